"""`stillroom bench distill`: every recipe measured on the same data sets, and the goals of distillation."""

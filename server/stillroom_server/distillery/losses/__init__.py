"""Losses of distillation: each a function of one batch's signals, composed by weights and schedules."""

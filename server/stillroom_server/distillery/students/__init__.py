"""Students: how each kind begins, and what makes it smaller while it learns."""

"""Public text, queries for it, and passages that are easily mistaken for the right one."""

"""Architecture search: the best shape of a student within bounds of latency and size, measured on this machine."""

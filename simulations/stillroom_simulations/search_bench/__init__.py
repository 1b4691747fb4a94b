"""`stillroom bench search`: a device's search, and others on the same passages and queries in the same run."""

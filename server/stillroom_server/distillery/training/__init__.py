"""Training of students: what a batch gives, how it is drawn, and a run that can be interrupted."""

"""How fast the student is, and how its precisions differ: `mlffd bench`."""

"""Active learning: the student looks for what it does not know, and the teacher tells it."""

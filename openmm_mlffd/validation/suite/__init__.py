"""The validation suite: the sections of `mlffd validate`, and what they share."""

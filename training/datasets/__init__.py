"""Tools for dataset files: checks, statistics, merging, splitting, conversion."""

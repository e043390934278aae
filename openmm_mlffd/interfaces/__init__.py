"""Adapters of the student to simulation engines."""

"""Structures to be labelled: from molecules to configurations (docs/data.md)."""

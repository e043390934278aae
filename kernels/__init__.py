"""Operators on neighbor lists and edges. `reference` holds each in plain torch: slow and right."""

"""Estimates what a run will need before it starts; a probe measures what can't be counted."""

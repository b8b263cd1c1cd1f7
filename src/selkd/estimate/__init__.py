"""Estimates what a run will need before it starts: parameters, memory, teacher queries, cache and time."""

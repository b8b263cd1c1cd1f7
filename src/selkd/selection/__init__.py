"""Scores in, selections out: positions, classes and samples."""

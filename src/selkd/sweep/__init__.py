"""Runs a grid of recipes and seeds, one after another, and compares them in one table."""

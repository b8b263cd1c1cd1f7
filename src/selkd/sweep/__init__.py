"""A grid of recipes and seeds, run one after another into one table."""

"""Writes what people read of a run: the page, the plots, the tables and the model card."""

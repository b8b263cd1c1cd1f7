"""Transformers' models: located, loaded, quantised, pruned, and seen as a body and a head."""

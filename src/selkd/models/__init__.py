"""Transformers' models: found, loaded, quantised, cut, and seen as a body and a head."""

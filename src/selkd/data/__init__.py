"""Texts, prompts and conversations become samples: read, tokenised, split, packed and put into batches."""

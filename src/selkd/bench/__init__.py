"""``selkd bench``: a recipe's step against its floor, on its own models, text, batch and precision, on this machine."""

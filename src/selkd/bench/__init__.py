"""``selkd bench`` measures a recipe's step against its floor, on the recipe's own models, text, batch and precision."""

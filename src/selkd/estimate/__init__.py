"""What a recipe will need, before it is spent: parameters, memory, teacher queries, cache, time."""

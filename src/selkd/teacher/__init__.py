"""The teacher's targets, from a model in memory or from a cache, which is built and rechecked here."""

"""The teacher's targets: from a model in memory, or from a cache that is built and checked here."""

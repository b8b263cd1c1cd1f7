"""``selkd tokens``: a text coloured by a metric, with the positions that policies select."""

"""``selkd tokens``: a text coloured by a metric, with what policies pick of it."""

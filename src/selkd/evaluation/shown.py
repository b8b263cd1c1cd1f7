"""How much held-out text a run's report shows: the most that the models run on for it."""

EXAMINED = 8  # samples of which the picked positions are shown, or counted in a histogram
MAPPED_TEXTS, MAPPED_TOKENS = 3, 512  # texts that are shown before and after training, tokens of each
PROMPT_TOKENS, NEW_TOKENS = 48, 40  # of a plain text, whose beginning is the prompt; that a model writes

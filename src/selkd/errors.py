"""The two ways in which selkd fails: the input was bad, or something failed while running."""


class InputError(ValueError):
    """What the user gave can't be used. The message says what was expected, what came and what to do.

    The command line prints it without a traceback and exits with 2.
    """


class RunError(RuntimeError):
    """A stage failed while running; what was finished before it is kept. The command line exits with 1."""

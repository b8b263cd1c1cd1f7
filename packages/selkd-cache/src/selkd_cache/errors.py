"""How reading and writing a cache ends before it is done; selkd raises the same two errors."""


def _own_words(message: object, kind: type[Exception]) -> str:
    """The message; of an error in a data loader's process, which comes with that one's traceback, its own alone."""
    message = str(message)
    if not (message.startswith("Caught ") and "DataLoader worker process" in message.partition("\n")[0]):
        return message
    return message.rpartition(f"\n{kind.__module__}.{kind.__qualname__}: ")[2].rstrip("\n") or message


class InputError(ValueError):
    """What the user gave can't be used. The message says what was expected, what came and what to do.

    The command line prints it without a traceback and exits with 2.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(_own_words(message, type(self)))


class RunError(RuntimeError):
    """A stage failed while running; what was finished before it is kept. The command line exits with 1."""

    def __init__(self, message: object = "") -> None:
        super().__init__(_own_words(message, type(self)))

"""The text that ``selkd tokens`` looks at: an argument, a file, what is piped in, or a passage of the demo text."""

import os
import stat
import sys
from pathlib import Path

from selkd.data.demo_text import demo_documents
from selkd.errors import InputError


def text_given(text: str | None, file: Path | None) -> str | None:
    """``text``, or else the text in ``file``, or else the text piped to standard input; None if there is none.

    Raises:
        InputError: there are two texts, the file can't be read, the text is not UTF-8, or it is white space alone.
    """
    if text is not None and file is not None:
        raise InputError("TEXT and --file: give one of them.")
    where = "TEXT" if text is not None else "standard input" if file is None else f"--file {file}"
    try:
        if file is not None:
            text = file.read_text(encoding="utf-8-sig")
        elif text is None:
            text = _piped() or None
            if text is None:
                return None
        text.encode()  # tokenizers refuse half a surrogate pair
    except OSError as error:
        raise InputError(f"{where} can't be read ({error.strerror}).") from error
    except UnicodeError as error:
        raise InputError(f"{where} is not UTF-8 text ({error}); convert it.") from error
    if not text.strip():
        raise InputError(f"{where} holds no text.")
    return text


def demo_passage() -> str:
    """The first document of the embedded text: one topic of the Python manual."""
    return next(demo_documents())


def _piped() -> str | None:
    """The text that a pipe or a file sends to standard input; None if neither does."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (AttributeError, OSError, ValueError):  # there is no standard input
        return None
    if stat.S_ISFIFO(mode) or stat.S_ISREG(mode):
        return sys.stdin.buffer.read().decode("utf-8-sig")
    return None

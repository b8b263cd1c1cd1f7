"""The ecosystem's own names for a row's fields, found in the text's first row where a recipe names none."""

import functools
import json
import logging
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

SUFFIXES = (".txt", ".jsonl", ".parquet")
SHAPES = ("text_field", "prompt_field", "completion_field", "messages_field")
# What a row may hold by these names -> the keys of a recipe's data that say so. A row that holds several is ambiguous.
_KNOWN: tuple[tuple[tuple[str, ...], dict[str, str]], ...] = (
    (("messages",), {"messages_field": "messages"}),
    (("conversations",), {"messages_field": "conversations"}),
    (("prompt", "completion"), {"prompt_field": "prompt", "completion_field": "completion"}),
)
_WAYS = "data.text_field, data.messages_field, or data.prompt_field with data.completion_field"
_logger = logging.getLogger(__name__)


def names_no_field(content: Mapping[str, Any]) -> bool:
    """Whether the content of a recipe's data says nothing of what a row holds."""
    return all(content.get(key) is None for key in SHAPES)


def found_fields(columns: Collection[str], where: str) -> dict[str, str]:
    """The keys that fit a row with these fields; none where it has ``text``, which is the default.

    Raises:
        ValueError: no field has a name that is known, or several have; the message names the keys to set.
    """
    if "text" in columns:
        return {}
    fitting = [(names, keys) for names, keys in _KNOWN if set(names) <= set(columns)]
    has = ", ".join(sorted(map(str, columns))) or "no field"
    if not fitting:
        known = ", ".join(" with ".join(names) for names, _ in _KNOWN)
        raise ValueError(
            f"data.text_field: {where} has no field 'text'; it has {has}, and none of what is known by name ({known}). "
            f"Give {_WAYS}."
        )
    if len(fitting) > 1:
        both = " and ".join(" with ".join(names) for names, _ in fitting)
        raise ValueError(f"data.text_field: {where} has {both}; say which is meant: give {_WAYS}.")
    _tell(where, tuple(fitting[0][1].items()))
    return dict(fitting[0][1])


@functools.cache
def _tell(where: str, keys: tuple[tuple[str, str], ...]) -> None:
    """Say once which fields were taken."""
    if os.environ.get("RANK", "0") == "0":
        _logger.warning("data: took %s of %s.", ", ".join(f"{key}: {name}" for key, name in keys), where)


def first_row_fields(path: str) -> tuple[Collection[str], str] | None:
    """The fields of the first row of local text, and where it stands; None where there is none to look at.

    What can't be read is refused by those who read all of it, in their words.
    """
    file = _first_file(Path(path).expanduser())
    if file is None:
        return None
    try:
        if file.suffix == ".parquet":
            import pyarrow.parquet as pq  # here, as few recipes need it

            return list(pq.read_schema(file).names), str(file)
        with file.open(encoding="utf-8-sig") as lines:
            row = json.loads(next((line for line in lines if line.strip()), "null"))
    except (OSError, ValueError, RecursionError):  # of Arrow, too
        return None
    return (list(row), f"{file}, line 1") if isinstance(row, dict) else None


def _first_file(path: Path) -> Path | None:
    """The file itself, or the first with fields of a folder that is read file by file."""
    try:
        if path.is_dir():
            if is_data_set(path):
                return None
            files = sorted(file for file in path.iterdir() if file.is_file() and file.suffix in SUFFIXES)
            return next((file for file in files if file.suffix != ".txt"), None)
        return path if path.is_file() and path.suffix in (".jsonl", ".parquet") else None
    except OSError:
        return None


def is_data_set(folder: Path) -> bool:
    """Whether a folder has a dataset card, so that the datasets library reads it."""
    card = folder / "README.md"
    return card.is_file() and card.read_bytes().startswith(b"---")

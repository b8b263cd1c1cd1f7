"""A row of data as a document: a text, a prompt with its completion, or a conversation."""

import json
from collections.abc import Collection
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from selkd.errors import InputError
from selkd.recipe.data import RowOptions
from selkd.recipe.fields import SHAPES

Message = dict[str, str]
_SHAREGPT_ROLES = {
    **{"human": "user", "gpt": "assistant", "chatgpt": "assistant"},
    **{role: role for role in ("system", "user", "assistant")},
}
_PARTS_OF_A_TURN = ("reasoning_content", "thinking", "tool_calls", "tool_call_id", "function_call")


@dataclass(frozen=True)
class Exchange:
    """A prompt and the completion that is learned; ``completion`` is None for a prompt alone."""

    prompt: str
    completion: str | None


@dataclass(frozen=True)
class Conversation:
    """Messages in order, each with ``role`` and ``content``."""

    messages: tuple[Message, ...]


Document = str | Exchange | Conversation


def columns_of(options: RowOptions) -> dict[str, str]:
    """The fields of a row that the recipe names, by the recipe's key."""
    return {f"data.{key}": column for key in SHAPES if (column := getattr(options, key)) is not None}


def document_of(row: Any, options: RowOptions, where: str) -> Document | None:
    """The document of a row, or None if its text or prompt is null. A null completion makes a prompt alone.

    Raises:
        InputError: the row is not an object, a field is missing (the message lists the fields that exist), or a field
            has another type. The message begins with the key or with ``where``.
    """
    columns = columns_of(options)
    if not isinstance(row, dict):
        names = " and ".join(map(repr, columns.values()))
        raise InputError(f"{where}: expected an object with the field {names}, got {type(row).__name__}.")
    require_columns(columns, row, where)
    first, *more = (row[column] for column in columns.values())
    if first is None:
        return None
    if options.messages_field is not None:
        return _conversation(first, options.messages_field, where)
    completion = more[0] if more else None
    for (key, column), value in zip(columns.items(), (first, completion), strict=False):
        if not isinstance(value, str) and not (value is None and key == "data.completion_field"):
            raise InputError(f"{key}: {column!r} of {where} is {type(value).__name__}, expected text.")
    return str(first) if options.prompt_field is None else Exchange(first, completion)


def require_columns(columns: dict[str, str], names: Collection[str], where: str) -> None:
    """Raises InputError if one of ``columns`` (see ``columns_of``) is not among ``names``, a row's fields."""
    for key, column in columns.items():
        if column not in names:
            available = ", ".join(sorted(map(str, names))) or "none"
            raise InputError(f"{key}: {where} has no field {column!r}; it has {available}.")


def _conversation(value: Any, column: str, where: str) -> Conversation:
    if not isinstance(value, list) or not value:
        raise InputError(
            f"data.messages_field: {column!r} of {where} is {type(value).__name__}, expected a list of messages."
        )
    return Conversation(tuple(_message(item, f"data.messages_field: {column!r} of {where}") for item in value))


def _message(value: Any, where: str) -> Message:
    value = _of_sharegpt(value, where)
    role, content = (value.get("role"), value.get("content")) if isinstance(value, dict) else (None, None)
    if not isinstance(role, str) or not isinstance(content, str):
        raise InputError(
            f"{where} holds {value!r:.80}, expected messages with role and content (or from and value), both text."
        )
    if ignored := [key for key in _PARTS_OF_A_TURN if value.get(key)]:
        raise InputError(
            f"{where} holds a message with {ignored[0]}, which selkd does not pass to the chat template: the student "
            "would not learn it. Put it into the content, or remove it."
        )
    return {"role": role, "content": content}


def _of_sharegpt(value: Any, where: str) -> Any:
    """A message of ShareGPT's form with the usual keys and roles; any other value as it is."""
    if not isinstance(value, dict) or "from" not in value or "role" in value:
        return value
    if value["from"] not in _SHAREGPT_ROLES:
        raise InputError(
            f"{where} holds a message from {value['from']!r:.40}; known are {', '.join(_SHAREGPT_ROLES)}. Give "
            "messages with role and content."
        )
    others = {key: part for key, part in value.items() if key not in ("from", "value")}
    return {**others, "role": _SHAREGPT_ROLES[value["from"]], "content": value.get("value")}


def texts_of(document: Document) -> list[str]:
    """All text of a document."""
    match document:
        case str():
            return [document]
        case Exchange():
            return [document.prompt, document.completion or ""]
    return [message["content"] for message in document.messages]


def has_text(document: Document) -> bool:
    """Whether a document has a visible character."""
    return any(text.strip() for text in texts_of(document))


def split_key(document: Document) -> str:
    """The text by which a document is held out: its own, or its prompt, so that a prompt with several answers lies in
    one split only."""
    match document:
        case str():
            return document
        case Exchange():
            return document.prompt
    prompt = takewhile(lambda message: message["role"] != "assistant", document.messages)
    return json.dumps([[message["role"], message["content"]] for message in prompt], ensure_ascii=False)

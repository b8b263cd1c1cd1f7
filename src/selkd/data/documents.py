"""What a row of data holds: a text, a prompt with its completion, or a conversation."""

import json
from dataclasses import dataclass
from typing import Any

from selkd.errors import InputError
from selkd.recipe.data import RowOptions

Message = dict[str, str]
_PARTS_OF_A_TURN = ("reasoning_content", "thinking", "tool_calls", "tool_call_id", "function_call")


@dataclass(frozen=True)
class Exchange:
    """A prompt and what is to be learned to answer; ``completion`` None: a prompt alone."""

    prompt: str
    completion: str | None


@dataclass(frozen=True)
class Conversation:
    """Messages in turn, each with ``role`` and ``content``."""

    messages: tuple[Message, ...]


Document = str | Exchange | Conversation


@dataclass(frozen=True)
class Fields:
    """Which fields of a row are read.

    Attributes:
        text: of a text; else None.
        prompt, completion: of an exchange; else None.
        messages: of a conversation; else None.
    """

    text: str | None = None
    prompt: str | None = None
    completion: str | None = None
    messages: str | None = None

    @classmethod
    def of(cls, options: RowOptions) -> "Fields":
        return cls(options.text_field, options.prompt_field, options.completion_field, options.messages_field)

    @property
    def columns(self) -> dict[str, str]:
        """The recipe's key -> the row's field that it names."""
        named = {name: getattr(self, name) for name in ("text", "prompt", "completion", "messages")}
        return {f"data.{name}_field": column for name, column in named.items() if column is not None}

    def take(self, row: Any, where: str) -> Document | None:
        """The document of a row; None where its text, or its prompt, is null. A null completion is none.

        Raises:
            InputError: the row is no object, has no such field (the message lists those there are), or it holds
                something else.
        """
        if not isinstance(row, dict):
            names = " and ".join(map(repr, self.columns.values()))
            raise InputError(f"{where}: expected an object with the field {names}, got {type(row).__name__}.")
        for key, column in self.columns.items():
            if column not in row:
                raise InputError(missing_field(key, column, [str(name) for name in row], where))
        values = [row[column] for column in self.columns.values()]
        if values[0] is None:
            return None
        if self.prompt is not None and values[-1] is None:
            values = values[:1]
        if self.messages is not None:
            listed = _listed(values[0], self.messages, where)
            return Conversation(tuple(_message(value, self.messages, where) for value in listed))
        for (key, column), value in zip(self.columns.items(), values, strict=False):
            if not isinstance(value, str):
                raise InputError(f"{key}: {column!r} of {where} is {type(value).__name__}, expected text.")
        if self.prompt is not None:
            return Exchange(values[0], values[1] if len(values) > 1 else None)
        return str(values[0])


def missing_field(key: str, column: str, fields: list[str], where: str) -> str:
    """What is said where a row has no such field."""
    return f"{key}: {where} has no field {column!r}; it has {', '.join(sorted(fields)) or 'none'}."


def _listed(value: Any, column: str, where: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise InputError(
            f"data.messages_field: {column!r} of {where} is {type(value).__name__}, expected a list of messages."
        )
    return value


def _message(value: Any, column: str, where: str) -> Message:
    role, content = (value.get("role"), value.get("content")) if isinstance(value, dict) else (None, None)
    if not isinstance(role, str) or not isinstance(content, str):
        raise InputError(
            f"data.messages_field: {column!r} of {where} holds {value!r:.80}, expected messages with role and content, "
            "both text."
        )
    if more := [key for key in _PARTS_OF_A_TURN if value.get(key)]:
        raise InputError(
            f"data.messages_field: {column!r} of {where} holds a message with {more[0]}, which selkd does not give to "
            "the chat template: what is learned would lack it. Put it into the content, or take it out."
        )
    return {"role": role, "content": content}


def texts_of(document: Document) -> list[str]:
    """All text of a document."""
    match document:
        case str():
            return [document]
        case Exchange():
            return [document.prompt, *([document.completion] if document.completion is not None else [])]
    return [message["content"] for message in document.messages]


def split_key(document: Document) -> str:
    """What decides whether a document is held out: its text, or what is asked, so that no question lies in both
    splits with different answers."""
    match document:
        case str():
            return document
        case Exchange():
            return document.prompt
    roles = [message["role"] for message in document.messages]
    asked = document.messages[: roles.index("assistant") if "assistant" in roles else len(roles)]
    return json.dumps([[message["role"], message["content"]] for message in asked], ensure_ascii=False)

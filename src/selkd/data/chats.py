"""Conversations through a tokenizer's chat template: token ids, and which of them the assistant says.

A template with ``{% generation %}`` marks tells by itself. Of one without, the assistant's turn is what a rendering
with it adds to the rendering of the messages before it, generation prompt included.
"""

import re
from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from selkd.data.marked import Marked, encode_parts
from selkd.data.rows import Message
from selkd.errors import InputError

_NO_TEXT = "\ue000selkd\ue000"  # stands in no conversation: private characters
_MARKS = re.compile(r"\{%-?\s*generation\b")


def require_chat_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokenizer's chat template. Raises InputError if it has none."""
    try:
        return str(tokenizer.get_chat_template())
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"data: conversations need a chat template, and the teacher's tokenizer has none ({reason:.120}). Take a "
            "chat model's, or give data.prompt_field with a data.template of your own."
        ) from error


def encode_conversation(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[Marked]:
    """One document of a conversation, or several: where the template shows an earlier turn otherwise once others
    follow (without its reasoning, say), one for each of the assistant's turns, which alone is its target.

    Messages after the assistant's last turn are left out: nothing is learned from them. A conversation without such a
    turn is a prompt alone, and ends with the generation prompt.

    Raises:
        InputError: the template refuses the messages, or it doesn't show where a turn begins.
    """
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        ids = _apply(tokenizer, messages, add_generation_prompt=True, tokenize=True, return_dict=True)["input_ids"]
        return [Marked(list(ids), [False] * len(ids))]
    told = list(messages[: turns[-1] + 1])
    if _MARKS.search(require_chat_template(tokenizer)):
        found = _apply(tokenizer, told, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        return [Marked(list(found["input_ids"]), [bool(value) for value in found["assistant_masks"]])]
    whole = _text(tokenizer, told)
    spans = [_turn(tokenizer, told, turn) for turn in turns]
    if all(whole.startswith(text) for text, _ in spans):
        return [encode_parts(tokenizer, _cut(whole, [(begin, len(text)) for text, begin in spans]), special=False)]
    return [encode_parts(tokenizer, _cut(text, [(begin, len(text))]), special=False) for text, begin in spans]


def _turn(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], turn: int) -> tuple[str, int]:
    """The rendering up to the assistant's turn, its end of turn included, and where what the assistant says begins."""
    before, text = messages[:turn], _text(tokenizer, messages[: turn + 1]).rstrip()
    plain = _text(tokenizer, before) if before else ""
    asked = _text(tokenizer, before, add_generation_prompt=True) if before else ""
    if asked != plain and text.startswith(asked):
        return text, len(asked)
    # No generation prompt, or none that the turn goes on from: what stands before the content is the template's.
    header, found, _ = _text(tokenizer, [*before, {**messages[turn], "content": _NO_TEXT}]).partition(_NO_TEXT)
    if not found or not text.startswith(header):
        raise InputError(
            "data: the chat template does not show where an assistant's turn begins: the text with the turn does not "
            "continue the text before it. Take a template with {% generation %} marks."
        )
    return text, len(header)


def _cut(text: str, spans: Sequence[tuple[int, int]]) -> list[tuple[str, bool]]:
    """The text in parts, and whether each is the assistant's."""
    parts, done = [], 0
    for begin, end in spans:
        parts += [(text[done:begin], False), (text[begin:end], True)]
        done = end
    return parts  # what follows the last turn's end is the template's, and predicts nothing that is learned


def _text(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], **options: Any) -> str:
    return str(_apply(tokenizer, messages, tokenize=False, **options))


def _apply(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], **options: Any) -> Any:
    try:
        return tokenizer.apply_chat_template(list(messages), **options)
    except (TemplateError, ValueError, TypeError) as error:
        roles = [message["role"] for message in messages]
        raise InputError(f"data: the chat template refuses a conversation of {roles} ({error}).") from error

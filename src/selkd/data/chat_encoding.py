"""Conversations through a tokenizer's chat template: token ids, and which of them the assistant says.

A template may mark the assistant's text with ``{% generation %}``. Without such marks, the assistant's turn is the text
that it adds to the rendering of the messages before it, generation prompt included.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from selkd.data.documents import Message
from selkd.data.prompt_encoding import EncodedDocument, PartEncoder
from selkd.errors import InputError

_PLACEHOLDER = "\ue000selkd\ue000"  # private characters, which no conversation contains
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


def encode_conversation(
    encode: PartEncoder, messages: Sequence[Message], *, learns_all: bool = False
) -> list[EncodedDocument]:
    """Encode a conversation as one document, or as several if the template renders an earlier turn in another way once
    messages follow (without its reasoning, say): then each of the assistant's turns is the target of its own document.

    Messages after the assistant's last turn are left out, because nothing is learned from them. A conversation without
    such a turn is a prompt alone and ends with the generation prompt.

    Args:
        learns_all: whether the loss is on all messages. Then one document holds all of them. Its targets are what
            follows the first prompt, so that ``SampleMaker`` can tell whether that prompt fills a sample alone.

    Raises:
        InputError: the template refuses the messages, or it doesn't show where a turn begins.
    """
    tokenizer = encode.tokenizer
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        return [encode([(_text(tokenizer, messages, add_generation_prompt=True), False)], special=False)]
    if learns_all:
        rendering = _text(tokenizer, messages).rstrip()
        return [encode.with_targets_after(rendering, _first_answer(tokenizer, messages, turns[0], rendering))]
    learned = messages[: turns[-1] + 1]
    if _is_marked(tokenizer):
        rendering, marks = _marked_text(tokenizer, learned)
        return [encode(_parts(rendering, marks), special=False)]
    rendering = _text(tokenizer, learned)
    spans = [_turn(tokenizer, learned, turn) for turn in turns]
    if all(rendering.startswith(text) for text, _ in spans):
        return [encode(_parts(rendering, [(begin, len(text)) for text, begin in spans]), special=False)]
    return [encode(_parts(text, [(begin, len(text))]), special=False) for text, begin in spans]


def _first_answer(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], turn: int, rendering: str) -> int:
    """Where the assistant's first turn begins in the rendering of all messages."""
    if _is_marked(tokenizer):
        _, marks = _marked_text(tokenizer, messages)
        return marks[0][0] if marks else len(rendering)
    text, begin = _turn(tokenizer, messages, turn)
    # The generation prompt may contain more than the turn shows once messages follow: take their common beginning.
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(rendering, text[:begin], strict=False)))


def _is_marked(tokenizer: PreTrainedTokenizerBase) -> bool:
    return _MARKS.search(require_chat_template(tokenizer)) is not None


def _marked_text(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
    """The rendering, and where the text between the template's marks begins and ends.

    The tokenizer's own mask of the assistant's tokens is not used: it counts a token that crosses a mark as the
    assistant's, and it misses entire turns of a tokenizer whose offsets leave out white space.
    """
    with _refusals(messages):
        (text,), (marks,) = render_jinja_template(
            conversations=[list(messages)],
            chat_template=require_chat_template(tokenizer),
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
    return text, [(begin, end) for begin, end in marks if begin < end]


def _turn(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], turn: int) -> tuple[str, int]:
    """The rendering up to the assistant's turn, its end of turn included, and where the assistant's text begins."""
    before, text = messages[:turn], _text(tokenizer, messages[: turn + 1]).rstrip()
    plain = _text(tokenizer, before) if before else ""
    prompted = _text(tokenizer, before, add_generation_prompt=True) if before else ""
    if prompted != plain and text.startswith(prompted):
        return text, len(prompted)
    # There is no generation prompt that the turn continues, so the template's header is what precedes the content.
    placeheld = _text(tokenizer, [*before, {**messages[turn], "content": _PLACEHOLDER}])
    header, separator, _ = placeheld.partition(_PLACEHOLDER)
    if separator and header.rstrip() == text:
        return text, len(text)  # an empty turn, whose end the template does not show
    if not separator or not text.startswith(header):
        raise InputError(
            "data: the chat template does not show where an assistant's turn begins: the text with the turn does not "
            "continue the text before it. Take a template with {% generation %} marks."
        )
    if before and header.startswith(plain) and not header[len(plain) :].strip():
        return text, len(plain)  # white space is no header, and a prompt that asks for an answer lacks it
    return text, len(header)


def _parts(text: str, spans: Sequence[tuple[int, int]]) -> list[tuple[str, bool]]:
    """The text up to the last span in parts, and whether a part is the assistant's: whether it is one of the spans."""
    parts, previous_end = [], 0
    for begin, end in spans:
        parts += [(text[previous_end:begin], False), (text[begin:end], True)]
        previous_end = end
    return parts


def _text(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], **options: Any) -> str:
    with _refusals(messages):
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, **options))


@contextmanager
def _refusals(messages: Sequence[Message]) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a template is a program, which may fail in every way
        roles = [message["role"] for message in messages]
        raise InputError(f"data: the chat template refuses a conversation of {roles} ({error}).") from error

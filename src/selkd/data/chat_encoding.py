"""Conversations through a tokenizer's chat template: token ids, and which of them the assistant says.

A template with ``{% generation %}`` marks shows it. With one that has none, the assistant's turn is what its rendering
adds to the rendering of the messages before it, generation prompt included.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from selkd.data.documents import Message
from selkd.data.prompt_encoding import Marked, PartEncoder
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


def encode_conversation(encode: PartEncoder, messages: Sequence[Message], *, learns_all: bool = False) -> list[Marked]:
    """One document of a conversation, or several: where the template shows an earlier turn otherwise once others
    follow (without its reasoning, say), one for each of the assistant's turns, which alone is its target.

    Messages after the assistant's last turn are left out: nothing is learned from them. A conversation without such a
    turn is a prompt alone, and ends with the generation prompt.

    Args:
        learns_all: the loss is on all messages: all are one document, also those after the assistant's last turn. Its
            targets are what follows the first prompt, so that ``Fitting`` sees where that prompt alone fills a sample.

    Raises:
        InputError: the template refuses the messages, or it doesn't show where a turn begins.
    """
    tokenizer = encode.tokenizer
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        return [encode([(_text(tokenizer, messages, add_generation_prompt=True), False)], special=False)]
    if learns_all:
        whole = _text(tokenizer, messages).rstrip()
        return [encode.from_on(whole, _first_answer(tokenizer, messages, turns[0], whole))]
    learned = messages[: turns[-1] + 1]
    if _is_marked(tokenizer):
        whole, marks = _marked_text(tokenizer, learned)
        return [encode(_cut(whole, marks), special=False)]
    whole = _text(tokenizer, learned)
    spans = [_turn(tokenizer, learned, turn) for turn in turns]
    if all(whole.startswith(text) for text, _ in spans):
        return [encode(_cut(whole, [(begin, len(text)) for text, begin in spans]), special=False)]
    return [encode(_cut(text, [(begin, len(text))]), special=False) for text, begin in spans]


def _first_answer(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], turn: int, whole: str) -> int:
    """Where in the rendering of all messages the assistant's first turn begins."""
    if _is_marked(tokenizer):
        _, marks = _marked_text(tokenizer, messages)
        return marks[0][0] if marks else len(whole)
    text, begin = _turn(tokenizer, messages, turn)
    # As far as the two agree: the generation prompt may hold more than the turn shows once others follow.
    agreed = zip(whole, text[:begin], strict=False)
    return next((at for at, (one, other) in enumerate(agreed) if one != other), min(begin, len(whole)))


def _is_marked(tokenizer: PreTrainedTokenizerBase) -> bool:
    return _MARKS.search(require_chat_template(tokenizer)) is not None


def _marked_text(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
    """The rendering, and where the template's marks begin and end.

    The tokenizer's own mask of the assistant's tokens is not taken: it counts a token across a mark as the
    assistant's, and of a tokenizer whose offsets leave out white space it misses whole turns.
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
    """The rendering up to the assistant's turn, its end of turn included, and where what the assistant says begins."""
    before, text = messages[:turn], _text(tokenizer, messages[: turn + 1]).rstrip()
    plain = _text(tokenizer, before) if before else ""
    asked = _text(tokenizer, before, add_generation_prompt=True) if before else ""
    if asked != plain and text.startswith(asked):
        return text, len(asked)
    # No generation prompt, or none that the turn goes on from: what stands before the content is the template's.
    header, separator, _ = _text(tokenizer, [*before, {**messages[turn], "content": _NO_TEXT}]).partition(_NO_TEXT)
    if separator and header.rstrip() == text:
        return text, len(text)  # an empty turn, of which the template shows no end
    if not separator or not text.startswith(header):
        raise InputError(
            "data: the chat template does not show where an assistant's turn begins: the text with the turn does not "
            "continue the text before it. Take a template with {% generation %} marks."
        )
    if before and header.startswith(plain) and not header[len(plain) :].strip():
        return text, len(plain)  # white space is no header: an answer is asked for without it
    return text, len(header)


def _cut(text: str, spans: Sequence[tuple[int, int]]) -> list[tuple[str, bool]]:
    """The text in parts, and whether each is the assistant's."""
    parts, done = [], 0
    for begin, end in spans:
        parts += [(text[done:begin], False), (text[begin:end], True)]
        done = end
    return parts  # what follows the last turn's end is the template's, and predicts nothing that is learned


def _text(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], **options: Any) -> str:
    with _refusals(messages):
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, **options))


@contextmanager
def _refusals(messages: Sequence[Message]) -> Iterator[None]:
    try:
        yield
    except (TemplateError, ValueError, TypeError) as error:
        roles = [message["role"] for message in messages]
        raise InputError(f"data: the chat template refuses a conversation of {roles} ({error}).") from error

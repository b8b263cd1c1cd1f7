"""Texts made of parts, such as a prompt and its answer, as tokens, and which of the tokens are learned."""

import json
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from selkd.errors import InputError

_Changes = dict[str, dict[str, Any]]  # new settings by a component's type

# Trimmed offsets leave out the white space at a token's beginning or end.
_TRUE_SPANS: _Changes = {"ByteLevel": {"trim_offsets": False}, "RobertaProcessing": {"trim_offsets": False}}
# Without these, the beginning of a text (or the text after a special token) becomes other tokens than the same text
# further on.
_NO_PREFIX: _Changes = {
    "ByteLevel": {"add_prefix_space": False},
    "Metaspace": {"prepend_scheme": "never"},
    "Prepend": {"prepend": ""},
    "Strip": {"strip_left": False, "strip_right": False},
}
_PRECEDING = "x"  # a part is decoded after this letter; any letter would do


@dataclass(frozen=True)
class EncodedDocument:
    """A document's tokens, and which of them are learned.

    Attributes:
        token_ids: the tokens.
        is_target: for each token, whether it is learned; the others belong to a prompt or a template.
    """

    token_ids: list[int]
    is_target: list[bool]

    @property
    def has_target(self) -> bool:
        """Whether a position predicts a learned token; none predicts the first token."""
        return any(self.is_target[1:])


class PartEncoder:
    """Encodes texts that are made of parts, such as a prompt and its answer.

    Args:
        tokenizer: a fast tokenizer.

    Raises:
        InputError: the tokenizer has no fast form, so it does not tell where in the text a token stands.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.is_fast:
            raise InputError(
                "data: prompts need a tokenizer that tells where each token stands, and "
                f"{type(tokenizer).__name__} does not (it has no fast form). Give texts (data.text_field), or convert "
                "the tokenizer."
            )
        self.tokenizer = tokenizer
        self._exact, self._continuing = exact_and_continuing(tokenizer)

    def __call__(
        self, parts: Sequence[tuple[str, bool]], *, special: bool = True, ended: bool = True
    ) -> EncodedDocument:
        """Encode the parts of one text. The tokens of parts marked True are targets.

        The tokens are those of the joined text, with two exceptions:

        - A token would cross the border of two parts. The first part is then encoded as a text that ends there, so
          that a prompt has the same tokens here as when it is answered, and the second part continues it.
        - The tokenizer puts a space before a text or after a special token. A part marked True continues without it.

        Args:
            special: whether to add the special tokens that the tokenizer puts around a text. Those before the text are
                never targets; those after it belong to the last part.
            ended: whether to add the special tokens after the text, too; False if the text will be continued.

        Raises:
            InputError: the tokenizer can't continue with a part without changing its text.
        """
        text = "".join(part for part, _ in parts)
        spans = _TokenSpans(self._exact, text, special)
        ids, is_target, begin = [*spans.before], [False] * len(spans.before), 0
        for part, is_learned in parts:
            part_ids = self._part(spans, begin, begin + len(part), is_learned)
            ids += part_ids
            is_target += [is_learned] * len(part_ids)
            begin += len(part)
        after = spans.after if ended else []
        return EncodedDocument([*ids, *after], [*is_target, *[bool(parts) and parts[-1][1]] * len(after)])

    def with_targets_after(self, text: str, begin: int) -> EncodedDocument:
        """Encode a text without parts. The tokens that end after ``begin`` are targets."""
        spans = _TokenSpans(self._exact, text, special=False)
        return EncodedDocument(spans.ids, [end > begin for end in spans.ends])

    def _part(self, spans: "_TokenSpans", begin: int, end: int, is_learned: bool) -> list[int]:
        continues = is_learned and begin > 0
        if continues and self._continuing is not self._exact:
            return self._continued(spans.text[begin:end])
        ids = spans.between(begin, end)
        if ids is None and not continues:
            ids = _TokenSpans(self._exact, spans.text[:end]).between(begin, end)
        return self._continued(spans.text[begin:end]) if ids is None else ids

    def _continued(self, part: str) -> list[int]:
        """The tokens of a part that follows others."""
        ids = self._ids(self._continuing, part)
        preceding = self._ids(self._exact, _PRECEDING)
        decoded = self._decoded(preceding + ids).removeprefix(self._decoded(preceding))
        if decoded != part:
            # Normal forms and unknown characters change any text, so only a changed beginning counts.
            decoded_alone = self._decoded(self._ids(self._exact, part)).lstrip()
            if decoded != part[: len(part) - len(part.lstrip())] + decoded_alone:
                raise InputError(
                    f"data: after a prompt, the tokenizer ({type(self.tokenizer).__name__}) makes {decoded[:40]!r} of "
                    f"the text {part[:40]!r}. Let prompt and completion meet at white space (data.template), or take a "
                    "tokenizer whose tokens decode to the text that they were made from."
                )
        return ids

    def _decoded(self, ids: list[int]) -> str:
        return str(self._exact.decode(ids, skip_special_tokens=False))

    @staticmethod
    def _ids(backend: Tokenizer, text: str) -> list[int]:
        return list(backend.encode(text, add_special_tokens=False).ids)


class _TokenSpans:
    """A text's tokens, where they begin and end, and the special tokens before and after them."""

    def __init__(self, backend: Tokenizer, text: str, special: bool = False) -> None:
        encoding = backend.encode(text, add_special_tokens=special)
        ids, is_special = encoding.ids, encoding.special_tokens_mask
        first = len(list(takewhile(bool, is_special)))
        last = len(ids) - len(list(takewhile(bool, reversed(is_special[first:]))))
        self.text = text
        self.before, self.ids, self.after = ids[:first], ids[first:last], ids[last:]
        self.begins = [begin for begin, _ in encoding.offsets[first:last]]
        self.ends = [end for _, end in encoding.offsets[first:last]]

    def between(self, begin: int, end: int) -> list[int] | None:
        """The tokens of a part of the text; None if a token crosses the part's borders."""
        first, last = self._count(begin), self._count(end)
        return None if first is None or last is None else self.ids[first:last]

    def _count(self, border: int) -> int | None:
        """The number of tokens before a border; None if a token crosses it."""
        if border == len(self.text):
            return len(self.ids)
        count = bisect_left(self.begins, border)
        return None if count and self.ends[count - 1] > border else count


def exact_and_continuing(tokenizer: PreTrainedTokenizerBase) -> tuple[Tokenizer, Tokenizer]:
    """Two forms of the tokenizer: with the same tokens and true spans; and without a prefix, for continued text.

    Both are the same object if the tokenizer puts nothing before a text. Neither cuts or pads, whatever settings the
    tokenizer was last called with.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}
    state["post_processor"] = _changed(state["post_processor"], _TRUE_SPANS)
    exact = _loaded(state, tokenizer)
    bare = state | {part: _changed(state[part], _NO_PREFIX) for part in ("normalizer", "pre_tokenizer")}
    return exact, exact if bare == state else _loaded(bare, tokenizer)


def _loaded(state: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    copy = Tokenizer.from_str(json.dumps(state))
    copy.encode_special_tokens = tokenizer.split_special_tokens  # the one setting that is not part of the state
    return copy


def _changed(component: Any, changes: _Changes) -> Any:
    """A component of a tokenizer, or a list of them, with the changes for its type."""
    if isinstance(component, list):
        return [_changed(part, changes) for part in component]
    if not isinstance(component, dict):
        return component
    changed = {key: _changed(value, changes) for key, value in component.items()}
    return changed | changes.get(component.get("type", ""), {})

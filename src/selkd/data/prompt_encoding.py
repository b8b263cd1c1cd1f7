"""A document as tokens, and which of them are to be learned."""

import json
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from selkd.errors import InputError

_Changes = dict[str, dict[str, Any]]  # a component's type -> what is set in it

# Trimmed offsets leave out the white space that a token begins or ends with.
_TRUE_SPANS: _Changes = {"ByteLevel": {"trim_offsets": False}, "RobertaProcessing": {"trim_offsets": False}}
# What makes a text's beginning (or, of some, what follows a special token) other tokens than the same text further on.
_NO_PREFIX: _Changes = {
    "ByteLevel": {"add_prefix_space": False},
    "Metaspace": {"prepend_scheme": "never"},
    "Prepend": {"prepend": ""},
    "Strip": {"strip_left": False, "strip_right": False},
}
_BEFORE = "x"  # any letter: what a part is decoded after


@dataclass(frozen=True)
class Marked:
    """A document's tokens, marked: which of them are to be learned.

    Attributes:
        token_ids: its tokens.
        is_target: for each token, whether it is to be learned; the others are a prompt's or a template's.
    """

    token_ids: list[int]
    is_target: list[bool]

    @property
    def has_target(self) -> bool:
        """Whether a position predicts a token to be learned; the first token is predicted by none."""
        return any(self.is_target[1:])


class PartEncoder:
    """The tokens of texts that are made of parts, such as a prompt and its answer.

    Args:
        tokenizer: a fast one.

    Raises:
        InputError: it has no fast form, so it does not tell where in the text each token stands.
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

    def __call__(self, parts: Sequence[tuple[str, bool]], *, special: bool = True, ended: bool = True) -> Marked:
        """The tokens of the parts of one text, those of the parts marked True as targets.

        They are those of the text as a whole, except:

        - Where a token would lie across the border of two parts. The part before it then ends as in a text that ends
          there, so that a prompt is the same tokens here as where it is to be answered; the part after it goes on.
        - Of a tokenizer that puts a space before a text, or after a special token: a part marked True goes on without.

        Args:
            special: with the special tokens that the tokenizer puts around a text; those before it are never targets,
                those after it are the last part's.
            ended: those after it, too; False: the text is to go on.

        Raises:
            InputError: the tokenizer can't go on with a part without changing its text.
        """
        text = "".join(part for part, _ in parts)
        whole = _TokenSpans(self._exact, text, special)
        ids, is_target, begin = [*whole.before], [False] * len(whole.before), 0
        for part, wanted in parts:
            part_ids = self._part(whole, begin, begin + len(part), wanted)
            ids += part_ids
            is_target += [wanted] * len(part_ids)
            begin += len(part)
        after = whole.after if ended else []
        return Marked([*ids, *after], [*is_target, *[bool(parts) and parts[-1][1]] * len(after)])

    def from_on(self, text: str, begin: int) -> Marked:
        """The tokens of a text as a whole; targets are those that end after ``begin``."""
        whole = _TokenSpans(self._exact, text, special=False)
        return Marked(whole.ids, [end > begin for end in whole.ends])

    def _part(self, whole: "_TokenSpans", begin: int, end: int, wanted: bool) -> list[int]:
        goes_on = wanted and begin > 0
        if goes_on and self._continuing is not self._exact:
            return self._continued(whole.text[begin:end])
        ids = whole.between(begin, end)
        if ids is None and not goes_on:
            ids = _TokenSpans(self._exact, whole.text[:end]).between(begin, end)
        return self._continued(whole.text[begin:end]) if ids is None else ids

    def _continued(self, part: str) -> list[int]:
        """The tokens of a part that follows others."""
        ids = self._ids(self._continuing, part)
        before = self._ids(self._exact, _BEFORE)
        said = self._decoded(before + ids).removeprefix(self._decoded(before))
        if said != part:
            # What the tokenizer makes of any text (normal forms, unknown characters) is no change; its beginning is.
            read = self._decoded(self._ids(self._exact, part)).lstrip()
            if said != part[: len(part) - len(part.lstrip())] + read:
                raise InputError(
                    f"data: after a prompt, the tokenizer ({type(self.tokenizer).__name__}) makes {said[:40]!r} of "
                    f"the text {part[:40]!r}. Let prompt and completion meet at white space (data.template), or take a "
                    "tokenizer whose tokens say the text they were made from."
                )
        return ids

    def _decoded(self, ids: list[int]) -> str:
        return str(self._exact.decode(ids, skip_special_tokens=False))

    @staticmethod
    def _ids(backend: Tokenizer, text: str) -> list[int]:
        return list(backend.encode(text, add_special_tokens=False).ids)


class _TokenSpans:
    """A text's tokens, where each begins and ends, and the special ones put before and after them."""

    def __init__(self, backend: Tokenizer, text: str, special: bool = False) -> None:
        encoding = backend.encode(text, add_special_tokens=special)
        ids, put = encoding.ids, encoding.special_tokens_mask
        first = len(list(takewhile(bool, put)))
        last = len(ids) - len(list(takewhile(bool, reversed(put[first:]))))
        self.text = text
        self.before, self.ids, self.after = ids[:first], ids[first:last], ids[last:]
        self.begins = [begin for begin, _ in encoding.offsets[first:last]]
        self.ends = [end for _, end in encoding.offsets[first:last]]

    def between(self, begin: int, end: int) -> list[int] | None:
        """The tokens of a part of the text; None where one lies across its borders."""
        first, last = self._count(begin), self._count(end)
        return None if first is None or last is None else self.ids[first:last]

    def _count(self, border: int) -> int | None:
        """How many tokens stand before a border; None where one lies across it."""
        if border == len(self.text):
            return len(self.ids)
        count = bisect_left(self.begins, border)
        return None if count and self.ends[count - 1] > border else count


def exact_and_continuing(tokenizer: PreTrainedTokenizerBase) -> tuple[Tokenizer, Tokenizer]:
    """The same tokens with true spans; and those of a text that goes on from another, without a prefix.

    Both are the same object where the tokenizer puts nothing before a text. Neither cuts or pads, whatever the
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
    """A component, or a sequence of them, with the changes of its types."""
    if isinstance(component, list):
        return [_changed(part, changes) for part in component]
    if not isinstance(component, dict):
        return component
    changed = {key: _changed(value, changes) for key, value in component.items()}
    return changed | changes.get(component.get("type", ""), {})

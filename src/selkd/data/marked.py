"""A document as tokens, and which of them are to be learned."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from selkd.errors import InputError


@dataclass(frozen=True)
class Marked:
    """One document.

    Attributes:
        token_ids: its tokens.
        is_target: for each, whether it is to be learned; the others are a prompt's or a template's.
    """

    token_ids: list[int]
    is_target: list[bool]

    @property
    def has_target(self) -> bool:
        """Whether a position predicts a token to be learned; the first token is predicted by none."""
        return any(self.is_target[1:])


def require_fast(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises InputError unless the tokenizer tells where in the text each token stands."""
    if not tokenizer.is_fast:
        raise InputError(
            f"data: prompts need a tokenizer that tells where each token stands, and {type(tokenizer).__name__} does "
            "not (it has no fast form). Give texts (data.text_field), or convert the tokenizer."
        )


def encode_parts(
    tokenizer: PreTrainedTokenizerBase, parts: Sequence[tuple[str, bool]], *, special: bool = True
) -> Marked:
    """The tokens of the parts of one text, those of the parts marked True as targets.

    The text is encoded whole. Where a token would lie across the border of two parts, the parts are encoded one by one
    in its place, so that a prompt is the same tokens here as where it stands alone. ``special``: with the special
    tokens that the tokenizer puts around a text; those before it are never targets, those after it are the last part's.
    """
    text = "".join(part for part, _ in parts)
    encoded = tokenizer(
        text,
        truncation=False,
        return_attention_mask=False,
        return_offsets_mapping=True,
        add_special_tokens=special,
        verbose=False,
    )
    ids, offsets = list(encoded["input_ids"]), encoded["offset_mapping"]
    borders, end = [], 0
    for part, _ in parts:
        end += len(part)
        borders.append(end)
    if any(begin < border < end for border in borders[:-1] for begin, end in offsets):
        return _one_by_one(tokenizer, parts, ids, special)
    is_target, at = [], 0
    for begin, end in offsets:
        while at + 1 < len(parts) and begin >= borders[at] and (begin, end) != (0, 0):
            at += 1
        is_target.append(parts[at][1])
    return Marked(ids, is_target)


def _one_by_one(
    tokenizer: PreTrainedTokenizerBase, parts: Sequence[tuple[str, bool]], whole: list[int], special: bool
) -> Marked:
    ids: list[int] = []
    is_target: list[bool] = []
    if special and parts and (first := tokenizer("", add_special_tokens=True)["input_ids"]) and whole[0] == first[0]:
        ids, is_target = [whole[0]], [False]
    for part, wanted in parts:
        found = tokenizer(part, truncation=False, add_special_tokens=False, verbose=False)["input_ids"]
        ids += found
        is_target += [wanted] * len(found)
    return Marked(ids, is_target)

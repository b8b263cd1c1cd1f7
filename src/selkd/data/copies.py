"""Copies of a tokenizer: one that tells where each token truly stands, one that puts nothing before a text."""

import json
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

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
        return [_changed(each, changes) for each in component]
    if not isinstance(component, dict):
        return component
    found = {key: _changed(value, changes) for key, value in component.items()}
    return found | changes.get(found.get("type", ""), {})

"""The log-probabilities in an answer of an OpenAI-compatible server.

Three shapes are read: vLLM's ``prompt_logprobs``, the ``logprobs`` of a completion with ``echo``, and those of a chat
completion's ``content``. No message of this module quotes a token or a text.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from selkd.foreign.scored import Scored
from selkd.models.tokenizers import vocab_size

NOTHING = -9999.0  # what servers write for a probability of 0, where JSON has no infinity
LARGEST = 1e30  # no log-probability is beyond it
LONGEST_ID = 9  # digits of a token's id
_PREFIX = "token_id:"


class UnreadableAnswer(ValueError):
    """An answer without what was asked for. The message says what is missing, without a word of the text."""


class TokenNames:
    """The names of tokens in answers: ``token_id:17`` (vLLM's ``return_tokens_as_token_ids``), or the token's text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    @cached_property
    def _ids_of_text(self) -> dict[str, list[int]]:
        ids_of_text: dict[str, list[int]] = {}
        for token_id in range(vocab_size(self.tokenizer)):
            text = self.tokenizer.decode([token_id], clean_up_tokenization_spaces=False)
            ids_of_text.setdefault(text, []).append(token_id)
        return ids_of_text

    def ids(self, name: Any) -> list[int]:
        """The ids that a name may mean: one if it is an id or an unmistakable text, none if it is no token's."""
        if not isinstance(name, str):
            raise UnreadableAnswer("the name of a token is no text")
        if name.startswith(_PREFIX) and _is_id(name[len(_PREFIX) :]):
            return [int(name[len(_PREFIX) :])]
        return self._ids_of_text.get(name, [])

    def encode(self, names: Sequence[str]) -> list[int]:
        """The ids of a text's tokens, which have these names.

        Raises:
            UnreadableAnswer: the names are not those of this tokenizer's tokens.
        """
        meant = [self.ids(name) for name in names]
        if all(len(ids) == 1 for ids in meant):
            return [ids[0] for ids in meant]
        token_ids: list[int] = self.tokenizer("".join(names), add_special_tokens=False)["input_ids"]
        if len(token_ids) != len(names) or not all(i in ids for i, ids in zip(token_ids, meant, strict=True)):
            raise UnreadableAnswer("its tokens are not those of this tokenizer")
        return token_ids

    def require(self, names: Sequence[str], token_ids: Sequence[int]) -> None:
        """Raises UnreadableAnswer unless the tokens with these names can be those with these ids."""
        if len(names) != len(token_ids) or not all(i in self.ids(n) for n, i in zip(names, token_ids, strict=True)):
            raise UnreadableAnswer("its tokens are not those of this tokenizer")


def scored(answer: Any, names: TokenNames, token_ids: Sequence[int] | None = None) -> Scored:
    """The tokens of an answer with what is known of their distributions.

    Args:
        answer: the parsed JSON of a response.
        token_ids: the tokens that were sent, with which the answer's must agree; None: the answer has them, as
            ``prompt_token_ids`` or ``input_ids``, or by their names.

    Raises:
        UnreadableAnswer: there are no log-probabilities, or they are of other tokens.
    """
    answer = _mapping(answer, "the answer")
    choices = answer.get("choices") or [{}]
    choice = _mapping(choices[0] if isinstance(choices, list) else None, "choices[0]")
    told = next((part[k] for part in (choice, answer) for k in ("prompt_token_ids", "input_ids") if part.get(k)), None)
    if told is not None and not (isinstance(told, list) and all(type(i) is int for i in told)):
        raise UnreadableAnswer("prompt_token_ids is no list of integers")
    if token_ids is not None and told is not None and told[: len(token_ids)] != list(token_ids):
        raise UnreadableAnswer("its prompt_token_ids are not those that were sent")
    known = list(token_ids) if token_ids is not None else told
    for part in (choice, answer):
        if part.get("prompt_logprobs"):
            return _of_prompt(part["prompt_logprobs"], names, known, answer.get("text") or answer.get("prompt"))
    logprobs = choice.get("logprobs") or answer.get("logprobs")
    if isinstance(logprobs, Mapping) and logprobs.get("content"):
        return _of_chat(logprobs["content"], names, known)
    if isinstance(logprobs, Mapping) and logprobs.get("top_logprobs"):
        return _of_echo(logprobs, names, known)
    raise UnreadableAnswer("it has no log-probabilities of the prompt's tokens")


def _of_prompt(entries: Any, names: TokenNames, known: list[int] | None, text: Any) -> Scored:
    """vLLM's: for each token a mapping of class ids to ``{logprob, rank, …}``, the token itself among them."""
    entries = _list(entries, "prompt_logprobs")
    if known is None and isinstance(text, list):
        known = text
    if known is None and isinstance(text, str):
        known = names.tokenizer(text)["input_ids"]
    if known is None:
        raise UnreadableAnswer("it does not say which tokens were sent: add prompt_token_ids to each line")
    if len(entries) < len(known):
        raise UnreadableAnswer(f"prompt_logprobs are of {len(entries)} tokens, and {len(known)} were sent")
    rows: list[dict[int, float]] = []
    for token_id, entry in zip(known, entries, strict=False):
        row = {_id(class_id): _number(value) for class_id, value in _mapping(entry or {}, "prompt_logprobs").items()}
        if row and token_id not in row:
            raise UnreadableAnswer("prompt_logprobs are of other tokens than those that were sent")
        rows.append(row)
    return _scored(known, rows)


def _of_echo(logprobs: Mapping[str, Any], names: TokenNames, known: list[int] | None) -> Scored:
    """A completion's with ``echo``: the tokens' names, and for each a mapping of names to log-probabilities."""
    told, top = _list(logprobs.get("tokens"), "logprobs.tokens"), _list(logprobs["top_logprobs"], "top_logprobs")
    if len(told) != len(top):
        raise UnreadableAnswer(f"logprobs has {len(told)} tokens and {len(top)} top_logprobs")
    if known is None:
        known = names.encode(told)
    else:
        names.require(told[: len(known)], known)
    rows = []
    for entry in top[: len(known)]:
        row = {}
        for name, value in _mapping(entry or {}, "top_logprobs").items():
            if len(ids := names.ids(name)) == 1:  # a class with a name of several goes to the tail
                row[ids[0]] = _number(value)
        rows.append(row)
    return _scored(known, rows)


def _of_chat(content: Any, names: TokenNames, prompt: list[int] | None) -> Scored:
    """A chat completion's: the generated tokens, each with a list of ``{token, logprob}``, after the prompt's ids."""
    if prompt is None:
        raise UnreadableAnswer("a chat's logprobs are of its answer alone: add the prompt's tokens as prompt_token_ids")
    content = [_mapping(entry, "logprobs.content") for entry in _list(content, "logprobs.content")]
    rows = []
    for entry in content:
        row = {}
        for top in _list(entry.get("top_logprobs"), "top_logprobs"):
            top = _mapping(top, "top_logprobs")
            if len(ids := names.ids(str(top.get("token")))) == 1:
                row[ids[0]] = _number(top.get("logprob"))
        rows.append(row)
    answered = names.encode([str(entry.get("token")) for entry in content])
    return _scored([*prompt, *answered], [*({} for _ in prompt), *rows])


def _scored(token_ids: Sequence[int], rows: Sequence[Mapping[int, float]]) -> Scored:
    width = max(1, max((len(row) for row in rows), default=1))
    class_ids = np.full((len(rows), width), -1, np.int64)
    logs = np.full((len(rows), width), -np.inf)
    for number, row in enumerate(rows):
        class_ids[number, : len(row)] = list(row.keys())
        logs[number, : len(row)] = list(row.values())
    logs[logs <= NOTHING] = -np.inf
    return Scored(np.asarray(token_ids, np.int64), class_ids, logs)


def _number(value: Any) -> float:
    if isinstance(value, Mapping):
        value = value.get("logprob")
    if value is None:
        return -np.inf
    if isinstance(value, bool) or not isinstance(value, int | float) or not value < LARGEST:  # nor is NaN
        raise UnreadableAnswer("a log-probability is no number")
    return float(max(value, -LARGEST))


def _id(name: Any) -> int:
    text = str(name).removeprefix(_PREFIX)
    if not _is_id(text):
        raise UnreadableAnswer("prompt_logprobs has a class that is no token id")
    return int(text)


def _is_id(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= LONGEST_ID


def _mapping(value: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise UnreadableAnswer(f"{name} is no object")
    return value


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise UnreadableAnswer(f"{name} is no list")
    return value

"""What training changed at each position of a few texts, and what teacher and student write after a few prompts.

Shapes: N valid positions of a text, n of a chunk, V classes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from selkd.data.collate import TOKENS_AT_ONCE, collate, group_by_tokens
from selkd.data.samples import Sample, SampleDataset
from selkd.evaluation.shown import MAPPED_TEXTS, MAPPED_TOKENS, NEW_TOKENS, PROMPT_TOKENS
from selkd.models.generation import Decoding, generate, stop_ids
from selkd.models.head import evaluating
from selkd.models.pair import ModelPair
from selkd.models.tokenizers import token_texts
from selkd.selection.position_scores import position_statistics

_FEWEST_NEW = 8  # a prompt that leaves fewer before the greatest length is left out
_ROWS = 64


@dataclass(frozen=True)
class Seen:
    """What one student says of one text: at each of N positions the nats (of KL to the teacher, or without one of
    cross-entropy with the text) and the class that it ranks first; the teacher's first class, if there is one."""

    nats: list[float]
    first: list[int]
    teachers_first: list[int] | None


def mapped_texts(samples: SampleDataset) -> list[Sample]:
    """The first few texts, cut to ``MAPPED_TOKENS``."""
    return [_cut(samples[index]) for index in range(min(MAPPED_TEXTS, len(samples)))]


def _cut(sample: Sample) -> Sample:
    if len(sample.token_ids) <= MAPPED_TOKENS:
        return sample
    starts = sample.document_starts[sample.document_starts < MAPPED_TOKENS]
    targets = None if sample.is_target is None else sample.is_target[:MAPPED_TOKENS]
    return Sample(sample.token_ids[:MAPPED_TOKENS], starts, targets)


@torch.no_grad()
def see(models: ModelPair, samples: Sequence[Sample], *, with_teacher: bool) -> list[Seen]:
    """What the pair's student says of each text, one text at a time."""
    seen = []
    head = models.student_head
    with evaluating(models.student):
        for sample in samples:
            batch = {name: t.to(models.student_device) for name, t in collate([sample], models.pad_token_id).items()}
            valid_mask = batch["valid_mask"]
            hidden = models.student_hidden(batch)[valid_mask]
            logits = models.teacher_logits(batch) if with_teacher else None
            name = "kl" if with_teacher else "student_ce"
            nats = position_statistics([name], hidden, head, batch["targets"][valid_mask], logits)[name]
            rows = [slice(start, start + _ROWS) for start in range(0, len(hidden), _ROWS)]
            first = [_first(head.logits(hidden[part].to(head.weight.dtype))) for part in rows]
            teachers = None if logits is None else _flat([_first(logits(part)) for part in rows])
            seen.append(Seen([round(value, 4) for value in nats.tolist()], _flat(first), teachers))
    return seen


def _first(logits: Tensor) -> list[int]:
    classes: list[int] = logits.argmax(dim=-1).tolist()
    return classes


def _flat(parts: Sequence[Sequence[int]]) -> list[int]:
    return [entry for part in parts for entry in part]


def changed(
    samples: Sequence[Sample], before: Sequence[Seen], after: Sequence[Seen], tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, Any]]:
    """The texts' tokens with what both students say of each, as plain data.

    Index t is about token t+1, as the model at t predicts it; None where nothing is predicted. ``before`` and ``after``
    are nats; ``teacher_first``, ``before_first`` and ``after_first`` the texts of the tokens ranked first.
    """
    texts = []
    for sample, old, new in zip(samples, before, after, strict=True):
        valid: list[bool] = collate([sample], 0)["valid_mask"][0].tolist()
        columns: dict[str, Sequence[Any] | None] = {
            "before": old.nats,
            "after": new.nats,
            "before_first": [_text(tokenizer, token) for token in old.first],
            "after_first": [_text(tokenizer, token) for token in new.first],
            "teacher_first": new.teachers_first and [_text(tokenizer, token) for token in new.teachers_first],
        }
        texts.append(
            {"sample_id": sample.id.hex(), "tokens": token_texts(tokenizer, sample.token_ids.tolist()), "valid": valid}
            | {name: None if values is None else _placed(values, valid) for name, values in columns.items()}
        )
    return texts


def _text(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    return str(tokenizer.decode([token], clean_up_tokenization_spaces=False))


def _placed(values: Sequence[Any], valid: Sequence[bool]) -> list[Any]:
    rest = iter(values)
    return [next(rest) if is_valid else None for is_valid in valid]


def prompts_of(samples: SampleDataset, count: int, max_length: int) -> list[np.ndarray]:
    """At most ``count`` prompts, from samples spread evenly: what stands before the first learned token (a prompt
    without an answer: all of it), or, of plain text, its beginning. Each leaves room for an answer within
    ``max_length``."""
    picked = np.linspace(0, len(samples) - 1, min(count, len(samples))).astype(int)
    prompts = []
    for index in sorted(set(picked.tolist())):
        sample = samples[index]
        length = min(PROMPT_TOKENS, max(1, max_length // 2), len(sample.token_ids))
        if sample.is_target is not None:
            length = int(sample.is_target.argmax()) if sample.is_target.any() else len(sample.token_ids)
        if 0 < length <= max_length - min(_FEWEST_NEW, max_length // 2):
            prompts.append(sample.token_ids[:length])
    return prompts


def written(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[np.ndarray],
    vocab_size: int,
    max_length: int,
) -> list[list[int]]:
    """What a model writes after each prompt, greedily: at most ``NEW_TOKENS`` tokens, as ``max_length`` lets."""
    decoding = Decoding(
        temperature=0.0,
        top_p=1.0,
        stop=stop_ids(model, tokenizer),
        pad_token_id=0 if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id),
        vocab_size=vocab_size,
    )
    answers: dict[int, list[int]] = {}
    for group in _at_once(prompts):
        asked = [prompts[index] for index in group]
        room = max(1, min(NEW_TOKENS, max_length - max(map(len, asked))))
        answers |= zip(group, generate(model, asked, np.zeros((len(asked), room)), decoding), strict=True)
    return [answers[index] for index in range(len(prompts))]


def _at_once(prompts: Sequence[np.ndarray]) -> list[list[int]]:
    """The prompts in batches of ``TOKENS_AT_ONCE`` tokens with their answers: many long ones would fill the memory."""
    return group_by_tokens([len(prompt) + NEW_TOKENS for prompt in prompts], TOKENS_AT_ONCE)


def tokens_run(texts: Sequence[Sample], prompts: Sequence[np.ndarray], answers: Sequence[Sequence[int]] | None) -> int:
    """How many tokens a model runs on in ``see`` and ``written``, padding included.

    An answer's last token is not run on: nothing is asked of it.
    """
    tokens = sum(len(sample.token_ids) for sample in texts)
    if answers is None:
        return tokens
    for group in _at_once(prompts):
        width = max(len(prompts[index]) for index in group) + max(len(answers[index]) for index in group) - 1
        tokens += len(group) * width
    return tokens


def side_by_side(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[np.ndarray], answers: Mapping[str, list[list[int]] | None]
) -> list[dict[str, Any]]:
    """Each prompt with what each model wrote, as plain data.

    Of an answer there are ``text``, ``tokens`` (their number) and, beside a teacher's, ``same``: how many of its first
    tokens are the teacher's. A model that did not write is None.
    """
    rows = []
    for number, prompt in enumerate(prompts):
        row: dict[str, Any] = {"prompt": tokenizer.decode(prompt.tolist(), clean_up_tokenization_spaces=False)}
        of_teacher = (answers.get("teacher") or {number: None})[number]
        for model, written_by in answers.items():
            tokens = None if written_by is None else written_by[number]
            row[model] = None if tokens is None else _answer(tokenizer, tokens, of_teacher)
        rows.append(row)
    return rows


def _answer(tokenizer: PreTrainedTokenizerBase, tokens: list[int], of_teacher: list[int] | None) -> dict[str, Any]:
    def decoded(part: list[int]) -> str:
        return str(tokenizer.decode(part, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    same = None
    if of_teacher is not None:
        pairs = enumerate(zip(tokens, of_teacher, strict=False))
        same = next((index for index, (own, others) in pairs if own != others), min(len(tokens), len(of_teacher)))
    return {"text": decoded(tokens), "tokens": len(tokens), "same": same, "same_text": decoded(tokens[: same or 0])}

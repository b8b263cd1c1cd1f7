"""What a metric and some policies make of a text: the work of ``selkd tokens``.

Shapes: B samples at once, T positions.
"""

import math
import os
import stat
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from selkd.data.demo_text import demo_documents
from selkd.data.encoding import encode
from selkd.data.packing import split
from selkd.data.samples import Sample
from selkd.errors import InputError, RunError
from selkd.models.head import check_head
from selkd.models.loading import load_model, n_positions, n_rows, native_dtype
from selkd.models.sources import ModelSource, default_cache_dir, locate
from selkd.models.tokenizers import load_tokenizer, require_same_tokenizer, shared_classes
from selkd.tokens.examine import examine
from selkd.tokens.policy import PolicyChoice, require_teacher

DEFAULT_MAX_LENGTH = 512
_TOKENS_AT_ONCE = 4096


def text_given(text: str | None, file: Path | None) -> str | None:
    """``text``, else ``file``'s, else what is piped to standard input; None if there is none of them.

    Raises:
        InputError: two texts, an unreadable file, bytes that are not UTF-8, or white space alone.
    """
    if text is not None and file is not None:
        raise InputError("TEXT and --file: give one of them.")
    where = "TEXT" if text is not None else "standard input" if file is None else f"--file {file}"
    try:
        if file is not None:
            text = file.read_text(encoding="utf-8-sig")
        elif text is None:
            text = _piped() or None
            if text is None:
                return None
        text.encode()  # half of a surrogate pair is no character, and no tokenizer takes it
    except OSError as error:
        raise InputError(f"{where} can't be read ({error.strerror}).") from error
    except UnicodeError as error:
        raise InputError(f"{where} is not UTF-8 text ({error}); convert it.") from error
    if not text.strip():
        raise InputError(f"{where} holds no text.")
    return text


def demo_passage() -> str:
    """The first document of the embedded text: one topic of the Python manual."""
    return next(demo_documents())


def _piped() -> str | None:
    """What a pipe or a file sends to standard input; None where there is neither."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (AttributeError, OSError, ValueError):  # no standard input at all
        return None
    if stat.S_ISFIFO(mode) or stat.S_ISREG(mode):
        return sys.stdin.buffer.read().decode("utf-8-sig")
    return None


def look(
    model: str,
    text: str,
    metric: str,
    policies: Sequence[PolicyChoice],
    *,
    teacher: str | None = None,
    max_length: int | None = None,
    seed: int = 1337,
) -> dict[str, Any]:
    """``examine`` of a text, tokenised as for training and cut into samples of at most ``max_length`` tokens.

    The model computes in float32, the teacher in the device's native dtype; a teacher at which nothing looks is not
    loaded.

    Returns:
        What ``examine`` returns, and ``model``, ``teacher`` (names, the teacher's None if it was not asked), ``seed``
        and ``options`` (a policy's ``PolicyChoice.described``).

    Raises:
        InputError: no such model, one that can't be used, another tokenizer, too long samples, too short a text.
        RunError: a score that is not finite.
    """
    teacher = teacher if require_teacher(metric, policies, teacher) else None
    source, teacher_source, tokenizer = _found(model, teacher)
    sources = {"model": source} | ({} if teacher_source is None else {"teacher": teacher_source})
    vocab_size = shared_classes({name: n_rows(each) for name, each in sources.items()}, tokenizer)
    samples = list(split(encode(tokenizer, [text]), _length(max_length, sources.values())))
    if not samples:
        raise InputError("the text is one token long, which predicts nothing; give a longer one.")

    # MPS has no float64, which the draws need: a Mac computes on its CPU.
    device = PartialState(cpu=torch.backends.mps.is_available()).device
    student = _loaded(source, torch.float32, device)
    supervisor = None
    if teacher_source is not None:
        same = teacher_source.fingerprint == source.fingerprint
        supervisor = student if same else _loaded(teacher_source, native_dtype(device), device)
    parts = [
        examine(
            student,
            supervisor,
            tokenizer,
            batch,
            metric,
            [choice.options for choice in policies],
            vocab_size,
            seed,
            contexts=[choice.context for choice in policies],
        )
        for batch in _batches(samples)
    ]
    found = parts[0] | {"samples": [sample for part in parts for sample in part["samples"]]}
    _require_finite(metric, found["samples"])
    return {
        "model": source.name,
        "teacher": None if teacher_source is None else teacher_source.name,
        "seed": seed,
        "options": [choice.described() for choice in policies],
        **found,
    }


def _found(model: str, teacher: str | None) -> tuple[ModelSource, ModelSource | None, PreTrainedTokenizerBase]:
    """Both models' files and the tokenizer that they share: the teacher's, which prepares the text of a training."""
    cache_dir = default_cache_dir()
    source = locate(model, cache_dir)
    tokenizer = load_tokenizer(source)
    if teacher is None:
        return source, None, tokenizer
    teacher_source = locate(teacher, cache_dir)
    teachers = load_tokenizer(teacher_source)
    require_same_tokenizer(teachers, tokenizer)
    return source, teacher_source, teachers


def _length(asked: int | None, sources: Iterable[ModelSource]) -> int:
    limits = {source.name: limit for source in sources if (limit := n_positions(source)) is not None}
    if asked is None:
        return min([DEFAULT_MAX_LENGTH, *limits.values()])
    for name, limit in limits.items():
        if asked > limit:
            raise InputError(f"--max-length: {asked} tokens, but {name} has positions for {limit}. Lower it.")
    return asked


def _loaded(source: ModelSource, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    model = load_model(source, dtype, device)
    check_head(model)
    return model


def _batches(samples: Sequence[Sample]) -> list[Sequence[Sample]]:
    """Consecutive samples, some thousands of tokens together; the first is as long as any."""
    size = max(1, _TOKENS_AT_ONCE // len(samples[0].token_ids))
    return [samples[start : start + size] for start in range(0, len(samples), size)]


def _require_finite(metric: str, samples: Sequence[dict[str, Any]]) -> None:
    for number, sample in enumerate(samples, start=1):
        for position, score in enumerate(sample["scores"]):
            if score is not None and not math.isfinite(score):
                raise RunError(
                    f"{metric} is {score} at position {position} of sample {number} (after the token "
                    f"{sample['tokens'][position]!r}): nothing can be picked by it."
                )

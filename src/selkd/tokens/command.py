"""What a metric and some policies make of a text: the work of ``selkd tokens``.

Shapes: B samples at once, T positions.
"""

import math
import os
import stat
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import PreTrainedModel

from selkd.data.collate import TOKENS_AT_ONCE
from selkd.data.demo_text import demo_documents
from selkd.data.encoding import encode
from selkd.data.packing import split
from selkd.errors import InputError, RunError
from selkd.models.head import check_head
from selkd.models.loading import load_model, n_positions, n_rows, native_dtype
from selkd.models.pair import ModelPair
from selkd.models.sources import ModelSource, default_cache_dir, locate
from selkd.models.tokenizers import load_tokenizer, require_same_tokenizer, shared_classes
from selkd.tokens.examine import examine
from selkd.tokens.policy import PolicyChoice, require_teacher

DEFAULT_MAX_LENGTH = 512


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
    models: tuple[str, str | None],
    text: str,
    metric: str,
    policies: Sequence[PolicyChoice],
    max_length: int | None = None,
    seed: int = 1337,
) -> dict[str, Any]:
    """``examine`` of a text, tokenised as for training and cut into samples of at most ``max_length`` tokens.

    Args:
        models: names of the model, which computes in float32, and of a teacher, which computes in the device's native
            dtype and is not loaded where no metric looks at it.

    Returns:
        What ``examine`` returns, and ``model``, ``teacher`` (names, the teacher's None if it was not asked), ``seed``
        and ``options`` (a policy's ``PolicyChoice.described``).

    Raises:
        InputError: no such model, one that can't be used, another tokenizer, too long samples, too short a text.
        RunError: a score that is not finite.
    """
    wanted = {"model": models[0]}
    if require_teacher(metric, policies, models[1]):
        wanted["teacher"] = str(models[1])
    cache_dir = default_cache_dir()
    sources = {role: locate(name, cache_dir) for role, name in wanted.items()}
    tokenizers = [load_tokenizer(source) for source in sources.values()]
    tokenizer = tokenizers[-1]  # the teacher's, which prepares the text of a training
    require_same_tokenizer(tokenizer, tokenizers[0])
    vocab_size = shared_classes({role: n_rows(source) for role, source in sources.items()}, tokenizer)
    samples = list(split(encode(tokenizer, [text]), _length(max_length, sources)))
    if not samples:
        raise InputError("the text is one token long, which predicts nothing; give a longer one.")

    # MPS has no float64, which the draws need: a Mac computes on its CPU.
    device = PartialState(cpu=torch.backends.mps.is_available()).device

    def teacher() -> PreTrainedModel:
        if sources["teacher"].fingerprint == sources["model"].fingerprint:
            return pair.student
        return _loaded(sources["teacher"], native_dtype(device), device)

    pair = ModelPair(
        lambda: _loaded(sources["model"], torch.float32, device), teacher, tokenizer, vocab_size, torch.float32
    )
    places = [(choice.options, choice.context) for choice in policies]
    size = max(1, TOKENS_AT_ONCE // len(samples[0].token_ids))  # samples at once: the first is as long as any
    parts = [
        examine(pair, samples[start : start + size], metric, places, seed) for start in range(0, len(samples), size)
    ]
    examined = parts[0] | {"samples": [sample for part in parts for sample in part["samples"]]}
    _require_finite(metric, examined["samples"])
    return {
        "model": sources["model"].name,
        "teacher": sources["teacher"].name if "teacher" in sources else None,
        "seed": seed,
        "options": [choice.described() for choice in policies],
        **examined,
    }


def _length(asked: int | None, sources: dict[str, ModelSource]) -> int:
    limits = {source.name: limit for source in sources.values() if (limit := n_positions(source)) is not None}
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


def _require_finite(metric: str, samples: Sequence[dict[str, Any]]) -> None:
    for number, sample in enumerate(samples, start=1):
        for position, score in enumerate(sample["scores"]):
            if score is not None and not math.isfinite(score):
                raise RunError(
                    f"{metric} is {score} at position {position} of sample {number} (after the token "
                    f"{sample['tokens'][position]!r}): nothing can be picked by it."
                )

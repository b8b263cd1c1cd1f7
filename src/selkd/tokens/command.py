"""The work of ``selkd tokens``: take a text, load the models, examine the text.

Shapes: B samples at once, T positions.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import PartialState
from transformers import PreTrainedModel

from selkd.data.collate import TOKENS_AT_ONCE
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


def look(
    models: tuple[str, str | None],
    text: str,
    metric: str,
    policies: Sequence[PolicyChoice],
    max_length: int | None = None,
    seed: int = 1337,
) -> dict[str, Any]:
    """``examine`` a text, tokenised as for training and cut into samples of at most ``max_length`` tokens.

    Args:
        models: the names of the model, which computes in float32, and of a teacher or None. The teacher computes in the
            device's native dtype and is loaded only if a metric needs it.

    Returns:
        The answer of ``examine`` with ``model`` and ``teacher``, their names (None if the teacher was not loaded),
        ``seed``, and ``options``, the ``PolicyChoice.described`` of each policy.

    Raises:
        InputError: a model is not there or can't be used, the two tokenizers differ, ``max_length`` is too large, or
            the text is too short.
        RunError: a score is not finite.
    """
    names = {"model": models[0]}
    if require_teacher(metric, policies, models[1]):
        names["teacher"] = str(models[1])
    cache_dir = default_cache_dir()
    sources = {role: locate(name, cache_dir) for role, name in names.items()}
    tokenizers = [load_tokenizer(source) for source in sources.values()]
    tokenizer = tokenizers[-1]  # the teacher's, which prepares the text of a training
    require_same_tokenizer(tokenizer, tokenizers[0])
    vocab_size = shared_classes({role: n_rows(source) for role, source in sources.items()}, tokenizer)
    samples = list(split(encode(tokenizer, [text]), _length(max_length, sources)))
    if not samples:
        raise InputError("the text is one token long, which predicts nothing; give a longer one.")

    # The draws need float64, which MPS does not have, so a Mac computes on its CPU.
    device = PartialState(cpu=torch.backends.mps.is_available()).device

    def teacher() -> PreTrainedModel:
        if sources["teacher"].fingerprint == sources["model"].fingerprint:
            return pair.student
        return _loaded(sources["teacher"], native_dtype(device), device)

    pair = ModelPair(
        lambda: _loaded(sources["model"], torch.float32, device), teacher, tokenizer, vocab_size, torch.float32
    )
    in_context = [(choice.options, choice.context) for choice in policies]
    size = max(1, TOKENS_AT_ONCE // len(samples[0].token_ids))  # samples a batch; none is longer than the first
    parts = [
        examine(pair, samples[start : start + size], metric, in_context, seed) for start in range(0, len(samples), size)
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


def _length(max_length: int | None, sources: dict[str, ModelSource]) -> int:
    limits = {source.name: limit for source in sources.values() if (limit := n_positions(source)) is not None}
    if max_length is None:
        return min([DEFAULT_MAX_LENGTH, *limits.values()])
    for name, limit in limits.items():
        if max_length > limit:
            raise InputError(f"--max-length: {max_length} tokens, but {name} has positions for {limit}. Lower it.")
    return max_length


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

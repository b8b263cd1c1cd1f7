"""A model under evaluation: its name, its identity, and its weights, loaded only if something is to be measured."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from selkd.errors import InputError
from selkd.evaluation.results import digest
from selkd.files import RECORD
from selkd.models.loading import load_model, n_positions, resolve_dtype
from selkd.models.pair import ModelSlot
from selkd.models.sources import default_cache_dir, locate
from selkd.models.tokenizers import load_tokenizer, tokenizer_fingerprint


@dataclass(frozen=True, eq=False)
class EvaluatedModel:
    """A model to measure.

    Attributes:
        name: what people call it.
        source: the folder or hub id that it came from.
        fingerprint: of weights and configuration.
        dtype: of the products; weights of another dtype are used under autocast.
        positions: how many positions it was made for; None: no limit.
        weights: loads the model, in evaluation mode, when it is first asked for.
        tokenizer: its tokenizer.
        generation: the settings that it writes text with, such as a repetition penalty, in whatever form.
    """

    name: str
    source: str
    fingerprint: str
    dtype: torch.dtype
    positions: int | None
    weights: ModelSlot
    tokenizer: PreTrainedTokenizerBase
    generation: str = ""

    @property
    def model(self) -> PreTrainedModel:
        return self.weights.model

    @property
    def dtype_name(self) -> str:
        """``float32``, as a recipe calls it."""
        return str(self.dtype).removeprefix("torch.")

    @cached_property
    def identity(self) -> str:
        """What decides its answers: weights, configuration, tokenizer and settings for writing text."""
        return f"{self.fingerprint} {tokenizer_fingerprint(self.tokenizer)} {digest(self.generation)}"


def find_model(wanted: str, dtype: str, device: torch.device) -> EvaluatedModel:
    """The model that ``[NAME=]MODEL`` names: ``demo``, a local folder, a run's folder (its student) or a hub id.

    Raises:
        InputError: no such model, or an empty name.
    """
    name, equals, model = wanted.partition("=")
    if not equals or Path(wanted).expanduser().is_dir():  # a folder's name may hold the sign
        name, model = "", wanted
    elif not name:
        model = ""
    if not model:
        raise InputError(f"{wanted!r}: expected MODEL or NAME=MODEL.")
    folder = Path(model).expanduser()
    if (folder / RECORD).is_file():
        name = name or _run_name(folder)
        if not (folder / "student").is_dir():
            raise InputError(f"{folder}: a run without a finished student. Finish it with selkd distill.")
        model = str(folder / "student")
    source = locate(model, default_cache_dir())
    model_dtype = resolve_dtype(dtype, device)
    generation = source.path / "generation_config.json"
    return EvaluatedModel(
        name=name or model,
        source=source.name,
        fingerprint=source.fingerprint,
        dtype=model_dtype,
        positions=n_positions(source),
        weights=ModelSlot(lambda: load_model(source, model_dtype, device)),
        tokenizer=load_tokenizer(source),
        generation=generation.read_text(encoding="utf-8") if generation.is_file() else "",
    )


def _run_name(folder: Path) -> str:
    try:
        return str(json.loads((folder / RECORD).read_text(encoding="utf-8"))["name"])
    except (ValueError, KeyError, TypeError):
        return folder.name

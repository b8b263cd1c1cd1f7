"""A model under evaluation: its name, its identity, and its weights, which are loaded only if they are needed."""

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
        name: its name in results.
        source: its folder or hub id.
        fingerprint: the fingerprint of its weights and configuration.
        dtype: the dtype of its products; weights of another dtype run under autocast.
        positions: the most positions that it takes; None: no limit.
        weights: loads the model, in evaluation mode, on first use.
        generation: the text of its generation settings, such as a repetition penalty.
        trained_on: the fingerprint of the text that it was trained on; None if it is no run's student.
    """

    name: str
    source: str
    fingerprint: str
    dtype: torch.dtype
    positions: int | None
    weights: ModelSlot
    tokenizer: PreTrainedTokenizerBase
    generation: str = ""
    trained_on: str | None = None

    @property
    def model(self) -> PreTrainedModel:
        return self.weights.model

    @property
    def dtype_name(self) -> str:
        """The dtype as a recipe spells it, such as ``float32``."""
        return str(self.dtype).removeprefix("torch.")

    @cached_property
    def identity(self) -> str:
        """A string of all that decides the model's answers: weights, configuration, tokenizer, generation settings."""
        return f"{self.fingerprint} {tokenizer_fingerprint(self.tokenizer)} {digest(self.generation)}"


def find_model(argument: str, dtype: str, device: torch.device) -> EvaluatedModel:
    """The model of an argument ``[NAME=]MODEL``: ``demo``, a local folder, a run's folder (its student) or a hub id.

    Raises:
        InputError: there is no such model, or the name or the model is empty.
    """
    name, equals, model = argument.partition("=")
    if not equals or Path(argument).expanduser().is_dir():  # a folder's name may contain "="
        name, model = "", argument
    elif not name:
        model = ""
    if not model:
        raise InputError(f"{argument!r}: expected MODEL or NAME=MODEL.")
    folder, trained_on = Path(model).expanduser(), None
    if (folder / RECORD).is_file():
        run_name, trained_on = _run(folder)
        name = name or run_name
        if not (folder / "student").is_dir():
            raise InputError(f"{folder} is a run without a finished student. Finish it with selkd distill.")
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
        trained_on=trained_on,
    )


def _run(folder: Path) -> tuple[str, str | None]:
    """The name of a run and the fingerprint of its text; without them in its record, the folder's name and None."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except ValueError:
        record = None
    told = record if isinstance(record, dict) else {}
    text = told.get("data")
    fingerprint = text.get("fingerprint") if isinstance(text, dict) else None
    return str(told.get("name", folder.name)), fingerprint if isinstance(fingerprint, str) else None

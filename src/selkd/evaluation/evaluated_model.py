"""A model under evaluation: its name, its identity, and its weights, loaded only if something is to be measured."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from selkd.errors import InputError
from selkd.evaluation.results import digest
from selkd.files import RECORD
from selkd.models.loading import load_model, n_positions, resolve_dtype
from selkd.models.sources import default_cache_dir, locate
from selkd.models.tokenizers import load_tokenizer, tokenizer_fingerprint

GENERATION = "generation_config.json"


@dataclass(frozen=True, eq=False)
class Subject:
    """A model to measure.

    Attributes:
        name: what people call it.
        model_name: where it came from.
        fingerprint: of weights and configuration.
        dtype: of the products.
        positions: how many it was made for; None: no limit.
        load: gives the model in evaluation mode.
        load_tokenizer: gives its tokenizer.
        generation: the settings that it writes text with, such as a repetition penalty, in whatever form.
    """

    name: str
    model_name: str
    fingerprint: str
    dtype: torch.dtype
    positions: int | None
    load: Callable[[], PreTrainedModel]
    load_tokenizer: Callable[[], PreTrainedTokenizerBase]
    generation: str = ""

    @cached_property
    def model(self) -> PreTrainedModel:
        return self.load()

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.load_tokenizer()

    @cached_property
    def identity(self) -> str:
        """What makes its answers: weights, configuration, tokenizer and settings for writing text."""
        return f"{self.fingerprint} {tokenizer_fingerprint(self.tokenizer)} {digest(self.generation)}"

    def release(self) -> None:
        """Give the weights' memory back."""
        self.__dict__.pop("model", None)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def find_subject(given: str, dtype: str, device: torch.device) -> Subject:
    """The model that ``[NAME=]MODEL`` names: ``demo``, a local folder, a run's folder (its student) or a hub id.

    Raises:
        InputError: no such model, or an empty name.
    """
    label, equals, model = given.partition("=")
    if not equals or Path(given).expanduser().is_dir():  # a folder's name may hold the sign
        equals = ""
        label, model = "", given
    if not model or (equals and not label):
        raise InputError(f"{given!r}: expected MODEL or NAME=MODEL.")
    folder = Path(model).expanduser()
    name = label or model
    if (folder / RECORD).is_file():
        name = label or _run_name(folder)
        model = str(folder / "student")
        if not Path(model).is_dir():
            raise InputError(f"{folder}: a run without a finished student. Finish it with selkd distill.")
    source = locate(model, default_cache_dir())
    resolved = resolve_dtype(dtype, device)
    generation = source.path / GENERATION
    return Subject(
        name,
        source.name,
        source.fingerprint,
        resolved,
        n_positions(source),
        lambda: load_model(source, resolved, device),
        lambda: load_tokenizer(source),
        generation.read_text(encoding="utf-8") if generation.is_file() else "",
    )


def _run_name(folder: Path) -> str:
    try:
        return str(json.loads((folder / RECORD).read_text(encoding="utf-8"))["name"])
    except (ValueError, KeyError, TypeError):
        return folder.name

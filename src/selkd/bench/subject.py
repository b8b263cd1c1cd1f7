"""The recipe's teacher and student and one batch of its text, which all variants share.

Shapes: B batch, T positions, D hidden, V classes.
"""

import tempfile
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from selkd.data.collate import collate
from selkd.data.samples import SampleDataset
from selkd.errors import InputError
from selkd.maths.head import Head
from selkd.models.head import head_of, hidden_states
from selkd.recipe.choices import ClassOptions
from selkd.recipe.foreign import require_model_here
from selkd.recipe.recipe import Recipe
from selkd.run.workspace import Workspace
from selkd.selection.host import keep_on_host
from selkd.selection.two_stage import by_frequency
from selkd.teacher.build_cache import build_cache
from selkd.teacher.cached import CachedTeacher
from selkd.teacher.live import LiveTeacher
from selkd.teacher.targets import Batch, Teacher
from selkd.training.student import bind_distillation
from selkd_cache.reader import TeacherCache

DRAWN = ClassOptions(sampler="systematic", draws=64)  # for the cached variant of a recipe that draws no classes


class BenchSubject:
    """The recipe's models and one batch, loaded when first needed, and a teacher cache of that batch until ``close``.

    The student has float32 weights and runs under autocast to the run's dtype; the teacher has a dtype of its own.

    Args:
        most_samples: the batch has no more than so many, if the recipe's own is larger.
    """

    def __init__(self, recipe: Recipe, most_samples: int | None = None) -> None:
        require_model_here(recipe.teacher)
        self.recipe = recipe
        self.most_samples = most_samples
        self._folder = tempfile.TemporaryDirectory(prefix="selkd-bench-")
        self.work = Workspace(recipe, Path(self._folder.name) / "run")
        self.work.check()
        self.work.require_positions()
        if not int(self.samples.n_valid.sum()):
            raise InputError(
                "data: the first samples hold no completion to learn, and bench generates none: its steps are on the "
                "data's. Give data.completion_field."
            )
        self.device = self.work.device
        self.dtype = self.work.dtype

    def close(self) -> None:
        """Remove the temporary folder."""
        self._folder.cleanup()

    @cached_property
    def teacher(self) -> Any:
        model = self.work.models.teacher
        model.requires_grad_(False)
        return model

    @cached_property
    def student(self) -> Any:
        model = self.work.models.student.train()
        bind_distillation(model, self.work.vocab_size)
        if self.work.arguments.activation_checkpointing:
            model.gradient_checkpointing_enable(self.work.arguments.activation_checkpointing_kwargs)
        return model

    @property
    def train(self) -> SampleDataset:
        return self.work.splits.train

    @cached_property
    def samples(self) -> SampleDataset:
        """The batch's samples: the first ones of the training text."""
        size = int(self.work.arguments.per_device_train_batch_size)
        return self.train.select(range(min(size, self.most_samples or size, len(self.train))))

    def batch_of(self, samples: SampleDataset) -> Batch:
        """A batch on the device, kept on the host, too, as a training's."""
        batch = collate(list(samples), self.work.models.pad_token_id)
        return keep_on_host({name: tensor.to(self.device) for name, tensor in batch.items()}, batch)

    @cached_property
    def batch(self) -> Batch:
        return self.batch_of(self.samples)

    @property
    def inputs(self) -> Batch:
        return {name: self.batch[name] for name in ("input_ids", "position_ids")}

    @cached_property
    def classes_by_frequency(self) -> np.ndarray:
        return by_frequency(self.train.token_counts(self.work.vocab_size))

    def autocast(self) -> Any:
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    def student_hidden(self, batch: Batch) -> Tensor:
        """The student's hidden states [B, T, D] in the step's precision, without gradient."""
        with torch.no_grad(), self.autocast():
            return hidden_states(self.student, batch["input_ids"], batch["position_ids"])

    @property
    def head(self) -> Head:
        """The student's LM head over the classes that both models share."""
        return head_of(self.student).slice_vocab(self.work.vocab_size)

    def live_teacher(self, classes: ClassOptions) -> LiveTeacher:
        temperature = self.recipe.criterion.temperature
        return LiveTeacher(self.teacher, classes, temperature, self.recipe.seed, self.work.vocab_size)

    def cached_teacher(self, classes: ClassOptions) -> Teacher:
        """A teacher that reads the batch's drawn classes from a cache on disk."""
        classes = DRAWN if classes.sampler == "all" else classes
        folder = Path(self._folder.name) / f"cache-{classes.sampler}-{classes.draws}"
        assert classes.draws is not None, "a sampler has draws"
        fingerprint: dict[str, str | int | float] = {
            "sampler": classes.sampler,
            "draws": classes.draws,
            "temperature": self.recipe.criterion.temperature,
            "vocabulary": self.work.vocab_size,
            "seed": self.recipe.seed,
        }
        if not folder.exists():
            pad_token_id = self.work.models.pad_token_id
            build_cache(folder, fingerprint, self.samples, lambda: self.live_teacher(classes), pad_token_id)
        return CachedTeacher(TeacherCache.open(folder))

"""A trainer's student, teacher and tokenizer given by a name: loaded by the rules of a recipe's models."""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from selkd.models.loading import load_model, native_dtype
from selkd.models.sources import default_cache_dir, locate
from selkd.models.tokenizers import load_tokenizer
from selkd.training.arguments import DistillArguments
from selkd_cache.manifest import MANIFEST
from selkd_cache.reader import TeacherCache


def student_of(model: Any) -> Any:
    """The student of ``demo``, a local folder or a hub id, its weights in float32; any other value as it is.

    Raises:
        InputError: as ``locate`` and ``load_model``; no code of the model is run.
    """
    if not isinstance(model, str | Path):
        return model
    return load_model(locate(str(model), default_cache_dir()), torch.float32, torch.device("cpu"))


def teacher_of(teacher: Any, args: DistillArguments) -> PreTrainedModel | TeacherCache | None:
    """The teacher of ``demo``, a local folder, a teacher cache's folder or a hub id; any other value as it is.

    A model's weights are in bfloat16 where its device computes in it, as a recipe's ``teacher.dtype: auto``.

    Raises:
        InputError: as ``student_of``, or the cache is none or damaged.
    """
    if not isinstance(teacher, str | Path):
        return teacher
    if (Path(teacher).expanduser() / MANIFEST).is_file():
        return TeacherCache.open(Path(teacher).expanduser())
    device = args.device if args.teacher_device is None else torch.device(args.teacher_device)
    return load_model(locate(str(teacher), default_cache_dir()), native_dtype(device), device)


def tokenizer_of(tokenizer: Any, model: Any) -> Any:
    """The tokenizer that was given, or that of a student given by its name."""
    if tokenizer is not None or not isinstance(model, str | Path):
        return tokenizer
    return load_tokenizer(locate(str(model), default_cache_dir()))

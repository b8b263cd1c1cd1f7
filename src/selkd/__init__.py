"""selkd: selective knowledge distillation of causal language models.

The names below are imported when they are first used, so ``import selkd`` needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str
    from selkd import reference
    from selkd.recipe.files import load_recipe
    from selkd.recipe.recipe import Recipe
    from selkd.run.pipeline import Run, distill
    from selkd.run.teacher_dataset import TeacherDataset
    from selkd.teacher.collator import TeacherCollator
    from selkd.training.arguments import DistillArguments
    from selkd.training.loss import chunked_entropy, distillation_loss, sample_classes, select_positions
    from selkd.training.trainer import DistillTrainer
    from selkd_cache.reader import TeacherCache

_HOME = {
    "DistillArguments": "selkd.training.arguments",
    "DistillTrainer": "selkd.training.trainer",
    "Recipe": "selkd.recipe.recipe",
    "Run": "selkd.run.pipeline",
    "TeacherCache": "selkd_cache.reader",
    "TeacherCollator": "selkd.teacher.collator",
    "TeacherDataset": "selkd.run.teacher_dataset",
    "chunked_entropy": "selkd.training.loss",
    "distill": "selkd.run.pipeline",
    "distillation_loss": "selkd.training.loss",
    "load_recipe": "selkd.recipe.files",
    "sample_classes": "selkd.training.loss",
    "select_positions": "selkd.training.loss",
}

__all__ = [
    "DistillArguments",
    "DistillTrainer",
    "Recipe",
    "Run",
    "TeacherCache",
    "TeacherCollator",
    "TeacherDataset",
    "__version__",
    "chunked_entropy",
    "distill",
    "distillation_loss",
    "load_recipe",
    "reference",
    "sample_classes",
    "select_positions",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("selkd")
    if name == "reference":
        return import_module("selkd.reference")
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'selkd' has no attribute {name!r}")

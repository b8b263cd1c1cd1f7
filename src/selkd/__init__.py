"""selkd: selective knowledge distillation of causal language models.

The names below are imported when they are first used, so ``import selkd`` needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from selkd import reference
    from selkd.cache.reader import TeacherCache
    from selkd.recipe.files import load_recipe
    from selkd.recipe.recipe import Recipe
    from selkd.run.pipeline import Run, distill
    from selkd.training.arguments import DistillArguments
    from selkd.training.trainer import DistillTrainer

_HOME = {
    "DistillArguments": "selkd.training.arguments",
    "DistillTrainer": "selkd.training.trainer",
    "Recipe": "selkd.recipe.recipe",
    "Run": "selkd.run.pipeline",
    "TeacherCache": "selkd.cache.reader",
    "distill": "selkd.run.pipeline",
    "load_recipe": "selkd.recipe.files",
}

__all__ = [
    "DistillArguments",
    "DistillTrainer",
    "Recipe",
    "Run",
    "TeacherCache",
    "distill",
    "load_recipe",
    "reference",
]


def __getattr__(name: str) -> Any:
    if name == "reference":
        return import_module("selkd.reference")
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'selkd' has no attribute {name!r}")

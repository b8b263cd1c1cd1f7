"""The recipe by which ``selkd prune-student`` cuts a student from a teacher."""

from pathlib import Path

from selkd.errors import InputError
from selkd.recipe.part import parse_part
from selkd.recipe.recipe import Recipe

CALIBRATION_SAMPLES = 16  # on which the layers' influence is measured


def pruning_recipe(teacher: str, layers: int, data: str, out: Path) -> Recipe:
    """The recipe of a student of ``layers`` layers, for the new folder ``out``.

    Raises:
        InputError: ``out`` exists, or a recipe can't have such a teacher, number of layers or text.
    """
    if out.exists():
        raise InputError(f"{out}: exists. Give a new folder; nothing was changed.")
    content = {
        "teacher": {"model": teacher},
        "student": {"prune_from_teacher": {"layers": layers}},
        "data": {"path": data, "held_out_fraction": 0, "tokens": 512 * CALIBRATION_SAMPLES},
        "evaluation": {"suite": []},
    }
    return parse_part(Recipe, content)

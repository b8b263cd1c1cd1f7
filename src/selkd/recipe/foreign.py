"""What a recipe may ask of a teacher whose model is not here: a served one, or one whose answers were imported."""

from typing import TYPE_CHECKING, Any

from selkd.errors import InputError
from selkd.recipe.evaluation import EvaluationOptions
from selkd.recipe.models import TeacherOptions

if TYPE_CHECKING:
    from selkd.recipe.recipe import Recipe

_GIVES = "which gives its most likely classes at each token and not its whole distribution"


def check_foreign(recipe: "Recipe") -> None:
    """Refuse what needs the teacher's model or its full distribution.

    Raises:
        ValueError: the message has the key, the reason and the way out.
    """
    teacher, key = recipe.teacher, key_of(recipe.teacher)
    for option in ("dtype", "quantization", "device"):
        if option in teacher.model_fields_set and getattr(teacher, option) not in (None, "auto"):
            raise ValueError(f"teacher.{option}: {key} names a teacher that is not loaded here; leave it out")
    if recipe.student.prune_from_teacher is not None:
        raise ValueError(
            f"student.prune_from_teacher: the layers of a teacher with {key} are not here; give student.model"
        )
    if recipe.cache is None:
        raise ValueError(
            f"cache: a teacher with {key} does not train live; its answers are stored once: set cache: {{path: null}}"
            + ("" if teacher.server else " or a path, and run `selkd cache import`")
        )
    if recipe.classes.sampler != "top_k":
        raise ValueError(
            f"classes.sampler: {recipe.classes.sampler} draws from the whole distribution, and {key} names a teacher "
            f"{_GIVES}; take classes: {{sampler: top_k, draws: 20, tail: true}}"
        )
    if teacher.server is not None and not recipe.classes.tail:
        raise ValueError("classes.tail: with teacher.server the mass of the other classes is known; set it to true")
    if teacher.server is not None and recipe.criterion.temperature != 1:
        raise ValueError(
            f"criterion.temperature: a server gives log-probabilities at temperature 1, and at "
            f"{recipe.criterion.temperature:g} they need the whole distribution; set it to 1.0"
        )
    for name, part in (("positions", recipe.positions), ("samples", recipe.samples)):
        if part is not None and part.needs_teacher:
            raise ValueError(
                f"{name}.metric: {part.metric} needs the teacher's full distribution, and {key} names a teacher "
                f"{_GIVES}; take a metric of the student, such as student_entropy"
            )


def evaluation_of(options: EvaluationOptions) -> EvaluationOptions:
    """The evaluation of a student whose teacher is not here: fidelity is no default then.

    Raises:
        ValueError: fidelity, or what is measured by it, is asked for.
    """
    if "suite" not in options.model_fields_set:
        return EvaluationOptions.model_validate({**options.model_dump(exclude_unset=True), "suite": []})
    if "fidelity" in options.suite:
        raise ValueError(
            "evaluation.suite: fidelity compares student and teacher on held-out text, and needs the teacher's logits "
            "there, which are not here; take benchmarks, or [], and compare perplexities with `selkd eval`"
        )
    return options


def key_of(teacher: TeacherOptions) -> str:
    """The key that says where a foreign teacher's answers come from."""
    return "teacher.server" if teacher.server is not None else "teacher.imported"


def require_model_here(teacher: TeacherOptions) -> None:
    """Raises InputError where a command needs the model of a teacher that is served, or was imported."""
    if teacher.is_foreign:
        raise InputError(
            f"{key_of(teacher)}: the teacher's model is not here, and this command needs it: give a recipe with the "
            "model itself as teacher.model."
        )


def require_imported(teacher: TeacherOptions) -> None:
    """Raises InputError where a cache is to be imported for a teacher of another kind."""
    if not teacher.imported:
        raise InputError(
            "teacher.imported: expected true in a recipe whose cache is imported; then no model of the teacher is "
            "loaded, and teacher.model is the name by which it is known."
        )


def without_address(teacher: dict[str, Any]) -> dict[str, Any]:
    """A teacher's plain data without where and how a server is asked: the same one may move to another host."""
    kept = {key: value for key, value in teacher.items() if key not in ("requests", "api_key_env")}
    return kept | ({"server": "served"} if kept.get("server") else {})

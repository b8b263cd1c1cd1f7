"""The recipe's ``evaluation`` part, and the names that it and ``selkd eval --suite`` take for suites and benchmarks."""

from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from selkd.errors import InputError, nearest
from selkd.extras import install
from selkd.recipe.harness_names import check_task_file, harness_tasks, has_harness, is_task_file, own_tasks
from selkd.recipe.part import LARGEST_COUNT, Count, Part, PathText

# Suite -> its benchmarks. Those of the paper use test rows and are for reports; the validation suite is for choices.
SUITES: dict[str, tuple[str, ...]] = {
    "fidelity": (),
    "paper": ("hellaswag", "piqa", "arc_easy", "gsm8k", "lambada", "ifeval"),
    "validation": ("arc_easy_validation", "gsm8k_train", "hellaswag_train", "piqa_train"),
}
BENCHMARKS = tuple(dict.fromkeys(name for names in SUITES.values() for name in names))
INSTALL = install("lm_eval")


def benchmarks_of(suite: Sequence[str]) -> list[str]:
    """The benchmarks and harness tasks that ``suite`` names, without repetitions, in order; without ``fidelity``."""
    names = [name for entry in suite for name in SUITES.get(entry, (entry,))]
    return list(dict.fromkeys(names))


def check_suite(suite: Iterable[str], include_path: Iterable[str] | None = None) -> list[str]:
    """``suite`` as a list without repetitions.

    Args:
        include_path: folders of the user's own tasks.

    Raises:
        InputError: a name that is neither a suite nor a benchmark nor a task of the harness or of the user, or a
            benchmark while the harness is not installed; or a task of the user with the name of a benchmark.
        ValueError: own tasks are refused by the gate of own code.
    """
    names = list(dict.fromkeys(suite))
    allowed = [*SUITES, *BENCHMARKS]
    if benchmarks_of(names) and not has_harness():
        unknown = [name for name in names if name not in allowed and not is_task_file(name)]
        also = f" (and, after `{INSTALL}`, lm-evaluation-harness's tasks)"
        if unknown and include_path is None:
            raise InputError(_unknown(unknown[0], allowed, also))
        raise InputError(f"{benchmarks_of(names)[0]} is measured by lm-evaluation-harness: {INSTALL}")
    own = own_tasks(include_path or ())
    if own is None:
        return names
    if hidden := sorted(own.intersection(allowed)):
        raise InputError(f"include_path: a task is called {hidden[0]!r}, as one of selkd's is; rename it.")
    for name in filter(is_task_file, names):
        check_task_file(name)
    others = [name for name in names if name not in allowed and name not in own and not is_task_file(name)]
    tasks = harness_tasks() if others else frozenset()
    for name in others:
        if name not in tasks:
            also = f"{', '.join(['', *sorted(own)])} and the {len(tasks):,} tasks of lm-evaluation-harness"
            raise InputError(_unknown(name, allowed, also, [*own, *tasks]))
    return names


def _unknown(name: str, allowed: list[str], also: str, tasks: Iterable[str] = ()) -> str:
    hint = nearest(name, allowed) or nearest(name, tasks)
    return f"{name!r} is not known. Allowed: {', '.join(allowed)}{also}.{hint}"


_KEYS = ("suite", "include_path")  # with which some of the errors above begin
KeepBest = Literal["perplexity", "kl_nats", "top1_agreement", "validation"]


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class EvaluationOptions(Part):
    """What is measured before and after training, and perhaps on the way."""

    suite: list[str] = Field(
        ["fidelity"],
        description="What to measure: fidelity (on the held-out split), paper, validation, single benchmarks, tasks "
        "of lm-evaluation-harness, or the path of your own task's YAML file; []: nothing.",
    )
    include_path: Annotated[list[PathText], BeforeValidator(_as_list)] | None = Field(
        None, description="Folders with tasks of your own, in lm-evaluation-harness's YAML, for suite to name."
    )
    every_steps: Count | None = Field(
        None, description="How many optimiser steps lie between measurements on the way; null: none."
    )
    keep_best: KeepBest | None = Field(
        None, description="The figure by which the best student on the way is kept, in best_student/."
    )
    data: Annotated[list[PathText], BeforeValidator(_as_list)] | None = Field(
        None, description="Folders of local benchmark files; null: the hub."
    )
    limit: Count | None = Field(None, description="How many rows of a benchmark are used at most, evenly spaced.")
    shots: int = Field(
        0,
        ge=0,
        le=LARGEST_COUNT,
        description="How many solved examples precede a question, where a benchmark has some.",
    )
    chat_template: bool = Field(False, description="Whether prompts are put into the tokenizer's chat template.")
    generations: int = Field(
        3,
        ge=0,
        le=20,
        description="How many held-out prompts the teacher and the student before and after training go on from, with "
        "40 tokens each, for the report; 0: none.",
    )

    @model_validator(mode="after")
    def _something_to_measure(self) -> "EvaluationOptions":
        try:
            self._settle(suite=check_suite(self.suite, self.include_path))
        except ValueError as error:
            key, _, _ = str(error).partition(":")
            raise ValueError(f"evaluation.{'' if key in _KEYS else 'suite: '}{error}") from None
        if self.every_steps is not None and not self.suite:
            raise ValueError("evaluation.every_steps measures evaluation.suite, which is empty; give [fidelity]")
        if not self.has_benchmarks:
            for key in ("include_path", "data", "limit", "shots", "chat_template"):
                if getattr(self, key):
                    raise ValueError(
                        f"evaluation.{key}: only benchmarks have {key}, and evaluation.suite is {self.suite}; "
                        "add paper, validation or a task's name"
                    )
        if self.keep_best is not None:
            self._require_measured(self.keep_best)
        return self

    @property
    def has_benchmarks(self) -> bool:
        """Whether the suite asks for more than fidelity."""
        return bool(benchmarks_of(self.suite))

    def _require_measured(self, keep_best: str) -> None:
        if self.every_steps is None:
            raise ValueError("evaluation.keep_best compares what is measured on the way; give evaluation.every_steps")
        needed = "validation" if keep_best == "validation" else "fidelity"
        if needed not in self.suite:
            raise ValueError(
                f"evaluation.keep_best: {keep_best} is measured by the suite {needed}; add it to evaluation.suite"
            )

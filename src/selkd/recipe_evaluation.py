"""The names that ``evaluation.suite`` and ``selkd eval --suite`` take: suites, benchmarks, the harness's tasks."""

from collections.abc import Iterable, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

from selkd.errors import InputError
from selkd.recipe_errors import nearest

# Suite -> its benchmarks. The paper's are test rows, to report; the validation suite's are not, to choose by.
SUITES: dict[str, tuple[str, ...]] = {
    "fidelity": (),
    "paper": ("hellaswag", "piqa", "arc_easy", "gsm8k", "lambada", "ifeval"),
    "validation": ("arc_easy_validation", "gsm8k_train", "hellaswag_train", "piqa_train"),
}
BENCHMARKS = tuple(dict.fromkeys(name for names in SUITES.values() for name in names))
INSTALL = "pip install 'selkd[eval]'"


def has_harness() -> bool:
    """Whether lm-evaluation-harness is installed; nothing is imported."""
    return find_spec("lm_eval") is not None


@cache
def task_manager() -> Any:
    """The harness's index of its own tasks. It reads thousands of files, in some ten seconds, once a process."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def harness_tasks() -> list[str]:
    """The names of the harness's tasks and groups of tasks."""
    return list(task_manager().all_tasks)


def benchmarks_of(suite: Sequence[str]) -> list[str]:
    """The benchmarks and harness tasks that ``suite`` names, each once, in order; ``fidelity`` is none of them."""
    names = [name for entry in suite for name in SUITES.get(entry, (entry,))]
    return list(dict.fromkeys(names))


def check_suite(suite: Iterable[str]) -> list[str]:
    """``suite`` as a list without repetitions.

    Raises:
        InputError: a name that is neither a suite nor a benchmark nor a task of the harness, or a benchmark while the
            harness is not installed.
    """
    names = list(dict.fromkeys(suite))
    allowed = [*SUITES, *BENCHMARKS]
    others = [name for name in names if name not in allowed]
    if others and not has_harness():
        raise InputError(_unknown(others[0], allowed, f" (and, after `{INSTALL}`, lm-evaluation-harness's tasks)"))
    if others:
        tasks = harness_tasks()
        for name in others:
            if name not in tasks:
                also = f" and the {len(tasks):,} tasks of lm-evaluation-harness"
                raise InputError(_unknown(name, allowed, also, tasks))
    if benchmarks_of(names) and not has_harness():
        raise InputError(f"{benchmarks_of(names)[0]} is measured by lm-evaluation-harness: {INSTALL}")
    return names


def _unknown(name: str, allowed: list[str], also: str, tasks: Iterable[str] = ()) -> str:
    hint = nearest(name, allowed) or nearest(name, tasks)
    return f"{name!r} is not known. Allowed: {', '.join(allowed)}{also}.{hint}"

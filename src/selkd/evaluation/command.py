"""``selkd eval``: one model or several, their suites, and the first against each of the others."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from selkd.errors import InputError
from selkd.evaluation.benchmark_tasks import (
    BenchmarkOptions,
    load_benchmarks,
    measure_benchmarks,
    require_answerable_by,
)
from selkd.evaluation.evaluated_model import Subject, find_subject
from selkd.evaluation.fidelity_task import FidelityOptions, measure_fidelity, text_windows
from selkd.evaluation.intervals import RESAMPLES
from selkd.evaluation.results import TaskResult, digest
from selkd.evaluation.summary import compare, summarise
from selkd.files import require_writable
from selkd.recipe.evaluation import benchmarks_of, check_suite


@dataclass(frozen=True)
class Request:
    """What ``selkd eval`` was asked.

    Attributes:
        models: ``[NAME=]MODEL`` each.
        benchmarks: suites, and how their benchmarks are measured.
        text: on what fidelity is measured.
        teacher: for KL and agreement; None: perplexity alone.
        dtype: ``auto`` or a name.
        out: where results are kept and found again.
    """

    models: Sequence[str]
    benchmarks: BenchmarkOptions
    text: FidelityOptions
    teacher: str | None = None
    dtype: str = "auto"
    out: Path = Path("evals")


def evaluate_models(request: Request) -> dict[str, Any]:
    """The answer of ``selkd eval``, plain data: ``models`` with their figures, and ``comparisons``.

    Every result is kept below ``request.out``, a folder for each model, and not measured again. What can't be used is
    refused before any weights are loaded.

    Raises:
        InputError: a model, suite, text, data or folder that can't be used, an option that has no effect, or two models
            of one name.
        RunError: memory or disk refused.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("selkd eval runs in one process; start it without torchrun.")
    suite = check_suite(request.benchmarks.suite)
    if not suite:
        raise InputError("suite: nothing to measure. Give a suite, a benchmark or a task.")
    _require_effect(request, suite)
    options = replace(request.benchmarks, suite=[name for name in suite if name != "fidelity"])
    left_out = options.names()[1]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    subjects = [find_subject(given, request.dtype, device) for given in request.models]
    _require_different_names([subject.name for subject in subjects])
    teacher = None if request.teacher is None else find_subject(request.teacher, request.dtype, device)
    tasks = load_benchmarks(options)
    for subject in subjects:
        require_answerable_by(subject, tasks, options)
        if "fidelity" in suite:
            text_windows(subject, teacher, request.text)
    require_writable(request.out)
    results, answers = [], []
    for subject in subjects:
        results.append(_measured(subject, teacher, tasks, options, request, "fidelity" in suite))
        subject.release()
        answers.append(
            {
                "name": subject.name,
                "model": subject.model_name,
                "fingerprint": subject.fingerprint,
                "dtype": str(subject.dtype).removeprefix("torch."),
                **summarise(results[-1], suite, left_out),
            }
        )
    comparisons = [
        {"model": subjects[0].name, "against": other.name, **compare(results[0], theirs)}
        for other, theirs in zip(subjects[1:], results[1:], strict=True)
    ]
    settings = {key: value for key, value in asdict(options).items() if key != "suite"}
    return {"suite": suite, **settings, "resamples": RESAMPLES, "models": answers, "comparisons": comparisons}


def _measured(
    subject: Subject,
    teacher: Subject | None,
    tasks: Mapping[str, Any],
    options: BenchmarkOptions,
    request: Request,
    has_fidelity: bool,
) -> dict[str, TaskResult]:
    keep = request.out / f"{Path(subject.model_name).name}-{digest(subject.identity)[:8]}"
    results: dict[str, TaskResult] = {}
    if has_fidelity:
        results["fidelity"] = measure_fidelity(subject, teacher, request.text, keep)
        if teacher is not None:
            teacher.release()
    return results | measure_benchmarks(subject, tasks, options, keep)


def _require_effect(request: Request, suite: list[str]) -> None:
    """Raises InputError if something was given that nothing of ``suite`` looks at."""
    text, usual, benchmarks = request.text, FidelityOptions(), request.benchmarks
    fields = ("text", "text_field", "prompt_field", "completion_field", "messages_field", "template")
    for_fidelity = {
        "teacher": request.teacher is not None,
        **{name: getattr(text, name) != getattr(usual, name) for name in fields},
    }
    for_benchmarks = {
        "data": benchmarks.data is not None,
        "shots": benchmarks.shots > 0,
        "chat_template": benchmarks.chat_template,
        "batch_size": benchmarks.batch_size is not None,
    }
    for name, is_given in for_fidelity.items():
        if is_given and "fidelity" not in suite:
            raise InputError(
                f"{name}: only the suite fidelity looks at it, and the suite is {', '.join(suite)}. Leave it out, or "
                "add --suite fidelity."
            )
    for name, is_given in for_benchmarks.items():
        if is_given and not benchmarks_of(suite):
            raise InputError(
                f"{name}: only benchmarks look at it, and the suite is {', '.join(suite)}. Leave it out, or add "
                "--suite paper, validation or a task's name."
            )


def _require_different_names(names: list[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"two models are called {name!r}; tell them apart with NAME=MODEL.")

"""``selkd eval``: one model or several, their suites, and the first against each of the others."""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from selkd.errors import InputError
from selkd.evaluation.held_out import FidelityOptions, measure_fidelity
from selkd.evaluation.measuring import BenchmarkOptions, measure_benchmarks
from selkd.evaluation.results import TaskResult, digest
from selkd.evaluation.statistics import RESAMPLES
from selkd.evaluation.subject import Subject, find_subject
from selkd.evaluation.summary import compare, summarise
from selkd.recipe_evaluation import check_suite


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

    Every result is kept below ``request.out``, a folder for each model, and not measured again.

    Raises:
        InputError: a model, suite, text or data that can't be used, or two models of one name.
        RunError: memory or disk refused.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("selkd eval runs in one process; start it without torchrun.")
    suite = check_suite(request.benchmarks.suite)
    if not suite:
        raise InputError("suite: nothing to measure. Give a suite, a benchmark or a task.")
    if request.teacher is not None and "fidelity" not in suite:
        raise InputError("teacher: only the suite fidelity compares with a teacher; add --suite fidelity.")
    options = replace(request.benchmarks, suite=suite)
    left_out = options.names()[1]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    subjects = [find_subject(given, request.dtype, device) for given in request.models]
    _require_different_names([subject.name for subject in subjects])
    teacher = None if request.teacher is None else find_subject(request.teacher, request.dtype, device)
    results, answers = [], []
    for subject in subjects:
        results.append(_measured(subject, teacher, suite, options, request))
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
    subject: Subject, teacher: Subject | None, suite: list[str], options: BenchmarkOptions, request: Request
) -> dict[str, TaskResult]:
    keep = request.out / f"{Path(subject.model_name).name}-{digest(subject.identity)[:8]}"
    results: dict[str, TaskResult] = {}
    if "fidelity" in suite:
        results["fidelity"] = measure_fidelity(subject, teacher, request.text, keep)
        if teacher is not None:
            teacher.release()
    benchmarks = replace(options, suite=[name for name in suite if name != "fidelity"])
    return results | measure_benchmarks(subject, benchmarks, keep)


def _require_different_names(names: list[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"two models are called {name!r}; tell them apart with NAME=MODEL.")

"""``selkd eval``: one model or several, their suites, and the first against each of the others."""

import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from selkd.errors import InputError
from selkd.evaluation.benchmark_tasks import BenchmarkOptions, load_benchmarks, measure_benchmarks
from selkd.evaluation.evaluated_model import find_model
from selkd.evaluation.fidelity_task import FidelityOptions, measure_fidelity, text_windows
from selkd.evaluation.harness import require_answerable
from selkd.evaluation.intervals import RESAMPLES
from selkd.evaluation.results import TaskResult, digest
from selkd.evaluation.summary import compare, summarise
from selkd.files import require_writable
from selkd.recipe.evaluation import benchmarks_of, check_suite

_FOR_FIDELITY = ("teacher", "text", "text_field", "prompt_field", "completion_field", "messages_field", "template")
_FOR_BENCHMARKS = ("data", "shots", "chat_template", "batch_size")


def evaluate_models(
    models: Sequence[str],
    benchmarks: BenchmarkOptions,
    text: FidelityOptions,
    teacher: str | None = None,
    dtype: str = "auto",
    out: Path = Path("evals"),
) -> dict[str, Any]:
    """The answer of ``selkd eval``, plain data: ``models`` with their figures, and ``comparisons``.

    What can't be used is refused before any weights are loaded.

    Args:
        models: ``[NAME=]MODEL`` each.
        benchmarks: suites, and how their benchmarks are measured.
        text: on what fidelity is measured.
        teacher: for KL and agreement; None: perplexity alone.
        dtype: ``auto`` or a name.
        out: every result is kept below it, a folder for each model, and not measured again.

    Raises:
        InputError: a model, suite, text, data or folder that can't be used, an option that has no effect, or two models
            of one name.
        RunError: memory or disk refused.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("selkd eval runs in one process; start it without torchrun.")
    options = replace(benchmarks, suite=check_suite(benchmarks.suite))
    if not options.suite:
        raise InputError("suite: nothing to measure. Give a suite, a benchmark or a task.")
    _require_effect(options, text, teacher)
    left_out = options.left_out()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ours = [find_model(model, dtype, device) for model in models]
    names = [model.name for model in ours]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise InputError(f"two models are called {repeated[0]!r}; tell them apart with NAME=MODEL.")
    theirs = None if teacher is None else find_model(teacher, dtype, device)
    tasks = load_benchmarks(options)
    for model in ours:
        require_answerable(tasks, model, options.chat_template)
        if "fidelity" in options.suite:
            text_windows(model, theirs, text)
    require_writable(out)
    results, answers = [], []
    for model in ours:
        folder = out / f"{Path(model.source).name}-{digest(model.identity)[:8]}"
        measured: dict[str, TaskResult] = {}
        if "fidelity" in options.suite:
            measured["fidelity"] = measure_fidelity(model, theirs, text, folder)
            if theirs is not None:
                theirs.weights.release()
        measured |= measure_benchmarks(model, tasks, options, folder)
        model.weights.release()
        about = {"name": model.name, "model": model.source, "fingerprint": model.fingerprint, "dtype": model.dtype_name}
        answers.append({**about, **summarise(measured, options.suite, left_out)})
        results.append(measured)
    comparisons = [
        {"model": names[0], "against": name, **compare(results[0], measured)}
        for name, measured in zip(names[1:], results[1:], strict=True)
    ]
    return {**asdict(options), "resamples": RESAMPLES, "models": answers, "comparisons": comparisons}


def _require_effect(benchmarks: BenchmarkOptions, text: FidelityOptions, teacher: str | None) -> None:
    """Raises InputError if something was given that nothing of the suite looks at."""
    suite = benchmarks.suite
    options = {"teacher": teacher, **vars(text), **vars(benchmarks)}
    defaults = {"teacher": None, **vars(FidelityOptions()), **vars(BenchmarkOptions(suite))}
    for name, value in options.items():
        if value == defaults[name]:
            continue
        if name in _FOR_FIDELITY and "fidelity" not in suite:
            raise InputError(
                f"{name}: only the suite fidelity looks at it, and the suite is {', '.join(suite)}. Leave it out, or "
                "add --suite fidelity."
            )
        if name in _FOR_BENCHMARKS and not benchmarks_of(suite):
            raise InputError(
                f"{name}: only benchmarks look at it, and the suite is {', '.join(suite)}. Leave it out, or add "
                "--suite paper, validation or a task's name."
            )

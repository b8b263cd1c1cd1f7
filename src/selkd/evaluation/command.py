"""``selkd eval``: the suites on one model or several, and the first model compared with each of the others."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from selkd.errors import InputError
from selkd.evaluation.benchmark_tasks import load_benchmarks, measure_benchmarks
from selkd.evaluation.evaluated_model import EvaluatedModel, find_model
from selkd.evaluation.fidelity_task import measure_fidelity, text_windows
from selkd.evaluation.harness import require_answerable
from selkd.evaluation.intervals import RESAMPLES
from selkd.evaluation.options import BenchmarkOptions, FidelityOptions, checked_options
from selkd.evaluation.results import TaskResult, digest
from selkd.evaluation.summary import compare, summarise
from selkd.evaluation.training_text import training_overlap
from selkd.files import require_writable


def evaluate_models(
    models: Sequence[str],
    benchmarks: BenchmarkOptions,
    text: FidelityOptions,
    teacher: str | None = None,
    dtype: str = "auto",
    out: Path = Path("evals"),
) -> dict[str, Any]:
    """Measure the models and return the answer of ``selkd eval`` as plain data: ``models`` and ``comparisons``.

    Bad input is refused before any weights are loaded.

    Args:
        models: ``[NAME=]MODEL`` strings.
        benchmarks: the suites, and how their benchmarks are measured.
        text: the text that fidelity is measured on.
        teacher: the teacher of KL and agreement; None: perplexity alone is measured.
        dtype: ``auto`` or the name of a dtype.
        out: the folder that keeps every result, in a folder for each model; a kept result is not measured again.

    Raises:
        InputError: a model, suite, text, data or folder can't be used, an option has no effect, or two models have the
            same name.
        RunError: memory ran out or the disk refused.
    """
    options = checked_options(benchmarks, text, teacher, dtype)
    left_out = options.left_out()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    students = [find_model(model, dtype, device) for model in models]
    students = _told_apart(students, models)
    names = [student.name for student in students]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise InputError(f"two models are called {repeated[0]!r}; tell them apart with NAME=MODEL.")
    fidelity_teacher = None if teacher is None else find_model(teacher, dtype, device)
    tasks = load_benchmarks(options)
    overlaps: dict[str, float | None] = {}
    for student in students:
        require_answerable(tasks, student, options.chat_template)
        if "fidelity" in options.suite:
            windows = text_windows(student, fidelity_teacher, text)
            has_prompts = text.prompt_field is not None or text.messages_field is not None
            overlaps[student.name] = training_overlap(student, windows, has_prompts=has_prompts)
    require_writable(out)
    results, answers = [], []
    for student in students:
        folder = out / f"{Path(student.source).name}-{digest(student.identity)[:8]}"
        student_results: dict[str, TaskResult] = {}
        if "fidelity" in options.suite:
            student_results["fidelity"] = measure_fidelity(student, fidelity_teacher, text, folder)
            if fidelity_teacher is not None:
                fidelity_teacher.weights.release()
        student_results |= measure_benchmarks(student, tasks, options, folder)
        student.weights.release()
        answers.append(
            {
                "name": student.name,
                "model": student.source,
                "fingerprint": student.fingerprint,
                "dtype": student.dtype_name,
                "training_overlap": overlaps.get(student.name),
                **summarise(student_results, options.suite, left_out),
            }
        )
        results.append(student_results)
    comparisons = [
        {"model": names[0], "against": name, **compare(results[0], other_results)}
        for name, other_results in zip(names[1:], results[1:], strict=True)
    ]
    return {**asdict(options), "resamples": RESAMPLES, "models": answers, "comparisons": comparisons}


def _told_apart(students: Sequence[EvaluatedModel], arguments: Sequence[str]) -> list[EvaluatedModel]:
    """The models, those that would be called alike called as they were given."""
    names = [student.name for student in students]
    return [
        student if names.count(student.name) == 1 else replace(student, name=argument.rstrip("/"))
        for student, argument in zip(students, arguments, strict=True)
    ]

"""Benchmarks inside a run: before, every so many steps, after; and the student that measured best on the way."""

import json
import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from selkd.files import new_folder
from selkd.models.adapters import merged
from selkd.models.head import evaluating
from selkd.models.loading import window_of
from selkd.models.pair import ModelSlot
from selkd.recipe.evaluation import EvaluationOptions, benchmarks_of
from selkd.run.workspace import Workspace

BEST = "best_student"
LOGGED = "benchmark_"
HIGHER_IS_BETTER = {"perplexity": False, "kl_nats": False, "top1_agreement": True, "validation": True}


def has_benchmarks(options: EvaluationOptions) -> bool:
    """Whether the suite asks for more than fidelity."""
    return bool(benchmarks_of(options.suite))


def require_benchmarks(options: EvaluationOptions) -> None:
    """Raises InputError if local benchmark files that the suite needs are not there; nothing is loaded."""
    if has_benchmarks(options):
        _benchmark_options(options).left_out()


def measure(
    work: Workspace, student: PreTrainedModel, when: str, fingerprint: str, reuse: bool = True
) -> dict[str, Any] | None:
    """The suite's benchmarks on ``student``, as ``selkd.evaluation.summary.summarise`` gives them.

    The main process measures, the others wait. Every example is kept in the run's ``benchmarks/<when>``. Training is
    not disturbed: modules go back to their mode, random states are put back.

    Returns:
        None on the other processes.
    """
    summary = None
    if work.state.is_main_process:
        from selkd.evaluation.benchmark_tasks import load_benchmarks, measure_benchmarks
        from selkd.evaluation.evaluated_model import EvaluatedModel
        from selkd.evaluation.summary import summarise

        options = _benchmark_options(work.recipe.evaluation)
        model = EvaluatedModel(
            name="student",
            source="student",
            fingerprint=fingerprint,
            dtype=work.dtype,
            positions=window_of(student),
            weights=ModelSlot(lambda: student),
            tokenizer=work.tokenizer,
            generation=str(student.generation_config),
        )
        folder = work.run_path / "benchmarks" / when
        with evaluating(student), _random_states_kept():
            results = measure_benchmarks(model, load_benchmarks(options), options, folder, reuse)
        summary = summarise(results, options.suite, options.left_out())
    work.state.wait_for_everyone()
    return summary


def figures(summary: dict[str, Any]) -> dict[str, float]:
    """What a summary says in a few numbers, for the metrics' file: each task's counted metric, the suites' means."""
    estimates = {
        task: result["metrics"][result["counts"] or next(iter(result["metrics"]))]
        for task, result in summary["tasks"].items()
    }
    if "paper" in summary:
        estimates["paper_acc"] = summary["paper"]["acc"]
    if "validation" in summary:
        estimates["validation"] = summary["validation"]
    return {f"{LOGGED}{name}": one["value"] for name, one in estimates.items() if one["value"] is not None}


def keep_if_best(work: Workspace, student: PreTrainedModel, step: int, measured: dict[str, float]) -> None:
    """Save ``student`` as the run's ``best_student`` if ``evaluation.keep_best`` is better than ever before.

    Args:
        measured: fidelity's figures by their names, and the validation suite's mean as ``benchmark_validation``.

    Raises:
        RunError: the disk refused.
    """
    metric = work.recipe.evaluation.keep_best
    if metric is None or not work.state.is_main_process:
        return
    value = measured[f"{LOGGED}validation" if metric == "validation" else metric]
    sign = 1 if HIGHER_IS_BETTER[metric] else -1
    best = read_best(work.run_path)
    if math.isfinite(value) and (best is None or sign * value > sign * best["value"]):
        _save(work, student, {"metric": metric, "value": value, "step": step})


def read_best(run_path: Path) -> dict[str, Any] | None:
    """``metric``, ``value`` and ``step`` of the run's best student, None if there is none."""
    try:
        content: dict[str, Any] = json.loads((run_path / BEST / "best.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content


def _save(work: Workspace, student: PreTrainedModel, best: dict[str, Any]) -> None:
    """Replace the best student by this one; the old one goes only when the new one is whole."""
    with new_folder(work.run_path / BEST, replace=True) as new:
        merged(student).save_pretrained(new)
        work.tokenizer.save_pretrained(new)
        (new / "best.json").write_text(json.dumps(best) + "\n", encoding="utf-8")


def _benchmark_options(options: EvaluationOptions) -> Any:
    from selkd.evaluation.benchmark_tasks import BenchmarkOptions  # imports the harness, which few recipes need

    return BenchmarkOptions(options.suite, options.data, options.limit, options.shots, options.chat_template)


@contextmanager
def _random_states_kept() -> Iterator[None]:
    """The harness and its tasks draw from the shared generators of Python and numpy; training must not notice."""
    python, legacy = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)

"""Benchmarks in a run, before, during and after training, and the student that measured best during training."""

import json
import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from selkd.errors import Interrupted, RunError
from selkd.evaluation.options import BenchmarkOptions
from selkd.files import new_folder
from selkd.interrupts import raise_together
from selkd.models.adapters import merged
from selkd.models.head import evaluating
from selkd.models.loading import window_of
from selkd.models.pair import ModelSlot
from selkd.recipe.evaluation import EvaluationOptions
from selkd.run.workspace import Workspace

BEST = "best_student"
LOGGED = "benchmark_"
HIGHER_IS_BETTER = {"perplexity": False, "kl_nats": False, "top1_agreement": True, "validation": True}


def require_benchmarks(options: EvaluationOptions) -> None:
    """Raises InputError if local benchmark files of the suite are missing; nothing is loaded."""
    if options.has_benchmarks:
        _benchmark_options(options).left_out()


def measure(
    work: Workspace, student: PreTrainedModel, when: str, fingerprint: str, reuse: bool = True
) -> dict[str, Any] | None:
    """Measure ``student`` on the suite's benchmarks.

    The main process measures while the others wait. Every example is written to the run's ``benchmarks/<when>``.
    Afterwards modules have their mode and generators their state again, so training is not disturbed.

    Returns:
        What ``selkd.evaluation.summary.summarise`` returns; None on the other processes.
    """
    summary: dict[str, Any] | None = None
    error: RunError | Interrupted | None = None
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
        try:
            with evaluating(student), _random_states_kept():
                results = measure_benchmarks(model, load_benchmarks(options), options, folder, reuse)
            summary = summarise(results, options.suite, options.left_out())
        except (RunError, Interrupted) as raised:  # told to the other processes, which wait for this one
            error = raised
    raise_together(error)
    return summary


def figures(summary: dict[str, Any]) -> dict[str, float]:
    """The figures of a summary for the metrics' file: the main metric of each task, and the means of the suites."""
    estimates = {
        task: result["metrics"][result["counts"] or next(iter(result["metrics"]))]
        for task, result in summary["tasks"].items()
    }
    if "paper" in summary:
        estimates["paper_acc"] = summary["paper"]["acc"]
    if "validation" in summary:
        estimates["validation"] = summary["validation"]
    values = {f"{LOGGED}{name}": estimate["value"] for name, estimate in estimates.items()}
    return {name: value for name, value in values.items() if value is not None}


def keep_if_best(
    work: Workspace,
    student: PreTrainedModel,
    step: int,
    measured: dict[str, float],
    weights: dict[str, Any] | None = None,
) -> None:
    """Save ``student`` as the run's ``best_student`` if the figure of ``evaluation.keep_best`` is its best so far.

    Args:
        measured: the figures of fidelity by their names, and the mean of the validation suite as
            ``benchmark_validation``.
        weights: all weights of a student that is sharded, on the main process; None: the student has them.

    Raises:
        RunError: the student can't be written.
    """
    metric = work.recipe.evaluation.keep_best
    if metric is None or not work.state.is_main_process:
        return
    value = measured[f"{LOGGED}validation" if metric == "validation" else metric]
    sign = 1 if HIGHER_IS_BETTER[metric] else -1
    best = read_best(work.run_path)
    if math.isfinite(value) and (best is None or sign * value > sign * best["value"]):
        best = {"metric": metric, "value": value, "step": step}
        with new_folder(work.run_path / BEST, replace=True) as new:
            merged(student).save_pretrained(new, state_dict=weights)
            work.tokenizer.save_pretrained(new)
            (new / "best.json").write_text(json.dumps(best) + "\n", encoding="utf-8")


def read_best(run_path: Path) -> dict[str, Any] | None:
    """``metric``, ``value`` and ``step`` of the run's best student; None if there is none."""
    try:
        content: dict[str, Any] = json.loads((run_path / BEST / "best.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content


def _benchmark_options(options: EvaluationOptions) -> BenchmarkOptions:
    return BenchmarkOptions(
        options.suite,
        options.data,
        options.limit,
        options.shots,
        options.chat_template,
        include_path=options.include_path,
    )


@contextmanager
def _random_states_kept() -> Iterator[None]:
    """Restore the shared generators of Python and numpy, which the harness and its tasks draw from."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)

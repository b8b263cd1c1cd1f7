"""Benchmarks from their names to their results: which can be measured, and which were measured before."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import xxhash

from selkd.errors import InputError
from selkd.evaluation.benchmarks import KNOWN
from selkd.evaluation.evaluated_model import EvaluatedModel
from selkd.evaluation.harness import build_requests, load_tasks, require_answerable, run_task, spread_rows
from selkd.evaluation.options import BenchmarkOptions
from selkd.evaluation.results import Measured, TaskResult, digest, find_or_measure
from selkd.recipe.evaluation import benchmarks_of
from selkd.recipe.harness_names import has_own_task, is_task_file


def load_benchmarks(options: BenchmarkOptions) -> dict[str, Any]:
    """The harness's tasks by name, for every benchmark and task of the suites that can be measured.

    Raises:
        InputError: as ``BenchmarkOptions.left_out`` and ``load_tasks``; or ``shots`` is set and no task takes shots.
    """
    left_out = options.left_out()
    tasks: dict[str, Any] = {}
    for name in benchmarks_of(options.suite):
        if name not in left_out:
            tasks |= load_tasks(name, options.data, options.shots, options.include_path or ())
    if options.shots and tasks and not any(task.get_config("num_fewshot") for task in tasks.values()):
        raise InputError(
            f"shots: {', '.join(tasks)} can't take solved examples, so {options.shots} would have no effect. Leave "
            "shots out, or measure a benchmark that has training rows beside those that are measured."
        )
    return tasks


def measure_benchmarks(
    model: EvaluatedModel,
    tasks: Mapping[str, Any],
    options: BenchmarkOptions,
    folder: Path | None = None,
    reuse: bool = True,
) -> dict[str, TaskResult]:
    """The result of each task, by name.

    Args:
        tasks: as ``load_benchmarks`` returns them.
        folder: where results are kept, each in a folder of its own; None: nowhere.
        reuse: whether a result that was kept for the same model, task, rows, shots and precision is read instead of
            measured again.

    Raises:
        InputError: as ``require_answerable`` and ``build_requests``.
        RunError: memory or disk refused.
    """
    require_answerable(tasks, model, options.chat_template)
    results = {}
    for name, task in tasks.items():
        limit = options.limit or (KNOWN[name].rows if name in KNOWN else None)
        rows = spread_rows(len(task.eval_docs), limit)
        build_requests(name, task, rows)
        fingerprint = {
            "model": model.identity,
            "dtype": model.dtype_name,
            "harness": version("lm_eval"),
            "task": digest(_scoring(task)),
            "requests": digest([[request.doc_id, request.doc, list(request.args)] for request in task.instances]),
            "rows": digest(list(rows)),
            "chat_template": model.tokenizer.chat_template if options.chat_template else None,
            **_own_code(name, options),
        }
        measure = partial(_measure, name, task, rows, model, options)
        results[name] = find_or_measure(folder, name, fingerprint, measure, reuse)
    return results


def _measure(name: str, task: Any, rows: Sequence[int], model: EvaluatedModel, options: BenchmarkOptions) -> Measured:
    measured = run_task(name, task, rows, model, options.chat_template, options.batch_size)
    benchmark = KNOWN.get(name)
    details: dict[str, Any] = {
        "shots": int(task.get_config("num_fewshot") or 0),
        "rows": len(task.eval_docs),
        "counts": benchmark.metric if benchmark else None,
        "described": benchmark.described if benchmark else None,
    }
    return replace(measured, details={**details, **measured.details})


def _own_code(name: str, options: BenchmarkOptions) -> dict[str, str]:
    """The digest of the Python files beside a task of the user, of which the harness tells single functions alone."""
    files = [str(Path(entry).parent) for entry in options.suite if is_task_file(entry)]
    folders = [*(options.include_path or ()), *files]
    if not has_own_task(folders, name):
        return {}
    paths = sorted({path for folder in folders for path in Path(folder).expanduser().rglob("*.py") if path.is_file()})
    return {"own": digest([xxhash.xxh3_128_hexdigest(path.read_bytes()) for path in paths])}


def _scoring(task: Any) -> dict[str, Any]:
    """The task's settings that decide its scores, once its requests are known."""
    config = task.dump_config()
    parts = {name: config.get(name) for name in ("output_type", "metric_list", "filter_list", "process_results")}
    return {name: str(value) for name, value in parts.items()}

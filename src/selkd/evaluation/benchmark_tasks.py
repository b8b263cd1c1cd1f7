"""From names of suites to results: what is measured, what was measured before, what had to be left out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from selkd.errors import InputError
from selkd.evaluation.benchmarks import KNOWN
from selkd.evaluation.evaluated_model import EvaluatedModel
from selkd.evaluation.harness import load_tasks, require_answerable, run_task, spread_rows
from selkd.evaluation.local_data import find_file, require_folders
from selkd.evaluation.results import Measured, TaskResult, digest, find_or_measure
from selkd.recipe.evaluation import SUITES, benchmarks_of


@dataclass(frozen=True)
class BenchmarkOptions:
    """How benchmarks are measured.

    Attributes:
        suite: suites, benchmarks or tasks by name; ``fidelity``, which is no benchmark, is passed over.
        data: folders of local files; None: rows come from the hub.
        limit: rows of a benchmark at most, spread evenly; None: all, or 1,000 training rows.
        shots: solved examples before each question, where there are training rows to take them from.
        chat_template: put each prompt into the tokenizer's chat template.
        batch_size: None: chosen from the memory there is.
    """

    suite: Sequence[str]
    data: Sequence[str] | None = None
    limit: int | None = None
    shots: int = 0
    chat_template: bool = False
    batch_size: int | None = None

    def left_out(self) -> list[str]:
        """The suites' benchmarks that can't be measured because local data lacks them.

        Raises:
            InputError: a folder is not there, or a benchmark that was asked for by its own name, or all of a suite's,
                has no local file.
        """
        if self.data is None:
            return []
        require_folders(self.data)
        names = [name for name in benchmarks_of(self.suite) if name in KNOWN]
        lacking = [name for name in names if find_file(self.data, KNOWN[name].file) is None]
        for entry in self.suite:
            members = SUITES.get(entry, (entry,))
            if members and set(members) <= set(lacking):
                files = ", ".join(KNOWN[name].file for name in members)
                raise InputError(
                    f"{entry}: none of {files} is in {', '.join(self.data)}. Give the folder that holds them."
                )
        return lacking


def load_benchmarks(options: BenchmarkOptions) -> dict[str, Any]:
    """Name -> harness task, for every benchmark and task of the suites that can be measured. No model is needed.

    Raises:
        InputError: as ``BenchmarkOptions.left_out`` and ``load_tasks``, or shots that none of them takes.
    """
    left_out = options.left_out()
    tasks: dict[str, Any] = {}
    for name in benchmarks_of(options.suite):
        if name not in left_out:
            tasks |= load_tasks(name, options.data, options.shots)
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
    """Task -> its result, for every one of ``tasks``.

    Args:
        tasks: as ``load_benchmarks`` gives them.
        folder: results are kept below it; None: nowhere.
        reuse: results that were kept for the same model, task, rows, shots and precision are not measured again.

    Raises:
        InputError: as ``require_answerable``.
        RunError: memory or disk refused.
    """
    require_answerable(tasks, model, options.chat_template)
    results = {}
    for name, task in tasks.items():
        limit = options.limit or (KNOWN[name].rows if name in KNOWN else None)
        rows = spread_rows(len(task.eval_docs), limit)
        task.build_all_requests(samples=rows)
        fingerprint = {
            "model": model.identity,
            "dtype": model.dtype_name,
            "harness": version("lm_eval"),
            "task": digest(_scoring(task)),
            "requests": digest([[request.doc_id, request.doc, list(request.args)] for request in task.instances]),
            "rows": digest(list(rows)),
            "chat_template": model.tokenizer.chat_template if options.chat_template else None,
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


def _scoring(task: Any) -> dict[str, Any]:
    """What of a task's settings decides its scores, once its requests are known."""
    config = task.dump_config()
    parts = {name: config.get(name) for name in ("output_type", "metric_list", "filter_list", "process_results")}
    return {name: str(value) for name, value in parts.items()}

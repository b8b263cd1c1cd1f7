"""From names of suites to results: what is measured, what was measured before, what had to be left out."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from selkd.errors import InputError
from selkd.evaluation.benchmarks import KNOWN
from selkd.evaluation.evaluated_model import Subject
from selkd.evaluation.harness import build_requests, load_tasks, require_answerable, run_task, spread_rows
from selkd.evaluation.local_data import find_file, require_folders
from selkd.evaluation.results import TaskResult, digest, stored
from selkd.recipe.evaluation import SUITES, benchmarks_of


@dataclass(frozen=True)
class BenchmarkOptions:
    """How benchmarks are measured.

    Attributes:
        suite: suites, benchmarks or tasks by name.
        data: folders of local files; None: rows come from the hub.
        limit: rows of a benchmark at most, spread evenly; None: all, or 1,000 training rows.
        shots: solved examples before each question, where there are training rows to take them from.
        chat_template: put each prompt into the tokenizer's chat template.
        batch_size: None: found from the memory there is.
    """

    suite: Sequence[str]
    data: Sequence[str] | None = None
    limit: int | None = None
    shots: int = 0
    chat_template: bool = False
    batch_size: int | None = None

    def __post_init__(self) -> None:
        if self.data is not None:
            require_folders(self.data)

    def names(self) -> tuple[list[str], list[str]]:
        """What is measured, and the suites' benchmarks that local data lacks.

        Raises:
            InputError: a benchmark that was asked for by its own name, or all of a suite's, has no local file.
        """
        asked = benchmarks_of(self.suite)
        if self.data is None:
            return asked, []
        lacking = [name for name in asked if name in KNOWN and find_file(self.data, KNOWN[name].file) is None]
        where = ", ".join(map(str, self.data))
        for entry in self.suite:
            members = SUITES.get(entry, (entry,))
            if members and set(members) <= set(lacking):
                files = ", ".join(KNOWN[name].file for name in members)
                raise InputError(f"{entry}: none of {files} is in {where}. Give the folder that holds them.")
        return [name for name in asked if name not in lacking], lacking


def load_benchmarks(options: BenchmarkOptions) -> dict[str, Any]:
    """Name -> harness task, for every benchmark and task of the suites. No model is needed.

    Raises:
        InputError: as ``BenchmarkOptions.names`` and ``load_tasks``, or shots that none of them takes.
    """
    tasks: dict[str, Any] = {}
    for asked in options.names()[0]:
        tasks |= load_tasks(asked, options.data, options.shots)
    if options.shots and tasks and not any(task.get_config("num_fewshot") for task in tasks.values()):
        raise InputError(
            f"shots: {', '.join(tasks)} can't take solved examples, so {options.shots} would have no effect. Leave "
            "shots out, or measure a benchmark that has training rows beside those that are measured."
        )
    return tasks


def require_answerable_by(subject: Subject, tasks: Mapping[str, Any], options: BenchmarkOptions) -> None:
    """Raises InputError if the model can't be asked one of the tasks so; its weights are not loaded."""
    for name, task in tasks.items():
        require_answerable(name, task, subject.positions, subject.tokenizer, options.chat_template)


def measure_benchmarks(
    subject: Subject,
    tasks: Mapping[str, Any],
    options: BenchmarkOptions,
    keep: Path | None = None,
    reuse: bool = True,
) -> dict[str, TaskResult]:
    """Task -> its result, for every one of ``tasks``.

    Args:
        tasks: as ``load_benchmarks`` gives them.
        keep: results are kept below this folder; None: nowhere.
        reuse: results that were kept for the same model, task, rows, shots and precision are not measured again.

    Raises:
        InputError: as ``require_answerable_by``.
        RunError: memory or disk refused.
    """
    require_answerable_by(subject, tasks, options)
    return {name: _measure(subject, name, task, options, keep, reuse) for name, task in tasks.items()}


def _measure(
    subject: Subject, name: str, task: Any, options: BenchmarkOptions, keep: Path | None, reuse: bool
) -> TaskResult:
    benchmark = KNOWN.get(name)
    available = len(task.eval_docs)
    limit = options.limit or (benchmark.rows if benchmark else None)
    rows = spread_rows(available, limit)
    build_requests(task, rows)
    fingerprint = {
        "model": subject.identity,
        "dtype": str(subject.dtype).removeprefix("torch."),
        "harness": version("lm_eval"),
        "task": digest(_scoring(task)),
        "requests": digest([[row.doc_id, row.doc, list(row.args)] for row in task.instances]),
        "rows": digest(rows),
        "chat_template": subject.tokenizer.chat_template if options.chat_template else None,
    }
    if keep is not None and reuse and (found := stored(keep, name, fingerprint)) is not None:
        return found
    started = time.perf_counter()
    output = run_task(
        name, task, rows, subject.model, subject.tokenizer, subject.dtype, options.chat_template, options.batch_size
    )
    result = TaskResult(
        name=name,
        fingerprint=fingerprint,
        examples=output.examples,
        kinds=output.kinds,
        figures=output.figures,
        higher_is_better=output.higher_is_better,
        details={
            "shots": int(task.get_config("num_fewshot") or 0),
            "rows": available,
            "counts": benchmark.metric if benchmark else None,
            "described": benchmark.described if benchmark else None,
            "prompts_cut": sum(example["cut"] for example in output.examples),
            "model_tokens": output.positions,
        },
        seconds=round(time.perf_counter() - started, 3),
    )
    if keep is not None:
        result.write(keep)
    return result


def _scoring(task: Any) -> dict[str, Any]:
    """What of a task's settings decides its scores, once its requests are known."""
    config = task.dump_config()
    parts = {name: config.get(name) for name in ("output_type", "metric_list", "filter_list", "process_results")}
    return {name: str(value) for name, value in parts.items()}

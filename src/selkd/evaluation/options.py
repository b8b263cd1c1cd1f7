"""What ``selkd eval`` is asked to measure, checked before a model is looked for; no torch is needed."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

from selkd.errors import InputError, nearest
from selkd.evaluation.benchmarks import KNOWN
from selkd.evaluation.local_data import find_file, require_folders
from selkd.recipe.data import DataOptions
from selkd.recipe.evaluation import SUITES, benchmarks_of, check_suite
from selkd.recipe.part import parse_part

_FOR_FIDELITY = ("teacher", "text", "text_field", "prompt_field", "completion_field", "messages_field", "template")
_FOR_BENCHMARKS = ("include_path", "data", "shots", "chat_template", "batch_size")
_DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class BenchmarkOptions:
    """Which benchmarks are measured, and how.

    Attributes:
        suite: names of suites, benchmarks or tasks, or paths of tasks' files. ``fidelity``, no benchmark, is skipped.
        data: folders of local files; None: the harness loads the rows from the hub.
        limit: the most rows of a benchmark, spread evenly; None: all rows, or 1,000 training rows.
        shots: the number of solved examples before each question, where there are training rows to take them from.
        chat_template: whether each prompt is put into the tokenizer's chat template.
        batch_size: prompts at once; None: chosen from the free memory.
        include_path: folders of the user's own tasks, in the harness's YAML.
    """

    suite: Sequence[str]
    data: Sequence[str] | None = None
    limit: int | None = None
    shots: int = 0
    chat_template: bool = False
    batch_size: int | None = None
    include_path: Sequence[str] | None = None

    def left_out(self) -> list[str]:
        """The suites' benchmarks that have no file in the local folders, so they can't be measured.

        Raises:
            InputError: a folder does not exist; a benchmark that ``suite`` names itself has no file; or no benchmark
                of a suite has one.
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


@dataclass(frozen=True)
class FidelityOptions:
    """The text that fidelity is measured on.

    Attributes:
        text: a recipe's ``data.path``.
        windows: the most windows, taken from the text's beginning; None: 32.
        text_field, prompt_field, completion_field, messages_field, template: the keys of a recipe's ``data``.
    """

    text: str = "demo"
    text_field: str | None = None
    windows: int | None = None
    prompt_field: str | None = None
    completion_field: str | None = None
    messages_field: str | None = None
    template: str | None = None

    def data(self, max_length: int) -> DataOptions:
        """The text as a recipe's ``data``, in windows of ``max_length`` tokens. Raises InputError as a recipe would."""
        fields = {name: value for name, value in vars(self).items() if name not in ("text", "windows")}
        options = parse_part(DataOptions, {"path": self.text, "max_length": max_length, **fields}, "data")
        if options.is_prompt_only:
            raise InputError("prompt_field: fidelity is measured on completions; give completion_field.")
        return options


def checked_options(
    benchmarks: BenchmarkOptions, text: FidelityOptions, teacher: str | None, dtype: str
) -> BenchmarkOptions:
    """The options with each name of the suite once.

    Raises:
        InputError: a suite, dtype, field or folder is unknown, or an option has no effect.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("selkd eval runs in one process; start it without torchrun.")
    if dtype not in _DTYPES:
        raise InputError(f"dtype {dtype!r} is unknown: expected one of {', '.join(_DTYPES)}.{nearest(dtype, _DTYPES)}")
    try:
        options = replace(benchmarks, suite=check_suite(benchmarks.suite, benchmarks.include_path))
    except ValueError as error:  # also of the gate of own code
        raise InputError(str(error)) from None
    if not options.suite:
        raise InputError("suite: nothing to measure. Give a suite, a benchmark or a task.")
    _require_effect(options, text, teacher)
    options.left_out()
    if "fidelity" in options.suite:
        text.data(max_length=512)
    return options


def _require_effect(benchmarks: BenchmarkOptions, text: FidelityOptions, teacher: str | None) -> None:
    """Raises InputError if an option is set that no part of the suite reads."""
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

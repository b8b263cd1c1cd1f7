"""The benchmarks of the suites: which harness task, which rows, which metric counts, which local file.

The harness makes the prompts, extracts the answers and scores them; a benchmark here only names its rows.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

ACC = ("hellaswag", "piqa", "arc_easy", "gsm8k", "lambada")
"""The paper suite's Acc is the mean accuracy of these benchmarks."""
VALIDATION_ROWS = 1000


@dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    Attributes:
        name: its name in ``--suite`` and in results.
        yaml: the harness's file of the task, relative to its folder of tasks.
        split: the harness's split whose rows are measured.
        files: the local file's name in a ``--data`` folder, by split.
        fields: the fields that each row must have, under their original names.
        metric: the harness's metric (and, after a comma, its filter) that counts as this benchmark's accuracy.
        described: that metric in words.
        rows: the number of rows that are measured without a ``limit``; None: all.
        overrides: settings that replace the task's own, so that the harness measures ``split``.
    """

    name: str
    yaml: str
    split: str
    files: Mapping[str, str]
    fields: tuple[str, ...]
    metric: str
    described: str
    rows: int | None = None
    overrides: Mapping[str, str | None] = field(default_factory=dict)

    @property
    def file(self) -> str:
        """The local file of the measured rows."""
        return self.files[self.split]

    @property
    def few_shot(self) -> bool:
        """Whether there are training rows to take solved examples from."""
        return "train" in self.files and self.split != "train"


_RAW = "accuracy by raw log-likelihood"
_NORMALISED = "accuracy by log-likelihood a character (length-normalised)"

_HELLASWAG = Benchmark(
    name="hellaswag",
    yaml="hellaswag/hellaswag.yaml",
    split="validation",
    files={"train": "hellaswag_train.jsonl", "validation": "hellaswag_val.jsonl"},
    fields=("activity_label", "ctx_a", "ctx_b", "endings", "label"),
    metric="acc_norm",
    described=_NORMALISED,
)
_PIQA = Benchmark(
    name="piqa",
    yaml="piqa/piqa.yaml",
    split="validation",
    files={"train": "piqa_train.jsonl", "validation": "piqa_valid.jsonl"},
    fields=("goal", "sol1", "sol2", "label"),
    metric="acc",
    described=_RAW,
)
_ARC_EASY = Benchmark(
    name="arc_easy",
    yaml="arc/arc_easy.yaml",
    split="test",
    files={
        "train": "arc_easy_train.jsonl",
        "validation": "arc_easy_validation.jsonl",
        "test": "arc_easy_test.jsonl",
    },
    fields=("question", "choices", "answerKey"),
    metric="acc",
    described=_RAW,
)
_GSM8K = Benchmark(
    name="gsm8k",
    yaml="gsm8k/gsm8k.yaml",
    split="test",
    files={"train": "gsm8k_train.jsonl", "test": "gsm8k_test.jsonl"},
    fields=("question", "answer"),
    metric="exact_match,flexible-extract",
    described="exact match of the answer's last number (flexible-extract)",
)
_LAMBADA = Benchmark(
    name="lambada",
    yaml="lambada/lambada_openai.yaml",
    split="test",
    files={"test": "lambada_openai_test.jsonl"},
    fields=("text",),
    metric="acc",
    described="accuracy of the greedy last word",
)
_IFEVAL = Benchmark(
    name="ifeval",
    yaml="ifeval/ifeval.yaml",
    split="train",  # the hub's name for the only split
    files={"train": "ifeval_input_data.jsonl"},
    fields=("key", "prompt", "instruction_id_list", "kwargs"),
    metric="prompt_level_strict_acc",
    described="prompts whose every instruction is followed (strict)",
)


def _on_training_rows(benchmark: Benchmark) -> Benchmark:
    """The same benchmark on training rows, 1,000 of them unless there is a limit."""
    splits = {"test_split": None, "validation_split": "train"}
    name = f"{benchmark.name}_train"
    return replace(benchmark, name=name, split="train", rows=VALIDATION_ROWS, overrides=splits)


_ALL = (
    *(_HELLASWAG, _PIQA, _ARC_EASY, _GSM8K, _LAMBADA, _IFEVAL),
    replace(_ARC_EASY, name="arc_easy_validation", split="validation", overrides={"test_split": None}),
    *map(_on_training_rows, (_GSM8K, _HELLASWAG, _PIQA)),
)
KNOWN = {benchmark.name: benchmark for benchmark in _ALL}
"""Every benchmark by its name: the names that ``selkd.recipe.evaluation`` lists."""

"""Fidelity as a task of ``selkd eval``: on any text, against any teacher of the family, an example a window of text.

Without a teacher there is perplexity alone, and the buckets are of the model's own entropy.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from selkd.data.corpus import open_corpus
from selkd.data.encoding import Encoder
from selkd.data.packing import Fitting
from selkd.data.samples import SampleDataset
from selkd.errors import InputError
from selkd.evaluation.evaluated_model import Subject
from selkd.evaluation.fidelity import Fidelity, fidelity
from selkd.evaluation.results import TaskResult, digest, stored
from selkd.models.head import check_head, check_packing, head_of
from selkd.models.tokenizers import require_same_tokenizer, shared_classes
from selkd.recipe.part import parse_part
from selkd.recipe.recipe import DataOptions

Bucket = dict[str, float | int | None]

WINDOW_TOKENS = 512
WINDOWS = 32
# metric, kind of measure, column of ``Fidelity.sums`` (0 holds the positions), whether higher is better
_COLUMNS = (
    ("perplexity", "exp_ratio", 1, False),
    ("kl_nats", "ratio", 3, False),
    ("top1_agreement", "ratio", 4, True),
)


@dataclass(frozen=True)
class FidelityOptions:
    """On what fidelity is measured.

    Attributes:
        text: as a recipe's ``data.path``.
        text_field, prompt_field, completion_field, messages_field, template: as a recipe's ``data`` has them.
        windows: windows of text at most, from its beginning; None: 32.
    """

    text: str = "demo"
    text_field: str | None = None
    windows: int | None = None
    prompt_field: str | None = None
    completion_field: str | None = None
    messages_field: str | None = None
    template: str | None = None


def measure_fidelity(
    subject: Subject, teacher: Subject | None, options: FidelityOptions, keep: Path | None = None, reuse: bool = True
) -> TaskResult:
    """Perplexity, and with a teacher KL and top-1 agreement, over windows of up to 512 tokens of packed text.

    Raises:
        InputError: as ``text_windows``.
    """
    samples = text_windows(subject, teacher, options)
    fingerprint = {
        "model": subject.identity,
        "dtype": str(subject.dtype).removeprefix("torch."),
        "teacher": teacher.identity if teacher is not None else None,
        "teacher_dtype": str(teacher.dtype).removeprefix("torch.") if teacher is not None else None,
        "samples": digest([sample_id.hex() for sample_id in samples.ids]),
    }
    if keep is not None and reuse and (found := stored(keep, "fidelity", fingerprint)) is not None:
        return found
    started = time.perf_counter()
    measured = _measured(subject, teacher or subject, samples)
    columns = _COLUMNS if teacher is not None else _COLUMNS[:1]
    per_sample = measured.sums.sum(dim=1).tolist()
    result = TaskResult(
        name="fidelity",
        fingerprint=fingerprint,
        examples=[
            {"row": row, "measures": {name: [sums[column], sums[0]] for name, _, column, _ in columns}}
            for row, sums in enumerate(per_sample)
        ],
        kinds={name: kind for name, kind, _, _ in columns},
        figures={name: getattr(measured, name) for name, _, _, _ in columns},
        higher_is_better={name: better for name, _, _, better in columns},
        details={
            "positions": measured.positions,
            "teacher": None if teacher is None else teacher.model_name,
            "teacher_perplexity": None if teacher is None else measured.teacher_perplexity,
            "by_entropy": _by_entropy(measured.by_entropy(), teacher is not None),
        },
        seconds=round(time.perf_counter() - started, 3),
    )
    if keep is not None:
        result.write(keep)
    return result


def _measured(subject: Subject, teacher: Subject, samples: SampleDataset) -> Fidelity:
    sizes = {}
    for role, model in (("model", subject.model), ("teacher", teacher.model)):
        check_head(model)
        check_packing(model)
        sizes[role] = head_of(model).vocab_size
    classes, pad = shared_classes(sizes, subject.tokenizer), int(subject.tokenizer.pad_token_id)
    return fidelity(subject.model, teacher.model, samples, subject.dtype, pad, classes, "fidelity")


def _by_entropy(buckets: Sequence[Bucket], has_teacher: bool) -> list[Bucket]:
    comparing = ("teacher_cross_entropy_nats", "kl_nats", "top1_agreement")
    return [{key: value for key, value in bucket.items() if has_teacher or key not in comparing} for bucket in buckets]


def text_windows(subject: Subject, teacher: Subject | None, options: FidelityOptions) -> SampleDataset:
    """The first windows of the text, packed, each as long as both have positions for, 512 tokens at most.

    Prompts with completions stay whole: longer ones are cut, or left out where the prompt alone fills a window. No
    weights are needed.

    Raises:
        InputError: no such text, too little of it, prompts without completions, or a teacher with another tokenizer.
    """
    if teacher is not None:
        require_same_tokenizer(teacher.tokenizer, subject.tokenizer)
    limits = [model.positions for model in (subject, teacher) if model is not None]
    length = min([WINDOW_TOKENS, *(limit for limit in limits if limit is not None)])
    given = {name: value for name, value in vars(options).items() if name not in ("text", "windows")}
    data = parse_part(DataOptions, {"path": options.text, "max_length": length, **given}, "data")
    if data.is_prompt_only:
        raise InputError("prompt_field: fidelity is measured on completions; give completion_field.")
    encoded = Encoder(data, subject.tokenizer).encoded(open_corpus(data).documents())
    windows = Fitting(data)(marked for _, sequences in encoded for marked in sequences)
    samples = list(islice(windows, options.windows or WINDOWS))
    if not samples:
        raise InputError(f"text: {options.text} is shorter than one window of {length} tokens. Give more text.")
    return SampleDataset.from_samples(samples)

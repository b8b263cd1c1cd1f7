"""Fidelity as a task of ``selkd eval``: on any text, against any teacher of the family, an example a window of text.

Without a teacher there is perplexity alone, and the buckets are of the model's own entropy.
"""

from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

from selkd.data.corpus import open_corpus
from selkd.data.encoding import Encoder
from selkd.data.packing import Fitting
from selkd.data.samples import SampleDataset
from selkd.errors import InputError
from selkd.evaluation.evaluated_model import EvaluatedModel
from selkd.evaluation.fidelity import Fidelity, fidelity
from selkd.evaluation.results import Measured, TaskResult, digest, find_or_measure
from selkd.models.head import check_head, check_packing, head_of
from selkd.models.pair import ModelPair
from selkd.models.tokenizers import require_same_tokenizer, shared_classes
from selkd.recipe.part import parse_part
from selkd.recipe.recipe import DataOptions

WINDOW_TOKENS = 512
WINDOWS = 32
# metric, kind of measure, column of ``Fidelity.sums`` (0 holds the positions), whether higher is better
_COLUMNS = (
    ("perplexity", "exp_ratio", 1, False),
    ("kl_nats", "ratio", 3, False),
    ("top1_agreement", "ratio", 4, True),
)
_OF_MODEL = ("from_nats", "to_nats", "positions", "cross_entropy_nats")  # what a bucket says without a teacher


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
    subject: EvaluatedModel, teacher: EvaluatedModel | None, options: FidelityOptions, folder: Path | None = None
) -> TaskResult:
    """Perplexity, and with a teacher KL and top-1 agreement, over windows of up to 512 tokens of packed text.

    ``folder``: the result is kept below it, and read from there where the same was measured before.

    Raises:
        InputError: as ``text_windows``.
    """
    samples = text_windows(subject, teacher, options)
    fingerprint = {
        "model": subject.identity,
        "dtype": subject.dtype_name,
        "teacher": teacher.identity if teacher is not None else None,
        "teacher_dtype": teacher.dtype_name if teacher is not None else None,
        "samples": digest([sample_id.hex() for sample_id in samples.ids]),
    }
    return find_or_measure(folder, "fidelity", fingerprint, partial(_measured, subject, teacher, samples))


def _measured(subject: EvaluatedModel, teacher: EvaluatedModel | None, samples: SampleDataset) -> Measured:
    measured = _fidelity(subject, teacher or subject, samples)
    columns = _COLUMNS if teacher is not None else _COLUMNS[:1]
    buckets = measured.by_entropy()
    if teacher is None:
        buckets = [{key: bucket[key] for key in _OF_MODEL} for bucket in buckets]
    return Measured(
        examples=[
            {"row": row, "measures": {name: [sums[column], sums[0]] for name, _, column, _ in columns}}
            for row, sums in enumerate(measured.sums.sum(dim=1).tolist())
        ],
        kinds={name: kind for name, kind, _, _ in columns},
        figures={name: getattr(measured, name) for name, _, _, _ in columns},
        higher_is_better={name: better for name, _, _, better in columns},
        details={
            "positions": measured.positions,
            "teacher": None if teacher is None else teacher.source,
            "teacher_perplexity": None if teacher is None else measured.teacher_perplexity,
            "by_entropy": buckets,
        },
    )


def _fidelity(subject: EvaluatedModel, teacher: EvaluatedModel, samples: SampleDataset) -> Fidelity:
    sizes = {}
    for role, model in (("model", subject.model), ("teacher", teacher.model)):
        check_head(model)
        check_packing(model)
        sizes[role] = head_of(model).vocab_size
    vocab_size = shared_classes(sizes, subject.tokenizer)
    models = ModelPair(lambda: subject.model, lambda: teacher.model, subject.tokenizer, vocab_size, subject.dtype)
    return fidelity(models, samples, "measuring fidelity")


def text_windows(subject: EvaluatedModel, teacher: EvaluatedModel | None, options: FidelityOptions) -> SampleDataset:
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
    fields = {name: value for name, value in vars(options).items() if name not in ("text", "windows")}
    data = parse_part(DataOptions, {"path": options.text, "max_length": length, **fields}, "data")
    if data.is_prompt_only:
        raise InputError("prompt_field: fidelity is measured on completions; give completion_field.")
    encoded = Encoder(data, subject.tokenizer).encoded(open_corpus(data).documents())
    windows = Fitting(data)(marked for _, sequences in encoded for marked in sequences)
    samples = list(islice(windows, options.windows or WINDOWS))
    if not samples:
        raise InputError(f"text: {options.text} is shorter than one window of {length} tokens. Give more text.")
    return SampleDataset.from_samples(samples)

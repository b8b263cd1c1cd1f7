"""Fidelity as a task of ``selkd eval``: on any text, against any teacher of the family, an example a window of text.

Without a teacher it measures perplexity alone, with buckets of the model's own entropy.
"""

from functools import partial
from itertools import islice
from pathlib import Path

from selkd.data.corpus import open_corpus
from selkd.data.encoding import Encoder
from selkd.data.packing import SampleMaker
from selkd.data.samples import SampleDataset
from selkd.errors import InputError
from selkd.evaluation.evaluated_model import EvaluatedModel
from selkd.evaluation.fidelity import Fidelity, fidelity
from selkd.evaluation.options import FidelityOptions
from selkd.evaluation.results import Measured, TaskResult, digest, find_or_measure
from selkd.models.head import check_head, check_packing, head_of
from selkd.models.pair import ModelPair
from selkd.models.tokenizers import require_same_tokenizer, shared_classes

WINDOW_TOKENS = 512
WINDOWS = 32
# Metric, kind of measure, column of ``Fidelity.sums`` (column 0 counts positions), whether higher is better.
_COLUMNS = (
    ("perplexity", "exp_ratio", 1, False),
    ("kl_nats", "ratio", 3, False),
    ("top1_agreement", "ratio", 4, True),
)
_WITHOUT_TEACHER = ("from_nats", "to_nats", "positions", "cross_entropy_nats")  # a bucket's keys


def measure_fidelity(
    student: EvaluatedModel, teacher: EvaluatedModel | None, options: FidelityOptions, folder: Path | None = None
) -> TaskResult:
    """Measure perplexity, and with a teacher KL and top-1 agreement, over ``text_windows``.

    Args:
        folder: where the result is kept, and read from if it was measured before; None: nowhere.

    Raises:
        InputError: as ``text_windows``.
    """
    samples = text_windows(student, teacher, options)
    fingerprint = {
        "model": student.identity,
        "dtype": student.dtype_name,
        "teacher": teacher.identity if teacher is not None else None,
        "teacher_dtype": teacher.dtype_name if teacher is not None else None,
        "samples": digest([sample_id.hex() for sample_id in samples.ids]),
    }
    return find_or_measure(folder, "fidelity", fingerprint, partial(_measure, student, teacher, samples))


def _measure(student: EvaluatedModel, teacher: EvaluatedModel | None, samples: SampleDataset) -> Measured:
    measured = _fidelity(student, teacher or student, samples)
    columns = _COLUMNS if teacher is not None else _COLUMNS[:1]
    buckets = measured.by_entropy()
    if teacher is None:
        buckets = [{key: bucket[key] for key in _WITHOUT_TEACHER} for bucket in buckets]
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


def _fidelity(student: EvaluatedModel, teacher: EvaluatedModel, samples: SampleDataset) -> Fidelity:
    sizes = {}
    for role, model in (("model", student.model), ("teacher", teacher.model)):
        check_head(model)
        check_packing(model)
        sizes[role] = head_of(model).vocab_size
    vocab_size = shared_classes(sizes, student.tokenizer)
    models = ModelPair(lambda: student.model, lambda: teacher.model, student.tokenizer, vocab_size, student.dtype)
    return fidelity(models, samples, "measuring fidelity")


def text_windows(student: EvaluatedModel, teacher: EvaluatedModel | None, options: FidelityOptions) -> SampleDataset:
    """The first windows of the packed text, of 512 tokens or as many as both models have positions for.

    A prompt with its completion stays in one window: what exceeds the window is cut off, and a prompt that fills a
    window alone is left out. No weights are loaded.

    Raises:
        InputError: there is no such text or too little of it, prompts have no completions, or the teacher has another
            tokenizer.
    """
    if teacher is not None:
        require_same_tokenizer(teacher.tokenizer, student.tokenizer)
    limits = [model.positions for model in (student, teacher) if model is not None]
    length = min([WINDOW_TOKENS, *(limit for limit in limits if limit is not None)])
    data = options.data(length)
    encoded = Encoder(data, student.tokenizer).encoded(open_corpus(data).documents())
    windows = SampleMaker(data)(document for _, documents in encoded for document in documents)
    samples = list(islice(windows, options.windows or WINDOWS))
    if not samples:
        raise InputError(f"text: {options.text} is shorter than one window of {length} tokens. Give more text.")
    return SampleDataset.from_samples(samples)

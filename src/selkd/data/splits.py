"""The text tokenised once, split into training and held-out samples, and kept on disk for the next run."""

import json
import logging
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import xxhash
from datasets import Dataset
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from selkd.data.corpus import Corpus, open_corpus
from selkd.data.documents import Document, split_key
from selkd.data.encoding import Encoder, encode
from selkd.data.packing import Fitting, pack, split
from selkd.data.prompt_encoding import Marked
from selkd.data.samples import FEATURES, Sample, SampleDataset, record_batch
from selkd.errors import InputError, RunError
from selkd.recipe.data import DataOptions, RowOptions

FORMAT_VERSION = 4
_DOCUMENTS_AT_ONCE = 64
_SAMPLES_AT_ONCE = 512
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Splits:
    """Training and held-out samples.

    Args:
        train: the samples to train on, in the text's order.
        held_out: samples of documents whose content is in no training sample.
        fingerprint: 32 hex digits of all that determines the samples.
        documents: how many documents were read for both splits together.
        train_tokens: tokens of the training samples.
        cut, too_long, unanswered: of prompts with answers, how many documents lost their end, were left out since the
            prompt alone fills a sample, or since there is nothing to learn in them.
    """

    train: SampleDataset
    held_out: SampleDataset
    fingerprint: str
    documents: int
    train_tokens: int
    cut: int = 0
    too_long: int = 0
    unanswered: int = 0


def load_splits(
    options: DataOptions, tokenizer: PreTrainedTokenizerBase, tokenizer_fingerprint: str, cache_dir: Path
) -> Splits:
    """Tokenise the text of ``options``, or reuse what an earlier call stored under ``cache_dir/tokenised``.

    Each text is tokenised whole, with the tokenizer's own special tokens, and ends with its end-of-sequence token if it
    has one; prompts and conversations as ``encoding.Encoder`` says. A document is held out iff xxh3_64(text, or what is
    asked) / 2^64 < ``held_out_fraction``: by content alone, so a duplicate never lies in both splits. Reading stops
    once the training samples fill ``data.tokens``, so held-out text is drawn from the same stretch of the corpus.

    Raises:
        InputError: no text; fewer tokens than one sample; a held-out split without a sample; stored samples that are
            damaged; and as ``corpus.open_corpus`` and ``corpus.documents``.
        RunError: the samples can't be written, or reading broke off.
    """
    _check_budgets(options)
    corpus = open_corpus(options)
    encoder = Encoder(options, tokenizer) if options.has_prompts else None
    chat_template = None if encoder is None else encoder.chat_template
    fingerprint = _fingerprint(options, corpus, tokenizer_fingerprint, chat_template)
    folder = cache_dir / "tokenised" / fingerprint
    if not folder.exists():
        _build(folder, options, corpus, encode_with(encoder, tokenizer))
    splits = _open(folder, fingerprint)
    _tell_what_did_not_fit(options, splits)
    # A budget is filled until another sample might not fit; where more is missing, the text ended first.
    if options.tokens is not None and splits.train_tokens <= options.tokens - options.max_length:
        _logger.warning(
            "data.tokens asks for %d training tokens; %s holds %d.", options.tokens, options.path, splits.train_tokens
        )
    return splits


def _tell_what_did_not_fit(options: DataOptions, splits: Splits) -> None:
    """Said at every run, not only at the one that tokenises."""
    for count, what in (
        (splits.too_long, f"prompts are longer than data.max_length = {options.max_length} and were left out"),
        (splits.cut, f"documents were cut at data.max_length = {options.max_length}"),
        (splits.unanswered, "documents hold nothing to learn and were left out"),
    ):
        if count:
            _logger.warning("%s: %d of %d %s.", options.path, count, splits.documents, what)


Encode = Callable[[Sequence[Document]], list[list[Marked]]]


def encode_with(encoder: Encoder | None, tokenizer: PreTrainedTokenizerBase) -> Encode:
    """Documents in, for each the token sequences that it becomes out."""
    if encoder is not None:
        return lambda documents: [encoder(document) for document in documents]
    return lambda texts: [[Marked(ids, [True] * len(ids))] for ids in encode(tokenizer, [str(text) for text in texts])]


def encoded(documents: Iterable[Document], encode: Encode) -> Iterator[tuple[Document, list[Marked]]]:
    """Each document with its token sequences; some are encoded at a time, which is quicker than one by one."""
    documents = iter(documents)
    while batch := list(islice(documents, _DOCUMENTS_AT_ONCE)):
        yield from zip(batch, encode(batch), strict=True)


def fitting_of(options: RowOptions) -> Fitting:
    """How whole documents become samples, and what of them did not fit."""
    return Fitting(
        options.max_length,
        options.packing,
        keeps_prompts=options.is_prompt_only,
        learns_all=options.loss_on == "all",
    )


def samples_of(documents: Iterable[Marked], options: RowOptions, fitting: Fitting) -> Iterator[Sample]:
    """Texts are continued from sample to sample; what asks for an answer stays whole."""
    if options.has_prompts:
        return fitting(documents)
    return (pack if options.packing else split)((each.token_ids for each in documents), options.max_length)


def is_held_out(document: Document, fraction: float) -> bool:
    """Whether a document belongs to the held-out split: decided by its content alone."""
    return xxhash.xxh3_64_intdigest(split_key(document).encode()) < fraction * 2**64


def _check_budgets(options: DataOptions) -> None:
    budgets = {"data.tokens": options.tokens}
    if options.held_out_fraction > 0:
        budgets["data.held_out_tokens"] = options.held_out_tokens
    for key, budget in budgets.items():
        if budget is not None and budget < options.max_length:
            raise InputError(
                f"{key}: {budget} tokens are fewer than one sample of data.max_length = {options.max_length}; "
                f"raise {key} or lower data.max_length."
            )


def _fingerprint(options: DataOptions, corpus: Corpus, tokenizer_fingerprint: str, chat_template: str | None) -> str:
    # Not the path, the configuration and the split, which the corpus's own fingerprint stands for where they matter;
    # nor streaming, which changes how the text arrives but not the text.
    fields = options.model_dump(exclude={"path", "name", "split", "streaming"})
    fields |= {"format": FORMAT_VERSION, "corpus": corpus.fingerprint, "tokenizer": tokenizer_fingerprint}
    fields["chat_template"] = chat_template
    return xxhash.xxh3_128_hexdigest(json.dumps(fields, sort_keys=True).encode())


@dataclass
class _Reading:
    """One pass over the documents: yields those to train on, keeps those held out, and counts."""

    options: DataOptions
    encode: Encode
    held_out: list[Marked] = field(default_factory=list)
    held_out_tokens: int = 0
    train_documents: int = 0
    held_out_documents: int = 0
    train_tokens: int = 0

    def training_documents(self, documents: Iterable[Document]) -> Iterator[Marked]:
        for document, found in encoded(documents, self.encode):
            tokens = sum(len(each.token_ids) for each in found)
            if not is_held_out(document, self.options.held_out_fraction):
                self.train_documents += 1
                self.train_tokens += tokens
                yield from found
            elif self.held_out_tokens < self.options.held_out_tokens:
                self.held_out += found
                self.held_out_documents += 1
                self.held_out_tokens += tokens


def _build(folder: Path, options: DataOptions, corpus: Corpus, encode: Encode) -> None:
    """Write ``folder``: complete or not at all."""
    with _disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = folder.with_name(f".{folder.name}-{secrets.token_hex(4)}")  # mkdtemp would hide it from others
        temporary.mkdir()
    try:
        _write_splits(temporary, options, corpus, encode)
        with _disk_errors(folder):
            try:
                temporary.rename(folder)
            except OSError:
                if not folder.exists():  # else another process was first, with the same content
                    raise
    finally:
        if temporary.exists():
            shutil.rmtree(temporary)


def _write_splits(folder: Path, options: DataOptions, corpus: Corpus, encode: Encode) -> None:
    fitting = fitting_of(options)
    reading = _Reading(options, encode)
    documents = reading.training_documents(corpus.documents())
    samples = _within(samples_of(documents, options, fitting), options.tokens, options.max_length)
    with tqdm(
        total=options.tokens, desc="tokenising", unit=" tokens", unit_scale=True, delay=2, disable=None
    ) as progress:
        n_train, train_tokens = _write(folder / "train.arrow", samples, progress)
    if n_train == 0 and fitting.too_long + fitting.unanswered:
        raise InputError(
            f"data.path: of {options.path} nothing is left to train on: {fitting.too_long} prompts alone are longer "
            f"than data.max_length = {options.max_length}, and {fitting.unanswered} documents hold nothing to learn. "
            "Raise data.max_length, or give prompts with completions."
        )
    if n_train == 0:
        raise InputError(
            f"data.path: {options.path} gives {reading.train_tokens} training tokens in {reading.train_documents} "
            f"documents ({reading.held_out_documents} more were held out), fewer than one sample: data.max_length is "
            f"{options.max_length}, data.tokens is {options.tokens}. Give more text or lower data.max_length."
        )
    held_out = _within(samples_of(reading.held_out, options, fitting), options.held_out_tokens, options.max_length)
    n_held_out, _ = _write(folder / "held_out.arrow", held_out, None)
    if n_held_out == 0 and options.held_out_fraction > 0:
        raise InputError(
            f"data.held_out_fraction: at {options.held_out_fraction}, {reading.held_out_documents} of "
            f"{reading.train_documents + reading.held_out_documents} documents were held out, "
            f"{reading.held_out_tokens} tokens, fewer than one sample of data.max_length = {options.max_length}. Raise "
            f"data.held_out_fraction, or data.tokens if given, or give more documents; 0 means no held-out split."
        )
    summary = {
        "format": FORMAT_VERSION,
        "documents": reading.train_documents + reading.held_out_documents,
        "train_samples": n_train,
        "train_tokens": train_tokens,
        "held_out_samples": n_held_out,
        "cut": fitting.cut,
        "too_long": fitting.too_long,
        "unanswered": fitting.unanswered,
    }
    with _disk_errors(folder):
        (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")


def _within(samples: Iterable[Sample], budget: int | None, max_length: int) -> Iterator[Sample]:
    """The first samples, until another one of ``max_length`` tokens might not fit in the budget."""
    left = float("inf") if budget is None else budget
    for sample in samples:
        yield sample
        left -= len(sample.token_ids)
        if left < max_length:
            return


def _write(path: Path, samples: Iterable[Sample], progress: Any) -> tuple[int, int]:
    """Write the samples as an Arrow stream, some at a time; return how many there were and their tokens."""
    samples = iter(samples)
    n_samples = n_tokens = 0
    with _disk_errors(path.parent):
        file = pa.OSFile(str(path), "wb")
        writer = pa.ipc.new_stream(file, FEATURES.arrow_schema)
    try:
        while batch := list(islice(samples, _SAMPLES_AT_ONCE)):
            with _disk_errors(path.parent):
                writer.write_batch(record_batch(batch))
            tokens = sum(len(sample.token_ids) for sample in batch)
            n_samples, n_tokens = n_samples + len(batch), n_tokens + tokens
            if progress is not None:
                progress.update(tokens)
    finally:
        with _disk_errors(path.parent):
            writer.close()
            file.close()
    return n_samples, n_tokens


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(
            f"Can't write tokenised text to {folder} ({error}). Free space there, or choose another cache folder."
        ) from error


def _open(folder: Path, fingerprint: str) -> Splits:
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        train = SampleDataset(Dataset.from_file(str(folder / "train.arrow")))
        held_out = SampleDataset(Dataset.from_file(str(folder / "held_out.arrow")))
        if (len(train), len(held_out)) != (summary["train_samples"], summary["held_out_samples"]):
            raise ValueError(f"{len(train)} and {len(held_out)} samples instead of those that the summary names")
        left_out = {name: int(summary[name]) for name in ("cut", "too_long", "unanswered")}
        return Splits(train, held_out, fingerprint, summary["documents"], summary["train_tokens"], **left_out)
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise InputError(f"The tokenised text in {folder} is damaged ({error}). Move it away and run again.") from error

"""The text tokenised once, split into training and held-out samples, and kept on disk for the next run."""

import json
import logging
import secrets
import shutil
from collections.abc import Iterable, Iterator, Sequence
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

from selkd.data.batching import pack, split
from selkd.data.corpus import Corpus, open_corpus
from selkd.data.samples import FEATURES, Sample, SampleDataset, record_batch
from selkd.errors import InputError, RunError
from selkd.recipe import DataOptions

FORMAT_VERSION = 1
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
    """

    train: SampleDataset
    held_out: SampleDataset
    fingerprint: str
    documents: int
    train_tokens: int


def load_splits(
    options: DataOptions, tokenizer: PreTrainedTokenizerBase, tokenizer_fingerprint: str, cache_dir: Path
) -> Splits:
    """Tokenise the text of ``options``, or reuse what an earlier call stored under ``cache_dir/tokenised``.

    Each document is tokenised whole, with the tokenizer's own special tokens, and ends with its end-of-sequence token
    if it has one. A document is held out iff xxh3_64(text) / 2^64 < ``held_out_fraction``: by content alone, so a
    duplicate never lies in both splits. Reading stops once the training samples fill ``data.tokens``, so held-out
    text is drawn from the same stretch of the corpus.

    Raises:
        InputError: no text; fewer tokens than one sample; a held-out split without a sample; stored samples that are
            damaged; and as ``corpus.open_corpus`` and ``corpus.documents``.
        RunError: the samples can't be written, or reading broke off.
    """
    _check_budgets(options)
    corpus = open_corpus(options)
    fingerprint = _fingerprint(options, corpus, tokenizer_fingerprint)
    folder = cache_dir / "tokenised" / fingerprint
    if not folder.exists():
        _build(folder, options, corpus, tokenizer)
    splits = _open(folder, fingerprint)
    # A budget is filled until another sample might not fit; where more is missing, the text ended first.
    if options.tokens is not None and splits.train_tokens <= options.tokens - options.max_length:
        _logger.warning(
            "data.tokens asks for %d training tokens; %s holds %d.", options.tokens, options.path, splits.train_tokens
        )
    return splits


def is_held_out(text: str, fraction: float) -> bool:
    """Whether a document belongs to the held-out split: decided by its content alone."""
    return xxhash.xxh3_64_intdigest(text.encode()) < fraction * 2**64


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, uncut, with the tokenizer's special tokens and one end-of-sequence token at the end.

    Markup of special tokens in the text (``<|im_start|>``) is read as those tokens.
    """
    # verbose=False: a document longer than the model's window is no mistake here, it will be cut into samples.
    encoded: list[list[int]] = tokenizer(
        list(texts), truncation=False, padding=False, return_attention_mask=False, verbose=False
    )["input_ids"]
    eos = tokenizer.eos_token_id
    if eos is None:
        return encoded
    return [token_ids if token_ids[-1:] == [eos] else [*token_ids, eos] for token_ids in encoded]


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


def _fingerprint(options: DataOptions, corpus: Corpus, tokenizer_fingerprint: str) -> str:
    # Not the path, the configuration and the split, which the corpus's own fingerprint stands for where they matter;
    # nor streaming, which changes how the text arrives but not the text.
    fields = options.model_dump(exclude={"path", "name", "split", "streaming"})
    fields |= {"format": FORMAT_VERSION, "corpus": corpus.fingerprint, "tokenizer": tokenizer_fingerprint}
    return xxhash.xxh3_128_hexdigest(json.dumps(fields, sort_keys=True).encode())


@dataclass
class _Reading:
    """One pass over the documents: yields those to train on, keeps those held out, and counts."""

    options: DataOptions
    tokenizer: PreTrainedTokenizerBase
    held_out: list[list[int]] = field(default_factory=list)
    held_out_tokens: int = 0
    train_documents: int = 0
    train_tokens: int = 0

    def training_documents(self, texts: Iterable[str]) -> Iterator[list[int]]:
        texts = iter(texts)
        while batch := list(islice(texts, _DOCUMENTS_AT_ONCE)):
            for text, token_ids in zip(batch, encode(self.tokenizer, batch), strict=True):
                if not is_held_out(text, self.options.held_out_fraction):
                    self.train_documents += 1
                    self.train_tokens += len(token_ids)
                    yield token_ids
                elif self.held_out_tokens < self.options.held_out_tokens:
                    self.held_out.append(token_ids)
                    self.held_out_tokens += len(token_ids)


def _build(folder: Path, options: DataOptions, corpus: Corpus, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write ``folder``: complete or not at all."""
    with _disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = folder.with_name(f".{folder.name}-{secrets.token_hex(4)}")  # mkdtemp would hide it from others
        temporary.mkdir()
    try:
        _write_splits(temporary, options, corpus, tokenizer)
        with _disk_errors(folder):
            try:
                temporary.rename(folder)
            except OSError:
                if not folder.exists():  # else another process was first, with the same content
                    raise
    finally:
        if temporary.exists():
            shutil.rmtree(temporary)


def _write_splits(folder: Path, options: DataOptions, corpus: Corpus, tokenizer: PreTrainedTokenizerBase) -> None:
    cut = pack if options.packing else split
    reading = _Reading(options, tokenizer)
    documents = reading.training_documents(corpus.documents())
    samples = _within(cut(documents, options.max_length), options.tokens, options.max_length)
    with tqdm(
        total=options.tokens, desc="tokenising", unit=" tokens", unit_scale=True, delay=2, disable=None
    ) as progress:
        n_train, train_tokens = _write(folder / "train.arrow", samples, progress)
    if n_train == 0:
        raise InputError(
            f"data.path: {options.path} gives {reading.train_tokens} training tokens in {reading.train_documents} "
            f"documents ({len(reading.held_out)} more were held out), fewer than one sample: data.max_length is "
            f"{options.max_length}, data.tokens is {options.tokens}. Give more text or lower data.max_length."
        )
    held_out = _within(cut(reading.held_out, options.max_length), options.held_out_tokens, options.max_length)
    n_held_out, _ = _write(folder / "held_out.arrow", held_out, None)
    if n_held_out == 0 and options.held_out_fraction > 0:
        raise InputError(
            f"data.held_out_fraction: at {options.held_out_fraction}, {len(reading.held_out)} of "
            f"{reading.train_documents + len(reading.held_out)} documents were held out, {reading.held_out_tokens} "
            f"tokens, fewer than one sample of data.max_length = {options.max_length}. Raise "
            f"data.held_out_fraction, or data.tokens if given, or give more documents; 0 means no held-out split."
        )
    summary = {
        "format": FORMAT_VERSION,
        "documents": reading.train_documents + len(reading.held_out),
        "train_samples": n_train,
        "train_tokens": train_tokens,
        "held_out_samples": n_held_out,
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
        return Splits(train, held_out, fingerprint, summary["documents"], summary["train_tokens"])
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise InputError(f"The tokenised text in {folder} is damaged ({error}). Move it away and run again.") from error

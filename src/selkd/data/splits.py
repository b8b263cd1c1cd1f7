"""The text tokenised once, split into training and held-out samples, and kept on disk for the next run."""

import json
import logging
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path

import pyarrow as pa
import xxhash
from datasets import Dataset
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from selkd.data.copies import COPY, NGRAM, Overlap, without_copies
from selkd.data.corpus import Corpus, open_corpus
from selkd.data.documents import Document, split_key
from selkd.data.encoding import Encoder
from selkd.data.packing import Misfits, SampleMaker
from selkd.data.prompt_encoding import EncodedDocument
from selkd.data.samples import FEATURES, Sample, SampleDataset, record_batch
from selkd.errors import InputError
from selkd.files import new_folder
from selkd.interrupts import stop_if_asked
from selkd.recipe.data import DataOptions

FORMAT_VERSION = 5
_SAMPLES_AT_ONCE = 512
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Splits:
    """Training and held-out samples.

    Args:
        train: the training samples, in the text's order.
        held_out: samples of documents that are no training documents, without copies of training text.
        fingerprint: 32 hex digits of everything that determines the samples.
        documents: the number of documents that were read for both splits together.
        train_tokens: the number of tokens in the training samples.
        misfits: how many documents are not in the samples, or only in part.
        overlap: how much of the held-out samples stands in the training samples, and how many copies were dropped.
    """

    train: SampleDataset
    held_out: SampleDataset
    fingerprint: str
    documents: int
    train_tokens: int
    misfits: Misfits
    overlap: Overlap


def load_splits(
    options: DataOptions, tokenizer: PreTrainedTokenizerBase, tokenizer_fingerprint: str, cache_dir: Path
) -> Splits:
    """Tokenise the text of ``options``, or reuse the samples that an earlier call stored in ``cache_dir/tokenised``.

    Each text is tokenised with the tokenizer's own special tokens and ends with its end-of-sequence token if it has
    one; for prompts and conversations see ``encoding.Encoder``. A document is held out iff xxh3_64(its text or prompt)
    / 2^64 < ``held_out_fraction``, so a duplicate never lies in both splits. Reading stops once the training samples
    fill ``data.tokens``, so held-out text comes from the same stretch of the corpus. Held-out samples that are copies
    of training text are dropped (see ``copies``).

    Raises:
        InputError: there is no text, there are fewer tokens than one sample, the held-out split has no sample or copies
            alone, stored samples are damaged, or as ``corpus.open_corpus`` and ``Corpus.documents``.
        RunError: the samples can't be written, or reading broke off.
    """
    corpus = open_corpus(options)
    encoder = Encoder(options, tokenizer)
    fingerprint = _fingerprint(options, corpus, tokenizer_fingerprint, encoder.chat_template)
    folder = cache_dir / "tokenised" / fingerprint
    if not folder.exists():
        with new_folder(folder) as new:
            _write_splits(new, options, corpus, encoder)
    splits = _open(folder, fingerprint)
    # At every run, not only at the first.
    splits.misfits.warn(options.path, splits.documents, options.max_length)
    splits.overlap.warn(options.path)
    # A budget is filled until another sample might not fit. If more is missing, the text was too short.
    if options.tokens is not None and splits.train_tokens <= options.tokens - options.max_length:
        _logger.warning(
            "data.tokens asks for %d training tokens; %s holds %d.", options.tokens, options.path, splits.train_tokens
        )
    return splits


def stored_training(cache_dir: Path, fingerprint: str) -> SampleDataset | None:
    """The training samples with this ``Splits.fingerprint``; None if they are not in ``cache_dir`` (any more)."""
    file = cache_dir / "tokenised" / fingerprint / "train.arrow"
    return _samples_in(file) if re.fullmatch(r"[0-9a-f]{32}", fingerprint) and file.is_file() else None


def is_held_out(document: Document, fraction: float) -> bool:
    """Whether a document belongs to the held-out split, by its content alone."""
    return xxhash.xxh3_64_intdigest(split_key(document).encode()) < fraction * 2**64


def _fingerprint(options: DataOptions, corpus: Corpus, tokenizer_fingerprint: str, chat_template: str | None) -> str:
    # The corpus's fingerprint covers path, configuration and split as far as they matter; streaming does not change
    # the text.
    fields = options.model_dump(exclude={"path", "name", "split", "streaming"})
    fields |= {"format": FORMAT_VERSION, "corpus": corpus.fingerprint, "tokenizer": tokenizer_fingerprint}
    fields["chat_template"] = chat_template
    return xxhash.xxh3_128_hexdigest(json.dumps(fields, sort_keys=True).encode())


@dataclass
class _Reading:
    """One pass over the documents: yields the training documents, keeps the held-out ones, and counts both."""

    options: DataOptions
    encoder: Encoder
    held_out: list[EncodedDocument] = field(default_factory=list)
    held_out_tokens: int = 0
    train_documents: int = 0
    held_out_documents: int = 0
    train_tokens: int = 0

    def training_documents(self, documents: Iterable[Document]) -> Iterator[EncodedDocument]:
        for document, encoded in self.encoder.encoded(documents):
            tokens = sum(len(part.token_ids) for part in encoded)
            if not is_held_out(document, self.options.held_out_fraction):
                self.train_documents += 1
                self.train_tokens += tokens
                yield from encoded
            elif self.held_out_tokens < self.options.held_out_tokens:
                self.held_out += encoded
                self.held_out_documents += 1
                self.held_out_tokens += tokens


def _write_splits(folder: Path, options: DataOptions, corpus: Corpus, encoder: Encoder) -> None:
    maker, reading = SampleMaker(options), _Reading(options, encoder)
    misfits, samples = maker.misfits, maker(reading.training_documents(corpus.documents()))
    n_train, train_tokens = _write(folder / "train.arrow", samples, options.tokens, options.max_length)
    if n_train == 0 and misfits.too_long + misfits.unanswered:
        raise InputError(
            f"data.path: {options.path} leaves nothing to train on: {misfits.too_long} prompts alone are longer "
            f"than data.max_length = {options.max_length}, and {misfits.unanswered} documents hold nothing to learn. "
            "Raise data.max_length, or give prompts with completions."
        )
    if n_train == 0:
        raise InputError(
            f"data.path: {options.path} gives {reading.train_tokens} training tokens in {reading.train_documents} "
            f"documents ({reading.held_out_documents} more were held out), fewer than one sample: data.max_length is "
            f"{options.max_length}, data.tokens is {options.tokens}. Give more text or lower data.max_length."
        )
    held_out = list(_within(maker(reading.held_out), options.held_out_tokens, options.max_length))
    if not held_out and options.held_out_fraction > 0:
        raise InputError(
            f"data.held_out_fraction: at {options.held_out_fraction}, {reading.held_out_documents} of "
            f"{reading.train_documents + reading.held_out_documents} documents were held out, "
            f"{reading.held_out_tokens} tokens, fewer than one sample of data.max_length = {options.max_length}. Raise "
            f"data.held_out_fraction, or data.tokens if given, or give more documents; 0 means no held-out split."
        )
    training = _samples_in(folder / "train.arrow").token_blocks()
    kept, overlap = without_copies(held_out, training, has_prompts=options.has_prompts)
    if held_out and not kept:
        raise InputError(
            f"data.path: all {len(held_out)} held-out samples of {options.path} are copies of its training text (at "
            f"least {COPY:.0%} of their tokens stand there in runs of {NGRAM} tokens), so nothing could be measured on "
            "them. Remove repeated text, raise data.held_out_fraction, or set it to 0 for no held-out split."
        )
    _write(folder / "held_out.arrow", kept, None, options.max_length)
    summary = {
        "format": FORMAT_VERSION,
        "documents": reading.train_documents + reading.held_out_documents,
        "train_samples": n_train,
        "train_tokens": train_tokens,
        "held_out_samples": len(kept),
        "overlap": asdict(overlap),
        **vars(misfits),
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")


def _write(path: Path, samples: Iterable[Sample], budget: int | None, max_length: int) -> tuple[int, int]:
    """Write the first samples, within a budget of tokens, as an Arrow stream; return the numbers of both."""
    samples = _within(samples, budget, max_length)
    n_samples = n_tokens = 0
    bar = tqdm(total=budget, desc="tokenising", unit=" tokens", unit_scale=True, delay=2, disable=None)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, FEATURES.arrow_schema) as writer, bar:
        while batch := list(islice(samples, _SAMPLES_AT_ONCE)):
            stop_if_asked()
            writer.write_batch(record_batch(batch))
            tokens = sum(len(sample.token_ids) for sample in batch)
            n_samples, n_tokens = n_samples + len(batch), n_tokens + tokens
            bar.update(tokens)
    return n_samples, n_tokens


def _within(samples: Iterable[Sample], budget: int | None, max_length: int) -> Iterator[Sample]:
    """The first samples, until another one of ``max_length`` tokens might not fit in the budget."""
    remaining = float("inf") if budget is None else budget
    for sample in samples:
        yield sample
        remaining -= len(sample.token_ids)
        if remaining < max_length:
            return


def _samples_in(path: Path) -> SampleDataset:
    return SampleDataset(Dataset.from_file(str(path)))


def _open(folder: Path, fingerprint: str) -> Splits:
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        train = _samples_in(folder / "train.arrow")
        held_out = _samples_in(folder / "held_out.arrow")
        if (len(train), len(held_out)) != (summary["train_samples"], summary["held_out_samples"]):
            raise ValueError(f"{len(train)} and {len(held_out)} samples instead of those that the summary names")
        misfits = Misfits(summary["cut"], summary["too_long"], summary["unanswered"])
        documents, train_tokens = summary["documents"], summary["train_tokens"]
        return Splits(train, held_out, fingerprint, documents, train_tokens, misfits, Overlap(**summary["overlap"]))
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise InputError(f"The tokenised text in {folder} is damaged ({error}). Move it away and run again.") from error

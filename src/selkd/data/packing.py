"""Documents become samples: packed together, or split one by one."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from selkd.data.documents import Document, document_of, has_text
from selkd.data.encoding import Encoder
from selkd.data.prompt_encoding import EncodedDocument
from selkd.data.samples import Sample, SampleDataset
from selkd.errors import InputError
from selkd.recipe.data import RowOptions
from selkd.recipe.fields import found_fields, names_no_field
from selkd.recipe.part import parse_part

_logger = logging.getLogger(__name__)


def pack(token_streams: Iterable[Sequence[int]], max_length: int) -> Iterator[Sample]:
    """Lay documents end to end and cut windows of exactly ``max_length`` tokens.

    A document that reaches the end of a window continues in the next one, as a document that starts there. Only the
    tail that does not fill a window is lost.

    Args:
        token_streams: the token ids of each document.
        max_length: the tokens of a sample, at least 2: a token and its target.
    """
    tokens: list[int] = []
    starts: list[int] = []
    for document in token_streams:
        taken = 0
        while taken < len(document):
            starts.append(len(tokens))
            piece = document[taken : taken + max_length - len(tokens)]
            tokens.extend(piece)
            taken += len(piece)
            if len(tokens) == max_length:
                yield Sample(np.array(tokens), np.array(starts))
                tokens, starts = [], []


def split(token_streams: Iterable[Sequence[int]], max_length: int) -> Iterator[Sample]:
    """Cut each document by itself into consecutive samples of at most ``max_length`` tokens.

    Only pieces of a single token, which predict nothing, are lost. Arguments as for ``pack``.
    """
    for document in token_streams:
        for begin in range(0, len(document), max_length):
            piece = document[begin : begin + max_length]
            if len(piece) >= 2:
                yield Sample(np.array(piece), np.zeros(1, np.int32))


OPEN_WINDOWS = 64


@dataclass
class Misfits:
    """How many documents with prompts are not in the samples, or only in part.

    Attributes:
        cut: documents whose end was cut off.
        too_long: documents left out because the prompt alone fills a sample; a prompt is never cut.
        unanswered: documents left out because they hold nothing to learn.
    """

    cut: int = 0
    too_long: int = 0
    unanswered: int = 0

    def warn(self, name: str, documents: int, max_length: int) -> None:
        """Log a warning for each kind of misfit among the ``documents`` of ``name``."""
        for count, sentence in (
            (self.too_long, f"prompts are longer than data.max_length = {max_length} and were left out"),
            (self.cut, f"documents were cut at data.max_length = {max_length}"),
            (self.unanswered, "documents hold nothing to learn and were left out"),
        ):
            if count:
                _logger.warning("%s: %d of %d %s.", name, count, documents, sentence)


class SampleMaker:
    """Makes samples of at most ``max_length`` tokens from documents, and counts the misfits.

    A text may continue in the next sample. A document with a prompt may not, because the rest would lack its prompt:
    what exceeds a sample is cut off.
    """

    def __init__(self, options: RowOptions) -> None:
        self.options = options
        self.misfits = Misfits()

    def __call__(self, documents: Iterable[EncodedDocument]) -> Iterator[Sample]:
        """The samples. Every token of a text is a target, whatever ``is_target`` says."""
        options = self.options
        if not options.has_prompts:
            cut = pack if options.packing else split
            return cut((document.token_ids for document in documents), options.max_length)
        fitted = (fitted for document in documents if (fitted := self._fitted(document)) is not None)
        return map(_window_sample, self._windows(fitted) if options.packing else ([document] for document in fitted))

    def _windows(self, documents: Iterable[EncodedDocument]) -> Iterator[list[EncodedDocument]]:
        """Each document goes into the fullest of 64 open windows that has room for it (the oldest of equals). A 65th
        window closes the fullest one."""
        windows: list[list[EncodedDocument]] = []
        for document in documents:
            room = self.options.max_length - len(document.token_ids)
            if roomy := [window for window in windows if _length(window) <= room]:
                max(roomy, key=_length).append(document)
                continue
            if len(windows) == OPEN_WINDOWS:
                yield windows.pop(max(range(len(windows)), key=lambda index: _length(windows[index])))
            windows.append([document])
        yield from windows

    def _fitted(self, document: EncodedDocument) -> EncodedDocument | None:
        """The part of a document that fits in a sample, or None, counted as a misfit, if it holds nothing to learn."""
        options, is_cut = self.options, len(document.token_ids) > self.options.max_length
        is_kept_prompt = options.is_prompt_only and document.token_ids
        if not document.has_target and not is_kept_prompt:
            self.misfits.unanswered += 1
            return None
        fitted = EncodedDocument(document.token_ids[: options.max_length], document.is_target[: options.max_length])
        if is_cut and not fitted.has_target:
            self.misfits.too_long += 1
            return None
        self.misfits.cut += is_cut
        # The document holds more than its prompt, so the prompt may be learned, too.
        return EncodedDocument(fitted.token_ids, [True] * len(fitted.token_ids)) if options.loss_on == "all" else fitted


def _length(window: list[EncodedDocument]) -> int:
    return sum(len(document.token_ids) for document in window)


def _window_sample(window: list[EncodedDocument]) -> Sample:
    lengths = [len(document.token_ids) for document in window]
    return Sample(
        np.concatenate([np.array(document.token_ids) for document in window]),
        np.cumsum([0, *lengths[:-1]]),
        np.concatenate([np.array(document.is_target, dtype=bool) for document in window]),
    )


def _with_fields(options: RowOptions, first: Any, name: str) -> RowOptions:
    """The options with the fields that the first row has, where they name none. Raises InputError if it has none."""
    given = options.model_dump(exclude_unset=True)
    if not isinstance(first, dict) or not names_no_field(given):
        return options
    try:
        found = found_fields(list(first), f"{name}, row 0")
    except ValueError as error:
        raise InputError(str(error)) from None
    return parse_part(type(options), given | found, "data")


def samples_of_rows(
    rows: Any, name: str, options: RowOptions, tokenizer: PreTrainedTokenizerBase, enough: int | None = None
) -> SampleDataset:
    """The samples of rows: of a ``datasets.Dataset`` or a list of objects, read as the lines of a data file.

    A stream (``datasets.IterableDataset``, a generator) is read once, and no further than the samples that are enough.

    Args:
        name: the name of the rows in messages.
        enough: how many samples are made of a stream; of rows with a length all are made. None: streams are refused.

    Raises:
        InputError: ``rows`` is not a collection of rows, a row lacks a field that ``options`` names, or the rows give
            fewer tokens than one sample.
    """
    if isinstance(rows, str | dict) or not hasattr(rows, "__iter__"):
        raise InputError(
            f"{name}: expected a SampleDataset, a datasets.Dataset or a list of rows, got {type(rows).__name__}."
        )
    is_stream = not hasattr(rows, "__len__")
    if is_stream and enough is None:
        raise InputError(
            f"{name}: how many rows this {type(rows).__name__} has is not known before it is read. Set max_steps, for "
            "which as many rows of train_dataset are read as it takes, or give some of them: list(islice(rows, 1000))."
        )
    rows = iter(rows)
    first = list(islice(rows, 1))
    options = _with_fields(options, first[0] if first else None, name)
    n_rows = 0

    def documents() -> Iterator[Document]:
        nonlocal n_rows
        for row in chain(first, rows):
            document = document_of(row, options, f"{name}, row {n_rows}")
            n_rows += 1
            if document and has_text(document):
                yield document

    encoded = Encoder(options, tokenizer).encoded(documents())
    maker = SampleMaker(options)
    made = maker(document for _, parts in encoded for document in parts)
    samples = list(islice(made, enough if is_stream else None))
    maker.misfits.warn(name, n_rows, options.max_length)
    if not samples:
        raise InputError(
            f"{name}: {n_rows} rows give fewer tokens than one sample of data.max_length = {options.max_length}, "
            "or nothing to learn. Give more of them, completions, or another data.max_length."
        )
    return SampleDataset.from_samples(samples)

"""Rows in memory to samples: a ``datasets.Dataset`` or a list of objects, read as a recipe's data file is."""

import logging
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedTokenizerBase

from selkd.data.documents import Document, Fields, texts_of
from selkd.data.encoding import Encoder
from selkd.data.samples import SampleDataset
from selkd.data.splits import encode_with, encoded, fitting_of, samples_of
from selkd.errors import InputError
from selkd.recipe.data import RowOptions

_logger = logging.getLogger(__name__)


def samples_of_rows(rows: Any, name: str, options: RowOptions, tokenizer: PreTrainedTokenizerBase) -> SampleDataset:
    """The samples of all rows, which messages call ``name``.

    Raises:
        InputError: no rows, a row without the fields that ``options`` names, or fewer tokens than one sample.
    """
    if isinstance(rows, str | dict) or not hasattr(rows, "__len__") or not hasattr(rows, "__iter__"):
        raise InputError(
            f"{name}: expected a SampleDataset, a datasets.Dataset or a list of rows, got {type(rows).__name__}."
        )
    encode = encode_with(Encoder(options, tokenizer) if options.has_prompts else None, tokenizer)
    fitting = fitting_of(options)
    documents = (each for _, found in encoded(_documents(rows, name, options), encode) for each in found)
    samples = list(samples_of(documents, options, fitting))
    for count, what in (
        (fitting.too_long, "prompts alone fill a sample and were left out"),
        (fitting.cut, "were cut"),
        (fitting.unanswered, "hold nothing to learn and were left out"),
    ):
        if count:
            _logger.warning("%s: of %d rows %d %s (max_length = %d).", name, len(rows), count, what,
                            options.max_length)  # fmt: skip
    if not samples:
        raise InputError(
            f"{name}: {len(rows)} rows give fewer tokens than one sample of max_length = {options.max_length}, "
            "or nothing to learn. Give more of them, completions, or another max_length."
        )
    return SampleDataset.from_samples(samples)


def _documents(rows: Any, name: str, options: RowOptions) -> Iterator[Document]:
    fields = Fields.of(options)
    for number, row in enumerate(rows):
        document = fields.take(row, f"{name}, row {number}")
        if document is not None and any(text.strip() for text in texts_of(document)):
            yield document

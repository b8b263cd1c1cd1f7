"""Rows in memory to samples: a ``datasets.Dataset`` or a list of objects, read as a recipe's data file is."""

from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedTokenizerBase

from selkd.data.documents import Document, document_of, has_text
from selkd.data.encoding import Encoder
from selkd.data.packing import Fitting
from selkd.data.samples import SampleDataset
from selkd.errors import InputError
from selkd.recipe.data import RowOptions


def samples_of_rows(rows: Any, name: str, options: RowOptions, tokenizer: PreTrainedTokenizerBase) -> SampleDataset:
    """The samples of all rows of what messages call ``name``.

    Raises:
        InputError: no rows, a row without the fields that ``options`` names, or fewer tokens than one sample.
    """
    if isinstance(rows, str | dict) or not hasattr(rows, "__len__") or not hasattr(rows, "__iter__"):
        raise InputError(
            f"{name}: expected a SampleDataset, a datasets.Dataset or a list of rows, got {type(rows).__name__}."
        )
    encoded, fitting = Encoder(options, tokenizer).encoded(_documents(rows, name, options)), Fitting(options)
    samples = list(fitting(marked for _, sequences in encoded for marked in sequences))
    fitting.misfits.tell(name, len(rows), options.max_length)
    if not samples:
        raise InputError(
            f"{name}: {len(rows)} rows give fewer tokens than one sample of data.max_length = {options.max_length}, "
            "or nothing to learn. Give more of them, completions, or another data.max_length."
        )
    return SampleDataset.from_samples(samples)


def _documents(rows: Any, name: str, options: RowOptions) -> Iterator[Document]:
    for number, row in enumerate(rows):
        document = document_of(row, options, f"{name}, row {number}")
        if document is not None and has_text(document):
            yield document

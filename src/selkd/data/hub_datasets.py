"""Documents from a Hugging Face dataset: a hub id, or a local folder laid out as a dataset."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets.exceptions import DatasetsError
from huggingface_hub.errors import HTTPError

from selkd.data.documents import Document, Fields
from selkd.data.text_files import content_digest
from selkd.errors import InputError, RunError


class HubDataset:
    """One split of one configuration, found but not yet read. ``datasets`` runs no code of the dataset's.

    Args:
        path: hub id or local folder.
        name: configuration, None for the only or default one.
        split: for example ``train`` or ``train[:1%]``.
        fields: the columns that hold the documents.
        streaming: read rows as they come instead of downloading the split first.

    Raises:
        InputError: no such dataset, configuration, split or column, or the hub can't be reached.
        RunError: reading broke off.
    """

    def __init__(self, path: str, name: str | None, split: str, fields: Fields, streaming: bool) -> None:
        self.path, self.name, self.split, self.fields, self.streaming = path, name, split, fields, streaming
        try:
            self._builder = datasets.load_dataset_builder(path, name)
        except (
            DatasetsError,
            HTTPError,
            OSError,
            ValueError,
            RuntimeError,
        ) as error:  # RuntimeError: it is a loading script
            raise InputError(
                f"data.path: can't load the dataset {self._shown} ({error}). Expected 'demo', a .txt, .jsonl or "
                f".parquet file, a folder of them, or a hub dataset's id; data.name is its configuration."
            ) from error

    @property
    def fingerprint(self) -> str:
        """What identifies the content: the hub's commit, or the digest of a local folder's files; with name and split.

        The rows come from the builder that was asked, so they are of this very commit.
        """
        folder = Path(self.path)
        revision = _folder_digest(folder) if folder.is_dir() else f"{self.path}@{self._builder.hash}"
        return f"dataset {revision} {self.name} {self.split}"

    def documents(self) -> Iterator[Document]:
        """The documents, in the dataset's order. A null text is no document."""
        rows = self._rows()
        read = 0
        try:
            for row in rows:
                document = self.fields.take(row, f"the dataset {self._shown}")
                read += 1
                if document is not None:
                    yield document
        except (DatasetsError, HTTPError, OSError, pa.ArrowException) as error:
            raise RunError(f"Reading the dataset {self._shown} broke off after {read} rows ({error}).") from error

    def _rows(self) -> Iterable[dict[str, Any]]:
        try:
            if self.streaming:
                rows = self._builder.as_streaming_dataset(split=self.split)
            else:
                self._builder.download_and_prepare()
                rows = self._builder.as_dataset(split=self.split)
        except (DatasetsError, HTTPError, OSError, ValueError) as error:
            reason = error.__cause__ or error  # a generation error names no file, its cause does
            raise InputError(f"data.split: can't load {self.split!r} of {self._shown} ({reason}).") from error
        # Other columns may hold images or audio that would be decoded; a stream need not know its columns beforehand.
        columns = list(self.fields.columns.values())
        return rows.select_columns(columns) if set(columns) <= set(rows.column_names or ()) else rows

    @property
    def _shown(self) -> str:
        return f"{self.path!r}" + (f" ({self.name})" if self.name else "")


def _folder_digest(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return content_digest((os.fsencode(path.relative_to(folder)), path) for path in files)  # names decide the splits

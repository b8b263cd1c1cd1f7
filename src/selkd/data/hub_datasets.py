"""Documents from a Hugging Face dataset: a hub id, or a local folder laid out as a dataset."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets.exceptions import DatasetsError
from huggingface_hub.errors import HTTPError

from selkd.data.documents import Document, columns_of, document_of
from selkd.data.text_files import content_digest
from selkd.errors import InputError, RunError
from selkd.files import DISK_FULL
from selkd.recipe.data import DataOptions


class HubDataset:
    """The split and configuration that ``options`` name, read lazily. The ``datasets`` library runs no dataset's code.

    Args:
        path: a hub id or a local folder.
        options: if ``streaming`` is null, rows are streamed if ``tokens`` is set, and downloaded otherwise.

    Raises:
        InputError: the dataset, configuration, split or column does not exist, or the hub can't be reached.
        RunError: reading broke off.
    """

    def __init__(self, path: str, options: DataOptions) -> None:
        self.path, self.options = path, options
        self._shown = f"{path!r}" + (f" ({options.name})" if options.name else "")
        try:
            self._builder = datasets.load_dataset_builder(path, options.name)
        except (DatasetsError, HTTPError, OSError, ValueError, RuntimeError) as error:  # RuntimeError: a loading script
            raise InputError(
                f"data.path: can't load the dataset {self._shown} ({error}). Expected 'demo', a .txt, .jsonl or "
                f".parquet file, a folder of them, or a hub dataset's id; data.name is its configuration."
            ) from error

    @property
    def fingerprint(self) -> str:
        """The content's identity: the hub's commit or the digest of a local folder's files, with name and split.

        The rows are read from the same builder, so they are of this commit.
        """
        folder = Path(self.path)
        revision = _folder_digest(folder) if folder.is_dir() else f"{self.path}@{self._builder.hash}"
        return f"dataset {revision} {self.options.name} {self.options.split}"

    def documents(self) -> Iterator[Document]:
        """The documents, in the dataset's order. A null text is no document."""
        rows = self._rows()
        n_read = 0
        try:
            for row in rows:
                document = document_of(row, self.options, f"the dataset {self._shown}")
                n_read += 1
                if document is not None:
                    yield document
        except (DatasetsError, HTTPError, OSError, pa.ArrowException) as error:
            raise RunError(f"Reading the dataset {self._shown} broke off after {n_read} rows ({error}).") from error

    def _rows(self) -> Iterable[dict[str, Any]]:
        options, split = self.options, self.options.split
        try:
            if options.tokens is not None if options.streaming is None else options.streaming:
                rows = self._builder.as_streaming_dataset(split=split)
            else:
                self._builder.download_and_prepare()
                rows = self._builder.as_dataset(split=split)
        except (DatasetsError, HTTPError, OSError, ValueError) as error:
            reason = error.__cause__ or error  # of a generation error, only the cause names the file
            if isinstance(reason, OSError) and reason.errno in DISK_FULL:
                raise RunError(
                    f"{self._builder.cache_dir} can't be written ({reason}). Free space there, or set "
                    "HF_DATASETS_CACHE to another folder; then run again."
                ) from error
            raise InputError(f"data.split: can't load {split!r} of {self._shown} ({reason}).") from error
        # Other columns may hold images or audio, which would be decoded. A stream may not know its columns beforehand.
        columns = list(columns_of(options).values())
        return rows.select_columns(columns) if set(columns) <= set(rows.column_names or ()) else rows


def _folder_digest(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return content_digest((os.fsencode(path.relative_to(folder)), path) for path in files)  # names decide splits

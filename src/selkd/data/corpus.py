"""The text's source: the demo's text, local files, or a Hugging Face dataset."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from selkd.data.demo_text import demo_digest, demo_documents
from selkd.data.documents import Document, columns_of, has_text
from selkd.data.hub_datasets import HubDataset
from selkd.data.text_files import content_digest, file_documents
from selkd.errors import InputError
from selkd.recipe.data import DataOptions
from selkd.recipe.fields import SUFFIXES, is_data_set

_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


@dataclass(frozen=True)
class Corpus:
    """Documents in a fixed order, and a fingerprint of them.

    Args:
        path: ``data.path``, for messages.
        fingerprint: changes whenever the content may have changed.
        read: iterates over the documents from the first one.
    """

    path: str
    fingerprint: str
    read: Callable[[], Iterator[Document]]

    def documents(self) -> Iterator[Document]:
        """The documents that have a visible character. Raises InputError at the end if there was none."""
        empty = True
        for document in self.read():
            if has_text(document):
                empty = False
                yield document
        if empty:
            raise InputError(f"data.path: {self.path} holds no text.")


def open_corpus(options: DataOptions) -> Corpus:
    """Find the text of ``data.path``. ``demo`` takes precedence over a local path, and that over a hub id.

    A folder that directly contains .txt, .jsonl or .parquet files is read file by file, in the order of their names.
    A folder with a dataset card (a README.md with a YAML header), or with such files only in subfolders, is loaded as a
    Hugging Face dataset, whose splits and configurations ``data.split`` and ``data.name`` choose.

    Raises:
        InputError: nothing exists at the path, its kind is unknown, or ``data.name``, ``data.split``,
            ``data.streaming`` or a field is set for text that has no such thing.
    """
    if options.path == "demo":
        _refuse_what_has_no_effect(options, "the demo text", has_fields=False)
        return Corpus(options.path, f"demo {demo_digest()}", demo_documents)
    path = Path(options.path).expanduser()
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise InputError(f"data.path: expected a file that ends in {', '.join(SUFFIXES)}, got {options.path}.")
        return _files_corpus(options, [path])
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.is_file() and file.suffix in SUFFIXES)
        if files and not is_data_set(path):
            return _files_corpus(options, files)
    elif path.suffix in SUFFIXES or not _HUB_ID.fullmatch(options.path):
        raise InputError(
            f"data.path: there is no file or folder {options.path!r}. Expected 'demo', a .txt, .jsonl or .parquet "
            f"file, a folder of them, or a hub dataset's id."
        )
    dataset = HubDataset(str(path), options)
    return Corpus(options.path, dataset.fingerprint, dataset.documents)


def _files_corpus(options: DataOptions, files: list[Path]) -> Corpus:
    _refuse_what_has_no_effect(options, options.path, has_fields=any(file.suffix != ".txt" for file in files))
    digest = content_digest((file.suffix.encode(), file) for file in files)  # names count only by the order they give

    def read() -> Iterator[Document]:
        for file in files:
            yield from file_documents(file, options)

    return Corpus(options.path, f"files {digest}", read)


def _refuse_what_has_no_effect(options: DataOptions, what: str, has_fields: bool) -> None:
    if options.name is not None:
        raise InputError(f"data.name: {what} has no configurations, got {options.name!r}; leave it out.")
    if options.split != "train":
        raise InputError(f"data.split: {what} has no splits, got {options.split!r}; leave it out.")
    if options.streaming is not None:
        raise InputError(f"data.streaming: only hub data sets are streamed, and this is {what}; leave it out.")
    for key, column in columns_of(options).items():
        if column != "text" and not has_fields:
            raise InputError(f"{key}: {what} has no fields, got {column!r}; leave it out.")

"""Documents from local .txt, .jsonl and .parquet files."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from selkd.data.documents import Document, columns_of, document_of, require_columns, texts_of
from selkd.errors import InputError
from selkd.recipe.data import RowOptions

SECTION_CHARACTERS = 10_000


def file_documents(path: Path, options: RowOptions) -> Iterator[Document]:
    """The documents of one file with one of ``SUFFIXES``, read lazily.

    A ``.txt`` file gives sections of about 10,000 characters, cut at blank lines. A ``.jsonl`` file gives the named
    fields of each line's object, a ``.parquet`` file the columns of these names. A null text is no document.

    Raises:
        InputError: the file is malformed or not UTF-8, or a field is missing or not text. The message names the file,
            and the line of a JSONL file.
    """
    if path.suffix == ".txt":
        return sections(_lines(path))
    if path.suffix == ".jsonl":
        return _jsonl(path, options)
    assert path.suffix == ".parquet", path
    return _parquet(path, options)


def content_digest(files: Iterable[tuple[bytes, Path]]) -> str:
    """xxh3_128 (hex) of the labels and contents of files, in this order. The paths themselves are not hashed.

    Raises:
        InputError: a file can't be read.
    """
    digest = xxhash.xxh3_128()
    for label, path in files:
        try:
            digest.update(label + b"\0%d\n" % path.stat().st_size)
            with path.open("rb") as file:
                hashlib.file_digest(file, lambda: digest)
        except OSError as error:
            raise InputError(f"data.path: can't read {path} ({error.strerror}).") from error
    return digest.hexdigest()


def json_lines(path: Path, key: str = "data.path") -> Iterator[tuple[str, Any]]:
    """The value of each line that is not blank, and where it stands: "FILE, line 3".

    Raises:
        InputError: the file can't be read, is not UTF-8, or a line is not JSON. The message begins with ``key``.
    """
    for number, line in enumerate(_lines(path, key), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:  # RecursionError: nested too deep to be a row of data
                raise InputError(f"{key}: {where} is not valid JSON ({error}).") from error
            yield where, value


def _lines(path: Path, key: str = "data.path") -> Iterator[str]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            yield from file
    except UnicodeDecodeError as error:
        raise InputError(f"{key}: {path} is not UTF-8 text ({error}); convert it.") from error
    except OSError as error:
        raise InputError(f"{key}: can't read {path} ({error.strerror}).") from error


def sections(text_lines: Iterable[str]) -> Iterator[str]:
    """Sections of about 10,000 characters, cut at blank lines. ``text_lines`` keep their line ends."""
    lines: list[str] = []
    characters = 0
    for line in text_lines:
        lines.append(line)
        characters += len(line)
        # A text without blank lines must not become one endless document, so it is cut at any line's end.
        if characters >= 2 * SECTION_CHARACTERS or (characters >= SECTION_CHARACTERS and not line.strip()):
            yield "".join(lines)
            lines, characters = [], 0
    yield "".join(lines)


def _jsonl(path: Path, options: RowOptions) -> Iterator[Document]:
    for where, row in json_lines(path):
        document = document_of(row, options, where)
        if document is None:
            continue
        try:
            "".join(texts_of(document)).encode()
        except UnicodeEncodeError as error:  # a lone \ud800 in JSON, which no tokenizer takes
            raise InputError(f"data.path: {where} holds half of a surrogate pair ({error}); remove it.") from error
        yield document


def _parquet(path: Path, options: RowOptions) -> Iterator[Document]:
    columns = columns_of(options)
    try:
        with pq.ParquetFile(path) as file:
            require_columns(columns, file.schema_arrow.names, str(path))
            for batch in file.iter_batches(batch_size=1024, columns=list(columns.values())):
                documents = (document_of(row, options, str(path)) for row in batch.to_pylist())
                yield from (document for document in documents if document is not None)
    except (pa.ArrowException, OSError) as error:  # a damaged page raises either
        raise InputError(f"data.path: {path} can't be read as Parquet ({error}).") from error

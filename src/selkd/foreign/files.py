"""Files in which others keep a teacher's distributions: DistillKit's and axolotl's Parquet, and JSON Lines of answers.

Each is read a few rows at a time, whatever its size.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from selkd.errors import InputError
from selkd.foreign.distillkit import (
    CONFIG,
    Compression,
    Decoded,
    LegacyCompression,
    decode,
    decode_legacy,
    read_compression,
)
from selkd.foreign.responses import TokenNames, UnreadableAnswer, scored
from selkd.foreign.scored import Scored

ROWS_AT_ONCE = 8
_DISTILLKIT = {"compressed_logprobs", "bytepacked_indices"}
_LEGACY = {"packed_indices", "exact_values", "coeffs"}
_AXOLOTL = {"target_token_ids", "target_logprobs"}
# What is raised where JSON or a column is not of the expected types: UnreadableAnswer and InputError are ValueErrors.
_NOT_AS_EXPECTED = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)


@dataclass(frozen=True)
class ReadOptions:
    """What a file does not say of itself.

    Attributes:
        config: DistillKit's configuration of its compression; None: beside the file.
        logits: whether the values are logits, so that the mass of the other classes is not known.
        own_rows: whether axolotl's row j is of token j; else of the next one, as its documentation has it.
    """

    config: Path | None = None
    logits: bool = False
    own_rows: bool = False


@dataclass(frozen=True)
class Source:
    """A file of distributions.

    Attributes:
        kind: what it is, in words.
        knows_tail: whether what the listed probabilities lack to 1 is the mass of the other classes.
        read: its texts, one after the other. Raises InputError where one can't be read.
    """

    path: Path
    kind: str
    knows_tail: bool
    read: Callable[[], Iterator[Scored]]


def open_sources(paths: Sequence[Path], names: TokenNames, options: ReadOptions) -> list[Source]:
    """The files, and those of the folders, in the order of their names; nothing but their columns is read.

    Of a folder the Parquet files are taken, or, where there is none, the JSON Lines.

    Raises:
        InputError: one is not there, or is of no known kind.
    """
    files: list[Path] = []
    for path in paths:
        inside = [path]
        if path.is_dir():
            inside = sorted(path.rglob("*.parquet")) or sorted(path.rglob("*.jsonl"))
        if not inside or not all(file.is_file() for file in inside):
            raise InputError(f"{path}: expected a .parquet or .jsonl file, or a folder of them.")
        files += inside
    return [_opened(file, names, options) for file in files]


def _opened(path: Path, names: TokenNames, options: ReadOptions) -> Source:
    if path.suffix == ".jsonl":
        if options.logits:
            raise InputError(f"{path}: --logits is of DistillKit's files alone; servers give log-probabilities.")
        is_axolotl = _first_keys(path) >= _AXOLOTL
        kind, knows_tail = ("axolotl", False) if is_axolotl else ("answers of a server", True)
        return Source(path, kind, knows_tail, partial(_json_lines, path, names, options, is_axolotl=is_axolotl))
    if path.suffix != ".parquet":
        raise InputError(f"{path}: expected a name that ends in .parquet or .jsonl.")
    try:
        columns = set(pq.read_schema(path).names)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: can't be read as Parquet ({error}).") from None
    if "input_ids" not in columns:
        raise InputError(
            f"{path}: expected a column input_ids, by which its texts are known; it has {sorted(columns)}."
        )
    if columns >= _DISTILLKIT or columns >= _LEGACY:
        config = read_compression(options.config or path.parent / CONFIG)
        is_legacy = not columns >= _DISTILLKIT
        if isinstance(config, LegacyCompression) != is_legacy:
            raise InputError(f"{path}: the configuration is that of DistillKit's other codec; give --config.")
        kind = f"DistillKit{', legacy codec' if is_legacy else ''}"
        return Source(path, kind, not options.logits, partial(_distillkit, path, config, options.logits))
    if columns >= _AXOLOTL:
        return Source(path, "axolotl", False, partial(_axolotl, path, options.own_rows))
    raise InputError(
        f"{path}: expected the columns of DistillKit ({', '.join(sorted(_DISTILLKIT))}; or "
        f"{', '.join(sorted(_LEGACY))}) or of axolotl ({', '.join(sorted(_AXOLOTL))}); it has {sorted(columns)}."
    )


def _distillkit(path: Path, config: Compression | LegacyCompression, is_logits: bool) -> Iterator[Scored]:
    columns = ["input_ids", *sorted(_DISTILLKIT if isinstance(config, Compression) else _LEGACY)]

    def read(row: Mapping[str, Any]) -> Scored:
        token_ids = _tokens(row["input_ids"].as_py())
        if not len(row[columns[1]].values):  # a text of one token
            return _of_next_tokens(token_ids, (np.zeros((0, 1), np.int64), np.zeros((0, 1))), False)
        if isinstance(config, Compression):
            packed, ids = _table(row, "compressed_logprobs", np.uint8), _table(row, "bytepacked_indices", np.uint8)
            return _of_next_tokens(token_ids, decode(config, packed, ids), is_logits)
        words = _table(row, "packed_indices", np.uint64)
        decoded = decode_legacy(config, words, _table(row, "exact_values"), _table(row, "coeffs"))
        return _of_next_tokens(token_ids, decoded, is_logits)

    return _parquet(path, columns, read)


def _axolotl(path: Path, own_rows: bool) -> Iterator[Scored]:
    def read(row: Mapping[str, Any]) -> Scored:
        decoded = _table(row, "target_token_ids", np.int64), _table(row, "target_logprobs", np.float64)
        return _axolotl_row(_tokens(row["input_ids"].as_py()), decoded, own_rows)

    return _parquet(path, ["input_ids", *sorted(_AXOLOTL)], read)


def _tokens(values: Any) -> np.ndarray:
    """A text's token ids, int64. Raises InputError where they are none."""
    if not isinstance(values, list) or not all(type(value) is int and 0 <= value < 2**31 for value in values):
        raise InputError("input_ids is no list of token ids")
    return np.array(values, np.int64)


def _axolotl_row(token_ids: np.ndarray, decoded: Decoded, own_rows: bool) -> Scored:
    class_ids, values = decoded
    if class_ids.shape != values.shape or ((class_ids < 0) & (values > -1e4)).any():
        raise InputError("expected as many target_token_ids as target_logprobs at each position")
    # A padded place has a large negative number.
    decoded = class_ids, np.where(values <= -1e4, -np.inf, values)
    return Scored(token_ids.astype(np.int64), *decoded) if own_rows else _of_next_tokens(token_ids, decoded, False)


def _of_next_tokens(token_ids: np.ndarray, decoded: Decoded, is_logits: bool) -> Scored:
    """``Scored`` of rows that are of the token after each."""
    class_ids, values = decoded
    if class_ids.shape != values.shape:
        raise InputError(f"it has class ids of {len(class_ids)} positions and values of {len(values)}")
    if is_logits:
        values = values - np.logaddexp.reduce(values, axis=1, keepdims=True)
    first = np.full((1, class_ids.shape[1]), -1, np.int64), np.full((1, class_ids.shape[1]), -np.inf)
    both = (np.concatenate(pair) for pair in zip(first, (class_ids, values), strict=True))
    return Scored(token_ids.astype(np.int64), *both)


def _parquet(path: Path, columns: list[str], read: Callable[[Mapping[str, Any]], Scored]) -> Iterator[Scored]:
    """The texts of a file, a few of them in memory at a time. ``read`` makes each of its columns, as Arrow scalars."""
    row = 0
    try:
        file = pq.ParquetFile(path, buffer_size=2**20, pre_buffer=False)
        for batch in file.iter_batches(batch_size=ROWS_AT_ONCE, columns=columns, use_threads=False):
            for number in range(len(batch)):
                row += 1
                yield read({name: batch.column(name)[number] for name in columns})
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: can't be read as Parquet ({error}).") from None
    except _NOT_AS_EXPECTED as error:
        reason = error if isinstance(error, InputError) else "its columns are not of the types that they should be"
        raise InputError(f"{path}, row {row}: {reason}.") from None


def _table(row: Mapping[str, Any], column: str, dtype: Any = np.float64) -> np.ndarray:
    """The numbers of a column of lists of lists, [n, k]; shorter lists are filled up: ids by -1, others by -inf."""
    lists = row[column].values
    lengths = np.diff(lists.offsets.to_numpy())
    flat = lists.flatten().to_numpy(zero_copy_only=False)
    if not len(lengths) or (lengths == lengths[0]).all():
        return flat.astype(dtype).reshape(len(lengths), -1 if len(flat) else 0)
    if dtype not in (np.int64, np.float64):
        raise InputError(f"{column}: expected as many values at each position of a row")
    table = np.full((len(lengths), lengths.max()), -1 if dtype is np.int64 else -np.inf, dtype)
    table[np.arange(lengths.max()) < lengths[:, None]] = flat
    return table


def _first_keys(path: Path) -> set[str]:
    """The keys of a file's first line that is not blank; what is none is told when it is read."""
    with suppress(OSError, ValueError, RecursionError), path.open(encoding="utf-8") as file:
        content = json.loads(next(filter(str.strip, file), ""))
        return set(content) if isinstance(content, dict) else set()
    return set()


def _json_lines(path: Path, names: TokenNames, options: ReadOptions, *, is_axolotl: bool) -> Iterator[Scored]:
    own_rows = options.own_rows if is_axolotl else None
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _json_row(line, f"{path}, line {number}", names, own_rows)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: can't be read ({error}).") from None


def _json_row(line: str, place: str, names: TokenNames, own_rows: bool | None) -> Scored:
    """A line's text. ``own_rows`` is as in ``ReadOptions``; None: it is a file of answers, which know their tail."""
    try:
        content = json.loads(line)
        if isinstance(content, dict) and isinstance(content.get("response"), dict):  # a batch's output
            content = content["response"].get("body") or content["response"]
        if isinstance(content, dict) and content.keys() >= _AXOLOTL | {"input_ids"}:
            if own_rows is None:
                raise InputError(
                    "it has axolotl's columns, whose probabilities were divided by their sum, and the file's first "
                    "line is an answer of a server, whose were not; keep the two in files of their own"
                )
            decoded = _filled(content["target_token_ids"], -1, np.int64), _filled(content["target_logprobs"], -np.inf)
            return _axolotl_row(_tokens(content["input_ids"]), decoded, own_rows)
        if isinstance(content, dict) and isinstance(content.get("logprobs"), list) and "input_ids" in content:
            return _last_tokens(content["input_ids"], content["logprobs"], names)
        return scored(content, names)
    except _NOT_AS_EXPECTED as error:
        reason = error if isinstance(error, UnreadableAnswer | InputError) else "it is no JSON of a known shape"
        raise InputError(f"{place}: {reason}.") from None


def _filled(lists: Sequence[Sequence[float]], missing: float, dtype: Any = np.float64) -> np.ndarray:
    table = np.full((len(lists), max(map(len, lists), default=0)), missing, dtype)
    for number, row in enumerate(lists):
        if dtype is np.int64 and not all(type(value) is int for value in row):
            raise InputError("target_token_ids has a class that is no token id")
        table[number, : len(row)] = row
    return table


def _last_tokens(token_ids: list[int], lists: list[Any], names: TokenNames) -> Scored:
    """axolotl's data before its own preparation: a list of ``{token, logprob}`` for each of the last tokens."""
    entries: list[dict[str, float]] = [{e["token"]: e["logprob"] for e in entry or []} for entry in lists]
    tops: list[Mapping[str, float]] = [*({} for _ in range(len(token_ids) - len(lists))), *entries]
    told = {"tokens": [f"token_id:{i}" for i in token_ids], "top_logprobs": tops[-len(token_ids) :]}
    return scored({"logprobs": told}, names, token_ids)

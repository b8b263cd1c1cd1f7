"""The seal of a run: its record carries a digest of itself and, once the run is finished, of every file of the run.

A reader checks the record by writing 32 zeros in the place of its ``digest``: the xxh3_128 of the file is then the
digest that stood there. What the run writes anew by itself (checkpoints, the cache's shards) has digests of its own.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import xxhash

from selkd.errors import InputError
from selkd.files import RECIPE, RECORD, file_digest, is_temporary
from selkd_cache.cost import COST

DIGEST, INPUTS, FILES = "digest", "inputs", "files"  # keys of the record
EXAMPLES, OVERLAP, SCORES = "selection/examples.json", "selection/overlap.json", "selection/samples.parquet"
FIDELITY, FIDELITY_STEPS, HELD_OUT = "fidelity.json", "fidelity_steps.jsonl", "held_out.json"
METRICS, REPORT, CARD = "metrics.jsonl", "report.html", "student/README.md"
CACHE_COST = f"teacher_cache/{COST}"
_UNSEALED = "0" * 32
_FILES = (RECIPE, METRICS, "rollouts.jsonl", REPORT, CACHE_COST, FIDELITY, FIDELITY_STEPS, HELD_OUT)
_FOLDERS = ("selection", "student", "adapter", "best_student", "benchmarks")


def sealed(record: dict[str, Any]) -> str:
    """The text of a record's file, with the digest of this text as its first key, which ``record`` gets, too."""
    content = {DIGEST: _UNSEALED} | {key: value for key, value in record.items() if key != DIGEST}
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    record[DIGEST] = xxhash.xxh3_128_hexdigest(text.encode())
    return text.replace(_UNSEALED, record[DIGEST], 1)


def unsealed(path: Path) -> dict[str, Any]:
    """The record in a file, whose digest matches. A record of an earlier version has none and is taken as it is.

    Raises:
        InputError: it is not JSON, no object, or not what selkd wrote.
    """
    try:
        text = path.read_bytes().decode("utf-8")
        content = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:  # or nested too deep to be a record
        raise InputError(f"{path}: expected JSON, could not read it ({error}). {_REMEDY}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(content).__name__}. {_REMEDY}")
    digest = content.get(DIGEST)
    if digest is None and not {INPUTS, FILES} & content.keys():
        return content
    if not isinstance(digest, str) or xxhash.xxh3_128_hexdigest(_without(text, digest).encode()) != digest:
        raise InputError(
            f"{path}: changed since selkd wrote it, by hand or by damage: its digest does not match, so nothing in it "
            f"can be relied on. {_REMEDY}"
        )
    return content


def require_begun(run_path: Path) -> None:
    """Raises InputError for a folder in which no run was begun."""
    if not any((run_path / name).is_file() for name in (RECORD, RECIPE)):
        raise InputError(f"{run_path}: no run: neither {RECORD} nor {RECIPE} is there. Give a folder that selkd wrote.")


_REMEDY = "Put back what selkd wrote, or give another --out; nothing was changed."


def _without(text: str, digest: str) -> str:
    return text.replace(digest, _UNSEALED, 1)


def _refuse(constant: str) -> None:
    raise ValueError(f"the number {constant}")


def digests(run_path: Path) -> dict[str, str]:
    """The digest of each file that a finished run consists of, by its path in the run's folder."""
    paths = [run_path / name for name in _FILES]
    paths += [path for folder in _FOLDERS for path in sorted((run_path / folder).rglob("*"))]
    kept = [path for path in paths if path.is_file() and not is_temporary(path.name)]
    return {path.relative_to(run_path).as_posix(): file_digest(path) for path in kept}


def differences(run_path: Path, files: dict[str, str], only: Iterable[str] | None = None) -> dict[str, str]:
    """What is wrong with the ``files`` of a finished run, or with ``only`` some: path -> ``missing``, ``changed`` …"""
    found = {name: _difference(run_path / name, files[name]) for name in (files if only is None else only)}
    return {name: problem for name, problem in found.items() if problem is not None}


def _difference(path: Path, digest: str) -> str | None:
    try:
        return None if file_digest(path) == digest else "changed"
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        return f"unreadable ({error.strerror})"

"""What a run has come to, in a form that can be compared: equal runs have equal content, whatever time they took."""

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from selkd.files import file_digest, is_temporary

_OF_THE_CLOCK = ("seconds", "peak_memory_bytes", "environment", "runtime", "per_second")
_UNCOMPARED = {"report.html", "run.lock"}  # a page of seconds and peaks, which the record holds; a lock
Content = dict[str, Any]


def content_of(run: Path, shared: Path) -> Content:
    """The content of each file of a run and of selkd's cache folder, by its name below one of the two.

    Left out are checkpoints, which a signal may have written at another step, and memos of fingerprints, which hold
    modification times. Their remains are not: see ``remains_of``.
    """
    content: Content = {}
    for folder in (run, shared):
        for path in sorted(folder.rglob("*")):
            name = str(path.relative_to(folder))
            is_left_out = name in _UNCOMPARED or name.startswith(("checkpoints/", "fingerprints/"))
            if path.is_file() and not is_left_out and not any(map(_is_remnant, Path(name).parts)):
                content[name] = _reader_of(path)(path)
    return content


def differences(found: Content, expected: Content) -> list[str]:
    """Where two contents differ, a line each; [] if they are equal."""
    return list(_differences(found, expected, ""))


def remains_of(run: Path, shared: Path) -> list[str]:
    """Hidden and temporary files and folders, and parts of checkpoints, which a finished run should not have."""
    found = []
    for folder in (run, shared):
        for path in sorted(folder.rglob("*")):
            name = str(path.relative_to(folder))
            is_part = path.name.startswith("checkpoint-") and not (path / "trainer_state.json").is_file()
            if (_is_remnant(path.name) or is_part) and not any(name.startswith(f"{outer}/") for outer in found):
                found.append(name)
    return found


def without_clock(content: Any) -> Any:
    """Plain data without what the clock, the memory and the machine decide."""
    if isinstance(content, dict):
        return {
            key: without_clock(value)
            for key, value in content.items()
            if not any(word in str(key) for word in _OF_THE_CLOCK)
        }
    return [without_clock(value) for value in content] if isinstance(content, list) else content


def _is_remnant(name: str) -> bool:
    return name.startswith((".", "tmp")) or is_temporary(name)


def _reader_of(path: Path) -> Callable[[Path], Any]:
    if path.name in (special := {"samples.parquet": _scores, "README.md": _card}):
        return special[path.name]
    return {".json": _json, ".jsonl": _lines}.get(path.suffix, _digest)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _card(path: Path) -> str:
    return re.sub(r" in [^;\n]*; the whole run took .*? on ", " on ", path.read_text(encoding="utf-8"))


def _json(path: Path) -> Any:
    content = without_clock(json.loads(path.read_text(encoding="utf-8")))
    if path.name == "record.json":
        # Digests of files that hold seconds differ; that they are right does not.
        digests = content.get("files", {}).items()
        content["files"] = {name: _has_digest(path.parent / name, digest) for name, digest in digests}
        del content["digest"]
    return content


def _has_digest(path: Path, digest: str) -> bool:
    return path.is_file() and file_digest(path) == digest


def _lines(path: Path) -> list[Any]:
    return [without_clock(json.loads(line)) for line in path.read_text(encoding="utf-8").split("\n") if line]


def _scores(path: Path) -> dict[str, Any]:
    table = pq.read_table(path)
    meta = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
    del meta["selkd.digest"]  # of the cost, too
    meta["selkd.cost"] = without_clock(json.loads(meta.get("selkd.cost", "null")))
    return {"rows": table.to_pydict(), "metadata": meta}


def _differences(found: Any, expected: Any, name: str) -> list[str]:
    if isinstance(found, dict) and isinstance(expected, dict):
        lines = []
        for key in dict.fromkeys([*expected, *found]):
            inner = f"{name}.{key}" if name else str(key)
            if key not in found:
                lines.append(f"{inner}: missing")
            elif key not in expected:
                lines.append(f"{inner}: {_short(found[key])}, not there in the reference")
            else:
                lines += _differences(found[key], expected[key], inner)
        return lines
    if isinstance(found, list) and isinstance(expected, list) and found != expected:
        if len(found) != len(expected):
            return [f"{name}: {len(found)} entries, {len(expected)} in the reference"]
        pairs = enumerate(zip(found, expected, strict=True))
        return [line for place, (a, b) in pairs for line in _differences(a, b, f"{name}[{place}]")][:5]
    return [] if found == expected else [f"{name}: {_short(found)}, {_short(expected)} in the reference"]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."

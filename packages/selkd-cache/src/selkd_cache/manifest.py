"""The two JSON files of a cache: ``plan.json`` says what it is to hold, ``manifest.json`` that it holds it."""

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import xxhash

from selkd_cache import codec
from selkd_cache.errors import InputError
from selkd_cache.files import replacing
from selkd_cache.fingerprint import Fingerprint, check_fingerprint, n_scalars
from selkd_cache.sample_index import INDEX_FILE
from selkd_cache.shard import ids_digest, shard_name

FORMAT = "selkd-teacher-cache"
VERSIONS = {2: codec.NAME, 3: codec.NAME_WITH_SCALARS}  # without scalars, and with them
PLAN = "plan.json"
MANIFEST = "manifest.json"
_NO_CHECKSUM = b"0" * 32


def make_plan(fingerprint: Fingerprint, shard_ids: Sequence[Sequence[bytes]]) -> dict[str, Any]:
    """The content of ``plan.json``. Every process of a build computes the same plan."""
    return _document(
        fingerprint=dict(fingerprint),
        n_samples=sum(len(ids) for ids in shard_ids),
        shards=[{"samples": len(ids), "ids_digest": ids_digest(ids)} for ids in shard_ids],
    )


def make_manifest(
    plan: Mapping[str, Any], plan_checksum: str, shards: Sequence[Mapping[str, Any]], index: Mapping[str, Any]
) -> dict[str, Any]:
    """The content of ``manifest.json``, which is written once every planned shard is there.

    Args:
        shards: the ``Shard.entry`` of every shard.
        index: size and digest of the index, from ``sample_index.describe_index``.
    """
    return _document(
        complete=True,
        plan=plan_checksum,
        fingerprint=plan["fingerprint"],
        n_samples=plan["n_samples"],
        shards=list(shards),
        index=dict(index),
    )


def render(content: Mapping[str, Any]) -> tuple[bytes, str]:
    """The bytes of a file with this content, and the checksum, 32 hex digits, that stands in them."""
    blank = {**content, "checksum": _NO_CHECKSUM.decode()}
    data = json.dumps(blank, indent=1, sort_keys=True, allow_nan=False).encode() + b"\n"
    checksum = xxhash.xxh3_128_hexdigest(data)
    field = b'\n "checksum": "'
    return data.replace(field + _NO_CHECKSUM, field + checksum.encode(), 1), checksum


def write_document(path: Path, content: Mapping[str, Any]) -> None:
    """Writes the file whole or not at all. Raises RunError where the operating system refuses."""
    with replacing(path) as file:
        file.write(render(content)[0])


def read_plan(path: Path) -> tuple[dict[str, Any], str]:
    """The content of ``plan.json``, and its checksum.

    Raises:
        InputError: the file is missing, not selkd's, changed since it was written, or of an unknown version or codec.
    """
    content, checksum = _read_document(path)
    shards = content.get("shards")
    if (
        not _has_fingerprint(content)
        or not isinstance(shards, list)
        or not all(isinstance(shard, dict) and _is_digest(shard.get("ids_digest")) for shard in shards)
        or not all(_is_count(shard.get("samples")) for shard in shards)
        or not _is_count(content.get("n_samples"))
    ):
        raise InputError(f"{path.name} in {path.parent} does not describe the plan of a teacher cache")
    return content, checksum


def read_manifest(path: Path) -> dict[str, Any]:
    """The content of ``manifest.json``. Its file names are checked, so none of them leads out of the folder.

    Raises:
        InputError: as ``read_plan``, or it does not describe a complete cache.
    """
    content, _ = _read_document(path)
    shards, index = content.get("shards"), content.get("index")
    if (
        content.get("complete") is not True
        or not _is_digest(content.get("plan"))
        or not _has_fingerprint(content)
        or not isinstance(shards, list)
        or not shards
        or not isinstance(index, dict)
        or not _is_count(index.get("bytes"))
        or not _is_digest(index.get("digest"))
        or not all(_is_shard_entry(entry, number) for number, entry in enumerate(shards))
        or content.get("n_samples") != sum(entry["samples"] for entry in shards)
    ):
        raise InputError(f"{path.name} in {path.parent} does not describe a complete teacher cache: build it again")
    return content


def read_complete(directory: Path) -> dict[str, Any]:
    """The manifest of a complete cache. Raises InputError, which says what is there instead, where there is none."""
    if not directory.is_dir():
        raise InputError(f"there is no teacher cache at {directory}: build it first, or set cache.path to one")
    if not (directory / MANIFEST).exists():
        if not (directory / PLAN).exists():
            raise InputError(f"{directory} is not a teacher cache: it has neither {MANIFEST} nor {PLAN}")
        plan, _ = read_plan(directory / PLAN)
        n_shards = sum((directory / shard_name(number)).exists() for number in range(len(plan["shards"])))
        raise InputError(
            f"the teacher cache in {directory} is incomplete: {n_shards} of {len(plan['shards'])} shards are there and "
            "it was not finished: build it again to the end"
        )
    return read_manifest(directory / MANIFEST)


def contradictions(manifest: Mapping[str, Any], plan: Mapping[str, Any]) -> list[str]:
    """The keys of a manifest that say otherwise than its plan; values are compared as JSON."""
    planned = [{key: entry[key] for key in ("samples", "ids_digest")} for entry in manifest["shards"]]
    said = {**manifest, "shards": planned}
    keys = ("fingerprint", "n_samples", "shards")
    return [key for key in keys if json.dumps(said[key], sort_keys=True) != json.dumps(plan[key], sort_keys=True)]


def settled_files(directory: Path, manifest: Mapping[str, Any]) -> set[str]:
    """The shards and the index that have the manifest's sizes and were last written before it was, by name.

    A start takes these for whole and reads nothing of them, so that its cost does not grow with them. A shard's header,
    model and index, and each sample, are compared with their digests when they are first read, before they are used.
    What was written since the manifest is compared at the start.
    """
    listed = {INDEX_FILE: manifest["index"]["bytes"]} | {entry["name"]: entry["bytes"] for entry in manifest["shards"]}
    settled = set()
    with suppress(OSError):
        written = (directory / MANIFEST).stat().st_mtime_ns
        for name, size in listed.items():
            with suppress(FileNotFoundError):
                file = (directory / name).stat()
                if file.st_size == size and file.st_mtime_ns < written:
                    settled.add(name)
    return settled


def _read_document(path: Path) -> tuple[dict[str, Any], str]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path.name} in {path.parent} can't be read: {error}") from error
    damaged = f"{path.name} in {path.parent} is damaged, or is not part of a selkd teacher cache"
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{damaged}: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError(f"{damaged}: its format is not {FORMAT!r}")
    # The version is read before the checksum, which another version may compute in another way.
    version = content.get("version")
    codecs = [name for number, name in VERSIONS.items() if number == version]
    for field, known in (("version", list(VERSIONS)), ("codec", codecs)):
        if content.get(field) not in known:
            raise InputError(
                f"{path.name} in {path.parent} has {field} {content.get(field)!r}; this selkd reads "
                f"{' and '.join(map(repr, known))}: use the selkd that wrote it, or build the cache anew elsewhere"
            )
    stored = content.pop("checksum", None)
    try:
        rendered, checksum = render(content)
    except ValueError as error:
        raise InputError(f"{damaged}: {error}") from error
    if rendered != data:
        raise InputError(f"{damaged}: its bytes do not match its checksum {stored!r}")
    return content, checksum


def _document(**content: Any) -> dict[str, Any]:
    version = _version(content["fingerprint"])
    return {"format": FORMAT, "version": version, "codec": VERSIONS[version], **content}


def _version(fingerprint: Fingerprint) -> int:
    return 3 if n_scalars(fingerprint) else 2


def _has_fingerprint(content: Mapping[str, Any]) -> bool:
    """Whether the content has a fingerprint that a cache may have, and its version."""
    fingerprint = content.get("fingerprint")
    if not isinstance(fingerprint, dict):
        return False
    try:
        check_fingerprint(fingerprint)
    except InputError:
        return False
    return content["version"] == _version(fingerprint)


def _is_shard_entry(entry: object, number: int) -> bool:
    return (
        isinstance(entry, dict)
        and entry.get("name") == shard_name(number)
        and all(_is_count(entry.get(key)) for key in ("bytes", "samples", "positions", "classes"))
        and all(_is_digest(entry.get(key)) for key in ("digest", "ids_digest"))
    )


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def _is_digest(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{32}", value) is not None

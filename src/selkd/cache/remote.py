"""A cache at an address (``hf://``, ``s3://``, …, by fsspec) is copied to local disk before it is read."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import xxhash

from selkd.cache.manifest import MANIFEST, PLAN, check_same_shard, read_manifest, read_plan
from selkd.cache.sample_index import INDEX_FILE, describe_index
from selkd.cache.shard import check_shard
from selkd.errors import InputError, RunError
from selkd.files import replacing

_COPY_BYTES = 2**24


def is_remote(path: str) -> bool:
    """Whether a cache's path is an address rather than a folder of this machine."""
    return "://" in path


def fetch_cache(url: str, folder: Path) -> Path:
    """Copy a complete cache into ``folder/<digest of its manifest>``, or go on with a copy that was interrupted.

    The manifest comes last, so that a copy which has one is complete; every byte of each file is checked against it
    before. A cache that changed at its address is another copy.

    Returns:
        The copy's folder, for ``TeacherCache.open``.

    Raises:
        InputError: no complete cache there, an address that fsspec does not know, or a file that is damaged there.
        RunError: reading or writing broke off; the same call continues.
    """
    try:
        remote, root = fsspec.core.url_to_fs(url)
        manifest_bytes: bytes = remote.cat_file(f"{root.rstrip('/')}/{MANIFEST}")
    except (FileNotFoundError, ValueError, ImportError) as error:
        raise InputError(f"there is no complete teacher cache at {url}: {MANIFEST} can't be read ({error})") from error
    except Exception as error:
        raise _broken_off(url, error) from error
    local = folder / xxhash.xxh3_128_hexdigest(manifest_bytes)
    # Read under a name that no cache has: the copy is not complete before its own manifest is in place.
    listing = local / f"{MANIFEST}.{os.getpid()}.listing"
    try:
        local.mkdir(parents=True, exist_ok=True)
        listing.write_bytes(manifest_bytes)
    except OSError as error:
        raise RunError(f"{local} can't be written: {error}") from error
    try:
        manifest = read_manifest(listing)
    finally:
        listing.unlink(missing_ok=True)
    if _is_copied(local, manifest, manifest_bytes):
        return local

    def copy(name: str) -> None:
        try:
            source = remote.open(f"{root.rstrip('/')}/{name}", "rb")
        except FileNotFoundError as error:
            raise InputError(f"the teacher cache at {url} lacks {name}, which its {MANIFEST} lists") from error
        except Exception as error:
            raise _broken_off(f"{name} at {url}", error) from error

        def read() -> bytes:
            try:
                return bytes(source.read(_COPY_BYTES))
            except Exception as error:
                raise _broken_off(f"{name} at {url}", error) from error

        with source, replacing(local / name) as target:
            while part := read():
                target.write(part)

    def ensure(name: str, check: Callable[[Path], None]) -> None:
        """The file of an earlier copy if it is whole, else a new one, which has to be."""
        if (local / name).exists():
            try:
                return check(local / name)
            except InputError:
                pass
        copy(name)
        try:
            return check(local / name)
        except InputError as error:
            (local / name).unlink(missing_ok=True)
            raise InputError(f"the teacher cache at {url} is damaged: {error}") from error

    def check_plan(path: Path) -> None:
        if read_plan(path)[1] != manifest["plan"]:
            raise InputError(f"{PLAN} is another cache's")

    def check_listed(number: int, path: Path) -> None:
        entry = manifest["shards"][number]
        shard = check_shard(path, number, manifest["plan"], entry["ids_digest"], decode=False)
        check_same_shard(number, shard, entry)

    def check_index(path: Path) -> None:
        if describe_index(path) != manifest["index"]:
            raise InputError(f"{INDEX_FILE} does not match its digest")

    ensure(PLAN, check_plan)
    for number, entry in enumerate(manifest["shards"]):
        ensure(entry["name"], partial(check_listed, number))
    ensure(INDEX_FILE, check_index)
    with replacing(local / MANIFEST) as file:
        file.write(manifest_bytes)
    return local


def _is_copied(local: Path, manifest: dict[str, Any], manifest_bytes: bytes) -> bool:
    """Whether a finished copy still has all its files, each in its size; their bytes are checked as they are read."""
    sizes = {entry["name"]: entry["bytes"] for entry in manifest["shards"]} | {INDEX_FILE: manifest["index"]["bytes"]}
    try:
        return (
            (local / MANIFEST).read_bytes() == manifest_bytes
            and (local / PLAN).is_file()
            and all((local / name).stat().st_size == size for name, size in sizes.items())
        )
    except OSError:
        return False


def _broken_off(what: str, error: Exception) -> RunError:
    """Each kind of address has errors of its own (HTTP, credentials, time-outs)."""
    return RunError(f"{what} can't be read: {type(error).__name__}: {error}. Run again to continue")

"""A cache at an address (``hf://``, ``s3://``, …, by fsspec) is copied to local disk before it is read."""

import os
import shutil
from pathlib import Path

import fsspec
import xxhash

from selkd.cache.files import replacing
from selkd.cache.manifest import MANIFEST, PLAN, check_same_shard, read_manifest
from selkd.cache.sample_index import INDEX_FILE, describe_index
from selkd.cache.shard import read_shard
from selkd.errors import InputError, RunError

_COPY_BYTES = 2**24


def is_remote(path: str) -> bool:
    """Whether a cache's path is an address rather than a folder of this machine."""
    return "://" in path


def fetch_cache(url: str, folder: Path) -> Path:
    """Copy a complete cache into ``folder/<digest of its manifest>``, or go on with a copy that was interrupted.

    The manifest comes last, so that a copy which has one is complete; each file is checked against it. A cache that
    changed at its address is another copy.

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
    except OSError as error:
        raise RunError(f"{url} can't be read: {error}. Run again to continue") from error
    local = folder / xxhash.xxh3_128_hexdigest(manifest_bytes)
    if (local / MANIFEST).exists():
        return local
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

    def copy(name: str) -> None:
        try:
            source = remote.open(f"{root.rstrip('/')}/{name}", "rb")
        except FileNotFoundError as error:
            raise InputError(f"the teacher cache at {url} lacks {name}, which its {MANIFEST} lists") from error
        except OSError as error:
            raise RunError(f"{name} at {url} can't be read: {error}. Run again to continue") from error
        with source, replacing(local / name) as target:
            shutil.copyfileobj(source, target, _COPY_BYTES)

    copy(PLAN)
    for number, entry in enumerate(manifest["shards"]):
        path = local / entry["name"]
        if not path.exists():
            copy(entry["name"])
        try:
            check_same_shard(number, read_shard(path, number, manifest["plan"]), entry)
        except InputError as error:
            path.unlink(missing_ok=True)
            raise InputError(f"the copy of {url}: {error}") from error
    copy(INDEX_FILE)
    if describe_index(local / INDEX_FILE) != manifest["index"]:
        raise InputError(f"the teacher cache at {url} has a damaged {INDEX_FILE}")
    with replacing(local / MANIFEST) as file:
        file.write(manifest_bytes)
    return local

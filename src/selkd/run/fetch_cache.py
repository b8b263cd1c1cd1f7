"""Fetching a cache from an address that fsspec knows (``hf://``, ``s3://``, …): copied to local disk, then verified."""

from pathlib import Path

import fsspec
import xxhash

from selkd.errors import InputError, RunError
from selkd.files import new_folder
from selkd_cache.manifest import MANIFEST, PLAN, read_manifest
from selkd_cache.reader import TeacherCache
from selkd_cache.sample_index import INDEX_FILE
from selkd_cache.verify import verify_cache


def is_remote(path: str) -> bool:
    """Whether a cache's path is an address rather than a folder of this machine."""
    return "://" in path


def fetch_cache(url: str, folder: Path) -> Path:
    """Copy a complete cache to ``folder/<digest of its manifest>`` and verify the copy; an earlier copy is used again.

    The copy takes its name once every byte of it is verified. A cache that changed at its address gets a new copy.

    Returns:
        The copy's folder, for ``TeacherCache.open``.

    Raises:
        InputError: there is no complete cache at the address, fsspec does not know such addresses, the copy does not
            verify, or an earlier copy lost a file.
        RunError: reading or writing broke off; nothing is left behind.
    """
    try:
        remote, root = fsspec.core.url_to_fs(url)
        manifest: bytes = remote.cat_file(f"{root.rstrip('/')}/{MANIFEST}")
    except (FileNotFoundError, ValueError, ImportError) as error:
        raise InputError(f"there is no complete teacher cache at {url}: {MANIFEST} can't be read ({error})") from error
    except Exception as error:
        raise _broken_off(url, error) from error
    local = folder / xxhash.xxh3_128_hexdigest(manifest)
    if local.exists():
        try:
            TeacherCache.open(local)
            for entry in read_manifest(local / MANIFEST)["shards"]:
                if (local / entry["name"]).stat().st_size != entry["bytes"]:
                    raise InputError(f"{entry['name']} has not the size that its {MANIFEST} lists")
        except (InputError, OSError) as error:
            raise InputError(f"the copy of {url} in {local} is damaged: {error}. Remove it to copy anew") from error
        return local
    with new_folder(local) as copy:
        (copy / MANIFEST).write_bytes(manifest)
        # read_manifest checks that the manifest names files of its own folder alone.
        for name in (PLAN, INDEX_FILE, *(entry["name"] for entry in read_manifest(copy / MANIFEST)["shards"])):
            try:
                remote.get_file(f"{root.rstrip('/')}/{name}", str(copy / name))
            except FileNotFoundError as error:
                raise InputError(f"the teacher cache at {url} lacks {name}, which its {MANIFEST} lists") from error
            except Exception as error:
                raise _broken_off(f"{name} at {url}", error) from error
        if problems := verify_cache(copy, decode=False):  # the digests cover every byte
            raise InputError(f"the teacher cache at {url} is damaged: {'; '.join(problems[:3])}")
    return local


def _broken_off(what: str, error: Exception) -> RunError:
    """The error for whatever a kind of address raises (HTTP, credentials, time-outs)."""
    return RunError(f"{what} can't be copied: {type(error).__name__}: {error}. Run again")

"""A cache at an address (``hf://``, ``s3://``, …, by fsspec) is copied to local disk before it is read."""

from pathlib import Path
from tempfile import TemporaryDirectory

import fsspec
import xxhash

from selkd.cache.manifest import MANIFEST, PLAN, read_manifest
from selkd.cache.reader import TeacherCache
from selkd.cache.sample_index import INDEX_FILE
from selkd.cache.verify import verify_cache
from selkd.errors import InputError, RunError


def is_remote(path: str) -> bool:
    """Whether a cache's path is an address rather than a folder of this machine."""
    return "://" in path


def fetch_cache(url: str, folder: Path) -> Path:
    """Copy a complete cache into ``folder/<digest of its manifest>`` and verify the copy, unless it is there.

    The copy takes its name once every byte of it is verified. A cache that changed at its address is another copy.

    Returns:
        The copy's folder, for ``TeacherCache.open``.

    Raises:
        InputError: no complete cache there, an address that fsspec does not know, a copy that does not verify, or an
            earlier copy that lost a file.
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
        except InputError as error:
            raise InputError(f"the copy of {url} in {local} is damaged: {error}. Remove it to copy anew") from error
        return local
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder) as temporary:
            copy = Path(temporary) / "cache"
            copy.mkdir()
            (copy / MANIFEST).write_bytes(manifest)
            # A manifest that is read names files of its own folder alone.
            for name in (PLAN, INDEX_FILE, *(entry["name"] for entry in read_manifest(copy / MANIFEST)["shards"])):
                _get(remote, f"{root.rstrip('/')}/{name}", copy / name, url)
            if problems := verify_cache(copy):
                raise InputError(f"the teacher cache at {url} is damaged: {'; '.join(problems[:3])}")
            copy.replace(local)
    except OSError as error:
        if not local.exists():  # else another process was first, with the same content
            raise RunError(f"{local} can't be written: {error}") from error
    return local


def _get(remote: fsspec.AbstractFileSystem, source: str, target: Path, url: str) -> None:
    try:
        remote.get_file(source, str(target))
    except FileNotFoundError as error:
        raise InputError(f"the teacher cache at {url} lacks {target.name}, which its {MANIFEST} lists") from error
    except Exception as error:
        raise _broken_off(f"{target.name} at {url}", error) from error


def _broken_off(what: str, error: Exception) -> RunError:
    """Each kind of address has errors of its own (HTTP, credentials, time-outs)."""
    return RunError(f"{what} can't be copied: {type(error).__name__}: {error}. Run again")

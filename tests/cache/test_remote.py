"""Caches at an address, on fsspec's in-memory file system: the same calls as for ``s3://`` or ``hf://``."""

from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from cache_samples import FINGERPRINT, assert_same_rows, build, contents, make_rows, sample_id

from selkd.cache.reader import TeacherCache
from selkd.cache.remote import fetch_cache, is_remote
from selkd.errors import InputError, RunError

URL = "memory://bucket/cache"


@pytest.fixture
def remote(tmp_path: Path) -> Iterator[fsspec.AbstractFileSystem]:
    build(tmp_path / "original")
    memory = fsspec.filesystem("memory")
    for path in (tmp_path / "original").iterdir():
        memory.pipe_file(f"/bucket/cache/{path.name}", path.read_bytes())
    yield memory
    memory.store.clear()


def test_only_an_address_is_remote() -> None:
    assert is_remote("hf://datasets/someone/cache")
    assert not is_remote("/data/cache")
    assert not is_remote("cache")


@pytest.mark.usefixtures("remote")
def test_a_remote_cache_is_copied_whole_and_once(tmp_path: Path) -> None:
    local = fetch_cache(URL, tmp_path / "copies")
    assert contents(local) == contents(tmp_path / "original")
    assert_same_rows(TeacherCache.open(local, FINGERPRINT).get(sample_id(7)), make_rows(7))
    stamps = {path: path.stat().st_mtime_ns for path in local.iterdir()}
    assert fetch_cache(URL + "/", tmp_path / "copies") == local
    assert {path: path.stat().st_mtime_ns for path in local.iterdir()} == stamps


def test_an_interrupted_copy_is_continued(
    tmp_path: Path, remote: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    whole = type(remote)._open

    def breaking(self: object, path: str, *arguments: object, **options: object) -> object:
        opened.append(path.rsplit("/", 1)[1])
        if len(opened) == 3:
            raise ConnectionError("the network is gone")
        return whole(self, path, *arguments, **options)

    monkeypatch.setattr(type(remote), "_open", breaking)
    with pytest.raises(RunError, match="the network is gone"):
        fetch_cache(URL, tmp_path / "copies")
    (local,) = (tmp_path / "copies").iterdir()
    assert sorted(contents(local)) == ["plan.json", "shard-00000.selkd"]
    with pytest.raises(InputError, match="incomplete"):
        TeacherCache.open(local)
    assert fetch_cache(URL, tmp_path / "copies") == local
    assert opened.count("shard-00000.selkd") == 1
    assert contents(local) == contents(tmp_path / "original")


def test_what_is_damaged_or_missing_there_is_named(tmp_path: Path, remote: fsspec.AbstractFileSystem) -> None:
    name = "/bucket/cache/shard-00001.selkd"
    intact = remote.cat_file(name)
    remote.pipe_file(name, intact[:-50])
    with pytest.raises(InputError, match=r"the copy of memory://bucket/cache: shard-00001\.selkd is truncated"):
        fetch_cache(URL, tmp_path / "copies")
    remote.rm_file(name)
    with pytest.raises(InputError, match=r"lacks shard-00001\.selkd, which its manifest\.json lists"):
        fetch_cache(URL, tmp_path / "copies")
    remote.pipe_file(name, intact)
    assert contents(fetch_cache(URL, tmp_path / "copies")) == contents(tmp_path / "original")


def test_no_cache_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no complete teacher cache at memory://nothing"):
        fetch_cache("memory://nothing", tmp_path)
    with pytest.raises(InputError, match="there is no complete teacher cache at gopher://old/cache"):
        fetch_cache("gopher://old/cache", tmp_path)
    assert list(tmp_path.iterdir()) == []

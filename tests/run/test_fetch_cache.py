"""Caches at an address, on fsspec's in-memory file system: the same calls as for ``s3://`` or ``hf://``."""

from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from cache_samples import FINGERPRINT, assert_same_rows, build, contents, make_rows, sample_id
from tiny_run import make_recipe

from selkd.errors import InputError, RunError
from selkd.recipe.part import parse_part
from selkd.recipe.recipe import Recipe
from selkd.run import fetch_cache as remote_module
from selkd.run.fetch_cache import fetch_cache, is_remote
from selkd.run.pipeline import cache_only
from selkd.run.teacher_dataset import TeacherDataset
from selkd_cache.reader import TeacherCache

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


def test_an_interrupted_copy_leaves_nothing(
    tmp_path: Path, remote: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    n_opened = 0
    whole = type(remote)._open

    def breaking(self: object, path: str, *arguments: object, **options: object) -> object:
        nonlocal n_opened
        n_opened += 1
        if n_opened == 3:
            raise ConnectionError("the network is gone")
        return whole(self, path, *arguments, **options)

    monkeypatch.setattr(type(remote), "_open", breaking)
    with pytest.raises(RunError, match="the network is gone"):
        fetch_cache(URL, tmp_path / "copies")
    assert list((tmp_path / "copies").iterdir()) == []
    assert contents(fetch_cache(URL, tmp_path / "copies")) == contents(tmp_path / "original")


def test_what_is_damaged_or_missing_there_is_named(tmp_path: Path, remote: fsspec.AbstractFileSystem) -> None:
    name = "/bucket/cache/shard-00001.selkd"
    intact = remote.cat_file(name)
    remote.pipe_file(name, intact[:-50])
    with pytest.raises(
        InputError, match=r"the teacher cache at memory://bucket/cache is damaged: shard-00001\.selkd is truncated"
    ):
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


@pytest.mark.parametrize("name", ["plan.json", "shard-00001.selkd", "index.selkd"])
def test_damage_in_the_middle_of_a_file_is_no_complete_copy(
    name: str, tmp_path: Path, remote: fsspec.AbstractFileSystem
) -> None:
    """A flipped bit inside a block leaves header, index and footer as they were."""
    path = f"/bucket/cache/{name}"
    good = remote.cat_file(path)
    middle = len(good) // 2
    remote.pipe_file(path, good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :])
    with pytest.raises(InputError, match=r"the teacher cache at .* is damaged"):
        fetch_cache(URL, tmp_path / "copies")
    remote.pipe_file(path, good)
    assert contents(fetch_cache(URL, tmp_path / "copies")) == contents(tmp_path / "original")


def test_any_error_of_the_network_names_the_address(
    tmp_path: Path, remote: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Forbidden(Exception):
        """As HTTP libraries have, none of the operating system's."""

    def refuse(*_: object, **__: object) -> object:
        raise Forbidden("403")

    monkeypatch.setattr(type(remote), "_open", refuse)
    with pytest.raises(RunError, match=r"plan.json at memory://.*Forbidden: 403"):
        fetch_cache(URL, tmp_path / "copies")
    monkeypatch.setattr(type(remote), "cat_file", refuse)
    with pytest.raises(RunError, match=r"memory://bucket/cache can't be copied: Forbidden: 403"):
        fetch_cache(URL, tmp_path / "copies")


@pytest.mark.usefixtures("remote")
@pytest.mark.parametrize("lost", ["the file", "its end"])
@pytest.mark.parametrize("name", ["index.selkd", "shard-00001.selkd"])
def test_a_copy_that_lost_a_file_or_a_part_of_one_is_refused_and_left(name: str, lost: str, tmp_path: Path) -> None:
    copy = fetch_cache(URL, tmp_path / "copies")
    content = (copy / name).read_bytes()
    (copy / name).unlink()
    if lost == "its end":
        (copy / name).write_bytes(content[:-1])
    left = contents(copy)
    with pytest.raises(InputError, match=rf"the copy of {URL} in .* is damaged: .*{name}.*Remove it to copy anew"):
        fetch_cache(URL, tmp_path / "copies")
    assert contents(copy) == left


def test_a_copy_that_another_process_finished_first_is_taken(
    tmp_path: Path, remote: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    del remote
    verify = remote_module.verify_cache

    def meanwhile(copy: Path, decode: bool = True) -> list[str]:
        monkeypatch.setattr(remote_module, "verify_cache", verify)
        fetch_cache(URL, tmp_path / "copies")
        return verify(copy, decode=decode)

    monkeypatch.setattr(remote_module, "verify_cache", meanwhile)
    local = fetch_cache(URL, tmp_path / "copies")
    assert list((tmp_path / "copies").iterdir()) == [local]
    assert contents(local) == contents(tmp_path / "original")


@pytest.mark.usefixtures("remote")
def test_a_copy_whose_manifest_was_damaged_is_refused(tmp_path: Path) -> None:
    copy = fetch_cache(URL, tmp_path / "copies")
    (copy / "manifest.json").write_text("{")
    with pytest.raises(InputError, match=r"is damaged: .*manifest.json.*Remove it to copy anew"):
        fetch_cache(URL, tmp_path / "copies")


def test_a_runs_samples_are_read_with_the_cache_at_its_address(
    tmp_path: Path, remote: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a trainer of one's own, with the scores on disk and without: these then come from the same cache."""
    monkeypatch.setenv("SELKD_CACHE", str(tmp_path / "selkd"))
    recipe = make_recipe(tmp_path, samples={"metric": "ce_ratio", "fraction": 0.3, "from_cache": True})
    cache_only(parse_part(Recipe, recipe), tmp_path / "built")
    for path in (tmp_path / "built" / "teacher_cache").iterdir():
        remote.pipe_file(f"/bucket/of_run/{path.name}", path.read_bytes())
    cache_only(parse_part(Recipe, recipe | {"cache": {"path": "memory://bucket/of_run"}}), tmp_path / "run")
    expected = [sample.id for sample in TeacherDataset.open(tmp_path / "built").samples]
    for _ in range(2):
        opened = TeacherDataset.open(tmp_path / "run")
        assert [sample.id for sample in opened.samples] == expected
        assert expected[0] in opened.cache
        (tmp_path / "run" / "selection" / "samples.parquet").unlink(missing_ok=True)

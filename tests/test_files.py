"""Files and folders that are whole or not there, whoever else writes them."""

import os
import signal
import stat
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.pool import Pool
from pathlib import Path

import pytest
import xxhash

from selkd.errors import RunError
from selkd.files import file_digest, is_temporary, new_folder, remove_temporaries, settle, write_whole


def fill(path: Path, text: str, **options: bool) -> None:
    with new_folder(path, **options) as new:
        (new / "inner").mkdir()
        (new / "inner" / "a.txt").write_text(text, encoding="utf-8")
        assert not path.exists() or text != (path / "inner" / "a.txt").read_text(encoding="utf-8")


def test_a_files_digest_is_xxh3_128_of_all_its_bytes(tmp_path: Path) -> None:
    content = bytes(range(256)) * 5000  # more than is read at once
    (tmp_path / "file").write_bytes(content)
    assert file_digest(tmp_path / "file") == xxhash.xxh3_128_hexdigest(content)


def test_a_folder_appears_whole_with_its_parents_and_the_usual_mode(tmp_path: Path) -> None:
    path, usual = tmp_path / "parent" / "folder", tmp_path / "usual"
    usual.mkdir()
    fill(path, "one")
    assert (path / "inner" / "a.txt").read_text(encoding="utf-8") == "one"
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(usual.stat().st_mode)
    assert list(path.parent.iterdir()) == [path]


def test_a_block_that_raises_leaves_nothing_and_the_disks_refusal_is_a_run_error(tmp_path: Path) -> None:
    for error, raised in ((ValueError("mine"), ValueError), (OSError(28, "No space left on device"), RunError)):
        refused = pytest.raises(raised, match=r"mine|folder/half can't be written .*No space left.*SELKD_CACHE")
        with refused, new_folder(tmp_path / "folder") as new:
            (new / "half").write_text("written", encoding="utf-8")
            raise error
        assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(RunError, match=r"file/folder can't be written"):
        fill(tmp_path / "file" / "folder", "one")


def test_the_first_of_two_processes_wins_unless_the_folder_is_to_be_replaced(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    fill(path, "one")
    fill(path, "two")
    assert (path / "inner" / "a.txt").read_text(encoding="utf-8") == "one"
    fill(path, "three", replace=True)
    assert (path / "inner" / "a.txt").read_text(encoding="utf-8") == "three"
    assert list(tmp_path.iterdir()) == [path]


def test_what_takes_the_name_and_is_no_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "folder").write_text("a file", encoding="utf-8")
    with pytest.raises(RunError, match=r"folder can't be written"), new_folder(tmp_path / "folder"):
        pass
    assert (tmp_path / "folder").read_text(encoding="utf-8") == "a file"


def test_the_folder_that_was_there_stays_if_the_new_one_cannot_take_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    best = tmp_path / "best"
    best.mkdir()
    (best / "weights").write_text("old")
    rename = Path.rename

    def refused(self: Path, target: Path) -> Path:
        if self.name == "new":
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(RunError, match="best can't be written"), new_folder(best, replace=True) as new:
        (new / "weights").write_text("new")
    assert (best / "weights").read_text() == "old"
    assert list(tmp_path.iterdir()) == [best]


def write_and_read(path: Path, letter: str) -> int:
    """Write the file again and again, and count what is read of it that no writer wrote."""
    torn = 0
    for _ in range(40):
        write_whole(path, letter * 100_000)
        read = path.read_bytes()
        torn += len(read) != 100_000 or len(set(read)) != 1
    return torn


def fill_and_read(path: Path, letter: str) -> int:
    """Fill the folders of several names, and count what is read of them that no writer wrote."""
    torn = 0
    for number in range(20):
        with new_folder(path / str(number)) as new:
            for name in "ab":
                (new / name).write_text(letter * 1000)
        read = {(path / str(number) / name).read_text() for name in "ab"}
        torn += len(read) != 1
    return torn


def test_three_processes_that_write_one_file_or_folder_never_fail_or_mix(tmp_path: Path) -> None:
    with Pool(3, context=get_context("fork")) as processes:
        for work, place in ((write_and_read, tmp_path / "file"), (fill_and_read, tmp_path / "folders")):
            assert processes.starmap(work, [(place, letter) for letter in "xyz"], chunksize=1) == [0, 0, 0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folders"]
    assert not [path for path in tmp_path.rglob("*") if is_temporary(path.name)]


def killed(work: Callable[[], None]) -> None:
    """Do ``work``, which kills its process, in a process of its own."""
    if (child := os.fork()) == 0:
        work()
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


def test_a_folder_that_a_killed_process_was_filling_goes_and_nothing_else(tmp_path: Path) -> None:
    def half() -> None:
        with new_folder(tmp_path / "one") as new:
            (new / "half").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)

    theirs = tmp_path / ".theirs.0123456789abcdef.tmp"
    for path in (theirs, tmp_path / ".notes", tmp_path / ".one-abcd1234"):
        path.mkdir()
        (path / "lock").write_text("")
        (path / "mine").write_text("mine")
    link = tmp_path / ".link.0123456789abcdef.tmp"
    link.symlink_to(theirs)
    before = set(tmp_path.iterdir())
    killed(half)
    (left,) = set(tmp_path.iterdir()) - before
    assert (left / "new" / "half").exists()
    with new_folder(tmp_path / "two"):
        (being_filled,) = set(tmp_path.iterdir()) - before
        assert being_filled != left  # the left one went when this one came
        remove_temporaries(tmp_path)
        with new_folder(tmp_path / "three"):
            pass
        assert being_filled.exists()
    assert set(tmp_path.iterdir()) == before | {tmp_path / "two", tmp_path / "three"}
    assert len(list(theirs.iterdir())) == 2


def test_a_process_killed_between_the_two_renames_loses_neither_folder(tmp_path: Path) -> None:
    best, rename = tmp_path / "best", Path.rename

    def die(self: Path, target: Path) -> Path:
        if self.name == "new" and target == best:
            os.kill(os.getpid(), signal.SIGKILL)
        return rename(self, target)

    def replace_it() -> None:
        Path.rename = die  # type: ignore[method-assign]
        fill(best, "second", replace=True)

    fill(best, "first")
    killed(replace_it)
    assert not best.exists()
    remove_temporaries(tmp_path)
    assert (best / "inner" / "a.txt").read_text() == "second"  # it was whole
    assert list(tmp_path.iterdir()) == [best]


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_files_are_as_readable_as_the_umask_says(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        with new_folder(tmp_path / "folder") as new:
            (new / "inner").mkdir()
            (new / "inner" / "private").touch(mode=0o600)  # as safetensors makes its files
        write_whole(tmp_path / "file", "")
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "private").touch(mode=0o600)
        settle(tmp_path / "other")
    finally:
        os.umask(before)
    for path in tmp_path.rglob("*"):
        usual = (0o777 if path.is_dir() else 0o666) & ~umask
        assert stat.S_IMODE(path.stat().st_mode) == usual, path

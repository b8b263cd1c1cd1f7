"""Folders that are whole or not there."""

import stat
from pathlib import Path

import pytest
import xxhash

from selkd.errors import RunError
from selkd.files import file_digest, new_folder


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
        refused = pytest.raises(raised, match=r"mine|folder can't be written .*No space left.*SELKD_CACHE")
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

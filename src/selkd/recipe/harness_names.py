"""The names of lm-evaluation-harness's tasks and of the user's own, read off their files without the harness."""

import os
import re
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from selkd.errors import InputError
from selkd.extras import is_installed
from selkd.own_code import is_allowed

# A key at the beginning of a line that names a task, its group or its tags, with a list that follows.
_NAME = re.compile(rb"^[\"']?(task|group|tag|class)[\"']?[ \t]*:[ \t]*(.*(?:\r?\n[ \t]*-.*)*)", re.MULTILINE)
_PASSED_OVER = {"__pycache__", ".ipynb_checkpoints"}  # as by the harness


def has_harness() -> bool:
    """Whether lm-evaluation-harness is installed; nothing is imported."""
    return is_installed("lm_eval")


@cache
def harness_tasks() -> frozenset[str]:
    """The names of the harness's tasks, groups of tasks and tags, in less than a second."""
    spec = find_spec("lm_eval")
    assert spec is not None, "asked for where the harness is installed"
    assert spec.submodule_search_locations is not None, "the harness is a package"
    return frozenset(_names_below(Path(spec.submodule_search_locations[0]) / "tasks"))


def own_tasks(folders: Iterable[str]) -> set[str] | None:
    """The names of the tasks in ``folders``; None where a recipe is only read, and so they are not.

    A task's templates and functions are code, so the gate of own code is asked for each folder.

    Raises:
        InputError: a folder does not exist or holds no task.
        ValueError: the gate refuses.
    """
    names: set[str] = set()
    for folder in folders:
        if not is_allowed("evaluation.include_path", folder):
            return None
        path = Path(folder).expanduser()
        if not path.is_dir():
            raise InputError(f"include_path: no folder {folder!r}. Give the folder that holds your tasks' .yaml files.")
        found = set(_names_below(path))
        if not found:
            raise InputError(
                f"include_path: no .yaml file in {folder} is a task of lm-evaluation-harness: none has the key task or "
                "group."
            )
        names |= found
    return names


def has_own_task(folders: Iterable[str], name: str) -> bool:
    """Whether one of the user's folders has a task, group or tag of this name."""
    return any(name in _names_below(Path(folder).expanduser()) for folder in folders)


def is_task_file(entry: str) -> bool:
    """Whether an entry of a suite is the path of a task's file, and no name."""
    return entry.endswith((".yaml", ".yml"))


def check_task_file(entry: str) -> None:
    """Check the file of a task that a suite names by its path, and ask the gate of own code.

    Raises:
        InputError: there is no such file, or it is no task's.
        ValueError: the gate refuses.
    """
    path = Path(entry).expanduser()
    if not is_allowed("evaluation.suite", str(path)):
        return
    if not path.is_file():
        raise InputError(f"suite: there is no file {entry!r}. Give a task's YAML file, or a name.")
    if not any(True for _ in _names_in(path)):
        raise InputError(f"suite: {entry} is no task of lm-evaluation-harness: it lacks the key task or group.")


def _names_below(folder: Path) -> Iterator[str]:
    for where, below, files in os.walk(folder):
        below[:] = [name for name in below if name not in _PASSED_OVER]
        for name in files:
            if name.endswith(".yaml"):
                yield from _names_in(Path(where, name))
            elif ("." not in name or "yaml" in name or name.endswith(".yml")) and Path(where, name).is_file():
                # A template: its tags are its tasks'.
                yield from _names_in(Path(where, name), keys=(b"tag",))


def _names_in(path: Path, keys: tuple[bytes, ...] = (b"task", b"tag")) -> Iterator[str]:
    found: dict[bytes, bytes] = dict(_NAME.findall(_content(path)))
    for key in (b"group",) if b"group" in found and b"class" not in found else keys:
        if key in found:
            yield from _texts(found[key])


def _content(path: Path) -> bytes:
    """The bytes of a file. Raises InputError for what the harness would fail at, or wait for, as a pipe."""
    if not path.is_file():
        raise InputError(f"{path} has the name of a task's file and is none. Move it away.")
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} can't be read ({error.strerror}).") from None


def _texts(value: bytes) -> Iterator[str]:
    """A plain text, or a list of texts, as YAML has it behind a key."""
    if re.fullmatch(rb"[\w.-]+[ \t\r]*", value):  # nearly always; YAML's own reader is slow
        yield value.strip().decode()
        return
    try:
        content: Any = yaml.safe_load(value.decode())
    except (UnicodeDecodeError, yaml.YAMLError):
        return
    for entry in content if isinstance(content, list) else [content]:
        if isinstance(entry, str | int | float):
            yield str(entry)

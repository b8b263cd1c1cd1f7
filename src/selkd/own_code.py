"""A user's own code, ``module:function``: it is imported here alone, and a gate is asked before.

Python users meet no gate. The commands that run a recipe name the code before they import it, or refuse it
(``--no-plugins``). Where the recipe of a run is only read, nothing is imported.
"""

import functools
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

Function = Callable[..., Any]
Gate = Callable[[str, str], bool]
"""Asked with a recipe's key and its ``module:function``: whether to import it. It refuses by raising ValueError."""

_gate: ContextVar[Gate] = ContextVar("_gate", default=lambda _key, _name: True)
_imported: set[str] = set()


@contextmanager
def gated(gate: Gate) -> Iterator[None]:
    """Ask ``gate`` within the block before a module is imported."""
    token = _gate.set(gate)
    try:
        yield
    finally:
        _gate.reset(token)


def only_read() -> Any:
    """A block in which recipes are read without importing anything that this process has not imported before."""
    return gated(lambda _key, name: name in _imported)


def is_allowed(key: str, name: str) -> bool:
    """Whether the gate lets a recipe's ``key`` run what is called ``name``; False where a recipe is only read.

    Raises:
        ValueError: the gate refuses it.
    """
    return _gate.get()(key, name)


def own_function(key: str, name: str) -> Function | None:
    """The function that a recipe's ``key`` calls ``module:function``; None where the gate leaves it unread.

    Raises:
        ValueError: it can't be imported, or the gate refuses it.
    """
    if not is_allowed(key, name):
        return None
    function = _function(name)
    _imported.add(name)
    return function


@functools.cache
def _function(name: str) -> Function:
    module_name, _, attribute = name.partition(":")
    folder = os.getcwd()  # noqa: PTH109  sys.path holds strings
    is_new = folder not in sys.path
    if is_new:
        sys.path.append(folder)
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # a user's module may raise anything
        raise ValueError(f"{name!r}: {module_name} can't be imported ({type(error).__name__}: {error})") from error
    finally:
        if is_new:
            sys.path.remove(folder)
    function = getattr(module, attribute, None)
    if not callable(function) or isinstance(function, type):
        raise ValueError(f"{name!r}: {module_name} has no function {attribute!r}")
    return function

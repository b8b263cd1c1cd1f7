"""A user's own metric, policy, criterion or class sampler: one function, named in a recipe.

A recipe names it as ``module:function``, or by the name under which a decorator registered it::

    from selkd.plugins import metric

    @metric("margin")
    def margin(student_logits):
        top = student_logits.topk(2).values
        return top[:, 1] - top[:, 0]

A function asks for what it needs by the names of its parameters; a metric that asks for ``teacher_logits`` needs the
teacher. What it returns is checked for shape, finiteness and mask where it is used. A recipe that names
``module:function`` runs that module's code; modules are found as Python finds them, and in the current folder.

Shapes: B batch, T positions, n of a chunk, V classes, U draws.

==========  =============================================================  ==========================================
kind        parameters to choose from                                      returns
==========  =============================================================  ==========================================
metric      ``student_logits``, ``teacher_logits`` [n, V]; ``targets`` [n]  importance, finite, [n]
policy      ``scores``, ``valid_mask`` [B, T]; ``counts`` [B] (ceil(k*n)    coefficients, finite, 0 where not valid,
            of each sample); ``progress``, the run's share done             [B, T]
criterion   ``student_logits``, ``teacher_logits`` [n, V], both divided by  divergence in nats, finite, [n];
            the temperature; ``targets`` [n]                                differentiable in the student's logits
sampler     ``probabilities`` [n, V]; ``draws``; ``uniforms`` [n, U]        distinct class ids int64 and counts, both
            float64 in [0, 1), the position's own                           [n, C]; rows padded with count 0
==========  =============================================================  ==========================================
"""

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any, Literal, TypeVar

from selkd.recipe_errors import nearest

Kind = Literal["metric", "policy", "criterion", "sampler"]
Function = Callable[..., Any]
F = TypeVar("F", bound=Function)

PARAMETERS: dict[Kind, tuple[str, ...]] = {
    "metric": ("student_logits", "teacher_logits", "targets"),
    "policy": ("scores", "valid_mask", "counts", "progress"),
    "criterion": ("student_logits", "teacher_logits", "targets"),
    "sampler": ("probabilities", "draws", "uniforms"),
}

_registered: dict[Kind, dict[str, Function]] = {kind: {} for kind in PARAMETERS}


def metric(name: str) -> Callable[[F], F]:
    """Decorator: registers a position-importance metric under ``name``."""
    return _registering("metric", name)


def policy(name: str) -> Callable[[F], F]:
    """Decorator: registers a position policy under ``name``."""
    return _registering("policy", name)


def criterion(name: str) -> Callable[[F], F]:
    """Decorator: registers an alignment criterion under ``name``."""
    return _registering("criterion", name)


def sampler(name: str) -> Callable[[F], F]:
    """Decorator: registers a class sampler under ``name``."""
    return _registering("sampler", name)


def _registering(kind: Kind, name: str) -> Callable[[F], F]:
    def register(function: F) -> F:
        _check(kind, name, function)
        _registered[kind][name] = function
        return function

    return register


def check_name(kind: Kind, name: str, builtin: Iterable[str]) -> str:
    """``name`` if it is built in, registered, or a ``module:function`` that can be used.

    Raises:
        ValueError: it is none of these; what is allowed and the nearest name are told.
    """
    builtin = list(builtin)
    if name in builtin:
        return name
    if name in _registered[kind] or ":" in name:
        resolve(kind, name)
        return name
    allowed = [*builtin, *_registered[kind]]
    raise ValueError(
        f"{name!r} is not known. Allowed: {', '.join(allowed)}, or your own as module:function.{nearest(name, allowed)}"
    )


def resolve(kind: Kind, name: str) -> Function:
    """The user's function that a recipe calls ``name``.

    Raises:
        ValueError: it can't be imported, or asks for what its kind can't give.
    """
    if name in _registered[kind]:
        return _registered[kind][name]
    module_name, _, attribute = name.partition(":")
    here = os.getcwd()  # noqa: PTH109  sys.path holds strings
    added = here not in sys.path
    if added:
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise ValueError(f"{name!r}: {module_name} can't be imported ({type(error).__name__}: {error})") from error
    finally:
        if added:
            sys.path.remove(here)
    function = getattr(module, attribute, None)
    if not callable(function):
        raise ValueError(f"{name!r}: {module_name} has no function {attribute!r}")
    _check(kind, name, function)
    return function


def wanted(kind: Kind, name: str) -> tuple[str, ...]:
    """The parameters that the user's function asks for."""
    return tuple(inspect.signature(resolve(kind, name)).parameters)


def call(kind: Kind, name: str, **available: Any) -> Any:
    """The user's function, given those of ``available`` that it asks for."""
    function = resolve(kind, name)
    return function(**{key: available[key] for key in inspect.signature(function).parameters})


def _check(kind: Kind, name: str, function: Function) -> None:
    given = list(inspect.signature(function).parameters)
    unknown = [parameter for parameter in given if parameter not in PARAMETERS[kind]]
    if unknown:
        raise ValueError(
            f"{name!r}: a {kind} may ask for {', '.join(PARAMETERS[kind])}, but this one asks for {', '.join(unknown)}"
        )

"""A user's own metric, policy, criterion or class sampler: one function, named in a recipe.

A recipe names it as ``module:function``, or by the name under which a decorator registered it::

    from selkd.plugins import metric

    @metric("margin")
    def margin(student_logits):
        top = student_logits.topk(2).values
        return top[:, 1] - top[:, 0]

A function asks for what it needs by the names of its parameters (those with a default of its own are left alone); a
metric that asks for ``teacher_logits`` needs the teacher. What it returns is checked for shape, finiteness and mask
where it is used. A recipe that names ``module:function`` runs that module's code, as does every command that reads the
recipe again; modules are found as Python finds them, and in the current folder.

Shapes: B batch, T positions, n of a chunk, V classes, U draws.

==========  =============================================================  ==========================================
kind        parameters to choose from                                      returns
==========  =============================================================  ==========================================
metric      ``student_logits``, ``teacher_logits`` [n, V]; ``targets`` [n]  importance, finite, [n]
policy      ``scores``, ``valid_mask`` [B, T]; ``counts`` [B] (ceil(k*n)    coefficients, finite, 0 where not valid,
            of each sample); ``progress``, the run's share done;            [B, T]
            ``uniforms`` float64 [B, T] in [0, 1), of the seed, the
            sample and the step: what is random comes from these
criterion   ``student_logits``, ``teacher_logits`` [n, V], both divided by  divergence in nats, finite, [n];
            the temperature; ``targets`` [n]                                differentiable in the student's logits
sampler     ``probabilities`` [n, V]; ``draws``; ``uniforms`` [n, U]        distinct class ids int64 and counts, both
            float64 in [0, 1), the position's own                           [n, C]; rows padded with count 0
==========  =============================================================  ==========================================
"""

import functools
import hashlib
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from selkd.builtin import BUILT_IN
from selkd.errors import RunError, nearest

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["metric", "policy", "criterion", "sampler"]
Function = Callable[..., Any]
F = TypeVar("F", bound=Function)

PARAMETERS: dict[Kind, tuple[str, ...]] = {
    "metric": ("student_logits", "teacher_logits", "targets"),
    "policy": ("scores", "valid_mask", "counts", "progress", "uniforms"),
    "criterion": ("student_logits", "teacher_logits", "targets"),
    "sampler": ("probabilities", "draws", "uniforms"),
}

KEYS: dict[Kind, str] = {
    "metric": "positions.metric",
    "policy": "positions.policy",
    "criterion": "criterion.name",
    "sampler": "classes.sampler",
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
        if name in BUILT_IN[kind]:
            raise ValueError(f"{name!r} is a built-in {kind}; give yours another name")
        earlier = _registered[kind].get(name, function)
        if (earlier.__module__, earlier.__qualname__) != (function.__module__, function.__qualname__):
            raise ValueError(f"{name!r} is already the {kind} {earlier.__module__}:{earlier.__qualname__}")
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
    function = _imported(name)
    _check(kind, name, function)
    return function


@functools.cache
def _imported(name: str) -> Function:
    module_name, _, attribute = name.partition(":")
    here = os.getcwd()  # noqa: PTH109  sys.path holds strings
    added = here not in sys.path
    if added:
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # whatever the user's module raises
        raise ValueError(f"{name!r}: {module_name} can't be imported ({type(error).__name__}: {error})") from error
    finally:
        if added:
            sys.path.remove(here)
    function = getattr(module, attribute, None)
    if not callable(function) or isinstance(function, type):
        raise ValueError(f"{name!r}: {module_name} has no function {attribute!r}")
    return function


def wanted(kind: Kind, name: str) -> tuple[str, ...]:
    """The parameters that the user's function asks for: those without a default."""
    return _wanted(resolve(kind, name))


@functools.cache
def _wanted(function: Function) -> tuple[str, ...]:
    parameters = inspect.signature(function).parameters.values()
    return tuple(parameter.name for parameter in parameters if parameter.default is parameter.empty)


def digest(kind: Kind, name: str) -> str:
    """A hash of the source that the user's function stands in: its module's file, or its own lines."""
    function = resolve(kind, name)
    path = inspect.getsourcefile(inspect.unwrap(function))
    source = Path(path).read_bytes() if path and Path(path).is_file() else inspect.getsource(function).encode()
    return hashlib.sha256(source).hexdigest()[:32]


def digests(**names: str | None) -> dict[str, str]:
    """``digest`` of each named part that is a user's own: kind -> name, built-in ones and None left out."""
    kinds: list[Kind] = [kind for kind in PARAMETERS if names.get(kind) not in (None, *BUILT_IN[kind])]
    return {kind: digest(kind, str(names[kind])) for kind in kinds}


def metric_function(name: str) -> "Callable[[Tensor, Tensor | None, Tensor], Tensor]":
    """A user's metric as a function of student logits, teacher logits and targets; its answer is checked."""

    def metric(student_logits: "Tensor", teacher_logits: "Tensor | None", targets: "Tensor") -> "Tensor":
        values = _call("metric", name, student_logits=student_logits, teacher_logits=teacher_logits, targets=targets)
        return _tensor("metric", name, values, targets.shape).detach()

    return metric


def criterion_function(name: str) -> "Callable[[Tensor, Tensor, Tensor], Tensor]":
    """A user's criterion as a function of student logits, teacher logits and targets; its answer is checked."""

    def criterion(student_logits: "Tensor", teacher_logits: "Tensor", targets: "Tensor") -> "Tensor":
        values = _call("criterion", name, student_logits=student_logits, teacher_logits=teacher_logits, targets=targets)
        return _tensor("criterion", name, values, targets.shape)

    return criterion


def coefficients(name: str, *, scores: "Tensor", valid_mask: "Tensor", **others: Any) -> "Tensor":
    """What a user's policy makes of the parameters of its kind: [B, T] in the dtype of the scores; checked."""
    given = {"scores": scores, "valid_mask": valid_mask, **others}
    copies = {key: value.clone() if hasattr(value, "clone") else value for key, value in given.items()}
    found = _tensor("policy", name, _call("policy", name, **copies), valid_mask.shape).detach().to(scores.dtype)
    if not found.isfinite().all():
        raise _fault("policy", name, "returned coefficients that are not finite")
    if (found[~valid_mask] != 0).any():
        raise _fault("policy", name, "gave weight to positions that are not valid")
    return found


def drawn(name: str, probabilities: "Tensor", uniforms: "Tensor", draws: int) -> "tuple[Tensor, Tensor]":
    """What a user's sampler draws from ``probabilities`` [n, V]: class ids and counts, int64 [n, C]; checked."""
    answer = _call("sampler", name, probabilities=probabilities, uniforms=uniforms, draws=draws)
    if not (isinstance(answer, tuple | list) and len(answer) == 2):
        raise _fault("sampler", name, f"returned {type(answer).__name__}, expected class ids and counts")
    n, vocab_size = probabilities.shape
    class_ids, counts = (_tensor("sampler", name, each, None) for each in answer)
    fault: str | None = None
    if class_ids.shape != counts.shape or class_ids.ndim != 2 or len(class_ids) != n:
        fault = f"shapes {tuple(class_ids.shape)} and {tuple(counts.shape)}, expected both [{n}, C]"
    elif {str(class_ids.dtype), str(counts.dtype)} != {"torch.int64"}:
        fault = f"{class_ids.dtype} and {counts.dtype}, expected int64 class ids and counts"
    elif ((class_ids < 0) | (class_ids >= vocab_size)).any():
        fault = f"a class id outside 0 to {vocab_size - 1}"
    elif (counts < 0).any() or (counts.sum(dim=-1) != draws).any():
        fault = f"counts that are negative or don't sum to draws = {draws}"
    else:
        ordered = class_ids.masked_fill(counts == 0, -1).sort(dim=-1).values
        if ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any():
            fault = "a class twice in one row"
    if fault is not None:
        raise _fault("sampler", name, f"returned {fault}")
    return class_ids, counts


def _call(kind: Kind, name: str, **available: Any) -> Any:
    function = resolve(kind, name)
    try:
        return function(**{key: available[key] for key in _wanted(function)})
    except Exception as error:
        raise _fault(kind, name, f"raised {type(error).__name__}: {error}") from error


def _tensor(kind: Kind, name: str, values: Any, shape: Any) -> "Tensor":
    import torch  # late: reading a recipe needs no torch

    if not isinstance(values, torch.Tensor):
        raise _fault(kind, name, f"returned {type(values).__name__}, expected a tensor")
    if shape is not None and values.shape != shape:
        raise _fault(kind, name, f"returned shape {tuple(values.shape)}, expected {tuple(shape)}")
    return values


def _fault(kind: Kind, name: str, what: str) -> RunError:
    return RunError(f"{KEYS[kind]}: {name} {what}.")


def _check(kind: Kind, name: str, function: Function) -> None:
    try:
        given = _wanted(function)
    except (TypeError, ValueError):
        raise ValueError(f"{name!r}: its parameters can't be read; wrap it in a Python function") from None
    unknown = [parameter for parameter in given if parameter not in PARAMETERS[kind]]
    if unknown:
        raise ValueError(
            f"{name!r}: a {kind} may ask for {', '.join(PARAMETERS[kind])}, but this one asks for {', '.join(unknown)}"
        )

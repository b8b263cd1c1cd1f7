"""Metrics, policies, criteria and class samplers: one entry for each, built in or a user's own.

An entry stands beside its function and holds all that the rest of selkd knows of it: what a recipe may say, what it
needs, and the words of reports and documentation. The built-in entries stand in ``HOMES``, which are imported when a
name is first looked up, so importing this module needs no torch.

A user's own part is one function. A recipe names it as ``module:function``, or by the name under which a decorator
registered it::

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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, TypeVar

from selkd.errors import RunError, nearest

if TYPE_CHECKING:
    from torch import Tensor

Function = Callable[..., Any]
F = TypeVar("F", bound=Function)

HOMES = ("selkd.maths.importance", "selkd.selection.positions", "selkd.maths.divergence", "selkd.selection.classes")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What selkd knows of one metric, policy, criterion or class sampler.

    Attributes:
        name: what a recipe calls it.
        function: what computes it; the user's function of a user's own part. Each kind says what it is called with.
        label: a noun phrase for reports, a format of ``name`` and of what the kind's reports say beside it.
        description: for the documentation's tables: what it computes.
        is_own: whether it is a user's own part.
    """

    kind: ClassVar[str]
    key: ClassVar[str]  # of the recipe
    parameters: ClassVar[tuple[str, ...]]  # that a user's function may ask for
    _entries: ClassVar[dict[str, Any]]

    name: str = field(kw_only=False)
    function: Any = field(default=None, kw_only=False)  # a function, or None
    label: str = "{name}"
    description: str = ""
    is_own: bool = False

    def __init_subclass__(cls) -> None:
        cls._entries = {}

    @classmethod
    def known(cls) -> dict[str, Self]:
        """Every entry by its name: the built-in ones in the order of their source, then what decorators registered."""
        for home in HOMES:
            importlib.import_module(home)
        return cls._entries

    @classmethod
    def builtin(cls) -> dict[str, Self]:
        """The built-in entries by their names."""
        return {name: entry for name, entry in cls.known().items() if not entry.is_own}

    @classmethod
    def find(cls, name: str) -> Self:
        """The entry that a recipe calls ``name``: built in, registered, or a user's ``module:function``.

        Raises:
            ValueError: it is none of these (what is allowed and the nearest name are told), can't be imported, or asks
                for what its kind can't give.
        """
        known = cls.known()
        if name in known:
            return known[name]
        if ":" in name:
            return cls.of_function(name, _imported(name))
        raise ValueError(unknown(name, list(known), ", or your own as module:function"))

    @classmethod
    def check(cls, name: str) -> str:
        """``name``, if there is such a part; raises ValueError as ``find`` does."""
        return cls.find(name).name

    @classmethod
    def of_function(cls, name: str, function: Function) -> Self:
        """The entry of a user's function. Raises ValueError: it asks for what its kind can't give."""
        try:
            asked = _asked(function)
        except (TypeError, ValueError):
            raise ValueError(f"{name!r}: its parameters can't be read; wrap it in a Python function") from None
        if unheard := [parameter for parameter in asked if parameter not in cls.parameters]:
            allowed = ", ".join(cls.parameters)
            raise ValueError(
                f"{name!r}: a {cls.kind} may ask for {allowed}, but this one asks for {', '.join(unheard)}"
            )
        return cls._own(name, function, asked)

    @classmethod
    def _own(cls, name: str, function: Function, asked: Sequence[str]) -> Self:
        """The entry of a user's function that asks for the parameters ``asked``."""
        del asked
        return cls(name, function, is_own=True)

    @classmethod
    def add(cls, name: str, function: Function | None = None, **facts: Any) -> None:
        """Registers a built-in part by the attributes of its entry; called beside its function, in ``HOMES``."""
        cls(name, function, **facts).register()

    def register(self) -> None:
        """Makes the entry known under its name; a user's function may come again, as when its module is reloaded.

        Raises:
            ValueError: the name is another's.
        """
        earlier = self._entries.get(self.name)
        if earlier is not None and not (earlier.is_own and self.is_own):
            raise ValueError(f"{self.name!r} is a built-in {self.kind}; give yours another name")
        if earlier is not None and earlier.home != self.home:
            raise ValueError(f"{self.name!r} is already the {self.kind} {earlier.home}")
        self._entries[self.name] = self

    @classmethod
    def in_words(cls, name: str, **values: str) -> str:
        """The label of the part called ``name``, filled with ``values``; imports nothing of a user's."""
        entry = cls.known().get(name)
        return (cls.label if entry is None else entry.label).format(name=name, **values)

    def answer(self, **available: Any) -> Any:
        """What the user's function answers to the parameters that it asks for. Raises RunError if it fails."""
        try:
            return self.function(**{parameter: available[parameter] for parameter in _asked(self.function)})
        except Exception as error:
            raise self.fault(f"raised {type(error).__name__}: {error}") from error

    def values(self, student_logits: "Tensor", teacher_logits: "Tensor | None", targets: "Tensor") -> "Tensor":
        """A user's own metric or criterion [n] of logits [n, V] and targets [n]; its answer is checked."""
        answer = self.answer(student_logits=student_logits, teacher_logits=teacher_logits, targets=targets)
        return self.tensor(answer, targets.shape)

    def tensor(self, values: Any, shape: Any = None) -> "Tensor":
        """``values`` of the user's function, if they are a tensor of that shape (None: any). Raises RunError if not."""
        import torch  # late: reading a recipe needs no torch

        if not isinstance(values, torch.Tensor):
            raise self.fault(f"returned {type(values).__name__}, expected a tensor")
        if shape is not None and values.shape != shape:
            raise self.fault(f"returned shape {tuple(values.shape)}, expected {tuple(shape)}")
        return values

    def fault(self, what: str) -> RunError:
        """The error that tells what the user's function did, by the recipe's key and its name."""
        return RunError(f"{self.key}: {self.name} {what}.")

    @property
    def home(self) -> str:
        """Where the user's function stands, as ``module:function``."""
        return f"{self.function.__module__}:{self.function.__qualname__}"

    @property
    def digest(self) -> str:
        """A hash of the source that the user's function stands in: its module's file, or its own lines."""
        path = inspect.getsourcefile(inspect.unwrap(self.function))
        source = Path(path).read_bytes() if path and Path(path).is_file() else inspect.getsource(self.function).encode()
        return hashlib.sha256(source).hexdigest()[:32]


@dataclass(frozen=True, kw_only=True)
class Metric(Entry):
    """A position-importance metric u(t).

    A built-in metric combines ``statistics`` (see ``selkd.maths.importance``): its function maps them, name -> values
    [B, T], and the valid mask to u [B, T]; None: u is its one statistic. A metric of no statistics is noise. A user's
    own is a statistic itself, of logits and targets.

    Attributes:
        statistics: those that it needs.
        needs_teacher: whether it is computed from the teacher's full distribution.
        unit: of its values; empty: none.
        of_sample: for the documentation's table: how it scores a sample, by the means of its statistics over the
            sample's valid positions; None: it does not.
    """

    kind = "metric"
    key = "positions.metric"
    parameters = ("student_logits", "teacher_logits", "targets")

    statistics: tuple[str, ...] = ()
    needs_teacher: bool = False
    unit: str = ""
    of_sample: str | None = None

    @classmethod
    def _own(cls, name: str, function: Function, asked: Sequence[str]) -> Self:
        return cls(name, function, is_own=True, statistics=(name,), needs_teacher="teacher_logits" in asked)

    @classmethod
    def of_samples(cls) -> dict[str, Self]:
        """The metrics that score samples."""
        return {name: metric for name, metric in cls.builtin().items() if metric.of_sample is not None}

    @property
    def is_noise(self) -> bool:
        """Whether it is uniform noise, of a seed in place of statistics."""
        return not self.statistics

    def combine(self, statistics: "Mapping[str, Tensor]", valid_mask: "Tensor") -> "Tensor":
        """u from the statistics and the valid mask, all of one shape."""
        if self.function is None or self.is_own:
            return statistics[self.statistics[0]]
        combined: Tensor = self.function(statistics, valid_mask)
        return combined


@dataclass(frozen=True, kw_only=True)
class Policy(Entry):
    """A position policy: scores in, coefficients out. The label is a format of ``share`` and ``metric``, too.

    A built-in policy's function takes ``selkd.selection.positions.Candidates``.

    Attributes:
        ranks: whether it looks at a metric's scores.
        metric: the metric that stands in a resolved recipe where the policy does not rank.
        fraction: whether it needs the recipe's fraction, may do without one, or has none.
        reductions: the reductions that it goes with, the default first. Only a policy whose K picked positions share
            one coefficient goes with both.
        uniforms: what it takes random numbers for: each of its draws, each position, or nothing.
        options: keys of the recipe's positions that it has, with their defaults.
    """

    kind = "policy"
    key = "positions.policy"
    parameters = ("scores", "valid_mask", "counts", "progress", "uniforms")

    label: str = "{share} of the positions, by the policy {name}"
    ranks: bool = True
    metric: str | None = None
    fraction: Literal["needed", "optional", "none"] = "needed"
    reductions: tuple[Literal["per_sample", "per_position"], ...] = ("per_sample",)
    uniforms: Literal["of draws", "of positions"] | None = None
    options: Mapping[str, float | None] = field(default_factory=dict)

    @classmethod
    def _own(cls, name: str, function: Function, asked: Sequence[str]) -> Self:
        uniforms: Literal["of positions"] | None = "of positions" if "uniforms" in asked else None
        return cls(name, function, is_own=True, ranks="scores" in asked, fraction="optional", uniforms=uniforms)

    def coefficients(self, *, scores: "Tensor", valid_mask: "Tensor", **others: Any) -> "Tensor":
        """What a user's own policy makes of its parameters: [B, T] in the dtype of the scores; checked."""
        available = {"scores": scores, "valid_mask": valid_mask, **others}
        copies = {key: value.clone() if hasattr(value, "clone") else value for key, value in available.items()}
        weights = self.tensor(self.answer(**copies), valid_mask.shape).detach().to(scores.dtype)
        if not weights.isfinite().all():
            raise self.fault("returned coefficients that are not finite")
        if (weights[~valid_mask] != 0).any():
            raise self.fault("gave weight to positions that are not valid")
        return weights


@dataclass(frozen=True, kw_only=True)
class Criterion(Entry):
    """How teacher and student are compared at a position.

    A built-in criterion's function takes its options by name and returns values and their gradient (see
    ``selkd.maths.divergence``); a user's own returns values alone.

    Attributes:
        options: keys of the recipe's criterion that it has, with their defaults.
        mixes: whether its options are shares of a mixture, strictly between 0 and 1; else they are weights.
        position_weights: gives the options that are a position's own, [N] each, from the teacher's log p(y) [N] at the
            picked positions and the sample [N] that each is of; None: all options are the recipe's.
    """

    kind = "criterion"
    key = "criterion.name"
    parameters = ("student_logits", "teacher_logits", "targets")

    options: Mapping[str, float] = field(default_factory=dict)
    mixes: bool = False
    position_weights: "Callable[[Tensor, Tensor], dict[str, Tensor]] | None" = None


@dataclass(frozen=True, kw_only=True)
class Sampler(Entry):
    """A class sampler: a teacher's distribution in, drawn classes out. The label is a format of ``draws``, too.

    A built-in sampler's function takes probabilities [n, V], uniforms and U (see ``selkd.selection.classes``); None:
    the whole distribution is compared.

    Attributes:
        n_uniforms: how many uniforms a position needs for U draws.
        total: what the integer counts of a stored row sum to for U draws.
        moments: of probabilities [n, V] and U, the mean [n, V] of counts / total, and the expected squared error [n]
            around it, sum_v E[(counts_v / total - mean_v)^2]; None: those of independent draws, which a user's own
            sampler is taken to be no worse than.
    """

    kind = "sampler"
    key = "classes.sampler"
    parameters = ("probabilities", "draws", "uniforms")

    label: str = "the classes that the sampler {name} picks"
    n_uniforms: Callable[[int], int] = lambda draws: draws
    total: Callable[[int], int] = lambda draws: draws
    moments: "Callable[[Tensor, int], tuple[Tensor, Tensor]] | None" = None

    def drawn(self, probabilities: "Tensor", uniforms: "Tensor", draws: int) -> "tuple[Tensor, Tensor]":
        """What a user's own sampler draws of ``probabilities`` [n, V]: class ids and counts, int64 [n, C]; checked."""
        answer = self.answer(probabilities=probabilities, uniforms=uniforms, draws=draws)
        if not (isinstance(answer, tuple | list) and len(answer) == 2):
            raise self.fault(f"returned {type(answer).__name__}, expected class ids and counts")
        n, vocab_size = probabilities.shape
        class_ids, counts = (self.tensor(values) for values in answer)
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
            raise self.fault(f"returned {fault}")
        return class_ids, counts


KINDS: tuple[type[Entry], ...] = (Metric, Policy, Criterion, Sampler)


def metric(name: str) -> Callable[[F], F]:
    """Decorator: registers a position-importance metric under ``name``."""
    return _registering(Metric, name)


def policy(name: str) -> Callable[[F], F]:
    """Decorator: registers a position policy under ``name``."""
    return _registering(Policy, name)


def criterion(name: str) -> Callable[[F], F]:
    """Decorator: registers an alignment criterion under ``name``."""
    return _registering(Criterion, name)


def sampler(name: str) -> Callable[[F], F]:
    """Decorator: registers a class sampler under ``name``."""
    return _registering(Sampler, name)


def _registering(kind: type[Entry], name: str) -> Callable[[F], F]:
    def decorate(function: F) -> F:
        kind.known()  # the built-in names come first
        kind.of_function(name, function).register()
        return function

    return decorate


def unknown(name: str, allowed: Sequence[str], or_else: str = "") -> str:
    """The message about a name that is not one of those ``allowed``, with the nearest of them."""
    return f"{name!r} is not known. Allowed: {', '.join(allowed)}{or_else}.{nearest(name, allowed)}"


def digests(**names: str | None) -> dict[str, str]:
    """The digest of each named part that is a user's own: kind -> digest; built-in ones and None are left out."""
    parts = {kind.kind: kind.find(name) for kind in KINDS if (name := names.get(kind.kind)) is not None}
    return {kind: entry.digest for kind, entry in parts.items() if entry.is_own}


@functools.cache
def _imported(name: str) -> Function:
    """The function that a recipe calls ``module:function``. Raises ValueError if it can't be imported."""
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


@functools.cache
def _asked(function: Function) -> tuple[str, ...]:
    """The parameters that a user's function asks for: those without a default."""
    parameters = inspect.signature(function).parameters.values()
    return tuple(parameter.name for parameter in parameters if parameter.default is parameter.empty)

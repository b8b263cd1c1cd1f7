"""Metrics, policies, criteria and class samplers: one entry for each, built in or a user's own.

An entry stands beside its function and holds all that the rest of selkd knows of it: its options in a recipe, what it
needs, and its names in reports and documentation. The built-in entries are in ``BUILTIN_MODULES``, which are imported
when a name is first looked up. They defer torch until one of their functions is called: a recipe is read, checked and
refused without it.

A user's own part is one function. A recipe names it as ``module:function``, or by the name that a decorator gave it::

    from selkd.plugins import metric

    @metric("margin")
    def margin(student_logits):
        top = student_logits.topk(2).values
        return top[:, 1] - top[:, 0]

A function is called with what its parameters name, except those that have a default. A metric with the parameter
``teacher_logits`` needs the teacher. Shape, finiteness and mask of what a function returns are checked where it is
used. A recipe that names ``module:function`` runs that module's code (``selkd.own_code``). Modules are imported from
Python's path and from the current folder.

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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, TypeVar

from selkd.errors import RunError, nearest
from selkd.own_code import Function, own_function

if TYPE_CHECKING:
    from torch import Tensor

F = TypeVar("F", bound=Function)

BUILTIN_MODULES = (
    "selkd.maths.importance",
    "selkd.selection.positions",
    "selkd.maths.divergence",
    "selkd.selection.classes",
)


STATISTICS_OF_DRAWS = frozenset({"student_entropy", "student_ce", "teacher_entropy", "teacher_ce", "kl"})
"""Statistics that ``selkd.maths.importance.statistics_of_draws`` knows."""


class _Deferred:
    """A module that is imported when something of it is first used."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(importlib.import_module(self._name), attribute)


def deferred(name: str) -> Any:
    """The module ``name``, imported when something of it is first used.

    For the modules of built-in parts: what a recipe may name is known before torch, which takes seconds, is imported.
    """
    return _Deferred(name)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What selkd knows of one metric, policy, criterion or class sampler.

    Attributes:
        name: its name in a recipe.
        function: the function that computes it; each subclass says with which arguments.
        label: a noun phrase for reports: a format string with the field ``name`` and those that the subclass names.
        description: what it computes, for the documentation's tables.
        is_own: whether it is a user's own part.
    """

    kind: ClassVar[str]
    key: ClassVar[str]  # the recipe's key that names such a part
    parameters: ClassVar[tuple[str, ...]]  # the parameters that a user's function may have
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
        """All entries by name: the built-in ones in the order of the source, then those of decorators."""
        for module in BUILTIN_MODULES:
            importlib.import_module(module)
        return cls._entries

    @classmethod
    def builtin(cls) -> dict[str, Self]:
        """The built-in entries by their names."""
        return {name: entry for name, entry in cls.known().items() if not entry.is_own}

    @classmethod
    def find(cls, name: str) -> Self:
        """The entry that a recipe calls ``name``: built in, registered, or a user's ``module:function``.

        Where a recipe is only read (``selkd.own_code``), a user's own part may be left ``unread``.

        Raises:
            ValueError: it is none of these (the message has the allowed names and the nearest one), it can't be
                imported, or it has a parameter that its kind does not have.
        """
        known = cls.known()
        if name in known:
            return known[name]
        if ":" in name:
            function = own_function(cls.key, name)
            return cls(name, is_own=True) if function is None else cls.of_function(name, function)
        raise ValueError(unknown(name, list(known), ", or your own as module:function"))

    @classmethod
    def check(cls, name: str) -> str:
        """``name``, if there is such a part. Raises ValueError as ``find`` does."""
        return cls.find(name).name

    @classmethod
    def of_function(cls, name: str, function: Function) -> Self:
        """The entry of a user's function. Raises ValueError if it has a parameter that its kind does not have."""
        try:
            required = _required_parameters(function)
        except (TypeError, ValueError):
            raise ValueError(f"{name!r}: its parameters can't be read; wrap it in a Python function") from None
        if foreign := [parameter for parameter in required if parameter not in cls.parameters]:
            allowed = ", ".join(cls.parameters)
            raise ValueError(
                f"{name!r}: a {cls.kind} may ask for {allowed}, but this one asks for {', '.join(foreign)}"
            )
        return cls(name, function, is_own=True, **cls._own_facts(name, required))

    @classmethod
    def _own_facts(cls, name: str, required: Sequence[str]) -> dict[str, Any]:  # noqa: ARG003
        """The attributes of a user's own part that follow from its name and its function's required parameters."""
        return {}

    @classmethod
    def add(cls, name: str, function: Function | None = None, **facts: Any) -> None:
        """Registers a built-in part with these attributes of its entry; called beside its function."""
        cls(name, function, **facts).register()

    def register(self) -> None:
        """Registers the entry under its name. A user's function may be registered again, as when a module is reloaded.

        Raises:
            ValueError: another part has the name.
        """
        earlier = self._entries.get(self.name)
        if earlier is not None and not (earlier.is_own and self.is_own):
            raise ValueError(f"{self.name!r} is a built-in {self.kind}; give yours another name")
        if earlier is not None and earlier.location != self.location:
            raise ValueError(f"{self.name!r} is already the {self.kind} {earlier.location}")
        self._entries[self.name] = self

    @classmethod
    def in_words(cls, name: str, **values: str) -> str:
        """The label of the part called ``name``, filled with ``values``. It imports no user's module."""
        entry = cls.known().get(name)
        return (cls.label if entry is None else entry.label).format(name=name, **values)

    def answer(self, **available: Any) -> Any:
        """Calls the user's function with those of the ``available`` arguments that it requires.

        Raises:
            RunError: the function raised an exception.
        """
        try:
            return self.function(**{name: available[name] for name in _required_parameters(self.function)})
        except Exception as error:
            raise self.fault(f"raised {type(error).__name__}: {error}") from error

    def values(self, student_logits: "Tensor", teacher_logits: "Tensor | None", targets: "Tensor") -> "Tensor":
        """The checked values [n] of a user's own metric or criterion for logits [n, V] and targets [n]."""
        answer = self.answer(student_logits=student_logits, teacher_logits=teacher_logits, targets=targets)
        return self.tensor(answer, targets.shape)

    def tensor(self, values: Any, shape: Any = None) -> "Tensor":
        """``values``, if they are a tensor of this shape (None: of any shape). Raises RunError if not."""
        import torch  # not at the top: reading a recipe needs no torch

        if not isinstance(values, torch.Tensor):
            raise self.fault(f"returned {type(values).__name__}, expected a tensor")
        if shape is not None and values.shape != shape:
            raise self.fault(f"returned shape {tuple(values.shape)}, expected {tuple(shape)}")
        return values

    def fault(self, what: str) -> RunError:
        """The error that the user's function did ``what``, with the recipe's key and the part's name."""
        return RunError(f"{self.key}: {self.name} {what}.")

    @property
    def is_unread(self) -> bool:
        """Whether it is a user's own part that was not imported, so that only its name is known."""
        return self.is_own and self.function is None

    @property
    def location(self) -> str:
        """The user's function as ``module:function``."""
        return f"{self.function.__module__}:{self.function.__qualname__}"

    @property
    def digest(self) -> str:
        """A hash of the source of the user's function: of its module's file, or of its own lines without a file."""
        path = inspect.getsourcefile(inspect.unwrap(self.function))
        source = Path(path).read_bytes() if path and Path(path).is_file() else inspect.getsource(self.function).encode()
        return hashlib.sha256(source).hexdigest()[:32]


@dataclass(frozen=True, kw_only=True)
class Metric(Entry):
    """A position-importance metric u(t).

    A built-in metric combines statistics (see ``selkd.maths.importance``). Its function takes them, name -> values
    [B, T], and the valid mask, and returns u [B, T]; without a function, u is the metric's one statistic. A metric
    without statistics is noise. A user's own metric is a statistic itself, a function of logits and targets.

    Attributes:
        statistics: the names of the statistics that it needs.
        needs_teacher: whether it is computed from the teacher's distribution, too.
        unit: the unit of its values; empty if they have none.
        is_scaled: whether its statistics are scaled by the highest of them, so that it is not estimated without bias
            where they are.
        of_sample: how it scores a sample, from the means of its statistics over the valid positions, for the
            documentation's table; None if it scores no samples.
    """

    kind = "metric"
    key = "positions.metric"
    parameters = ("student_logits", "teacher_logits", "targets")

    statistics: tuple[str, ...] = ()
    needs_teacher: bool = False
    unit: str = ""
    is_scaled: bool = False
    of_sample: str | None = None

    @classmethod
    def _own_facts(cls, name: str, required: Sequence[str]) -> dict[str, Any]:
        return {"statistics": (name,), "needs_teacher": "teacher_logits" in required}

    @classmethod
    def of_samples(cls) -> dict[str, Self]:
        """The metrics that score samples."""
        return {name: metric for name, metric in cls.builtin().items() if metric.of_sample is not None}

    @property
    def is_noise(self) -> bool:
        """Whether it is uniform noise, made from a seed instead of statistics."""
        return not self.statistics

    @property
    def is_from_draws(self) -> bool:
        """Whether a teacher's drawn classes, its entropy and its log p(y) are enough to compute or estimate it."""
        return STATISTICS_OF_DRAWS.issuperset(self.statistics)

    @property
    def uses_draws(self) -> bool:
        """Whether, of a cached teacher, it is estimated from the drawn classes."""
        return "kl" in self.statistics

    def combine(self, statistics: "Mapping[str, Tensor]", valid_mask: "Tensor") -> "Tensor":
        """u from the statistics and the valid mask, all of the same shape."""
        if self.function is None or self.is_own:
            return statistics[self.statistics[0]]
        combined: Tensor = self.function(statistics, valid_mask)
        return combined


@dataclass(frozen=True, kw_only=True)
class Policy(Entry):
    """A position policy: scores in, coefficients out. The label has the fields ``share`` and ``metric``, too.

    A built-in policy's function takes ``selkd.selection.positions.Candidates``.

    Attributes:
        ranks: whether it uses a metric's scores.
        metric: the metric in a resolved recipe, if the policy does not rank.
        fraction: whether it needs the recipe's fraction, can do without one, or has none.
        reductions: the reductions that it goes with, the default first. Only a policy that gives K positions the same
            coefficient goes with both.
        uniforms: whether it needs a random number for each of its draws, for each position, or none.
        picks_counts: whether it picks K positions of each sample, whatever the scores are; with a threshold, gls does
            not.
        is_corrected: whether it is Full KD in expectation over its own draws, as long as every score is above 0.
        options: the keys of the recipe's positions that it has, with their defaults.
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
    picks_counts: bool = False
    is_corrected: bool = False
    options: Mapping[str, float | None] = field(default_factory=dict)

    @classmethod
    def _own_facts(cls, name: str, required: Sequence[str]) -> dict[str, Any]:  # noqa: ARG003
        uniforms = "of positions" if "uniforms" in required else None
        return {"ranks": "scores" in required, "fraction": "optional", "uniforms": uniforms}

    def coefficients(self, *, scores: "Tensor", valid_mask: "Tensor", **others: Any) -> "Tensor":
        """The checked coefficients [B, T] of a user's own policy, in the dtype of the scores."""
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
        options: the keys of the recipe's criterion that it has, with their defaults.
        mixes: whether its options are shares of a mixture, strictly between 0 and 1; else they are weights.
        position_weights: computes options that differ by position, each [N], from the teacher's log p(y) [N] at the
            picked positions and the number of each position's sample [N]; None if all options are the recipe's.
    """

    kind = "criterion"
    key = "criterion.name"
    parameters = ("student_logits", "teacher_logits", "targets")

    options: Mapping[str, float] = field(default_factory=dict)
    mixes: bool = False
    position_weights: "Callable[[Tensor, Tensor], dict[str, Tensor]] | None" = None


@dataclass(frozen=True, kw_only=True)
class Sampler(Entry):
    """A class sampler: a teacher's distribution in, drawn classes out. The label has the field ``draws``, too.

    A built-in sampler's function takes probabilities [n, V], uniforms and U (see ``selkd.selection.classes``). Without
    a function, the whole distribution is compared.

    Attributes:
        n_uniforms: how many uniforms a position needs for U draws.
        total: the sum of the integer counts of a stored row for U draws.
        truncates: whether it gives the probabilities of some classes and leaves the others' out.
        is_unbiased: whether the expected share of each class among the draws is its probability.
        is_evenly_spaced: whether the draws, in the order of the classes, are equally spaced through the distribution.
        least_same_draws: the lowest shares, over all positions and over one sample's, of draws that are the same when
            the same teacher runs in another precision, measured on SmolLM2-135M at 8 to 64 draws
            (docs/results/cache.md). A teacher at temperature 1.1 stays below. A sample may be short, so its limit is
            wider. None: not measured.
    """

    kind = "sampler"
    key = "classes.sampler"
    parameters = ("probabilities", "draws", "uniforms")

    label: str = "the classes that the sampler {name} picks"
    n_uniforms: Callable[[int], int] = lambda draws: draws
    total: Callable[[int], int] = lambda draws: draws
    truncates: bool = False
    is_unbiased: bool = False
    is_evenly_spaced: bool = False
    least_same_draws: tuple[float, float] | None = None

    def drawn(self, probabilities: "Tensor", uniforms: "Tensor", draws: int) -> "tuple[Tensor, Tensor]":
        """The checked class ids and counts, int64 [n, C], that a user's own sampler draws, by ascending id, as a
        cache has them; padding, whose count is 0, is last."""
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
            ordered, order = class_ids.masked_fill(counts == 0, vocab_size).sort(dim=-1)
            class_ids, counts = class_ids.gather(-1, order), counts.gather(-1, order)
            if ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] < vocab_size)).any():
                fault = "a class twice in one row"
        if fault is not None:
            raise self.fault(f"returned {fault}")
        return class_ids, counts


KINDS: tuple[type[Entry], ...] = (Metric, Policy, Criterion, Sampler)


def metric(name: str) -> Callable[[F], F]:
    """Decorator that registers a position-importance metric under ``name``."""
    return _registering(Metric, name)


def policy(name: str) -> Callable[[F], F]:
    """Decorator that registers a position policy under ``name``."""
    return _registering(Policy, name)


def criterion(name: str) -> Callable[[F], F]:
    """Decorator that registers an alignment criterion under ``name``."""
    return _registering(Criterion, name)


def sampler(name: str) -> Callable[[F], F]:
    """Decorator that registers a class sampler under ``name``."""
    return _registering(Sampler, name)


def _registering(kind: type[Entry], name: str) -> Callable[[F], F]:
    def decorate(function: F) -> F:
        kind.known()  # so that a built-in name is refused
        kind.of_function(name, function).register()
        return function

    return decorate


def unknown(name: str, allowed: Sequence[str], or_else: str = "") -> str:
    """The message that ``name`` is not one of the ``allowed`` names, with the nearest of them."""
    return f"{name!r} is not known. Allowed: {', '.join(allowed)}{or_else}.{nearest(name, allowed)}"


def digests(**names: str | None) -> dict[str, str]:
    """The digests of those named parts that are a user's own: kind -> digest. Names are given by kind, or None."""
    parts = {kind.kind: kind.find(name) for kind in KINDS if (name := names.get(kind.kind)) is not None}
    return {kind: entry.digest for kind, entry in parts.items() if entry.is_own}


@functools.cache
def _required_parameters(function: Function) -> tuple[str, ...]:
    """The parameters of a user's function that have no default."""
    parameters = inspect.signature(function).parameters.values()
    return tuple(parameter.name for parameter in parameters if parameter.default is parameter.empty)

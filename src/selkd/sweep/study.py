"""A study is recipes x seeds in one file. All of it is checked before the first run starts."""

import itertools
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from selkd.errors import InputError, nearest
from selkd.recipe.files import named_texts, put_key, read_mapping, read_text, recipe_content
from selkd.recipe.part import PathText, explain, parse_part
from selkd.recipe.recipe import Recipe
from selkd.reporting.comparison import comparable

Seed = Annotated[int, Field(ge=0, lt=2**32)]
_NAME = r"[\w][\w.-]*"
_MOST_RECIPES = 10_000
_LONGEST = 120  # letters of a recipe's name, which is also its folder's


class Study(BaseModel):
    """The content of a study's file.

    Layers of keys make up a recipe; a later layer wins, key by key: ``base``, ``set``, the variant, the grid's values,
    then ``overrides`` of ``expand`` (the command's ``--set``). A whole part (``samples: null``) replaces what earlier
    layers set of it, and a later key of that part (``samples.fraction: 0.5``) begins it anew.

    Attributes:
        base: a named recipe, a YAML file beside the study's, or a recipe's keys.
        set: overrides for every run, ``key.path: value``.
        variants: name -> overrides.
        grid: ``key.path`` -> values; every combination is a recipe, in every variant.
        seeds: each recipe runs once with each.
        baseline: the recipe that the others are compared with; the first one if not given.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    base: PathText | dict[str, Any]
    set: dict[str, Any] = {}
    variants: dict[Annotated[str, Field(pattern=f"^{_NAME}$")], dict[str, Any]] = {}
    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = {}
    seeds: list[Seed] = Field([1337], min_length=1)
    baseline: str | None = None

    @field_validator("variants", mode="before")
    @classmethod
    def _plain_variants(cls, variants: Any) -> Any:
        """Read a variant without keys (``se_kd:``) as the base itself."""
        return {n: {} if v is None else v for n, v in variants.items()} if isinstance(variants, dict) else variants

    @model_validator(mode="after")
    def _consistent(self) -> "Study":
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds: {self.seeds} holds a seed twice; each runs once")
        for key, values in self.grid.items():
            if len({json.dumps(value, sort_keys=True, default=str) for value in values}) < len(values):
                raise ValueError(f"grid.{key}: {values} holds a value twice; each is one recipe")
        recipes = math.prod(map(len, self.grid.values())) * max(1, len(self.variants))
        if recipes > _MOST_RECIPES:
            raise ValueError(f"grid: {recipes:,} recipes, of which a study has at most {_MOST_RECIPES:,}")
        variants = {f"variants.{name}": keys for name, keys in self.variants.items()}
        for part, keys in {"set": self.set, "grid": self.grid, **variants}.items():
            _refuse_owned(keys, part)
        return self


def _refuse_owned(keys: Iterable[str], part: str) -> None:
    """Raise InputError for keys that a study sets by itself or forbids."""
    if "seed" in keys:
        raise InputError(f"{part}.seed: not set here; give seeds")
    if any(key == "hub" or key.startswith("hub.") for key in keys):
        raise InputError(f"{part}.hub: not in a study; each run would replace the one before in the same repository")
    if "name" in keys:
        raise InputError(f"{part}.name: not set here; a recipe is called by its variant and grid values")


@dataclass(frozen=True)
class PlannedRun:
    """One run to do."""

    name: str
    seed: int
    recipe: Recipe

    @property
    def id(self) -> str:
        return f"{self.name}/seed-{self.seed}"


def named_studies() -> dict[str, str]:
    """The YAML text of every study that comes with selkd, by name."""
    return named_texts("studies")


def load_study(source: str | Path) -> tuple[str, Study, Path]:
    """The study named or filed as ``source``: its name, its content, and the folder its paths start from.

    Raises:
        InputError: there is no such study, its YAML can't be read, or a key or value is not allowed.
    """
    named = named_studies()
    name, text = read_text(source, named, "study")
    try:
        content = Study.model_validate(read_mapping(text, str(source), "a study"))
    except ValidationError as error:
        raise InputError(explain(error, Study)) from None
    return name, content, Path() if str(source) in named else Path(source).parent


def expand(study: Study, folder: Path, overrides: Mapping[str, Any] | None = None) -> list[PlannedRun]:
    """List every run of the study, its recipe checked; the seeds of a recipe come one after another.

    Args:
        folder: where a ``base`` that is a file is looked for first.
        overrides: keys for every run that win over all that the study says.

    Raises:
        InputError: a recipe is not valid (the message names it), two are the same, or the baseline is unknown.
    """
    _refuse_owned(overrides or {}, "overrides")
    base = _base(study, folder)
    _refuse_owned([key for key in ("hub",) if base.get(key) is not None], "base")
    recipes: dict[str, Recipe] = {}
    for variant, changes in (study.variants or {"": {}}).items():
        name = variant or str(base.get("name"))

        def recipe_of(cell: Mapping[str, Any], label: str, changes: Mapping[str, Any] = changes) -> Recipe:
            return _recipe(base, (study.set, changes, cell, overrides or {}), label, study.seeds[0])

        identities = [_identity(recipe_of(cell, name)) for cell in _cells(study.grid)]
        labelled = _labelled(variant, study.grid, _without_effect(study.grid, identities), name)
        if twice := sorted(labelled.keys() & recipes.keys()):
            raise InputError(f"variants: two recipes would be called {twice[0]!r}; rename a variant.")
        recipes |= {label: recipe_of(cell, label) for label, cell in labelled.items()}
    _require_different(recipes)
    if study.baseline is not None and study.baseline not in recipes:
        raise InputError(
            f"baseline: no recipe of the study is called {study.baseline!r}. There are {', '.join(recipes)}."
            f"{nearest(study.baseline, recipes)}"
        )
    return [
        PlannedRun(name, seed, recipe.model_copy(update={"seed": seed}))
        for name, recipe in recipes.items()
        for seed in study.seeds
    ]


def _base(study: Study, folder: Path) -> dict[str, Any]:
    if isinstance(study.base, dict):
        return {"name": "base", **study.base}
    beside = folder / study.base
    return recipe_content(beside if beside.is_file() else study.base)


def _cells(grid: Mapping[str, list[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def _without_effect(grid: Mapping[str, list[Any]], identities: list[str]) -> set[str]:
    """Keys that change no recipe of this variant whatever the other keys are, as a fraction beside ``policy: all``."""
    cells = [{key: json.dumps(value, sort_keys=True) for key, value in cell.items()} for cell in _cells(grid)]

    def changes_nothing(key: str) -> bool:
        recipes: dict[tuple[str, ...], set[str]] = {}
        for cell, identity in zip(cells, identities, strict=True):
            recipes.setdefault(tuple(v for k, v in cell.items() if k != key), set()).add(identity)
        return all(len(same) == 1 for same in recipes.values())

    return {key for key, values in grid.items() if len(values) > 1 and changes_nothing(key)}


def _labelled(
    variant: str, grid: Mapping[str, list[Any]], without_effect: set[str], default: str
) -> dict[str, dict[str, Any]]:
    """The cells of the grid by label; a key without effect keeps its first value alone.

    A label that would be given twice, or is too long for a folder, ends in a digest of the cell.
    """
    cells = _cells({key: values[:1] if key in without_effect else values for key, values in grid.items()})
    shown = [{key: value for key, value in cell.items() if key not in without_effect} for cell in cells]
    labels = ["-".join(part for part in (variant, _label(cell, grid)) if part) or default for cell in shown]
    by_label = {}
    for label, cell in zip(labels, cells, strict=True):
        is_plain = len(label) <= _LONGEST and labels.count(label) == 1
        digest = xxhash.xxh3_64_hexdigest(json.dumps(cell, sort_keys=True).encode())[:8]
        by_label[label if is_plain else f"{label[:_LONGEST]}-{digest}"] = cell
    return by_label


def _label(cell: Mapping[str, Any], grid: Mapping[str, Any]) -> str:
    """``fraction-0.1`` for ``positions.fraction: 0.1``; the whole key where two end alike."""
    last_parts = [key.rpartition(".")[2] for key in grid]
    parts = []
    for key, value in cell.items():
        short = key.rpartition(".")[2]
        text = value if isinstance(value, str) else json.dumps(value)
        parts.append(f"{short if last_parts.count(short) == 1 else key}-{text}")
    return re.sub(r"[^\w.-]+", "_", "-".join(parts)).strip("_")


def _recipe(base: dict[str, Any], layers: Sequence[Mapping[str, Any]], label: str, seed: int) -> Recipe:
    content = deepcopy(base)
    for keys in layers:
        for key, value in keys.items():
            put_key(content, key, deepcopy(value), key)
    try:
        return parse_part(Recipe, {**content, "name": label, "seed": seed})
    except InputError as error:
        raise InputError(f"recipe {label!r} of the study: {error}") from None


def _identity(recipe: Recipe) -> str:
    return json.dumps(comparable(recipe.resolved()), sort_keys=True)


def _require_different(recipes: Mapping[str, Recipe]) -> None:
    first_names: dict[str, str] = {}
    for name, recipe in recipes.items():
        other = first_names.setdefault(_identity(recipe), name)
        if other != name:
            raise InputError(
                f"recipes {other!r} and {name!r} of the study are the same once resolved; leave one out (a key may "
                "have no effect beside another, as a fraction beside policy: all, and where scores and caches are kept "
                "changes no result)."
            )

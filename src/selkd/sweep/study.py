"""A study: recipes x seeds, written down in one file and checked whole before anything runs."""

import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from selkd.errors import InputError, nearest
from selkd.recipe.files import read_mapping, recipe_content
from selkd.recipe.part import explain, parse_part
from selkd.recipe.recipe import Recipe
from selkd.reporting.comparison import comparable

Seed = Annotated[int, Field(ge=0, lt=2**32)]
_NAME = r"[\w][\w.-]*"
_LONGEST = 120  # letters of a recipe's name, which is a folder's


class Study(BaseModel):
    """What a study's file says.

    Later ones win, key by key and in the order in which they stand: ``base``, ``set``, the variant, the grid's values,
    then ``overrides`` of ``expand`` (the command's ``--set``). A whole part (``samples: null``) replaces what was set
    of it before, and a key of it (``samples.fraction: 0.5``) that comes later begins it anew.

    Attributes:
        base: a named recipe, a YAML file beside the study's, or a recipe's keys.
        set: overrides for every run, ``key.path: value``.
        variants: name -> overrides.
        grid: ``key.path`` -> values; every combination is a recipe, in every variant.
        seeds: each recipe runs once with each.
        baseline: the recipe that differences are told against; the first one if not given.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    base: str | dict[str, Any]
    set: dict[str, Any] = {}
    variants: dict[Annotated[str, Field(pattern=f"^{_NAME}$")], dict[str, Any]] = {}
    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = {}
    seeds: list[Seed] = Field([1337], min_length=1)
    baseline: str | None = None

    @field_validator("variants", mode="before")
    @classmethod
    def _plain_variants(cls, given: Any) -> Any:
        """``se_kd:`` with nothing after it is the base as it is."""
        return {n: {} if v is None else v for n, v in given.items()} if isinstance(given, dict) else given

    @model_validator(mode="after")
    def _consistent(self) -> "Study":
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds: {self.seeds} holds a seed twice; each runs once")
        for key, values in self.grid.items():
            if len({json.dumps(value, sort_keys=True, default=str) for value in values}) < len(values):
                raise ValueError(f"grid.{key}: {values} holds a value twice; each is one recipe")
        variants = {f"variants.{name}": keys for name, keys in self.variants.items()}
        for part, keys in {"set": self.set, "grid": self.grid, **variants}.items():
            if owned := _owned_key(keys, part):
                raise ValueError(owned)
        return self


def _owned_key(keys: Iterable[str], part: str) -> str | None:
    """What is wrong with keys that a study sets by itself."""
    if "seed" in keys:
        return f"{part}.seed: not set here; give seeds"
    if any(key == "hub" or key.startswith("hub.") for key in keys):
        return f"{part}.hub: not in a study; each run would replace the one before in the same repository"
    if "name" in keys:
        return f"{part}.name: not set here; a recipe is called by its variant and grid values"
    return None


@dataclass(frozen=True)
class PlannedRun:
    """One run: its recipe's name, its seed, and the recipe."""

    name: str
    seed: int
    recipe: Recipe

    @property
    def id(self) -> str:
        return f"{self.name}/seed-{self.seed}"


def named_studies() -> dict[str, str]:
    """Name -> YAML text of every study that comes with selkd."""
    files = sorted((resources.files("selkd") / "studies").iterdir(), key=lambda file: file.name)
    return {f.name.removesuffix(".yaml"): f.read_text(encoding="utf-8") for f in files if f.name.endswith(".yaml")}


def load_study(source: str | Path) -> tuple[str, Study, Path]:
    """The study named or filed as ``source``: its name, its content, and the folder its paths start from.

    Raises:
        InputError: no such study, unreadable YAML, or a key or value that can't be.
    """
    named, path = named_studies(), Path(source)
    if str(source) in named:
        name, text, folder = str(source), named[str(source)], Path()
    elif path.is_file():
        name, folder = path.stem, path.parent
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise InputError(f"{source}: not a text file; a study is YAML in UTF-8.") from None
    else:
        raise InputError(
            f"{source}: neither a named study nor a file. Named studies: {', '.join(named)}.{nearest(source, named)}"
        )
    given = read_mapping(text, str(source), "a study")
    try:
        return name, Study.model_validate(given), folder
    except ValidationError as error:
        raise InputError(explain(error, Study)) from None


def expand(study: Study, folder: Path, overrides: Mapping[str, Any] | None = None) -> list[PlannedRun]:
    """Every run of the study, each recipe checked; seeds innermost.

    Args:
        folder: where a ``base`` that is a file is looked for first.
        overrides: more keys for every run, stronger than all that the study says.

    Raises:
        InputError: a recipe that can't be (named, with what is wrong), two that are the same, an unknown baseline.
    """
    if owned := _owned_key(overrides or {}, "overrides"):
        raise InputError(owned)
    base = _base(study, folder)
    if base.get("hub") is not None and (owned := _owned_key({"hub": None}, "base")):
        raise InputError(owned)
    recipes: dict[str, Recipe] = {}
    for variant, changes in (study.variants or {"": {}}).items():
        name = variant or str(base.get("name"))

        def made(cell: Mapping[str, Any], label: str, changes: Mapping[str, Any] = changes) -> Recipe:
            return _recipe(base, (study.set, changes, cell, overrides or {}), label, study.seeds[0])

        identities = [_identity(made(cell, name)) for cell in _cells(study.grid)]
        labelled = _labelled(variant, study.grid, _without_effect(study.grid, identities), name)
        cells = {label: made(cell, label) for label, cell in labelled.items()}
        if twice := cells.keys() & recipes.keys():
            raise InputError(f"variants: two recipes would be called {sorted(twice)[0]!r}; rename a variant.")
        recipes |= cells
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
    """Keys that change no recipe of this variant, whatever the others are: a fraction beside ``policy: all``."""
    cells = [{key: json.dumps(value, sort_keys=True) for key, value in cell.items()} for cell in _cells(grid)]
    found = set()
    for key in grid:
        told: dict[tuple[str, ...], set[str]] = {}
        for cell, identity in zip(cells, identities, strict=True):
            told.setdefault(tuple(v for k, v in cell.items() if k != key), set()).add(identity)
        if len(grid[key]) > 1 and all(len(same) == 1 for same in told.values()):
            found.add(key)
    return found


def _labelled(
    variant: str, grid: Mapping[str, list[Any]], without_effect: set[str], otherwise: str
) -> dict[str, dict[str, Any]]:
    """Label -> cell of the grid, one alone where keys are without effect.

    Labels that would be the same, or too long for a folder, end in a digest of values.
    """
    cells = _cells({key: values[:1] if key in without_effect else values for key, values in grid.items()})
    shown = [{key: value for key, value in cell.items() if key not in without_effect} for cell in cells]
    labels = ["-".join(part for part in (variant, _label(cell, grid)) if part) or otherwise for cell in shown]
    found = {}
    for label, cell in zip(labels, cells, strict=True):
        is_plain = len(label) <= _LONGEST and labels.count(label) == 1
        digest = xxhash.xxh3_64_hexdigest(json.dumps(cell, sort_keys=True).encode())[:8]
        found[label if is_plain else f"{label[:_LONGEST]}-{digest}"] = cell
    return found


def _label(cell: Mapping[str, Any], grid: Mapping[str, Any]) -> str:
    """``fraction-0.1`` for ``positions.fraction: 0.1``; the whole key where two end alike."""
    last = [key.rpartition(".")[2] for key in grid]
    parts = []
    for key, value in cell.items():
        short = key.rpartition(".")[2]
        told = value if isinstance(value, str) else json.dumps(value)
        parts.append(f"{short if last.count(short) == 1 else key}-{told}")
    return re.sub(r"[^\w.-]+", "_", "-".join(parts)).strip("_")


def _recipe(base: dict[str, Any], layers: Sequence[Mapping[str, Any]], label: str, seed: int) -> Recipe:
    content = deepcopy(base)
    for keys in layers:
        for key, value in keys.items():
            _put(content, key, value)
    try:
        return parse_part(Recipe, {**content, "name": label, "seed": seed})
    except InputError as error:
        raise InputError(f"recipe {label!r} of the study: {error}") from None


def _put(content: dict[str, Any], key: str, value: Any) -> None:
    *parts, last = key.split(".")
    for part in parts:
        if content.get(part) is None:
            content[part] = {}
        content = content[part]
        if not isinstance(content, dict):
            raise InputError(f"{key}: {part} is {content!r}, which has no keys of its own.")
    content[last] = deepcopy(value)


def _identity(recipe: Recipe) -> str:
    return json.dumps(comparable(recipe.resolved()), sort_keys=True)


def _require_different(recipes: Mapping[str, Recipe]) -> None:
    seen: dict[str, str] = {}
    for name, recipe in recipes.items():
        other = seen.setdefault(_identity(recipe), name)
        if other != name:
            raise InputError(
                f"recipes {other!r} and {name!r} of the study are the same once resolved; leave one out (a key may "
                "have no effect beside another, as a fraction beside policy: all, and where scores and caches are kept "
                "changes no result)."
            )

"""The study's tables as runs: what ``tables.yaml`` says, put together to recipes in the order of their value."""

from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selkd.errors import InputError, nearest
from selkd.recipe.files import put_key, read_mapping
from selkd.recipe.part import parse_part
from selkd.recipe.recipe import Recipe

TABLES = Path(__file__).with_name("tables.yaml")
RATES = "rates_"  # before a start's name: the table that chooses its learning rates
_MERGED = ("data", "training", "evaluation", "run")  # parts of which a layer changes some keys; others it replaces


@dataclass(frozen=True)
class StudyRun:
    """One run to do, or a starting student to make (``arm`` is then the start's own name)."""

    table: str
    arm: str
    seed: int
    recipe: Recipe

    @property
    def id(self) -> str:
        return f"{self.table}/{self.arm}/seed-{self.seed}"


@dataclass(frozen=True)
class StudyTables:
    """The content of a ``tables.yaml``.

    Attributes:
        content: its parts by name.
        data: the folder of the texts that ``prepare.py`` wrote.
        out: the folder of the runs, in which the starting students are.
        scale: the name of a part of ``scales``; None: as the file says.
    """

    content: Mapping[str, Any]
    data: Path
    out: Path
    scale: str | None = None

    @classmethod
    def read(cls, file: Path, data: Path, out: Path, scale: str | None = None) -> "StudyTables":
        content = read_mapping(file.read_text(encoding="utf-8"), str(file), "a study's tables")
        if scale is not None:
            _require(scale, content.get("scales", {}), "scale")
        return cls(content, data, out, scale)

    @property
    def names(self) -> list[str]:
        """What can be run: starting students, their rates, and tables."""
        starts: Mapping[str, Any] = self.content["starts"]
        made = [name for name, start in starts.items() if "made" in start]
        return [*made, *(f"{RATES}{name}" for name in starts), *self.content["tables"]]

    def runs(self, name: str, rates: Mapping[str, float] | None = None) -> list[StudyRun]:
        """The runs of ``name``: of a table one seed after another, so that all arms have as many.

        Args:
            rates: family -> learning rate; needed for a table of the file's own scale.

        Raises:
            InputError: there is no such table, or a recipe is not valid.
        """
        _require(name, self.names, "table")
        if name in self.content["starts"]:
            return [StudyRun(name, name, 1, self._recipe(name, self.content["recovery"], self._start(name, made=True)))]
        if name.startswith(RATES):
            return list(self._rates(name.removeprefix(RATES)))
        table = self.content["tables"][name]
        return [self._run(name, table, arm, seed, rates) for seed in table["seeds"] for arm in table["arms"]]

    @property
    def arms(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.content["arms"]
        return found

    def family(self, arm: str) -> str:
        return str(self.content["arms"][arm]["family"])

    def _rates(self, start: str) -> Iterator[StudyRun]:
        table = {"start": start, "text": "tuning"}
        for family, arm in self.content["families"].items():
            for rate in self.content["rates"]:
                run = self._run(f"{RATES}{start}", table, arm, 1, {self.family(arm): rate})
                yield StudyRun(run.table, f"{family}_{rate:g}", run.seed, run.recipe)

    def _run(
        self, name: str, table: Mapping[str, Any], arm: str, seed: int, rates: Mapping[str, float] | None
    ) -> StudyRun:
        keys = dict(_required(arm, self.content["arms"], f"tables.{name}.arms"))
        family, like = keys.pop("family"), keys.pop("like", None)
        seed += keys.pop("seeds_from", 0)
        layers = [self.content["texts"][table["text"]], self._start(table["start"])]
        layers += [self.content["like"][like]] if like is not None else []
        layers.append(table.get("changes", {}))
        if rates is not None:
            layers.append({"training": {"learning_rate": rates[family]}})
        return StudyRun(name, arm, seed, self._recipe(f"{arm}-{seed}", *layers, keys, {"seed": seed}))

    def _start(self, name: str, made: bool = False) -> dict[str, Any]:
        start: dict[str, Any] = dict(_required(name, self.content["starts"], "start"))
        if made:
            return dict(start["made"])
        return start if "made" not in start else {"student": {"model": str(self.out / name / "student")}}

    def _recipe(self, label: str, *layers: Mapping[str, Any]) -> Recipe:
        content: dict[str, Any] = deepcopy(dict(self.content["base"]))
        for layer in (*layers, {} if self.scale is None else self.content["scales"][self.scale]):
            for key, value in layer.items():
                if key in _MERGED:
                    content[key] = {**content.get(key, {}), **value}
                else:
                    put_key(content, key, deepcopy(value), key)
        path = self.data / str(content["data"].get("path"))
        if path.exists():
            content["data"]["path"] = str(path)
        try:
            return parse_part(Recipe, {**content, "name": label})
        except InputError as error:
            raise InputError(f"{label}: {error}") from None


def _required(name: str, known: Mapping[str, Any], what: str) -> Mapping[str, Any]:
    _require(name, known, what)
    found: Mapping[str, Any] = known[name]
    return found


def _require(name: str, known: Mapping[str, Any] | list[str], what: str) -> None:
    if name not in known:
        raise InputError(f"{what}: {name!r} is not known. Allowed: {', '.join(known)}.{nearest(name, list(known))}")

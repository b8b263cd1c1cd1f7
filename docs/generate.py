"""Fills what pages show of the code and of the measurements: ``python docs/generate.py``.

A page has marks, ``<!-- generated: NAME -->`` and ``<!-- end -->``. What stands between them is written here: from the
recipe's models, the entries of its choices, the named recipes, the command line, the modules' docstrings, and
``docs/results/figures.yaml``. All else in a page is written by hand. A test fails where a page is stale.
"""

import ast
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import typer
import yaml
from pydantic import BaseModel

from selkd.cli.main import app
from selkd.plugins import Criterion, Entry, Metric, Policy, Sampler
from selkd.recipe.files import named_recipes
from selkd.recipe.part import models_in
from selkd.recipe.recipe import Recipe
from selkd.recipe.training import OWNED, RECIPE_RANGES, REFUSED
from selkd.reporting import formats

E = TypeVar("E", bound=Entry)
HERE = Path(__file__).parent
ROOT = HERE.parent
SOURCE = ROOT / "src" / "selkd"
PACKAGES = (SOURCE, ROOT / "packages" / "selkd-cache" / "src" / "selkd_cache")
MARKED = re.compile(r"(<!-- generated: (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)
WORDS = {"string": "text", "integer": "integer", "number": "number", "boolean": "true or false", "null": "null"}
SIGNS = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}
SCORING_SAMPLES = "all draws, which are then trained on, too"


def pages() -> list[Path]:
    """README.md and the pages of docs/ that have something generated."""
    written = [ROOT / "README.md", *sorted(HERE.rglob("*.md"))]
    return [page for page in written if MARKED.search(page.read_text(encoding="utf-8"))]


def filled(page: Path) -> str:
    """The text of a page with what is generated written anew."""
    text = page.read_text(encoding="utf-8")
    return MARKED.sub(lambda mark: f"{mark[1]}\n{generated(mark[2])}\n\n{mark[3]}", text)


def generated(name: str) -> str:
    """What stands between the marks of ``name``: a block's name, or ``keys`` and a part of the recipe."""
    block, _, part = name.partition(" ") if name.startswith("keys ") else (name, "", "")
    blocks: dict[str, Callable[[], str]] = {
        "ranges": lambda: table(
            "key | allowed", [[f"`{key}`", allowed] for key, (_, allowed) in RECIPE_RANGES.items()]
        ),
        "owned": lambda: table("key | instead", [[f"`{key}`", instead] for key, instead in OWNED.items()]),
        "refused": lambda: table(
            "key | why, or what to do", [[f"`{key}`", reason] for key, (_, reason) in REFUSED.items()]
        ),
        "recipes": lambda: table("name | what it is", [[f"`{n}`", first_line(t)] for n, t in named_recipes().items()]),
        "commands": commands_text,
        "criteria": lambda: table(
            "`name` | D(p, q) | options", [[*cells(c), options_of(c)] for c in entries(Criterion)]
        ),
        "metrics": lambda: table(
            "`metric` | score u, at temperature 1 | needs the teacher | from a cache with scalars",
            [[*cells(m), yes(m.needs_teacher), from_cache(m, "some of the draws")] for m in entries(Metric)],
        ),
        "choices": choices,
        "policies": lambda: table("`policy` | coefficients a", [cells(policy) for policy in entries(Policy)]),
        "samplers": lambda: table("`sampler` | what is compared", [cells(sampler) for sampler in entries(Sampler)]),
        "sample metrics": lambda: table(
            "`metric` | score of a sample | needs the teacher | from a cache with scalars",
            [
                [f"`{m.name}`", escape(m.of_sample or ""), yes(m.needs_teacher), from_cache(m, SCORING_SAMPLES)]
                for m in Metric.of_samples().values()
            ],
        ),
        "keys": lambda: table("key | type | default | meaning", keys_of(part)),
        "tree": tree,
        "saves": saves,
        "demo-printed": demo_printed,
        "demo-fidelity": demo_fidelity,
        "demo-runs": demo_runs,
        "measured": measured,
        "how": how_made,
        "step": step_table,
        "selection": selection_table,
    }
    return blocks[block]()


def keys_of(part: str) -> list[list[str]]:
    """A row for each key of a part of the recipe, or of the recipe itself."""
    if part == "recipe":
        return rows_of(Recipe, "", nested=False)
    (model,) = models_in(Recipe.model_fields[part].annotation)
    return rows_of(model, f"{part}.")


def rows_of(model: type[BaseModel], prefix: str, nested: bool = True) -> list[list[str]]:
    schema = model.model_json_schema()["properties"]
    rows = []
    for name, field in model.model_fields.items():
        key = field.alias or name
        if not field.description:
            raise ValueError(f"{model.__name__}.{name} has no description")
        default = "see below" if field.default_factory else default_of(schema[key].get("default"))
        default = "required" if field.is_required() else default
        rows.append([f"`{prefix}{key}`", type_of(schema[key]), default, escape(field.description)])
        for inner in models_in(field.annotation) if nested else ():
            rows += rows_of(inner, f"{prefix}{key}.")
    return rows


def entries(kind: type[E]) -> list[E]:
    """The built-in metrics, policies, criteria or samplers."""
    return list(kind.builtin().values())


def choices() -> str:
    """A row for each choice of a recipe with the names that it takes, and the options that belong to a name."""

    def listed(parts: Iterable[Entry]) -> str:
        options = {part.name: ", ".join(f"`{key}`" for key in getattr(part, "options", ())) for part in parts}
        return ", ".join(f"`{name}`" + (f" ({keys})" if keys else "") for name, keys in options.items())

    metrics = entries(Metric)
    alone, with_teacher = ([m for m in metrics if m.needs_teacher == needed] for needed in (False, True))
    rows = {
        "criterion.name": listed(entries(Criterion)),
        "positions.metric": f"of the student: {listed(alone)}; of the teacher, live or (all but `reverse_kl`) cached: "
        f"{listed(with_teacher)}",
        "positions.policy": listed(entries(Policy)),
        "classes.sampler": listed(entries(Sampler)),
        "samples.metric": f"{listed(Metric.of_samples().values())}, or `all` for no filter",
    }
    return table("choice | names", [[f"`{key}`", names] for key, names in rows.items()])


def cells(entry: Entry) -> list[str]:
    return [f"`{entry.name}`", escape(entry.description)]


def options_of(criterion: Criterion) -> str:
    """A criterion's options with their defaults, and between what they must lie."""
    options = [f"`{key}` {value:g}" for key, value in criterion.options.items()]
    return ", ".join(options + ["between 0 and 1"] * criterion.mixes)


def from_cache(metric: Metric, draws: str) -> str:
    """How a metric is had where the teacher is a cache with its entropy and log p(y); ``draws`` says by which draws."""
    if not metric.is_from_draws:
        return "no"
    if not metric.uses_draws:
        return "exact"
    return f"estimated{'' if metric.is_scaled else ' without bias'} from {draws}"


def yes(answer: bool) -> str:
    return "yes" if answer else "no"


def type_of(schema: dict[str, Any]) -> str:
    """A JSON schema in words."""
    if choices := schema.get("anyOf") or schema.get("oneOf"):
        return " or ".join(type_of(choice) for choice in choices)
    if "const" in schema:
        return f"`{schema['const']}`"
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "$ref" in schema or schema.get("type") == "object":
        return "mapping"
    if schema.get("type") == "array":
        return f"list of {type_of(schema['items'])}"
    limits = ", ".join(f"{sign} {schema[key]}" for key, sign in SIGNS.items() if key in schema)
    return f"{WORDS[schema['type']]} {limits}".strip()


def default_of(value: Any) -> str:
    """A default as YAML shows it."""
    match value:
        case dict():
            return "see below" if value else "`{}`"
        case None:
            return "`null`"
        case bool():
            return f"`{str(value).lower()}`"
        case list():
            return f"`[{', '.join(map(str, value))}]`"
    return f"`{value}`"


def commands_text() -> str:
    """A section for each command."""
    sections = []
    for name, command in commands().items():
        shown = [p for p in command.params if p.name != "help"]
        needed = [usage_of(p) for p in shown if is_argument(p) or p.required]
        rows = [
            [
                f"`{usage_of(p)}`" if p.metavar or not getattr(p, "is_flag", False) else flags(p),
                "required" if p.required else "" if p.default in (None, False) else f"`{p.default}`",
                escape(getattr(p, "help", None) or ""),
            ]
            for p in shown
        ]
        usage = f"    selkd {' '.join([name, *needed])} [OPTIONS]"
        listed = table("argument or option | default | meaning", rows)
        sections.append(f"## selkd {name}\n\n{escape(command.help or '')}\n\n{usage}\n\n{listed}")
    return "\n\n".join(sections)


def flags(parameter: Any) -> str:
    """A flag, and what turns it off if there is such a one."""
    return ", ".join(f"`{option}`" for option in [parameter.opts[0], *parameter.secondary_opts])


def commands() -> dict[str, Any]:
    """Every command: ``cache build`` and what Typer makes of it."""

    def below(command: Any, path: str) -> Iterator[tuple[str, Any]]:
        for name, inner in command.commands.items():
            if hasattr(inner, "commands"):
                yield from below(inner, f"{path}{name} ")
            else:
                yield f"{path}{name}", inner

    return dict(below(typer.main.get_command(app), ""))


def is_argument(parameter: Any) -> bool:
    return not parameter.opts[0].startswith("-")


def usage_of(parameter: Any) -> str:
    """``[TEXT]``, ``--layers LAYERS``."""
    name = str(parameter.metavar or parameter.name.upper())
    if not is_argument(parameter):
        return f"{parameter.opts[0]} {name}"
    return name if parameter.required or name.startswith("[") else f"[{name}]"


def table(heads: str, rows: list[list[str]]) -> str:
    names = heads.split(" | ")
    return "\n".join(f"| {' | '.join(row)} |" for row in [names, ["---"] * len(names), *rows])


def escape(text: str) -> str:
    """Text for a cell or a paragraph of Markdown."""
    return re.sub(r"([|<*])", r"\\\1", re.sub(r"\s+", " ", text)).strip()


def first_line(text: str) -> str:
    return escape(text.splitlines()[0].removeprefix("# "))


# What the modules say of themselves.


def tree() -> str:
    """Every module of both packages with the first sentence of its docstring; folders of data with their number."""
    lines = [line for source in PACKAGES for line in (f"{source.name}/", *tree_below(source, "  "))]
    return "\n".join(["```text", *lines, "```"])


def tree_below(folder: Path, indent: str) -> Iterator[str]:
    """The lines of a folder: its modules, then its data, then the folders below."""
    modules = [path for path in sorted(folder.glob("*.py")) if path.name != "__init__.py" or folder in PACKAGES]
    width = max((len(path.name) for path in modules), default=0)
    for path in modules:
        yield f"{indent}{path.name:<{width}}  {first_sentence(path)}".rstrip()
    for room in sorted(path for path in folder.iterdir() if path.is_dir() and path.name != "__pycache__"):
        sentence = first_sentence(room / "__init__.py") if (room / "__init__.py").is_file() else ""
        data = [path.suffix for path in room.iterdir() if path.is_file() and path.suffix != ".py"]
        if data and not sentence:
            sentence = f"{len(data)} files: {', '.join(f'*{suffix}' for suffix in sorted(set(data)))}"
        yield f"{indent}{room.name}/  {sentence}".rstrip()
        yield from tree_below(room, indent + "  ")


def first_sentence(module: Path) -> str:
    """The first sentence of a module's docstring, on one line; empty if it has none."""
    docstring = ast.get_docstring(ast.parse(module.read_text(encoding="utf-8"))) or ""
    line = re.sub(r"\s+", " ", docstring.split("\n\n")[0]).replace("``", "")
    return re.split(r"(?<=\.)\s(?=[A-Z])", line)[0]


# What was measured.


@dataclass(frozen=True)
class Figure:
    """A figure as it is written: ``1.72 nats``."""

    value: str
    unit: str

    def __str__(self) -> str:
        return f"{self.value}%" if self.unit == "%" else f"{self.value} {self.unit}".strip()

    @property
    def number(self) -> float:
        return float(self.value.replace(",", ""))

    @property
    def duration(self) -> str:
        """Seconds as ``1 min 56 s``."""
        assert self.unit == "s", self
        minutes, seconds = divmod(round(self.number), 60)
        return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def measurements() -> dict[str, dict[str, Any]]:
    """The measurements of ``figures.yaml``; their figures as ``Figure``."""
    content = yaml.safe_load((HERE / "results" / "figures.yaml").read_text(encoding="utf-8"))["measurements"]
    for measurement in content.values():
        figures = measurement.get("figures", {})
        measurement["figures"] = {name: Figure(*[*str(text).split(" "), ""][:2]) for name, text in figures.items()}
    return dict(content)


def with_figures(measurement: dict[str, Any], text: str) -> str:
    """``text`` with a measurement's figures, its machine and its ``ranges`` in place of their names in braces."""
    return text.format(machine=measurement["machine"], ranges=measurement.get("ranges", {}), **measurement["figures"])


def saves() -> str:
    """What a step, a run and a teacher on disk cost, beside what they cost with full logits everywhere."""
    measured = measurements()
    step, run, cache = (measured[name]["figures"] for name in ("step", "whole_run", "cache_bytes"))
    variants = ("full_kd_plain", "full_kd", "se_kd_exact", "se_kd_cached")
    reused = f"{run['run'].value}; {run['reused'].value} once scores and file are there"
    rows = [
        [
            "a training step; 1 is both models without their heads",
            *(step[name].value for name in variants),
        ],
        ["memory for its loss", *(str(step.get(f"{name}_memory", "")) for name in variants)],
        ["a whole run's processor time, with `samples.scoring: approximate`", "1", "", "", reused],
        ["the teacher on disk, bytes a position", cache["full_logits"].value, "", "", bytes_by_text(cache)],
    ]
    return table(" | Full KD, full logits | Full KD, chunked | SE-KD, chunked | SE-KD 3X, teacher in a file", rows)


def bytes_by_text(cache: dict[str, Figure]) -> str:
    return f"{cache['textbooks'].number:.0f} to {cache['web'].number:.0f}, about 1 more with entropy and log p(y)"


def demo_printed() -> str:
    """The lines of the demo's closing table that matter, and where they were printed."""
    demo = measurements()["demo"]
    f = demo["figures"]
    rows = [
        ("perplexity", f"{f['perplexity_before']} → {f['perplexity_after']}"),
        ("  the teacher’s", f["perplexity_teacher"]),
        ("KL to the teacher, nats", f"{f['kl_before'].value} → {f['kl_after'].value}"),
        ("top-1 agreement", f"{f['agreement_before']} → {f['agreement_after']}"),
        ("held-out positions", f["held_out"].value),
        ("samples kept", f"{f['samples_kept'].value} of {f['samples'].value}"),
        ("positions selected", f["positions_selected"]),
        ("cache, a position", f["cache"]),
        ("total time", f["total"].duration),
        ("peak memory, process", f["peak"]),
    ]
    lines = [f"{name:<26}{value!s:>14}" for name, value in rows]
    return "\n".join(["```text", *lines, "```", "", f"Printed on {demo['machine']}, {demo['date']}."])


def demo_fidelity() -> str:
    """How close the demo's student comes to its teacher, and under which conditions."""
    demo = measurements()["demo"]
    f = demo["figures"]
    change = formats.signed(f["kl_after"].number / f["kl_before"].number - 1, partial(formats.percent, digits=0))
    fidelity = table(
        f"on {f['held_out'].value} held-out positions | before | after | teacher",
        [
            ["perplexity", *(str(f[f"perplexity_{when}"]) for when in ("before", "after", "teacher"))],
            ["KL to the teacher, nats", f["kl_before"].value, f"{f['kl_after'].value} ({change})", ""],
            ["top-1 agreement", str(f["agreement_before"]), str(f["agreement_after"]), ""],
        ],
    )
    counted = (
        f"{f['samples_kept'].value} of {f['samples'].value} samples were kept, {f['positions_selected']} of their "
        f"positions selected; {f['steps'].value} optimiser steps."
    )
    return f"{fidelity}\n\n{counted}\n\nMeasured on {demo['machine']}, {demo['date']}: {demo['conditions']}."


def demo_runs() -> str:
    """A row for each machine that ran the demo."""
    stages = ("prepare", "score", "build", "train", "evaluate")
    rows = []
    for name, run in measurements().items():
        if name != "demo" and not name.startswith("demo_"):
            continue
        f = run["figures"]
        reached = ("perplexity_after", "kl_after", "agreement_after")  # missing where the text was another
        times = [f["total"].duration, *(f[stage].value for stage in stages)]
        where = f"{run['machine']}, {run.get('date', 'date not recorded')}"
        rows.append([where, *times, *(str(f.get(name, "")) for name in reached), str(f["cache"]), str(f["peak"])])
    return table(
        "machine | whole run | prepare, s | score, s | cache, s | train, s | evaluate, s | perplexity | KL "
        "| agreement | a cached position | peak memory",
        rows,
    )


def measured() -> str:
    """A list item for each measurement that has a sentence."""
    return "\n".join(
        f"- [{m['what']}](results/{m['page']}): {with_figures(m, m['summary'])}"
        for m in measurements().values()
        if "summary" in m
    )


def how_made() -> str:
    """A row for each measurement that has a name."""
    return table(
        "figures | commands | machine | date",
        [
            [
                f"[{m['what']}]({m['page']})",
                "<br>".join(f"`{command}`" for command in m["commands"]),
                m["machine"],
                str(m["date"]),
            ]
            for m in measurements().values()
            if "what" in m
        ],
    )


def step_table() -> str:
    """A row for each variant of a step: time as a multiple of the floor and memory above it, on each machine."""
    known = measurements()
    steps = [known[name] for name in ("step", "step_float32", "step_xeon", "step_amx") if name in known]
    heads = [head for step in steps for head in (f"{step['column']}: x floor", "memory above floor")]
    rows = [["floor", *(cell for step in steps for cell in (str(step["figures"]["floor"]), "")), ""]]
    for name, ratio in steps[0]["figures"].items():
        if ratio.unit != "x":
            continue
        cells = [f"`{name}`"]
        for figures in (step["figures"] for step in steps):
            memory = figures.get(f"{name}_memory")
            cells += [figures[name].value if name in figures else "", f"+{memory}" if memory else ""]
        rows.append([*cells, steps[0]["aims"].get(name, "")])
    return table(" | ".join(["variant", *heads, "aim"]), rows)


def selection_table() -> str:
    figures = measurements()["selection"]["figures"]
    return table("policy | milliseconds", [[f"`{name}`", figure.value] for name, figure in figures.items()])


if __name__ == "__main__":
    for page in pages():
        page.write_text(filled(page), encoding="utf-8")

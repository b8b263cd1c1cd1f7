"""The student's model card, as the Hugging Face hub reads it: YAML front matter, then Markdown."""

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from selkd.reporting import formats, words
from selkd.reporting.formats import dig, or_dash

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def model_card(record: dict[str, Any]) -> str:
    """README.md of the student from a run's record.json.

    Names a base model and a data set only where they are ids of the hub: a folder of this machine means nothing there,
    so of a local path only the last part shows. Claims no licence: the base model's holds.
    """
    front: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    base, data = _hub_id(_base_model(record)), _hub_id(dig(record, "recipe", "data", "path"))
    if base is not None:
        front["base_model"] = base
    if data is not None:
        front["datasets"] = [data]
    front["tags"] = ["selkd", "knowledge-distillation", "selective-knowledge-distillation"]
    matter = yaml.safe_dump(front, sort_keys=False, allow_unicode=True)
    sections = [_what(record), _figures(record), *_benchmarks(record), _how(record), _limits(), _recipe(record)]
    return f"---\n{matter}---\n\n" + "\n\n".join(sections) + "\n"


def _base_model(record: dict[str, Any]) -> str | None:
    """The model whose weights the student began with: its own, or the teacher that it was cut from."""
    pruned = dig(record, "student", "pruned_from_teacher") is not None
    name = dig(record, "teacher" if pruned else "student", "model")
    return words.DEMO_MODEL if name == "demo" else name


def _hub_id(name: str | None) -> str | None:
    # A folder of that name is what selkd would have loaded.
    return name if name is not None and _HUB_ID.fullmatch(name) and not Path(name).exists() else None


def _what(record: dict[str, Any]) -> str:
    layers, version = dig(record, "student", "layers"), _plain(or_dash(dig(record, "environment", "selkd")))
    return (
        f"# {_plain(str(dig(record, 'name') or 'student'))}\n\n"
        f"A causal language model of {formats.parameters(dig(record, 'student', 'parameters'))} parameters and "
        f"{formats.count(layers)} layers ({_plain(words.student(record))}), distilled from "
        f"{_code(words.model(dig(record, 'teacher', 'model')))} with selkd {version}.\n\n"
        "```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'folder = "."  # this folder, or its id on the hub\n'
        "model = AutoModelForCausalLM.from_pretrained(folder)\n"
        "tokenizer = AutoTokenizer.from_pretrained(folder)\n"
        "```"
    )


def _figures(record: dict[str, Any]) -> str:
    before, after = dig(record, "fidelity", "before"), dig(record, "fidelity", "after")
    teacher = formats.perplexity(dig(record, "fidelity", "teacher", "perplexity"))
    rows: list[tuple[str, str, Callable[[float | None], str], str]] = [
        ("Perplexity", "perplexity", formats.perplexity, teacher),
        ("KL to the teacher, nats", "kl_nats", formats.nats, "0"),
        ("Top-1 agreement with the teacher", "top1_agreement", formats.percent, "100%"),
    ]
    table = "\n".join(
        f"| {name} | {form(dig(before, key))} | {form(dig(after, key))} | {at_teacher} |"
        for name, key, form, at_teacher in rows
    )
    return (
        "## Figures\n\n"
        f"On {formats.count(dig(record, 'fidelity', 'positions'))} held-out positions, text of the same source as the "
        "training's:\n\n"
        f"| | before | after | teacher |\n|---|---:|---:|---:|\n{table}"
    )


def _benchmarks(record: dict[str, Any]) -> list[str]:
    """Each task's counted figure after training, with its rows and shots; no section if there is none."""
    tasks = dig(record, "benchmarks", "after", "tasks")
    if not tasks:
        return []
    rows = []
    for name, task in tasks.items():
        metric = task.get("counts") or next(iter(task["metrics"]))
        described = _plain(str(task.get("described") or metric))
        value = dig(task, "metrics", metric, "value")
        figure = formats.percent(value) if task.get("counts") else or_dash(value)
        rows.append(f"| {_plain(name)} | {described} | {or_dash(task.get('shots'))} | {figure} |")
    table = "| task | measured | shots | after |\n|---|---|---:|---:|\n" + "\n".join(rows)
    return [f"## Benchmarks\n\nBy lm-evaluation-harness; what is written is written greedily:\n\n{table}"]


def _how(record: dict[str, Any]) -> str:
    recipe, counts, seconds = dig(record, "recipe"), dig(record, "counts"), dig(record, "seconds")
    kept, samples = formats.count(dig(counts, "samples_kept")), formats.count(dig(counts, "samples"))
    share = formats.percent(formats.share(dig(counts, "positions_selected"), dig(counts, "positions_valid")))
    environment = dig(record, "environment")
    lines = [
        f"Data: {words.data(recipe)}.",
        f"Samples: {words.samples(recipe)} ({kept} of {samples}).",
        f"Positions: {words.positions(recipe)} ({share} of those seen).",
        f"Classes: {words.classes(recipe)}.",
        f"Criterion: {words.criterion(recipe)}, temperature {or_dash(dig(recipe, 'criterion', 'temperature'))}, "
        f"weight {or_dash(dig(recipe, 'criterion', 'kd_weight'))} against cross-entropy on the true token.",
        f"Training: {formats.count(dig(record, 'train', 'steps'))} optimiser steps in "
        f"{formats.duration(dig(seconds, 'train'))}; the whole run took {formats.duration(dig(seconds, 'total'))} on "
        f"{or_dash(dig(environment, 'device'))} ({or_dash(dig(environment, 'processor'))}, "
        f"{or_dash(dig(environment, 'precision'))}).",
    ]
    return "## How it was made\n\n" + "\n".join(f"- {_plain(line)}" for line in lines)


def _limits() -> str:
    return (
        "## Limits\n\n"
        "The figures measure closeness to the teacher on one kind of text; they are no benchmark of ability or safety. "
        "The student inherits what its teacher gets wrong. The licence of the base model applies.\n\n"
        'Method: "Rethinking Selective Knowledge Distillation" (arXiv 2602.01395) and the works it builds on.'
    )


def _recipe(record: dict[str, Any]) -> str:
    recipe = copy.deepcopy(dig(record, "recipe"))
    for part, key in (
        ("teacher", "model"),
        ("student", "model"),
        ("data", "path"),
        ("samples", "path"),
        ("cache", "path"),
    ):
        if isinstance(value := dig(recipe, part, key), str) and value != "demo" and _hub_id(value) is None:
            recipe[part][key] = Path(value).name  # a folder of this machine means nothing elsewhere
    text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True).strip()
    # A fence longer than any run of backticks in it can't be closed from within.
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"## Recipe\n\n{fence}yaml\n{text}\n{fence}"


def _code(text: str) -> str:
    return "`" + re.sub(r"[`\r\n]", "'", text) + "`"


def _plain(text: str) -> str:
    """Text that Markdown and HTML take as it stands: on one line, their signs escaped."""
    return re.sub(r"([\\`*_\[\]<>#|])", r"\\\1", " ".join(text.split()))

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
    sections = [_what(record), _figures(record), *_benchmarks(record), _how(record), _limits(record), _recipe(record)]
    return f"---\n{matter}---\n\n" + "\n\n".join(section for section in sections if section) + "\n"


def _base_model(record: dict[str, Any]) -> str | None:
    """The model whose weights the student began with: its own, or the teacher that it was cut from."""
    pruned = dig(record, "student", "pruned_from_teacher") is not None
    name = dig(record, "teacher" if pruned else "student", "model")
    return words.DEMO_MODEL if name == "demo" else name


def _hub_id(name: str | None) -> str | None:
    # A folder of that name is what selkd would have loaded.
    return name if name is not None and _HUB_ID.fullmatch(name) and not Path(name).exists() else None


def _when(text: str, *values: object) -> str:
    """``text`` where all of ``values`` are known, else nothing: a card tells no blanks."""
    return text if all(value is not None for value in values) else ""


def _what(record: dict[str, Any]) -> str:
    parameters, layers = dig(record, "student", "parameters"), dig(record, "student", "layers")
    size = _when(
        f" of {formats.parameters(parameters)} parameters and {formats.count(layers)} layers", parameters, layers
    )
    origin = _when(f" ({_plain(words.student(record))})", _base_model(record))
    teacher, version = dig(record, "teacher", "model"), dig(record, "environment", "selkd")
    distilled = f"distilled{_when(f' from {_code(words.model(teacher))}', teacher)} with selkd"
    return (
        f"# {_plain(str(dig(record, 'name') or 'student'))}\n\n"
        f"A causal language model{size}{origin}, {distilled}{_when(f' {_plain(str(version))}', version)}.\n\n"
        "```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'folder = "."  # this folder, or its id on the hub\n'
        "model = AutoModelForCausalLM.from_pretrained(folder)\n"
        "tokenizer = AutoTokenizer.from_pretrained(folder)\n"
        "```"
    )


def _figures(record: dict[str, Any]) -> str:
    """What was measured, a column for each time that it was; a sentence where nothing was."""
    teacher = dig(record, "fidelity", "teacher", "perplexity")
    columns: dict[str, dict[str, float]] = {
        "before": dig(record, "fidelity", "before") or {},
        "after": dig(record, "fidelity", "after") or {},
        "teacher": {"kl_nats": 0.0, "top1_agreement": 1.0} | ({} if teacher is None else {"perplexity": teacher}),
    }
    if not columns["after"]:
        return "## Figures\n\nCloseness to the teacher on held-out text was not measured."
    columns = {name: column for name, column in columns.items() if column}
    rows: list[tuple[str, str, Callable[[float | None], str]]] = [
        ("Perplexity", "perplexity", formats.perplexity),
        ("KL to the teacher, nats", "kl_nats", lambda value: formats.nats(value) if value else "0"),
        ("Top-1 agreement with the teacher", "top1_agreement", lambda v: "100%" if v == 1 else formats.percent(v)),
    ]
    table = "\n".join(
        f"| {name} | "
        + " | ".join("not measured" if column.get(key) is None else form(column[key]) for column in columns.values())
        + " |"
        for name, key, form in rows
        if columns["after"].get(key) is not None
    )
    positions = dig(record, "fidelity", "positions")
    return (
        f"## Figures\n\nOn {_when(f'{formats.count(positions)} ', positions)}held-out positions, text of the same "
        f"source as the training's:\n\n| | {' | '.join(columns)} |\n|---|{'---:|' * len(columns)}\n{table}"
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
    kept, samples = dig(counts, "samples_kept"), dig(counts, "samples")
    share = formats.share(dig(counts, "positions_selected"), dig(counts, "positions_valid"))
    quantised, adapters = dig(recipe, "teacher", "quantization"), dig(recipe, "student", "lora")
    trained, rollouts = dig(record, "student", "trained_parameters"), dig(record, "on_policy")
    path, criterion = dig(recipe, "data", "path"), dig(recipe, "criterion", "name")
    lines = [
        _when(f"Data: {words.data(recipe)}.", path),
        "" if not rollouts else f"Rollouts, the student's own answers: {words.rollouts(rollouts)}.",
        _when(
            f"Samples: {words.samples(recipe)}"
            + _when(f" ({formats.count(kept)} of {formats.count(samples)})", kept, samples)
            + ".",
            path,
        ),
        _when(
            f"Positions: {words.positions(recipe)}{_when(f' ({formats.percent(share)} of those seen)', share)}.",
            dig(recipe, "positions", "policy"),
        ),
        _when(f"Classes: {words.classes(recipe)}.", dig(recipe, "classes", "sampler")),
        _when(f"Criterion: {words.criterion(recipe)}{_weighting(recipe)}.", criterion),
        ""
        if quantised is None
        else f"Teacher: its layers quantised, {words.quantisation(quantised)}; the head is not.",
        ""
        if adapters is None
        else f"Trained: {words.adapters(adapters)}"
        + _when(f", {formats.parameters(trained)} parameters", trained)
        + "; they are merged into the weights here.",
        _training(record, seconds),
    ]
    told = "\n".join(f"- {_plain(line)}" for line in lines if line)
    return told and f"## How it was made\n\n{told}"


def _weighting(recipe: Any) -> str:
    temperature, weight = dig(recipe, "criterion", "temperature"), dig(recipe, "criterion", "kd_weight")
    told = _when(f", temperature {temperature}", temperature)
    if weight is not None and weight < 1:
        told += f", weight {weight} against cross-entropy on the true token"
    return told


def _training(record: dict[str, Any], seconds: Any) -> str:
    steps, train, total = dig(record, "train", "steps"), dig(seconds, "train"), dig(seconds, "total")
    keys = ("device", "processor", "precision")
    device, *more = (str(value) for key in keys if (value := dig(record, "environment", key)) or key == "device")
    machine = f" on {device}" + (f" ({', '.join(more)})" if more else "")
    return _when(
        f"Training: {formats.count(steps)} optimiser steps"
        + _when(f" in {formats.duration(train)}", train)
        + _when(f"; the whole run took {formats.duration(total)}", total)
        + _when(machine, dig(record, "environment", "device"))
        + ".",
        steps,
    )


def _limits(record: dict[str, Any]) -> str:
    measured = (
        "The figures measure closeness to the teacher on one kind of text; they are no benchmark of ability or safety. "
    )
    return (
        "## Limits\n\n"
        f"{_when(measured, dig(record, 'fidelity', 'after'))}"
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

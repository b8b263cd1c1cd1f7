"""The record of the study: one line of JSON for each run, from which all tables and plots are made.

A line has what was run (table, arm, seed, digest of the recipe), each held-out document's sums of KL in nats at each
measured step, and what the run cost: positions that the teacher was asked at, passes of a head over one, seconds.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import xxhash

from selkd.maths.importance import OF_TEACHER
from selkd.models.sources import default_cache_dir
from selkd.needs.architecture import Architecture, find_files, teacher_and_student
from selkd.plugins import Criterion, Metric
from selkd.recipe.files import stored_recipe
from selkd.recipe.recipe import Recipe
from selkd.reporting.comparison import comparable

FORMAT = 1
Line = Mapping[str, Any]


def line_of(run: Path, table: str, arm: str, seed: int) -> dict[str, Any]:
    """The line of a finished run."""
    record = json.loads((run / "record.json").read_text(encoding="utf-8"))
    sums = json.loads((run / "fidelity.json").read_text(encoding="utf-8"))
    recipe, steps, after = stored_recipe(run / "recipe.yaml"), record["train"]["steps"], record["fidelity"]["after"]
    way = run / "fidelity_steps.jsonl"
    on_the_way = [json.loads(text) for text in way.read_text(encoding="utf-8").splitlines()] if way.exists() else []
    kl = {0: sums["before"]["kl_nats"]} | {line["step"]: line["kl_nats"] for line in on_the_way}
    kl[steps] = sums["after"]["kl_nats"]
    return {
        "format": FORMAT,
        "table": table,
        "arm": arm,
        "seed": seed,
        "recipe": digest(recipe),
        "learning_rate": recipe.training.get("learning_rate"),
        "steps": steps,
        "held_out": record["inputs"]["held_out"],
        "positions": sums["positions"],
        "kl_nats": {str(step): [round(value, 3) for value in values] for step, values in sorted(kl.items())},
        "figures": {name: round(value, 6) for name, value in after.items()},
        "teacher_perplexity": round(record["fidelity"]["teacher"]["perplexity"], 4),
        "cost": costs(recipe, record),
        "seconds": record["seconds"],
        "seconds_of_step": seconds_of_step(run),
        "machine": record["environment"]["processor"],
        "selkd": record["environment"]["selkd"],
    }


def digest(recipe: Recipe) -> str:
    """A digest of what a recipe does: without name, seed and the places of shared files.

    Keys without a value are left out, so that an option more or less changes no recipe that does not give it.
    """
    content = comparable(recipe.resolved())
    for part in ("run", "hub"):
        content.pop(part, None)
    content["data"]["path"] = Path(content["data"]["path"]).name
    if content["student"]["model"] is not None:
        content["student"]["model"] = Path(content["student"]["model"]).parent.name
    return xxhash.xxh3_64_hexdigest(json.dumps(_given(content), sort_keys=True).encode())


def _given(content: Any) -> Any:
    """Without the keys that have no value."""
    if not isinstance(content, Mapping):
        return content
    return {key: _given(value) for key, value in content.items() if value is not None}


def costs(recipe: Recipe, record: Mapping[str, Any]) -> dict[str, float]:
    """What was spent, counted, so the same on every machine; ``..._in_steps`` is the part that grows with the steps.

    ``positions``: the student trained on. ``teacher_queries``: the teacher's body ran over (prompts, too, which
    nothing is learnt from). ``head_passes``: a head (of either model) made or used logits of: one to score, three to
    compare (forward, and the gradients of states and weight), one of the teacher's, and another where the criterion
    weighs positions by it. ``work``: multiply-adds of bodies and heads, in billions; a step takes three passes of the
    student's body.
    """
    counts, data, samples = record["counts"], record["data"], recipe.samples
    valid, selected = counts["positions_valid"], counts["positions_selected"]
    metric = None if recipe.positions.metric is None else Metric.find(recipe.positions.metric)
    is_cached = recipe.cache is not None
    of_student = 3 * selected + (valid if metric is not None and set(metric.statistics) - OF_TEACHER else 0)
    weighs = Criterion.find(recipe.criterion.name).position_weights is not None
    of_teacher = (0 if is_cached else selected * (2 if weighs else 1)) + (
        valid if metric is not None and metric.needs_teacher else 0
    )
    tokens = data["train_tokens"] / data["train_positions"]  # that a body runs over, for each position
    queries = 0 if is_cached else round(valid * tokens)
    scored = data["train_positions"] if samples is not None and not Metric.find(samples.metric).is_noise else 0
    scored_by_teacher = scored if samples is not None and samples.needs_teacher else 0
    cached = record["teacher_cache"]["positions"] if is_cached else 0
    body, head = _multiply_adds(recipe)
    in_steps = work_of(body, head, valid * tokens, queries, of_student, of_teacher)
    before = scored * (tokens * body["student"] + head["student"])
    before += (scored_by_teacher + cached) * (tokens * body["teacher"] + head["teacher"])
    return {
        "positions": valid,
        "teacher_queries": queries + round((scored_by_teacher + cached) * tokens),
        "teacher_queries_in_steps": queries,
        "head_passes": of_student + of_teacher + scored + scored_by_teacher + cached,
        "head_passes_in_steps": of_student + of_teacher,
        "work": round((before + in_steps) / 1e9, 6),
        "work_in_steps": round(in_steps / 1e9, 6),
    }


def _multiply_adds(recipe: Recipe) -> tuple[dict[str, int], dict[str, int]]:
    """Of a position: of each model's body and of its head, as many as they have weights."""
    cache = default_cache_dir()
    name = recipe.student.model
    of_student = None if name is None else find_files(name, cache)
    teacher, student = teacher_and_student(recipe, find_files(recipe.teacher.model, cache), of_student)
    return bodies_and_heads({"teacher": teacher, "student": student})


def bodies_and_heads(models: Mapping[str, Architecture]) -> tuple[dict[str, int], dict[str, int]]:
    """The weights of each model's body, without its embedding, and of its head."""
    head = {name: model.vocab_size * model.hidden_size for name, model in models.items()}
    body = {n: m.parameters - head[n] * (1 if m.head_is_tied else 2) for n, m in models.items()}
    return body, head


def work_of(
    body: Mapping[str, int],
    head: Mapping[str, int],
    tokens: float,
    queries: float,
    of_student: float,
    of_teacher: float,
) -> float:
    """Multiply-adds of steps over ``tokens``, with ``queries`` of the teacher and passes of both models' heads."""
    bodies = tokens * 3 * body["student"] + queries * body["teacher"]
    return bodies + of_student * head["student"] + of_teacher * head["teacher"]


def seconds_of_step(run: Path) -> float | None:
    """The median time from one logged step to the next; measurements on the way, which are fewer, don't move it."""
    lines = [json.loads(text) for text in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    times = {line["step"]: line["seconds"] for line in lines if "loss" in line and "seconds" in line}
    apart = [(times[b] - times[a]) / (b - a) for a, b in zip(list(times), list(times)[1:], strict=False)]
    return round(statistics.median(apart), 4) if apart else None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a record; none if there is no file yet. A run that was recorded twice counts as recorded last."""
    if not path.exists():
        return []
    lines = [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines() if text]
    return list({(line["table"], line["arm"], line["seed"]): line for line in lines}.values())


def append(path: Path, line: Line) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, separators=(",", ":")) + "\n")


def rates_of(lines: Sequence[Line], table: str) -> dict[str, float]:
    """Family -> the rate whose student was closest to the teacher, of the arms ``FAMILY_RATE`` of ``table``."""
    best: dict[str, tuple[float, float]] = {}
    for line in lines:
        if line["table"] == table:
            family = line["arm"].rpartition("_")[0]
            found = (line["figures"]["kl_nats"], line["learning_rate"])
            best[family] = min(best.get(family, found), found)
    return {family: rate for family, (_, rate) in best.items()}

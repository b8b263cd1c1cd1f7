"""The registry: what a built-in entry decides, a user's own parts as they are shipped, and what is refused."""

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny import V, make_model, make_samples
from tiny_run import make_recipe

from selkd import distill, plugins
from selkd.data.collate import collate
from selkd.errors import InputError, RunError
from selkd.plugins import Criterion, Entry, Metric, Policy, Sampler
from selkd.recipe.choices import ClassOptions, CriterionOptions, PositionOptions
from selkd.recipe.part import parse_part
from selkd.recipe.recipe import Recipe
from selkd.reporting import words
from selkd.selection.classes import class_sampler, top_k
from selkd.selection.position_scores import choose_positions
from selkd.selection.positions import StepContext, select
from selkd.teacher.build_cache import build_cache
from selkd.teacher.live import LiveTeacher
from selkd.tokens.policy import check_metric, require_teacher
from selkd_cache.reader import TeacherCache

EXAMPLE = Path(__file__).parent.parent / "examples" / "own_parts"


def know(monkeypatch: pytest.MonkeyPatch, kind: type[Entry], name: str, function: Callable[..., Any]) -> None:
    """Registers a user's function for one test."""
    monkeypatch.setitem(kind.known(), name, kind.of_function(name, function))


@pytest.mark.parametrize("name", ["recipe.yaml", "sampler.yaml"])
def test_the_worked_example_runs_where_it_lies(name: str, tmp_path: Path) -> None:
    """As a user would, in its folder, with the toy teacher and text in place of the demo's."""
    toy = make_recipe(tmp_path, samples=None, cache=None, classes={"sampler": "all"})
    given = yaml.safe_load((EXAMPLE / name).read_text())
    own = {key: given[key] for key in ("criterion", "positions", "classes", "cache") if key in given}
    recipe = tmp_path / "own.yaml"
    recipe.write_text(yaml.safe_dump(toy | own | {"evaluation": {"suite": []}}))
    done = subprocess.run(
        [sys.executable, "-m", "selkd", "distill", str(recipe), "--out", str(tmp_path / "run"), "--json"],
        capture_output=True, text=True, cwd=EXAMPLE, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    record = yaml.safe_load(done.stdout)
    assert record["train"]["loss_last"] < record["train"]["loss_first"]
    if "positions" in own:
        assert 0 < record["counts"]["positions_selected"] < record["counts"]["positions_valid"]


def test_a_part_that_changed_is_not_taken_for_the_one_that_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code = "def wide(student_logits):\n    return student_logits.amax(-1) - student_logits.amin(-1)\n"
    module = tmp_path / "changing_part.py"
    module.write_text(code)
    recipe = make_recipe(tmp_path, samples=None, cache=None, classes={"sampler": "all"}, evaluation={"suite": []})
    recipe["positions"] = {"metric": "changing_part:wide"}
    distill(recipe, tmp_path / "run")
    assert distill(recipe, tmp_path / "run").record["own_parts"].keys() == {"metric"}
    module.write_text(code + "# another\n")
    with pytest.raises(InputError, match="other inputs than those that the run began with: own_metric: then"):
        distill(recipe, tmp_path / "run")


def test_the_examples_sampler_is_unbiased(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(EXAMPLE)
    draw = class_sampler(ClassOptions.model_validate({"sampler": "own_parts:stratified", "draws": 8}))
    generator = torch.Generator().manual_seed(0)
    p = torch.softmax(torch.randn(6, generator=generator, dtype=torch.float64), dim=-1)
    uniforms = torch.rand(20_000, draw.n_uniforms, generator=generator, dtype=torch.float64)
    class_ids, counts = draw(p.expand(20_000, -1), uniforms)
    target = torch.zeros(20_000, 6, dtype=torch.float64).scatter_add_(-1, class_ids, counts.double()) / 8
    deviation = (p * (1 - p) / 8 / 20_000).sqrt()
    assert ((target.mean(0) - p).abs() < 4.5 * deviation).all()


BAD_ANSWERS = {
    "shapes": ((torch.zeros(2, 1).long(), torch.ones(3, 1).long()), r"expected both \[2, C\]"),
    "dtype": ((torch.zeros(2, 1).long(), torch.ones(2, 1)), "expected int64"),
    "range": ((torch.full((2, 1), 5), torch.full((2, 1), 4)), "outside 0 to 4"),
    "total": ((torch.zeros(2, 1).long(), torch.ones(2, 1).long()), "sum to draws = 4"),
    "twice": ((torch.zeros(2, 2).long(), torch.full((2, 2), 2)), "a class twice"),
}


@pytest.mark.parametrize("name", BAD_ANSWERS)
def test_a_samplers_answer_is_checked(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    answer, message = BAD_ANSWERS[name]
    know(monkeypatch, Sampler, "bad", lambda: answer)
    draw = class_sampler(ClassOptions.model_validate({"sampler": "bad", "draws": 4}))
    with pytest.raises(RunError, match=f"classes.sampler: bad returned .*{message}"):
        draw(torch.full((2, 5), 0.2), torch.zeros(2, 4, dtype=torch.float64))


def test_a_samplers_classes_may_come_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """What selkd has of them ascends, each class with its own count, and padding is last."""
    answer = torch.tensor([[7, 7, 2, 5], [3, 9, 1, 0]]), torch.tensor([[0, 1, 2, 1], [4, 0, 0, 0]])
    know(monkeypatch, Sampler, "unsorted", lambda: answer)
    options = ClassOptions.model_validate({"sampler": "unsorted", "draws": 4})
    class_ids, counts = class_sampler(options)(torch.full((2, 10), 0.1), torch.zeros(2, 4, dtype=torch.float64))
    assert class_ids[0, :3].tolist() == [2, 5, 7]
    assert counts.tolist() == [[2, 1, 1, 0], [4, 0, 0, 0]]
    assert class_ids[1, 0] == 3


def test_a_sampler_whose_classes_descend_is_cached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def backwards(probabilities: torch.Tensor, draws: int) -> tuple[torch.Tensor, torch.Tensor]:
        likeliest = probabilities.topk(3).indices.sort(descending=True).values
        return likeliest, torch.tensor([1, 2, draws - 3]).expand_as(likeliest)

    know(monkeypatch, Sampler, "backwards", backwards)
    options, samples = ClassOptions.model_validate({"sampler": "backwards", "draws": 8}), make_samples(2)
    live = LiveTeacher(make_model(0), options, 1.0, 0, V)
    build_cache(tmp_path, {"draws": 8, "vocabulary": V}, samples, lambda: live, 1)
    rows = TeacherCache.open(tmp_path).get(samples.ids[0])
    assert rows.counts.reshape(-1, 3).tolist() == [[5, 2, 1]] * len(rows.row_lengths)


def test_faults_are_told_by_key_and_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def boom(student_logits: torch.Tensor) -> torch.Tensor:
        return student_logits.no_such_thing

    for kind in (Metric, Criterion):
        know(monkeypatch, kind, "boom", boom)
        know(monkeypatch, kind, "number", lambda: 5)
        know(monkeypatch, kind, "flat", lambda targets: targets.sum())
    logits, targets = torch.zeros(3, 4), torch.zeros(3).long()
    for kind, key in ((Metric, "positions.metric"), (Criterion, "criterion.name")):
        for name, message in (
            ("boom", "raised AttributeError: .*no_such_thing"),
            ("number", "returned int, expected a tensor"),
            ("flat", r"returned shape \(\), expected \(3,\)"),
        ):
            with pytest.raises(RunError, match=f"{key}: {name} {message}"):
                kind.find(name).values(logits, logits, targets)


def test_a_policys_own_randomness_is_the_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    def half(uniforms: torch.Tensor, valid_mask: torch.Tensor, floor: float = 0.5) -> torch.Tensor:
        picked = valid_mask & (uniforms > floor)
        valid_mask |= True  # its own copy
        return picked / picked.sum(-1, keepdim=True).clamp(min=1)

    know(monkeypatch, Policy, "half", half)
    options = PositionOptions.model_validate({"policy": "half"})
    batch = collate(list(make_samples(4)), 1)
    mask = batch["valid_mask"].clone()
    scores = torch.zeros(mask.shape)
    first = choose_positions(options, scores, batch, StepContext(0, 0.2, 0.0, None), seed=1)
    assert torch.equal(batch["valid_mask"], mask)
    assert 0 < int((first > 0).sum()) < int(mask.sum())
    assert torch.equal(first, choose_positions(options, scores, batch, StepContext(0, 0.2, 0.0, None), seed=1))
    assert not torch.equal(first, choose_positions(options, scores, batch, StepContext(1, 0.2, 0.0, None), seed=1))


def test_a_decorated_function_has_a_name_in_recipes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Metric, "_entries", dict(Metric.known()))

    @plugins.metric("gap")
    def gap(student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
        return (student_logits - teacher_logits).abs().amax(-1)

    recipe = make_recipe(tmp_path, cache=None, classes={"sampler": "all"})
    recipe["positions"] = {"metric": "gap"}
    assert parse_part(Recipe, recipe).positions.metric == "gap"
    with pytest.raises(InputError, match="gap needs the teacher's full distribution"):
        parse_part(Recipe, recipe | {"classes": {"sampler": "rs_kd"}, "cache": {"path": None}})
    with pytest.raises(InputError, match=r"'gab' is not known.*Did you mean 'gap'\?"):
        parse_part(Recipe, recipe | {"positions": {"metric": "gab"}})
    with pytest.raises(ValueError, match="'kl' is a built-in metric"):
        plugins.metric("kl")(gap)
    with pytest.raises(ValueError, match=r"'gap' is already the metric .*gap"):
        plugins.metric("gap")(lambda student_logits: student_logits.amax(-1))
    with pytest.raises(ValueError, match=r"a metric may ask for .* but this one asks for temperature"):
        plugins.metric("wrong")(lambda student_logits, temperature: student_logits / temperature)


def test_a_module_that_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fails_at_import.py").write_text("raise RuntimeError('no luck')")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "leaves_at_import.py").write_text("import sys\nsys.exit(0)")
    with pytest.raises(ValueError, match=r"fails_at_import can't be imported \(RuntimeError: no luck\)"):
        Metric.find("fails_at_import:f")
    with pytest.raises(ValueError, match=r"leaves_at_import can't be imported \(SystemExit: 0\)"):
        Metric.find("leaves_at_import:f")
    with pytest.raises(ValueError, match="collections has no function 'OrderedDict'"):
        Metric.find("collections:OrderedDict")


def added(monkeypatch: pytest.MonkeyPatch, kind: type[Entry], name: str, function: Any, **facts: Any) -> None:
    """Adds a built-in entry for one test, by the call that stands beside the function of each."""
    monkeypatch.setattr(kind, "_entries", dict(kind.known()))
    kind.add(name, function, **facts)


def pages(monkeypatch: pytest.MonkeyPatch, block: str) -> str:
    """A block of the documentation, as it is written for what is registered now."""
    monkeypatch.syspath_prepend(str(EXAMPLE.parents[1] / "docs"))
    text: str = importlib.import_module("generate").generated(block)
    return text


def test_a_built_in_metric_is_one_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that recipe, errors, documentation, selection and reports know of it is read from there."""
    added(
        monkeypatch,
        Metric,
        "entropy_gap",
        lambda of, _: (of["teacher_entropy"] - of["student_entropy"]).abs() - of["top1_agreement"],
        statistics=("teacher_entropy", "student_entropy", "top1_agreement"),  # no other metric has the last one
        needs_teacher=True,
        label="the gap between both entropies",
        unit="nats",
        description="|H(p) - H(q)|",
        of_sample="the gap between its mean entropies",
    )
    live: dict[str, Any] = {"cache": None, "classes": {"sampler": "all"}}
    by_gap: dict[str, Any] = {"positions": {"metric": "entropy_gap"}, "samples": {"metric": "entropy_gap"}}
    recipe = make_recipe(tmp_path, **live, **by_gap)
    assert parse_part(Recipe, recipe).positions.needs_teacher
    with pytest.raises(InputError, match="entropy_gap needs the teacher's full distribution"):
        parse_part(Recipe, make_recipe(tmp_path, **by_gap))
    for part in ("positions", "samples"):
        with pytest.raises(InputError, match=r"Allowed: .*entropy_gap.* Did you mean 'entropy_gap'\?"):
            parse_part(Recipe, recipe | {part: {"metric": "entropy_gabs"}})
    with pytest.raises(InputError, match="entropy_gap looks at the teacher's distribution"):
        require_teacher(check_metric("entropy_gap"), [], None)

    run = distill(recipe, tmp_path / "run")
    assert run.record["teacher_tokens"]["score"] > 0
    shown = json.loads((run.path / "selection" / "examples.json").read_text())
    assert shown["metric"] == "entropy_gap"
    overlap = json.loads((run.path / "selection" / "overlap.json").read_text())
    assert all("entropy_gap" in overlap[of]["metrics"] for of in ("positions", "samples"))
    assert "positions where the gap between both entropies is highest" in (run.path / "report.html").read_text()
    assert words.metric_unit("entropy_gap") == "nats"

    assert r"| `entropy_gap` | \|H(p) - H(q)\| | yes |" in pages(monkeypatch, "metrics")
    assert "| `entropy_gap` | the gap between its mean entropies | yes |" in pages(monkeypatch, "sample metrics")


def test_a_built_in_policy_criterion_or_sampler_is_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    added(
        monkeypatch, Policy, "late", lambda given: given.valid_mask / given.valid_mask.sum(-1, keepdim=True),
        fraction="none", options={"smoothing": 3.0}, label="late positions by {metric}", description="1/n, late",
    )  # fmt: skip
    added(monkeypatch, Criterion, "mixture", None, options={"beta": 0.25}, mixes=True, label="mixed KL")
    added(monkeypatch, Sampler, "first", top_k, n_uniforms=lambda _: 3, label="the {draws} first classes")

    options = parse_part(PositionOptions, {"policy": "late"}, "positions")
    assert (options.fraction, options.smoothing, options.reduction) == (None, 3.0, "per_sample")
    with pytest.raises(InputError, match="smoothing: an option of pos_rs and pos_rs_corrected and late, without"):
        parse_part(PositionOptions, {"policy": "top_k", "smoothing": 2}, "positions")
    mask = torch.tensor([[True, True, False]])
    weights = select(options, torch.zeros(1, 3), mask, StepContext(0, None, 0.0, None))
    assert weights.tolist() == [[0.5, 0.5, 0.0]]
    assert parse_part(CriterionOptions, {"name": "mixture"}, "criterion").beta == 0.25
    with pytest.raises(InputError, match="mixture mixes two distributions"):
        parse_part(CriterionOptions, {"name": "mixture", "beta": 1}, "criterion")
    assert class_sampler(parse_part(ClassOptions, {"sampler": "first", "draws": 2}, "classes")).n_uniforms == 3

    recipe = {"positions": {"policy": "late", "metric": "kl"}, "criterion": {"name": "mixture"}}
    summary = words.summary({"recipe": recipe | {"classes": {"sampler": "first", "draws": 2}}})
    for phrase in ("by mixed KL", "late positions by the divergence KL(teacher ‖ student)", "the 2 first classes"):
        assert phrase in summary
    assert "| `late` | 1/n, late |" in pages(monkeypatch, "policies")
    assert "| `mixture` |  | `beta` 0.25, between 0 and 1 |" in pages(monkeypatch, "criteria")
    assert "| `first` |" in pages(monkeypatch, "samplers")


def test_a_named_recipe_is_read_without_torch_which_a_parts_function_imports() -> None:
    code = "import sys; from selkd.plugins import Policy; from selkd.recipe.files import load_recipe, named_recipes\n"
    code += "recipes = [load_recipe(name) for name in named_recipes()]\n"
    code += "first = [name for name in ('torch', 'transformers') if name in sys.modules]\n"
    code += "from selkd.maths.divergence import torch; torch.zeros(1); print(first, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] True"

"""A user's own parts: the worked example as it is shipped, and what is refused."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tiny import make_samples
from tiny_run import make_recipe

from selkd import distill, plugins
from selkd.data.collate import collate
from selkd.errors import InputError, RunError
from selkd.recipe.choices import ClassOptions, PositionOptions
from selkd.recipe.part import parse_part
from selkd.recipe.recipe import Recipe
from selkd.selection.classes import class_sampler
from selkd.selection.position_scores import choose_positions
from selkd.selection.positions import StepContext

EXAMPLE = Path(__file__).parent.parent / "examples" / "own_parts"


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
    with pytest.raises(InputError, match="the source of this recipe's own metric changed since the run began"):
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
    monkeypatch.setitem(plugins._registered["sampler"], "bad", lambda: answer)
    draw = class_sampler(ClassOptions.model_validate({"sampler": "bad", "draws": 4}))
    with pytest.raises(RunError, match=f"classes.sampler: bad returned .*{message}"):
        draw(torch.full((2, 5), 0.2), torch.zeros(2, 4, dtype=torch.float64))


def test_faults_are_told_by_key_and_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def boom(student_logits: torch.Tensor) -> torch.Tensor:
        return student_logits.no_such_thing

    for kind in ("metric", "criterion"):
        monkeypatch.setitem(plugins._registered[kind], "boom", boom)
        monkeypatch.setitem(plugins._registered[kind], "number", lambda: 5)
        monkeypatch.setitem(plugins._registered[kind], "flat", lambda targets: targets.sum())
    logits, targets = torch.zeros(3, 4), torch.zeros(3).long()
    for kind, function_of in (("metric", plugins.metric_function), ("criterion", plugins.criterion_function)):
        key = plugins.KEYS[kind]
        for name, message in (
            ("boom", "raised AttributeError: .*no_such_thing"),
            ("number", "returned int, expected a tensor"),
            ("flat", r"returned shape \(\), expected \(3,\)"),
        ):
            with pytest.raises(RunError, match=f"{key}: {name} {message}"):
                function_of(name)(logits, logits, targets)


def test_a_policys_own_randomness_is_the_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    def half(uniforms: torch.Tensor, valid_mask: torch.Tensor, floor: float = 0.5) -> torch.Tensor:
        picked = valid_mask & (uniforms > floor)
        valid_mask |= True  # its own copy
        return picked / picked.sum(-1, keepdim=True).clamp(min=1)

    monkeypatch.setitem(plugins._registered["policy"], "half", half)
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
    monkeypatch.setitem(plugins._registered, "metric", {})

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
        plugins.resolve("metric", "fails_at_import:f")
    with pytest.raises(ValueError, match=r"leaves_at_import can't be imported \(SystemExit: 0\)"):
        plugins.resolve("metric", "leaves_at_import:f")
    with pytest.raises(ValueError, match="collections has no function 'OrderedDict'"):
        plugins.resolve("metric", "collections:OrderedDict")

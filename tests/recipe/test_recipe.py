"""Recipes: what is read, what is refused and in which words, and that every key changes something."""

import logging
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import yaml

from selkd import reference
from selkd.errors import InputError
from selkd.recipe.choices import PositionOptions
from selkd.recipe.files import load_recipe, named_recipes, to_yaml
from selkd.recipe.part import parse_part
from selkd.recipe.recipe import Recipe

MINIMAL: dict[str, Any] = {"teacher": {"model": "demo"}, "student": {"model": "demo"}, "data": {"path": "demo"}}


@pytest.mark.parametrize("name", named_recipes())
def test_named_recipes_read_back_to_themselves(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    path = tmp_path / "recipe.yaml"
    path.write_text(to_yaml(recipe))
    assert load_recipe(path) == recipe
    assert recipe.name == name


def test_the_named_recipes_are_there() -> None:
    wanted = (
        "full_kd random_pos se_kd gls curriculum pos_rs pos_rs_corrected weighted_kd dkd at_kd full_kd_t2 full_kd_ce "
        "rs_kd top_samples random_samples top_samples_rs_kd se_kd_top_samples se_kd_3x demo"
    )
    wanted += (
        " full_kd_on_policy random_pos_on_policy se_kd_on_policy pos_rs_on_policy pos_rs_corrected_on_policy "
        "top_samples_on_policy se_kd_top_samples_on_policy gsm8k_off_policy gsm8k_on_policy"
    )
    by_metric = set(reference.METRICS) - {"student_entropy"}  # se_kd
    assert {*wanted.split(), *by_metric} <= named_recipes().keys()


def test_the_minimal_recipe_is_full_kd_with_a_live_teacher() -> None:
    recipe = parse_part(Recipe, MINIMAL)
    assert recipe.positions.policy == "all"
    assert (recipe.classes.sampler, recipe.samples, recipe.cache) == ("all", None, None)


REFUSED = {
    "positions.metric=student_entorpy": "positions.metric: 'student_entorpy' is not known. Allowed: student_entropy, .*"
    r"or your own as module:function. Did you mean 'student_entropy'\?",
    "positons.fraction=0.1": r"positons: unknown key.*Did you mean 'positions'\?",
    "positions.fractoin=0.1": r"positions.fractoin: unknown key. Allowed here: .*Did you mean 'fraction'\?",
    "positions.fraction=0": "positions.fraction: input should be greater than 0, but got 0",
    "positions.fraction=1.01": "positions.fraction: input should be less than or equal to 1, but got 1.01",
    "positions.fraction=null": "positions.policy: top_k picks a share; give positions.fraction",
    "positions.metric=null": "positions.policy: top_k goes by a metric; give positions.metric",
    "classes={sampler: rs_kd, tail: true}": "classes.tail: an option of top_k; rs_kd leaves no mass out. Leave it out",
    "classes.draws=0": "classes.draws: input should be greater than or equal to 1, but got 0",
    "classes.sampler=all": "classes.draws: 64 draws have no effect beside sampler: all",
    "criterion.temperature=0": "criterion.temperature: input should be greater than or equal to 0.000001",
    "criterion.temperature=.inf": "criterion.temperature: input should be a finite number",
    "criterion.kd_weight=1.5": "criterion.kd_weight: input should be less than or equal to 1",
    "criterion.name=reverse_kl": "criterion.name: reverse_kl of drawn classes would be a biased estimate",
    "criterion.name=reverse_lk": r"criterion.name: 'reverse_lk' is not known. .*Did you mean 'reverse_kl'\?",
    "criterion={name: jsd, beta: 1.0}": "criterion.beta: jsd mixes two distributions; give a share between 0 and 1",
    "criterion.beta=0.5": "criterion.beta: forward_kl has no beta",
    "positions.metric=reverse_kl": "positions.metric: reverse_kl needs the teacher.s full .* set cache: null",
    "positions={policy: pos_rs_corrected, metric: kl}": "pos_rs_corrected is Full KD in expectation only where every",
    "positions.metric=os.path:nothing": "positions.metric: 'os.path:nothing': os.path has no function 'nothing'",
    "positions.metric=no_such_module:f": "positions.metric: .*no_such_module can't be imported",
    "positions.metric=os.path:join": "a metric may ask for student_logits, .* but this one asks for a, p",
    "positions.policy=topk": r"positions.policy: 'topk' is not known.*Did you mean 'top_k'\?",
    "positions.smoothing=2": "positions.smoothing: an option of pos_rs and pos_rs_corrected, without effect on top_k",
    "positions={policy: pos_rs, smoothing: 0}": "positions.smoothing: input should be greater than 0",
    "positions={policy: gls, reduction: per_sample}": "positions.reduction: gls counts over the whole step",
    "positions={policy: weighted, reduction: per_position}": "positions.reduction: weighted gives its",
    "positions={policy: curriculum, curriculum_steps: 0}": "curriculum_steps: expected a whole number of",
    "positions={policy: curriculum, curriculum_steps: 1.5}": "curriculum_steps: expected a whole number of",
    "positions.fraction={from: 1.0, too: 0.2}": r"(?s)positions.fraction.to: required.*Allowed here: from, to, over",
    "positions.fraction={from: 0, to: 0.2}": "positions.fraction.from: input should be greater than 0",
    "positions={policy: curriculum, curriculum_steps: true}": "curriculum_steps: expected a whole number",
    "positions.fraction=true": "positions.fraction: expected a number, but got true",
    "steps=100": r"steps: unknown key. Allowed here: .*teacher",
    "positions.share=1": r"positions.share: unknown key. Allowed here: metric, policy",
    "positions={fraction: {from: 1.0, to: 0.2, steps: 4}}": "positions.fraction.steps: unknown key. Allowed here: from",
    "positions={policy: pos_rs, skip_first: 511}": "positions.skip_first: 511 leaves no position .* = 512",
    "criterion={name: dkd, alpha: 0, beta: 0}": "criterion: dkd with alpha and beta 0 compares nothing",
    "samples={metric: all, fracton: 7}": "samples.fracton: unknown key",
    "classes.sampler=rskd": r"classes.sampler: 'rskd' is not known.*Did you mean 'rs_kd'\?",
    "samples.metric=entropy": "'entropy' is not known. Allowed: student_entropy, kl, ce_ratio, random, all",
    "student={}": "give exactly one of student.model and student.prune_from_teacher",
    "student.prune_from_teacher={layers: 2}": "give exactly one of student.model and student.prune_from_teacher",
    "student={prune_from_teacher: {layers: 0}}": "student.prune_from_teacher.layers: input should be greater",
    "teacher=null": "teacher: input should be a valid dictionary",
    "data.path=null": "data.path: input should be a valid string",
    "data.max_length=1": "data.max_length: input should be greater than or equal to 2",
    "data.held_out_fraction=0": "evaluation.suite: .*data.held_out_fraction is 0",
    "evaluation={suite: [], every_steps: 5}": "evaluation.every_steps measures evaluation.suite, which is empty",
    "training.learning_rat=1": r"training.learning_rat: unknown key.*Did you mean 'learning_rate'\?",
    "training.learning_rate=fast": "training.learning_rate: input should be a valid number.*but got 'fast'",
    "training.seed=1": "training.seed: not set here; set the recipe's seed",
    "training.output_dir=x": "training.output_dir: not set here; give the command's --out",
    "training.fp16=true": "training.fp16: not set here; .*use bf16",
    "training.per_device_train_batch_size=0": "train_batch_size: expected at least 1, at most 2,147,483,647, but got 0",
    "training.num_train_epochs=0": "training.num_train_epochs: expected above 0",
    "training.max_steps=0": "training.max_steps: expected at least 1",
    "training.learning_rate=.nan": "training.learning_rate: expected a finite number",
    "training.save_strategy=best": "training.save_strategy: expected no, steps or epoch",
    "positions={policy: all, fraction: 7}": "positions.fraction: input should be less than or equal to 1",
    "positions={policy: random, metric: studnt}": "positions.metric: 'studnt' is not known",
    "name=../evil": "name: string should match pattern",
    "training=5": "training: expected keys of transformers.TrainingArguments, but got 5",
    "seed=-1": "seed: input should be greater than or equal to 0",
    "samples.fraction=lots": "samples.fraction: input should be a valid number",
}


@pytest.mark.parametrize("override", REFUSED)
def test_bad_values_are_refused_by_name(override: str) -> None:
    with pytest.raises(InputError, match=f"(?s){REFUSED[override]}"):
        load_recipe("se_kd_3x", [override])


def test_all_faults_are_named_at_once() -> None:
    with pytest.raises(InputError) as caught:
        load_recipe("se_kd", ["positions.fraction=2", "criterion.temperature=-1", "sede=4"])
    assert len(str(caught.value).splitlines()) == 3


def test_a_missing_part_is_named() -> None:
    with pytest.raises(InputError, match="data: required, but not given"):
        parse_part(Recipe, {key: MINIMAL[key] for key in ("teacher", "student")})


def test_unknown_recipes_and_unreadable_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"se_kd3x: neither a named recipe nor a file.*Did you mean 'se_kd_3x'\?"):
        load_recipe("se_kd3x")
    for content, message in {
        "a: [": "not readable as YAML",
        "- 1": "a recipe is a mapping of keys to values, but this is list",
        "seed: 1\nseed: 2": "the key 'seed' stands twice",
    }.items():
        path = tmp_path / "bad.yaml"
        path.write_text(content)
        with pytest.raises(InputError, match=message):
            load_recipe(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not a text file"):
        load_recipe(path)


@pytest.mark.parametrize("override", ["x", "=3", "a..b=1", "seed.x=1", "seed=[1"])
def test_malformed_overrides_are_refused(override: str) -> None:
    with pytest.raises(InputError, match="--set"):
        load_recipe("se_kd", [override])


def test_overrides_reach_into_parts_that_were_null() -> None:
    recipe = load_recipe("se_kd", ["samples.fraction=0.5", "training.learning_rate=1e-4", "classes={sampler: rs_kd}"])
    assert recipe.samples is not None
    assert recipe.samples.fraction == 0.5
    assert recipe.training["learning_rate"] == pytest.approx(1e-4)
    assert recipe.classes.draws == 64


def test_what_a_choice_makes_meaningless_is_null_once_resolved() -> None:
    recipe = load_recipe("se_kd", ["positions.policy=all"]).resolved()
    kept = {key: value for key, value in recipe["positions"].items() if value is not None}
    assert kept == {"policy": "all", "reduction": "per_sample"}
    assert recipe["classes"] == {"sampler": "all", "draws": None, "tail": False}
    with pytest.raises(InputError, match=r"classes\.draws: 3 draws have no effect beside sampler: all"):
        load_recipe("se_kd", ["classes.draws=3"])
    assert load_recipe("se_kd", ["positions.policy=random"]).positions.metric == "random"
    assert load_recipe("se_kd", ["samples={metric: all}"]).samples is None


def test_what_a_choice_needs_is_filled_in() -> None:
    for changes, expected in {
        ("positions.policy=gls",): {"queue_size": 30_000, "reduction": "per_position"},
        ("positions.policy=curriculum",): {"curriculum_steps": 1.0},
        ("positions={policy: curriculum, curriculum_steps: 4000.0}",): {"curriculum_steps": 4000},
        ("positions.policy=pos_rs",): {"smoothing": 1.0, "clip": None, "skip_first": 0, "coverage": 0.0},
        ("criterion.name=dkd",): {"alpha": 1.0, "beta": 8.0},
        ("criterion.name=skew_kl",): {"alpha": 0.1, "beta": None},
        ("positions.fraction={from: 1, to: 0.2}",): {"fraction": {"from": 1, "to": 0.2, "over": 1, "shape": "linear"}},
    }.items():
        recipe = load_recipe("se_kd", list(changes))
        part = recipe.resolved()["criterion" if changes[0].startswith("criterion") else "positions"]
        assert {key: part[key] for key in expected} == expected
        assert parse_part(Recipe, recipe.resolved()) == recipe, "reading the resolved recipe gives an equal one"


def test_what_is_given_of_positions_tells_the_policy() -> None:
    for given, expected in (
        ({}, ("all", None, None)),
        ({"policy": None}, ("all", None, None)),
        ({"fraction": 0.3}, ("random", "random", 0.3)),
        (MappingProxyType({"metric": "kl"}), ("top_k", "kl", 0.2)),
        ({"metric": "kl"}, ("top_k", "kl", 0.2)),
        ({"metric": "kl", "fraction": 0.3}, ("top_k", "kl", 0.3)),
        ({"scoring": "two_stage"}, ("top_k", "student_entropy", 0.2)),
        ({"policy": "gls"}, ("gls", "student_entropy", 0.2)),
    ):
        options = parse_part(PositionOptions, given)
        assert (options.policy, options.metric, options.fraction) == expected
        assert parse_part(PositionOptions, options.model_dump()) == options


def test_yaml_tags_build_no_objects(tmp_path: Path) -> None:
    path = tmp_path / "evil.yaml"
    path.write_text("!!python/object/apply:os.system ['true']")
    with pytest.raises(InputError, match="not readable as YAML"):
        load_recipe(path)


def test_the_design_pages_recipe_is_read(tmp_path: Path) -> None:
    path = tmp_path / "design.yaml"
    path.write_text(
        """
teacher:   {model: Qwen/Qwen3-8B, dtype: bfloat16}
student:   {model: Qwen/Qwen3-1.7B}
data:      {path: HuggingFaceFW/fineweb-edu, name: sample-10BT, tokens: 80_000_000, max_length: 512, packing: true}
criterion: {name: forward_kl, temperature: 1.0, kd_weight: 1.0}
positions: {metric: student_entropy, policy: top_k, fraction: 0.20, reduction: per_sample}
classes:   {sampler: rs_kd, draws: 64}
samples:   {metric: student_entropy, fraction: 0.20}
cache:     {path: null}
training:  {learning_rate: 1.0e-5, per_device_train_batch_size: 2, gradient_accumulation_steps: 8}
evaluation: {suite: [fidelity], every_steps: null}
seed: 1337
"""
    )
    recipe = load_recipe(path)
    assert yaml.safe_load(to_yaml(recipe))["data"]["tokens"] == 80_000_000


def test_a_renamed_key_is_still_read_with_a_note(caplog: pytest.LogCaptureFixture) -> None:
    options = {"scoring": "two_stage", "probed_share": 0.25}
    with caplog.at_level(logging.WARNING):
        assert parse_part(PositionOptions, options).calibration_fraction == 0.25
    assert "probed_share is now called calibration_fraction" in caplog.text
    caplog.clear()
    assert parse_part(PositionOptions, {"probed_share": None}) == PositionOptions()  # an earlier run's recipe.yaml
    assert not caplog.text
    with pytest.raises(InputError, match="probed_share is the former name of calibration_fraction, which is given too"):
        parse_part(PositionOptions, {**options, "calibration_fraction": 0.5})
    # A resolved recipe has every key: a null under one name leaves the value under the other.
    for former, current in ((0.25, None), (None, 0.25)):
        both = {"scoring": "two_stage", "probed_share": former, "calibration_fraction": current}
        assert parse_part(PositionOptions, both).calibration_fraction == 0.25

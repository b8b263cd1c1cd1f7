"""A run goes on with what it began with, or not at all."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from tiny import make_model, make_tokenizer
from tiny_run import make_recipe, make_teacher, make_text

from selkd import DistillTrainer, distill
from selkd.errors import InputError
from selkd.models.sources import locate, revision_of
from selkd.recipe.part import parse_part
from selkd.recipe.recipe import Recipe
from selkd.run.inputs import inputs_of
from selkd.run.pipeline import cache_only, score_only
from selkd.sealed import sealed, unsealed

ALONE: dict[str, Any] = {"samples": None, "cache": None, "classes": {"sampler": "all"}}
PART = "def spread(student_logits):\n    return student_logits.amax(-1) - student_logits.amin(-1)\n"


class Killed(BaseException):
    """Stands for the end of the process."""


@contextmanager
def killed_at(step: int) -> Iterator[None]:
    """The training ends in the middle of this optimiser step."""

    def ends(self: DistillTrainer, *arguments: Any, **options: Any) -> Any:
        if self.state.global_step == step:
            raise Killed
        return compute_loss(self, *arguments, **options)

    compute_loss = DistillTrainer.compute_loss
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DistillTrainer, "compute_loss", ends)
        with pytest.raises(Killed):
            yield


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "run.lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def put(path: Path, place: Path) -> None:
    """Copy a file or a folder over another."""
    if path.is_dir():
        shutil.copytree(path, place, dirs_exist_ok=True)
    else:
        shutil.copy2(path, place)


def module_of(folder: Path) -> str:
    """A name of its own for each test: a module is imported once."""
    return f"part_of_{folder.name.replace('-', '_')}.py"


def short_recipe(folder: Path, **changes: Any) -> dict[str, Any]:
    """The toy recipe with five steps, a checkpoint every second one, and nothing measured."""
    recipe = make_recipe(folder, evaluation={"suite": []}, **changes)
    epochs = {key: value for key, value in recipe["training"].items() if key != "num_train_epochs"}
    return recipe | {"training": epochs | {"max_steps": 5}}


def own_recipe(folder: Path, **changes: Any) -> dict[str, Any]:
    """The toy recipe with a student and a metric of its own."""
    (folder / module_of(folder)).write_text(PART)
    make_teacher(folder / "student", seed=5)
    recipe = short_recipe(folder, student={"model": str(folder / "student")}, **changes)
    recipe["positions"] = {"metric": f"{Path(module_of(folder)).stem}:spread", "policy": "top_k", "fraction": 0.5}
    return recipe


def normalise_otherwise(folder: Path) -> None:
    """Give the tokenizer of both models a normaliser: the same vocabulary, other ids for some words."""
    normalizer = {"type": "Replace", "pattern": {"String": "w2"}, "content": "w3"}
    for name in ("teacher", "student"):
        path = folder / name / "tokenizer.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"normalizer": normalizer}))


CHANGES: dict[str, tuple[Callable[[Path], object], set[str]]] = {
    "another text": (lambda folder: make_text(folder / "text.jsonl", seed=1), {"data", "samples", "held_out"}),
    "another teacher": (lambda folder: make_model(7, layers=4).save_pretrained(folder / "teacher"), {"teacher"}),
    "another student": (lambda folder: make_model(8, layers=4).save_pretrained(folder / "student"), {"student"}),
    "another tokenizer": (normalise_otherwise, {"tokenizer", "data", "samples", "held_out"}),
    "another part": (lambda folder: (folder / module_of(folder)).write_text(PART + "# changed\n"), {"own_metric"}),
}


def require_refused(recipe: dict[str, Any], folder: Path, stages: list[Callable[..., Any]]) -> None:
    """Each changed input is refused by every command, with the field and both values, and nothing is written."""
    run, inputs = folder / "run", [folder / name for name in ("teacher", "student", "text.jsonl", module_of(folder))]
    before, began = contents(run), unsealed(run / "record.json")["inputs"]
    for path in inputs:
        put(path, folder / f"kept-{path.name}")
    for change, fields in CHANGES.values():
        change(folder)
        for stage in stages:
            with pytest.raises(InputError, match="other inputs than those that the run began with") as refused:
                stage(parse_part(Recipe, recipe), run)
            for field in fields:
                assert f"then {began[field]}, now " in str(refused.value), field
            assert str(refused.value).count(": then ") == len(fields)
            assert contents(run) == before
        for path in inputs:
            put(folder / f"kept-{path.name}", path)


@pytest.mark.parametrize("is_alone", [True, False], ids=["live, all samples", "cached, selected samples"])
def test_changed_inputs_are_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_alone: bool) -> None:
    """Of a run that was killed in the middle, and of the same run once it was finished."""
    monkeypatch.syspath_prepend(tmp_path)
    recipe = own_recipe(tmp_path, **(ALONE if is_alone else {}))
    with killed_at(3):
        distill(recipe, tmp_path / "run")
    stages: list[Callable[..., Any]] = [distill, score_only, *([] if is_alone else [cache_only])]
    require_refused(recipe, tmp_path, stages)
    began = unsealed(tmp_path / "run" / "record.json")["inputs"]
    finished = distill(recipe, tmp_path / "run")
    assert finished.record["train"]["steps"] == 5
    assert finished.record["inputs"] == began
    require_refused(recipe, tmp_path, stages[:1])


def test_a_recipe_that_was_edited_in_the_folder_is_no_way_round(tmp_path: Path) -> None:
    recipe = short_recipe(tmp_path, **ALONE)
    with killed_at(3):
        distill(recipe, tmp_path / "run")
    stored = tmp_path / "run" / "recipe.yaml"
    stored.write_text(stored.read_text().replace("fraction: 0.2", "fraction: 0.3"))
    other = recipe | {"positions": recipe["positions"] | {"fraction": 0.3}}
    with pytest.raises(InputError, match=r"began with: recipe \(recipe.yaml in the run's folder\): then"):
        distill(other, tmp_path / "run")


def test_a_record_of_an_earlier_version_is_compared_by_what_it_has(tmp_path: Path) -> None:
    recipe = short_recipe(tmp_path, **ALONE)
    with killed_at(3):
        distill(recipe, tmp_path / "run")
    path = tmp_path / "run" / "record.json"
    record = unsealed(path)
    inputs = record.pop("inputs")
    path.write_text(json.dumps({key: value for key, value in record.items() if key != "digest"}))
    known = inputs_of(json.loads(path.read_text()))
    told = {"teacher", "student", "data", "held_out", "student_precision", "teacher_precision", "processes"}
    assert known.keys() == told
    assert known.items() <= inputs.items()
    text = (tmp_path / "text.jsonl").read_text()
    make_text(tmp_path / "text.jsonl", seed=1)
    with pytest.raises(InputError, match=r"data \(the text, or how it is read\): then .* held_out"):
        distill(recipe, tmp_path / "run")
    (tmp_path / "text.jsonl").write_text(text)
    assert distill(recipe, tmp_path / "run").record["inputs"] == known


def test_a_finished_run_of_an_earlier_version_is_left_as_it_is(tmp_path: Path) -> None:
    """That version's digest of the text is another, as its format was."""
    recipe = short_recipe(tmp_path, **ALONE)
    distill(recipe, tmp_path / "run")
    path = tmp_path / "run" / "record.json"
    record = {key: value for key, value in unsealed(path).items() if key not in ("inputs", "files", "digest")}
    record["data"]["fingerprint"] = record["data"]["held_out_fingerprint"] = "0" * 32
    path.write_text(json.dumps(record))
    before = {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()}
    assert distill(recipe, tmp_path / "run").record == record
    assert score_only(parse_part(Recipe, recipe), tmp_path / "run").record == record
    assert {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()} == before
    make_teacher(tmp_path / "teacher", seed=5)
    with pytest.raises(InputError, match=r"teacher: then .*, now "):
        distill(recipe, tmp_path / "run")


def test_a_finished_run_does_without_the_precision_it_was_made_in(tmp_path: Path) -> None:
    """As on a machine where the dtype of ``auto`` is another."""
    recipe = short_recipe(tmp_path, **ALONE)
    distill(recipe, tmp_path / "run")
    path = tmp_path / "run" / "record.json"
    record = unsealed(path)
    record["inputs"]["teacher_precision"] = "float16"
    path.write_text(sealed(record))
    text = path.read_text()
    distill(recipe, tmp_path / "run")
    assert path.read_text() == text


@pytest.mark.parametrize("field", ["student_precision", "teacher_precision", "tokenizer"])
def test_another_precision_is_refused(tmp_path: Path, field: str) -> None:
    """As on another machine, where the dtype of ``auto`` is another."""
    recipe = short_recipe(tmp_path, **ALONE)
    score_only(parse_part(Recipe, recipe), tmp_path / "run")
    path = tmp_path / "run" / "record.json"
    record = unsealed(path)
    record["inputs"][field] = "float16"
    path.write_text(sealed(record))
    with pytest.raises(InputError, match=f"{field}: then float16, now "):
        distill(recipe, tmp_path / "run")


def test_a_record_that_was_changed_or_lost_is_not_believed(tmp_path: Path) -> None:
    recipe = short_recipe(tmp_path, **ALONE)
    with killed_at(3):
        distill(recipe, tmp_path / "run")
    path = tmp_path / "run" / "record.json"
    text = path.read_text()
    path.write_text(text.replace('"train_samples": ', '"train_samples": 1'))
    with pytest.raises(InputError, match=r"record\.json: changed since selkd wrote it, by hand or by damage"):
        distill(recipe, tmp_path / "run")
    path.unlink()
    with pytest.raises(InputError, match=r"record\.json is lost, .*move checkpoints away to train anew"):
        distill(recipe, tmp_path / "run")
    (tmp_path / "run" / "checkpoints").rename(tmp_path / "away")
    assert distill(recipe, tmp_path / "run").record["train"]["steps"] > 0


def test_a_model_of_the_hub_keeps_the_revision_that_the_run_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub has moved on: its cache has another snapshot, and main points to it."""
    hub = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(hub))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    revisions = ["a" * 40, "b" * 40]
    stored = hub / "models--somebody--teacher"
    for seed, revision in enumerate(revisions):
        make_model(seed, layers=4).save_pretrained(stored / "snapshots" / revision)
        make_tokenizer().save_pretrained(stored / "snapshots" / revision)

    def point_to(revision: str) -> None:
        (stored / "refs").mkdir(exist_ok=True)
        (stored / "refs" / "main").write_text(revision)

    point_to(revisions[0])
    recipe = short_recipe(tmp_path, **ALONE)
    recipe["teacher"] = {"model": "somebody/teacher", "dtype": "float32"}
    with killed_at(3):
        distill(recipe, tmp_path / "run")
    point_to(revisions[1])
    assert revision_of(locate("somebody/teacher", tmp_path / "selkd")) == revisions[1]
    record = distill(recipe, tmp_path / "run").record
    assert record["inputs"]["teacher_revision"] == revisions[0]
    assert record["teacher"]["fingerprint"] == record["inputs"]["teacher"]
    shutil.rmtree(stored / "snapshots" / revisions[0])
    with pytest.raises(InputError, match="could not be fetched from the hub"):
        distill(recipe, tmp_path / "run")

"""Whole runs at toy size: every stage, its files, what happens on the second call and after an accident."""

import gc
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny import V, make_tokenizer
from tiny_run import make_recipe, make_task, make_teacher, make_text
from transformers import AutoModelForCausalLM, AutoTokenizer, BloomConfig, BloomForCausalLM, PreTrainedModel

from selkd import DistillTrainer, TeacherCache, distill
from selkd.errors import InputError
from selkd.recipe.files import load_recipe, named_recipes
from selkd.recipe.part import parse_part
from selkd.recipe.recipe import Recipe
from selkd.run.pipeline import full_kd_on_same_samples
from selkd.run.workspace import Workspace

CONTRACT = {
    "recipe": None,
    "environment": {"device", "cores"},
    "teacher": None,
    "student": None,
    "counts": {"samples", "samples_kept", "positions_valid", "positions_selected", "teacher_tokens"},
    "seconds": {"score", "cache", "train", "evaluate", "total"},
    "peak_memory_bytes": {"process", "accelerator"},
    "teacher_cache": {
        "bytes",
        "positions",
        "bytes_per_position",
        "fixed_width_bytes_per_position",
        "full_logits_bytes_per_position",
    },
    "fidelity": {"before", "after", "positions"},
    "train": {"steps", "loss_first", "loss_last"},
}


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and modification time of every file below ``folder``."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


def metrics_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_writes_what_the_contract_names(tmp_path: Path) -> None:
    run = distill(make_recipe(tmp_path), tmp_path / "run")
    record = json.loads((run.path / "record.json").read_text())
    assert record == run.record
    for key, inner in CONTRACT.items():
        assert key in record
        assert inner is None or inner <= record[key].keys()
    for when in ("before", "after"):
        assert record["fidelity"][when].keys() == {
            "perplexity",
            "kl_nats",
            "top1_agreement",
            "calibration_error",
        }
    assert record["fidelity"]["after"]["kl_nats"] < record["fidelity"]["before"]["kl_nats"]

    overlap = record["data"]["held_out_overlap"]
    assert overlap["samples"] == record["data"]["held_out_samples"] > 0
    assert (overlap["ngram"], overlap["copies"], overlap["share"]) == (13, 0, 0.0)

    counts, scores = record["counts"], pq.read_table(run.path / "selection" / "samples.parquet").to_pylist()
    kept = [row for row in scores if row["kept"]]
    assert counts["samples"] == len(scores) == record["data"]["train_samples"]
    assert counts["samples_kept"] == len(kept) == -(-3 * len(scores) // 10)
    assert min(row["score"] for row in kept) >= max(row["score"] for row in scores if not row["kept"])

    overlap = json.loads((run.path / "selection" / "overlap.json").read_text())
    assert set(overlap["samples"]["metrics"]) == {"student_entropy", "kl", "ce_ratio"}
    assert overlap["positions"]["fraction"] == record["recipe"]["positions"]["fraction"]

    cache = TeacherCache.open(run.path / "teacher_cache")
    assert sorted(id.hex() for id in cache.sample_ids()) == sorted(row["sample_id"] for row in kept)
    assert record["teacher_cache"]["positions"] * 3 == counts["positions_valid"]
    assert 0.2 <= counts["positions_selected"] / counts["positions_valid"] < 0.24

    lines = metrics_of(run.path)
    assert [line["step"] for line in lines] == list(range(1, record["train"]["steps"] + 1))
    assert (lines[0]["loss"], lines[-1]["loss"]) == (record["train"]["loss_first"], record["train"]["loss_last"])
    assert record["seconds"]["total"] == pytest.approx(sum(v for k, v in record["seconds"].items() if k != "total"))

    student = AutoModelForCausalLM.from_pretrained(run.student)
    assert student.config.num_hidden_layers == 2
    assert len(AutoTokenizer.from_pretrained(run.student)) == 83
    assert {p.name for p in run.student.iterdir()} >= {"model.safetensors", "config.json", "README.md"}
    assert not list(run.student.glob("*.bin"))
    assert load_recipe(run.path / "recipe.yaml").resolved() == record["recipe"]
    assert "<svg" in (run.path / "report.html").read_text()


def test_the_same_recipe_again_does_nothing_twice(tmp_path: Path) -> None:
    first = distill(make_recipe(tmp_path), tmp_path / "run")
    before = snapshot(first.path)
    second = distill(make_recipe(tmp_path), tmp_path / "run")
    assert snapshot(second.path) == before
    assert second.record == first.record


def test_the_same_seed_gives_the_same_student(tmp_path: Path) -> None:
    runs = [distill(make_recipe(tmp_path), tmp_path / name) for name in ("a", "b")]
    other = distill(make_recipe(tmp_path, seed=4), tmp_path / "c")
    first, second, third = (load_file(run.student / "model.safetensors") for run in (*runs, other))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], third[name]) for name in first)
    shards = [(run.path / "teacher_cache" / "shard-00000.selkd").read_bytes() for run in (*runs, other)]
    assert shards[0] == shards[1] != shards[2]


def write_recipe(folder: Path, **changes: Any) -> Path:
    path = folder / "toy.yaml"
    path.write_text(yaml.safe_dump(make_recipe(folder, **changes)))
    return path


def command(recipe: Path, out: Path) -> list[str]:
    return [sys.executable, "-m", "selkd", "distill", str(recipe), "--out", str(out), "--json"]


@pytest.mark.slow
def test_a_killed_run_continues_and_ends_the_same(tmp_path: Path) -> None:
    """SIGKILL as soon as a checkpoint is complete; the second call, after the run was moved, resumes from it."""
    training = make_recipe(tmp_path)["training"] | {"num_train_epochs": 20}
    recipe = write_recipe(tmp_path, training=training)
    process = subprocess.Popen(
        command(recipe, tmp_path / "killed"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    checkpoints = tmp_path / "killed" / "checkpoints"
    deadline = time.monotonic() + 120
    while not list(checkpoints.glob("checkpoint-*/trainer_state.json")):
        assert time.monotonic() < deadline
        assert process.poll() is None, "finished before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "student" / "model.safetensors").exists()
    moved = (tmp_path / "killed").rename(tmp_path / "moved")
    scores = (moved / "selection" / "samples.parquet").read_bytes()

    continued = json.loads(subprocess.run(command(recipe, moved), capture_output=True, check=True).stdout)
    straight = distill(load_recipe(recipe), tmp_path / "straight")
    assert (moved / "selection" / "samples.parquet").read_bytes() == scores
    ours, theirs = (load_file(run / "student" / "model.safetensors") for run in (moved, straight.path))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert continued["counts"] == straight.record["counts"]
    assert continued["train"] == straight.record["train"]
    assert [line["step"] for line in metrics_of(moved)] == [line["step"] for line in metrics_of(tmp_path / "straight")]
    assert (moved / "metrics.jsonl").exists()
    assert not (tmp_path / "killed").exists()


@pytest.mark.slow
def test_a_full_disk_loses_nothing_that_was_finished(tmp_path: Path) -> None:
    """A limit on file sizes stands in for the disk: the scores fit below it, the student's weights do not."""
    recipe = write_recipe(tmp_path, evaluation={"suite": []})
    distill(
        make_recipe(tmp_path, evaluation={"suite": []}), tmp_path / "other"
    )  # the pruned student is in the cache folder
    limited = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (40000, 40000)); import signal; \
signal.signal(signal.SIGXFSZ, signal.SIG_IGN); import sys; sys.argv = {command(recipe, tmp_path / 'run')[2:]!r}; \
from selkd.cli.main import main; main()"
    failed = subprocess.run([sys.executable, "-c", limited], capture_output=True, text=True, check=False)
    assert failed.returncode == 1, failed.stderr
    assert "Traceback" not in failed.stderr
    assert "Free space there, or choose another folder" in failed.stderr
    finished = snapshot(tmp_path / "run" / "teacher_cache")
    assert finished.keys() >= {"manifest.json", "shard-00000.selkd"}
    done = subprocess.run(command(recipe, tmp_path / "run"), capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["train"]["steps"] > 0
    assert snapshot(tmp_path / "run" / "teacher_cache") == finished


@pytest.mark.slow
def test_two_processes_distil_what_one_does(tmp_path: Path) -> None:
    training = make_recipe(tmp_path)["training"]
    alone = distill(make_recipe(tmp_path), tmp_path / "alone")
    recipe = write_recipe(tmp_path, training=training | {"per_device_train_batch_size": 2})
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, *command(recipe, tmp_path / "both")[1:]],
        capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads((tmp_path / "both" / "record.json").read_text())
    assert record["environment"]["world_size"] == 2
    assert record["counts"] == alone.record["counts"]
    assert record["fidelity"]["positions"] == alone.record["fidelity"]["positions"]
    for when in ("before", "after"):
        for name, value in alone.record["fidelity"][when].items():
            assert record["fidelity"][when][name] == pytest.approx(value, rel=1e-3)
    ours, theirs = (load_file(tmp_path / name / "student" / "model.safetensors") for name in ("both", "alone"))
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=2e-3)
    cached = [(tmp_path / name / "teacher_cache" / "shard-00000.selkd").read_bytes() for name in ("both", "alone")]
    assert cached[0] == cached[1]


def test_folders_of_others_are_refused_and_left_alone(tmp_path: Path) -> None:
    distill(make_recipe(tmp_path, samples=None, evaluation={"suite": []}), tmp_path / "run")
    before = snapshot(tmp_path / "run")
    with pytest.raises(InputError, match=r"the run of another recipe \(seed: there 3, here 5\)"):
        distill(make_recipe(tmp_path, samples=None, evaluation={"suite": []}, seed=5), tmp_path / "run")
    assert snapshot(tmp_path / "run") == before
    holiday = tmp_path / "photos" / "holiday.jpg"
    holiday.parent.mkdir()
    holiday.write_bytes(b"not a run")
    with pytest.raises(InputError, match=r"not a run \(no recipe.yaml\) and not empty"):
        distill(make_recipe(tmp_path), holiday.parent)
    with pytest.raises(InputError, match="a file; a run needs a folder"):
        distill(make_recipe(tmp_path), holiday)
    assert holiday.read_bytes() == b"not a run"
    assert [path.name for path in holiday.parent.iterdir()] == ["holiday.jpg"]


def test_the_teacher_is_out_of_memory_while_a_cached_run_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers: dict[str, list[int]] = {}
    train = DistillTrainer.train

    def looking(self: DistillTrainer, **options: Any) -> Any:
        gc.collect()
        models = [found for found in gc.get_objects() if isinstance(found, PreTrainedModel)]
        layers[name] = sorted({m.config.num_hidden_layers for m in models if m.can_generate()})
        return train(self, **options)

    monkeypatch.setattr(DistillTrainer, "train", looking)
    for name, changes in {"cached": {}, "live": {"cache": None}}.items():
        distill(make_recipe(tmp_path, **changes), tmp_path / name)
    assert layers == {"cached": [2], "live": [2, 4]}


def test_scores_and_cache_are_shared_between_runs(tmp_path: Path) -> None:
    shared = {
        "samples": {"metric": "student_entropy", "fraction": 0.3, "path": str(tmp_path / "scores.parquet")},
        "cache": {"path": str(tmp_path / "cache")},
    }
    first = distill(make_recipe(tmp_path, **shared), tmp_path / "a")
    stored = snapshot(tmp_path / "cache")
    second = distill(make_recipe(tmp_path, **shared, positions={"policy": "all"}), tmp_path / "b")
    assert snapshot(tmp_path / "cache") == stored
    assert first.record["teacher_tokens"]["cache"] > 0
    assert "cache" not in second.record["teacher_tokens"]
    make_teacher(tmp_path / "stranger", seed=9)
    stranger = make_recipe(tmp_path, **shared) | {"teacher": {"model": str(tmp_path / "stranger"), "dtype": "float32"}}
    with pytest.raises(InputError, match="another student"):  # it is pruned from another teacher
        distill(stranger, tmp_path / "c")
    with pytest.raises(InputError, match="teacher: stored"):
        distill(stranger | {"samples": None}, tmp_path / "d")
    with pytest.raises(InputError, match=r"temperature: stored 1.0, expected 2.0"):
        distill(make_recipe(tmp_path, **shared, criterion={"temperature": 2.0}), tmp_path / "e")
    assert snapshot(tmp_path / "cache") == stored
    assert not any((tmp_path / name).exists() for name in "cde")  # so another samples.path or cache.path can be given


def test_a_folder_that_can_hold_no_cache_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "holiday.jpg").write_bytes(b"mine")
    places = {
        "photos": r"not a teacher cache and not empty \(holiday\.jpg\)",
        "photos/holiday.jpg": "is a file, expected a folder",
        "photos/holiday.jpg/cache": r"holiday\.jpg is a file, so .*cache can't be made",
    }
    for place, why in places.items():
        with pytest.raises(InputError, match=why):
            distill(make_recipe(tmp_path, cache={"path": str(tmp_path / place)}), tmp_path / "run")
        assert not (tmp_path / "run").exists()
    assert snapshot(tmp_path / "photos").keys() == {"holiday.jpg"}


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A toy recipe whose teacher, text and pruned student are made once for all."""
    recipe = make_recipe(tmp_path_factory.mktemp("toy"), samples=None, cache=None)
    quick = {"num_train_epochs": 2, "save_strategy": "no", "learning_rate": 0.002}
    return recipe | {"training": {**without_saving(recipe["training"]), **quick}}


def without_saving(training: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in training.items() if key != "save_steps"}


@pytest.mark.parametrize("name", [name for name in named_recipes() if name != "demo"])
def test_every_named_recipe_runs_at_toy_size(name: str, toy: dict[str, Any], tmp_path: Path) -> None:
    written = yaml.safe_load(named_recipes()[name])
    parts = [key for key in ("criterion", "positions", "classes", "samples", "cache", "on_policy") if key in written]
    given = load_recipe(name).resolved()  # a recipe may leave out what has a default
    recipe = {**toy, "name": name, "samples": None, "cache": None, **{key: written[key] for key in parts}}
    if given["data"]["prompt_field"] is not None:
        epochs = 2 if given["samples"] is None else 8
        recipe |= {"data": make_task(tmp_path, 200, packing=given["data"]["packing"])}
        recipe["training"] = {**toy["training"], "num_train_epochs": epochs}
    if given["on_policy"] is not None:
        recipe["on_policy"] = {**given["on_policy"], "max_new_tokens": 12}
    run = distill(recipe, tmp_path / "run")
    counts = run.record["counts"]
    assert (counts["samples_kept"] < counts["samples"]) == (given["samples"] is not None)
    assert 0 < counts["positions_selected"] <= counts["positions_valid"]
    assert (counts["positions_selected"] < counts["positions_valid"]) == (
        given["positions"]["fraction"] not in (None, 1.0)
    )
    assert (run.record["teacher_cache"] is not None) == (given["cache"] is not None)
    assert run.record["fidelity"]["after"]["kl_nats"] < run.record["fidelity"]["before"]["kl_nats"]


def test_fidelity_every_so_many_steps_is_logged(tmp_path: Path) -> None:
    run = distill(make_recipe(tmp_path, evaluation={"suite": ["fidelity"], "every_steps": 3}), tmp_path / "run")
    measured = [line for line in metrics_of(run.path) if "held_out_perplexity" in line]
    assert [line["step"] for line in measured] == [
        step for step in range(1, run.record["train"]["steps"] + 1) if step % 3 == 0
    ]
    last = measured[-1]
    assert last["step"] == run.record["train"]["steps"]
    assert last["held_out_perplexity"] == pytest.approx(run.record["fidelity"]["after"]["perplexity"], rel=1e-4)


def test_a_student_of_its_own_and_a_wrong_tokenizer(tmp_path: Path) -> None:
    make_teacher(tmp_path / "other", seed=5)
    own = make_recipe(tmp_path, student={"model": str(tmp_path / "other")})
    assert distill(own, tmp_path / "run").record["student"]["layers"] == 4
    config = json.loads((tmp_path / "other" / "tokenizer.json").read_text())
    vocabulary = config["model"]["vocab"]
    vocabulary["w7"], vocabulary["w8"] = vocabulary["w8"], vocabulary["w7"]
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"different tokenizers.*'w7'"):
        distill(own, tmp_path / "run2")


def test_models_that_see_across_packed_documents_train_unpacked(tmp_path: Path) -> None:
    """The trainer's own default is packing, which it refuses of them; the recipe's word counts."""
    config = BloomConfig(vocab_size=V, hidden_size=32, n_layer=2, n_head=4)
    BloomForCausalLM(config).save_pretrained(tmp_path / "teacher")
    make_tokenizer().save_pretrained(tmp_path / "teacher")
    recipe = make_recipe(tmp_path, student={"model": str(tmp_path / "teacher")})
    recipe["data"] |= {"packing": False}
    assert distill(recipe, tmp_path / "run").record["train"]["steps"] > 0


def test_what_the_first_positions_skip_is_held_against_the_recipes_length(tmp_path: Path) -> None:
    """The trainer's own default is 512 tokens."""
    recipe = make_recipe(tmp_path, samples=None, cache=None, classes={"sampler": "all"})
    recipe["data"] |= {"max_length": 600}
    recipe["positions"] = {"policy": "pos_rs", "fraction": 0.2, "skip_first": 520}
    arguments = Workspace(parse_part(Recipe, recipe), tmp_path / "run").arguments
    assert (arguments.data.max_length, arguments.data.packing) == (600, True)


def test_too_little_text_is_refused(tmp_path: Path) -> None:
    make_text(tmp_path / "short.jsonl", n_sections=1)
    data = make_recipe(tmp_path)["data"] | {"path": str(tmp_path / "short.jsonl"), "max_length": 64}
    with pytest.raises(InputError, match="fewer than one sample"):
        distill(make_recipe(tmp_path, data=data), tmp_path / "run")


def test_full_kd_is_compared_on_the_same_samples(tmp_path: Path) -> None:
    run = distill(make_recipe(tmp_path), tmp_path / "run")
    written = run.path / "recipe.yaml"
    written.write_text(written.read_text().replace("hub: null", "hub: {repo: somebody/student}"))
    assert load_recipe(written).hub is not None
    full = full_kd_on_same_samples(run)  # pushes nothing, and asks for no login
    assert load_recipe(full.path / "recipe.yaml").hub is None
    kept = [pq.read_table(r.path / "selection" / "samples.parquet")["kept"].to_pylist() for r in (run, full)]
    assert kept[0] == kept[1]
    assert full.path == tmp_path / "run-full-kd"
    assert full.record["train"]["steps"] == run.record["train"]["steps"]
    assert full.record["counts"]["positions_selected"] == full.record["counts"]["positions_valid"]
    assert full.record["teacher_cache"] is None
    assert full.record["fidelity"]["before"] == run.record["fidelity"]["before"]


def test_a_mistyped_path_leaves_no_trace(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path)
    with pytest.raises(InputError, match="txet"):
        distill(recipe | {"data": recipe["data"] | {"path": str(tmp_path / "txet.jsonl")}}, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml.0123456789abcdef.tmp").write_text("a write that was cut off")
    assert distill(recipe, tmp_path / "run").record["train"]["steps"] > 0


def test_shared_scores_keep_the_choice_of_the_run_that_wrote_them(tmp_path: Path) -> None:
    first = distill(make_recipe(tmp_path), tmp_path / "one")
    scores = first.path / "selection" / "samples.parquet"
    before = scores.read_bytes()
    samples = {"metric": "student_entropy", "fraction": 0.1, "path": str(scores)}
    second = distill(make_recipe(tmp_path, samples=samples), tmp_path / "two")
    assert scores.read_bytes() == before
    kept = pq.read_table(second.path / "selection" / "samples.parquet")["kept"].to_pylist()
    assert sum(kept) == second.record["counts"]["samples_kept"] < first.record["counts"]["samples_kept"]


def test_lost_weights_are_trained_again_and_edited_ones_left_alone(tmp_path: Path) -> None:
    run = distill(make_recipe(tmp_path), tmp_path / "run")
    weights, card, config = (run.student / name for name in ("model.safetensors", "README.md", "config.json"))
    content = weights.read_bytes()
    card.write_text("my own words")
    weights.unlink()
    distill(make_recipe(tmp_path), tmp_path / "run")
    assert weights.read_bytes() == content
    card.write_text("my own words")
    distill(make_recipe(tmp_path), tmp_path / "run")
    assert card.read_text() == "my own words"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"mine": 1}))
    with pytest.raises(InputError, match="changed since it was saved"):
        distill(make_recipe(tmp_path), tmp_path / "run")
    assert json.loads(config.read_text())["mine"] == 1


def test_first_and_last_loss_are_known_without_asking(tmp_path: Path) -> None:
    training = {key: value for key, value in make_recipe(tmp_path)["training"].items() if key != "logging_steps"}
    run = distill(make_recipe(tmp_path, training=training), tmp_path / "run")
    steps = [line["step"] for line in metrics_of(run.path)]
    assert (steps[0], steps[-1]) == (1, run.record["train"]["steps"])
    assert run.record["train"]["loss_last"] < run.record["train"]["loss_first"]


def test_a_crashed_run_keeps_its_time_and_its_teachers_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint is newer than the last logged line, and held-out measurements came before the crash."""
    changes: dict[str, Any] = {
        "evaluation": {"suite": ["fidelity"], "every_steps": 5},
        "training": make_recipe(tmp_path)["training"] | {"logging_steps": 30, "save_steps": 10},
    }
    straight = distill(make_recipe(tmp_path, **changes), tmp_path / "straight")
    compute_loss = DistillTrainer.compute_loss
    crashes = [25]

    def failing(self: DistillTrainer, *arguments: Any, **options: Any) -> Any:
        time.sleep(0.02)
        if crashes and self.state.global_step == crashes[0]:
            crashes.clear()
            raise OSError("the power went")
        return compute_loss(self, *arguments, **options)

    monkeypatch.setattr(DistillTrainer, "compute_loss", failing)
    with pytest.raises(OSError, match="the power went"):
        distill(make_recipe(tmp_path, **changes), tmp_path / "crashed")
    resumed = distill(make_recipe(tmp_path, **changes), tmp_path / "crashed")
    assert resumed.record["counts"] == straight.record["counts"]
    assert resumed.record["seconds"]["train"] > 0.02 * resumed.record["train"]["steps"]


def test_a_run_that_would_not_save_on_a_signal_is_refused(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path)
    recipe["training"] |= {"enable_jit_checkpoint": False}
    with pytest.raises(InputError, match="enable_jit_checkpoint: false, but a run always saves and ends on a signal"):
        distill(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()

"""Studies: what is refused before anything runs, what is shared, and a whole one at toy size with a failing recipe."""

import csv
import json
import shutil
import statistics
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from tiny import V, make_model
from tiny_run import make_recipe, make_text

from selkd.errors import InputError
from selkd.recipe.files import load_recipe
from selkd.recipe.part import parse_part
from selkd.recipe.recipe import Recipe
from selkd.run.lock import working_in
from selkd.run.verify import verify_run
from selkd.sweep.runner import _how_it_ended, run_apart
from selkd.sweep.sharing import with_shared_paths
from selkd.sweep.study import Study, expand, load_study, named_studies
from selkd.sweep.sweep import _claim, _seconds_left, sweep

BASE: dict[str, Any] = {
    "teacher": {"model": "demo"},
    "student": {"prune_from_teacher": {"layers": 20}},
    "data": {"path": "demo"},
    "positions": {"metric": "student_entropy"},
    "classes": {"sampler": "rs_kd"},
    "samples": {"fraction": 0.5},
    "cache": {"path": None},
}


def study(**content: Any) -> Study:
    return Study.model_validate({"base": BASE, **content})


def names(content: Study) -> list[str]:
    return list(dict.fromkeys(run.name for run in expand(content, Path())))


def test_a_grid_in_every_variant_and_every_seed() -> None:
    planned = expand(
        study(
            variants={"se": {}, "random": {"positions.policy": "random"}},
            grid={"positions.fraction": [0.1, 0.5], "samples.fraction": [0.2]},
            seeds=[7, 8],
        ),
        Path(),
    )
    assert [run.id for run in planned[:3]] == [
        "se-positions.fraction-0.1-samples.fraction-0.2/seed-7",
        "se-positions.fraction-0.1-samples.fraction-0.2/seed-8",
        "se-positions.fraction-0.5-samples.fraction-0.2/seed-7",
    ]
    assert len(planned) == 8
    last = planned[-1].recipe
    assert (last.positions.policy, last.positions.fraction, last.samples.fraction, last.seed) == ("random", 0.5, 0.2, 8)
    assert last.name == planned[-1].name


def test_a_variant_that_the_grid_does_not_touch_is_one_recipe() -> None:
    content = study(variants={"se": None, "full": {"positions.policy": "all"}}, grid={"positions.fraction": [0.1, 0.5]})
    assert names(content) == ["se-fraction-0.1", "se-fraction-0.5", "full"]


def test_a_key_of_the_grid_without_effect_on_a_variant_is_left_out_there() -> None:
    content = study(
        variants={"se": {}, "full": {"positions.policy": "all"}},
        grid={"positions.fraction": [0.1, 0.5], "samples.fraction": [0.2, 0.4]},
    )
    assert len(names(content)) == 6
    assert names(content)[4:] == ["full-samples.fraction-0.2", "full-samples.fraction-0.4"]


def test_overrides_win_over_the_study() -> None:
    content = study(set={"positions.fraction": 0.3}, variants={"a": {}, "b": {"positions.fraction": 0.4}})
    given = {run.name: run.recipe.positions.fraction for run in expand(content, Path())}
    assert given == {"a": 0.3, "b": 0.4}
    with pytest.raises(InputError, match="'a' and 'b' of the study are the same once resolved"):
        expand(content, Path(), {"positions.fraction": 0.9})


def test_what_comes_later_wins_key_by_key() -> None:
    """base, set, the variant, the grid, --set: a whole part is replaced, whatever key stood first in a mapping."""
    content = study(set={"samples": {"fraction": 0.1}}, variants={"a": {"samples.fraction": 0.5}})
    (run,) = expand(content, Path())
    assert run.recipe.samples is not None
    assert run.recipe.samples.fraction == 0.5
    (run,) = expand(content, Path(), {"samples": None})
    assert run.recipe.samples is None
    (run,) = expand(study(set={"samples.fraction": 0.1}, grid={"samples.fraction": [0.3]}), Path())
    assert run.recipe.samples is not None
    assert run.recipe.samples.fraction == 0.3
    (run,) = expand(content, Path(), {"samples": None, "samples.fraction": 0.7})
    assert run.recipe.samples is not None
    assert run.recipe.samples.fraction == 0.7


def test_every_recipe_of_a_grid_has_a_name_of_its_own() -> None:
    given = ["org/m", "org m", "org:m", "x" * 250]  # too long for a label, not for a path
    planned = expand(study(grid={"teacher.model": given}), Path())
    assert [run.recipe.teacher.model for run in planned] == given
    assert len({run.name for run in planned}) == 4
    assert all(run.name.startswith("model-org_m-") for run in planned[:3])
    assert max(len(run.name) for run in planned) < 140
    # What it is called does not depend on where its value stands.
    assert {run.name for run in expand(study(grid={"teacher.model": given[::-1]}), Path())} == {r.name for r in planned}


def test_a_grid_without_effect_and_without_variants_is_the_base() -> None:
    content = study(set={"positions.policy": "all"}, grid={"positions.fraction": [0.1, 0.2]})
    assert [(run.id, run.recipe.name) for run in expand(content, Path())] == [("base/seed-1337", "base")]


@pytest.mark.parametrize("key", ["cache.path", "samples.path"])
def test_recipes_that_differ_in_a_place_alone_are_refused(key: str) -> None:
    with pytest.raises(InputError, match="where scores and caches are kept changes no result"):
        expand(study(variants={"a": {}, "b": {key: "elsewhere"}}), Path())


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown key": ({"seedz": [1]}, r"seedz: unknown key.*Did you mean 'seeds'\?"),
    "seed twice": ({"seeds": [1, 1]}, "holds a seed twice"),
    "value twice": ({"grid": {"positions.fraction": [0.1, 0.1]}}, "positions.fraction: .* holds a value twice"),
    "no seed": ({"seeds": []}, "seeds: list should have at least 1 item"),
    "empty values": ({"grid": {"positions.fraction": []}}, "grid.positions.fraction: list should have at least 1"),
    "a hub for all runs": ({"set": {"hub.repo": "me/x"}}, "set.hub: not in a study"),
    "seed in the grid": ({"grid": {"seed": [1, 2]}}, "grid.seed: not set here; give seeds"),
    "odd name": ({"variants": {"a/b": {}}}, "variants"),
    "bad recipe": (
        {"variants": {"good": {}, "bad": {"positions.fractoin": 1}}},
        r"recipe 'bad' of the study: positions.fractoin: unknown key.*Did you mean 'fraction'\?",
    ),
    "impossible recipe": ({"variants": {"live": {"classes.sampler": "all"}}}, "recipe 'live' of the study: cache: "),
    "not a part": ({"set": {"teacher.model.x": 1}}, "teacher.model.x: model is 'demo', which has no keys"),
    "baseline": (
        {"variants": {"se_kd": {}}, "baseline": "se_k"},
        r"no recipe of the study is called 'se_k'.*Did you mean 'se_kd'\?",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_before_anything_runs(case: str, tmp_path: Path) -> None:
    content, message = REFUSED[case]
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"base": BASE, **content}))
    with pytest.raises(InputError, match=message):
        expand(load_study(path)[1], tmp_path)


def test_a_study_is_found_by_name_or_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"neither a named study nor a file.*Did you mean 'demo_positions'\?"):
        load_study("demo_position")
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(BASE))
    (tmp_path / "mine.yaml").write_text("base: base.yaml\nseeds: [3]\nseeds: [4]\n")
    with pytest.raises(InputError, match="the key 'seeds' stands twice"):
        load_study(tmp_path / "mine.yaml")
    (tmp_path / "mine.yaml").write_text("base: base.yaml\nseeds: [3]\n")
    name, content, folder = load_study(tmp_path / "mine.yaml")
    assert (name, [run.id for run in expand(content, folder)]) == ("mine", ["base/seed-3"])


@pytest.mark.parametrize("name", named_studies())
def test_the_shipped_studies_can_run(name: str) -> None:
    _, content, folder = load_study(name)
    assert len(expand(content, folder)) >= 6


def paths(**changes: Any) -> tuple[str, str]:
    recipe = with_shared_paths(parse_part(Recipe, BASE | changes), Path("shared"))
    assert recipe.samples is not None
    assert recipe.cache is not None
    return str(recipe.samples.path), str(recipe.cache.path)


def test_scores_and_caches_are_shared_exactly_where_they_are_the_same() -> None:
    scores, cache = paths()
    assert paths(positions={"policy": "all"}, training={"learning_rate": 1.0}) == (scores, cache)
    # The scores know no seed, no budget and no draws; the cache does.
    for changes in ({"seed": 5}, {"samples": {"fraction": 0.2}}, {"classes": {"sampler": "rs_kd", "draws": 12}}):
        others = paths(**changes)
        assert others[0] == scores
        assert others[1] != cache
    for changes in (
        {"data": {"path": "demo", "max_length": 128}},
        {"student": {"prune_from_teacher": {"layers": 10}}},
        {"teacher": {"model": "demo", "dtype": "float32"}},
        {"training": {"bf16": False}},
    ):
        others = paths(**changes)
        assert others[0] != scores
        assert others[1] != cache
    # Chance depends on the seed.
    by_chance = {"samples": {"metric": "random", "fraction": 0.5}}
    assert paths(**by_chance)[0] != paths(**by_chance, seed=5)[0]
    # What the user placed stays there.
    assert paths(samples={"path": "mine.parquet"}, cache={"path": "mine"}) == ("mine.parquet", "mine")


def test_caches_of_students_with_other_vocabularies_are_apart(tmp_path: Path) -> None:
    for name, extra in (("plain", 0), ("same", 0), ("larger", 64)):
        model = make_model(1, layers=2)
        if extra:
            model.resize_token_embeddings(V + extra)
        model.save_pretrained(tmp_path / name)

    def cache(student: dict[str, Any], **changes: Any) -> str | None:
        content = {**BASE, "samples": None, "student": student, **changes}
        return with_shared_paths(parse_part(Recipe, content), Path("shared")).cache.path  # type: ignore[union-attr]

    plain, same, larger = (cache({"model": str(tmp_path / name)}) for name in ("plain", "same", "larger"))
    assert plain == same
    assert len({plain, larger, cache({"model": "org/one"}), cache({"model": "org/other"})}) == 4
    # One that is cut from the teacher has the teacher's classes, however many layers are kept.
    layers = [cache({"prune_from_teacher": {"layers": n}}) for n in (10, 20)]
    assert layers[0] == layers[1]
    assert cache({"model": "org/one"}, training={"use_cpu": True}) != cache({"model": "org/one"})


def test_a_killed_process_is_told_as_such() -> None:
    assert _how_it_ended(-9) == "its process was ended by SIGKILL; the system may have run out of memory"
    assert _how_it_ended(3) == "its process ended with exit code 3"


@pytest.mark.slow
def test_a_run_that_is_killed_is_a_failed_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    log, killed = tmp_path / "run.log", []

    def kill() -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not killed:
            (server,) = [p for p in psutil.Process().children() if "forkserver" in " ".join(p.cmdline())] or [None]
            if server is not None and log.exists() and log.stat().st_size:  # it has begun
                killed.extend(child.kill() for child in server.children())
            time.sleep(0.01)

    training = make_recipe(tmp_path)["training"] | {"num_train_epochs": 500}
    killer = threading.Thread(target=kill)
    killer.start()
    why = run_apart(parse_part(Recipe, make_recipe(tmp_path, training=training)), tmp_path / "run", log)
    killer.join()
    assert why == "its process was ended by SIGKILL; the system may have run out of memory"


@pytest.mark.slow
def test_a_whole_study_shares_survives_a_failure_and_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # more threads only wait for each other at this size
    make_text(tmp_path / "text.jsonl", n_sections=60)
    base = make_recipe(tmp_path)
    base["training"] |= {"max_steps": 4, "save_strategy": "no"}
    content = Study.model_validate(
        {
            "base": base,
            "variants": {
                "full": {"positions.policy": "all"},
                "broken": {"student.prune_from_teacher.layers": 9},
                "se": {},
            },
            "seeds": [1, 2],
            "baseline": "full",
        }
    )
    told: list[str] = []
    out = tmp_path / "study"
    result = sweep("toy", content, tmp_path, out, tell=told.append)
    assert result.failed.keys() == {"broken/seed-1", "broken/seed-2"}
    assert "1 to 3 can be kept" in result.failed["broken/seed-1"]
    # Scored once for both seeds; a cache a seed, as draws depend on it.
    assert len(list((out / "shared" / "scores").iterdir())) == 1
    assert len(list((out / "shared" / "caches").iterdir())) == 2
    tokens = {
        run: json.loads((out / "runs" / run / "record.json").read_text())["teacher_tokens"].get("cache", 0)
        for run in ("full/seed-1", "full/seed-2", "se/seed-1", "se/seed-2")
    }
    assert [count > 0 for count in tokens.values()] == [True, True, False, False]
    # Yet in the table it costs each of them the same.
    shared = {run: json.loads((out / "runs" / run / "record.json").read_text())["shared"] for run in tokens}
    for seed in ("1", "2"):
        assert shared[f"full/seed-{seed}"] == shared[f"se/seed-{seed}"]
    assert [cost["cache"]["teacher_tokens"] for cost in list(shared.values())[:2]] == list(tokens.values())[:2]
    queries = [recipe["figures"]["teacher_tokens"]["mean"] for recipe in result.table["recipes"]]  # type: ignore[index]
    assert queries[0] == queries[1]

    assert result.table is not None
    full, se = (recipe["figures"]["kl_nats"] for recipe in result.table["recipes"])
    figures: dict[str, list[float]] = {}
    with (out / "comparison" / "runs.csv").open() as file:
        for row in csv.DictReader(file):
            figures.setdefault(row["recipe"], []).append(float(row["kl_nats"]))
    assert full["mean"] == pytest.approx(statistics.fmean(figures["full"]))
    assert se["deviation"] == pytest.approx(statistics.stdev(figures["se"]))
    differences = [ours - theirs for ours, theirs in zip(figures["se"], figures["full"], strict=True)]
    assert se["difference"]["mean"] == pytest.approx(statistics.fmean(differences))
    assert "broken/seed-1" in (out / "comparison" / "report.html").read_text()

    stamps = {path: path.stat().st_mtime_ns for path in (out / "runs").rglob("*") if path.is_file()}
    mended = content.model_copy(update={"variants": {k: v for k, v in content.variants.items() if k != "broken"}})
    told.clear()
    again = sweep("toy", mended, tmp_path, out, tell=told.append)
    assert again.failed == {}
    assert again.table is not None
    assert again.table["recipes"] == result.table["recipes"]
    assert [line.rpartition(": ")[2] for line in told] == ["done before"] * 4
    assert {path: path.stat().st_mtime_ns for path in (out / "runs").rglob("*") if path.is_file()} == stamps

    # Moved to another place, with a run that is not finished and one whose record is damaged.
    moved = out.rename(tmp_path / "moved")
    shutil.rmtree(moved / "runs" / "se" / "seed-2" / "student")
    (moved / "runs" / "full" / "seed-2" / "record.json").write_text("{")
    told.clear()
    after = sweep("toy", mended, tmp_path, moved, tell=told.append)
    assert after.failed.keys() == {"full/seed-2"}
    assert "record.json: expected JSON" in after.failed["full/seed-2"]
    assert after.table is not None
    assert [len(recipe["runs"]) for recipe in after.table["recipes"]] == [1, 2]
    assert str(out) not in (moved / "runs" / "se" / "seed-2" / "recipe.yaml").read_text()
    for run in ("se/seed-1", "se/seed-2", "full/seed-1"):
        assert verify_run(moved / "runs" / run).problems == [], run
    out = moved

    changed = mended.model_copy(update={"set": {"training.learning_rate": 0.5}})
    with pytest.raises(InputError, match="the run of another recipe of that name"):
        sweep("toy", changed, tmp_path, out, tell=told.append)


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="not a study's folder and not empty"):
        sweep("toy", study(), tmp_path, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_what_a_study_left_that_was_killed_at_its_first_write_is_no_hindrance(tmp_path: Path) -> None:
    (tmp_path / "study.json.0123456789abcdef.tmp").touch()
    (tmp_path / "run.lock").touch()
    assert _claim(tmp_path) == {}


def test_a_study_that_another_command_runs_is_left_to_it(tmp_path: Path) -> None:
    with working_in(tmp_path / "study"):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(InputError, match="works in this folder since"):
            sweep("toy", study(), tmp_path, tmp_path / "study")
        assert sorted(tmp_path.rglob("*")) == before


def test_estimated_scores_are_not_shared_between_seeds() -> None:
    """The classes that stand for the others are drawn by the seed."""

    def scores(seed: int, **samples: Any) -> str | None:
        recipe = parse_part(Recipe, BASE | {"samples": {"fraction": 0.5, **samples}, "seed": seed})
        return with_shared_paths(recipe, Path("shared")).samples.path  # type: ignore[union-attr]

    assert scores(1) == scores(2)
    assert scores(1, scoring="approximate") != scores(2, scoring="approximate")


def test_the_names_of_shared_scores_outlive_a_keys_renaming() -> None:
    """A study that an earlier version began finds its scores: by the digest that it wrote."""
    shared = with_shared_paths(load_recipe("demo"), Path("shared"))
    assert shared.samples is not None
    assert shared.samples.path == "shared/scores/7fdabc5857597f33.parquet"


def test_the_time_left_is_that_of_the_runs_to_come() -> None:
    status = {
        "a": {"status": "done", "seconds": 10.0},
        "b": {"status": "failed", "seconds": 1.0},
        "c": {"status": "done", "seconds": 30.0},
    }
    assert _seconds_left(["b", "c", "d"], status) == 40.0  # what is done is not run again, what failed is
    assert _seconds_left([], status) is None
    assert _seconds_left(["d"], {"b": status["b"]}) is None

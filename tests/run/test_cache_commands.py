"""``selkd cache verify --repair`` and ``--rescore``, and ``inspect``, on a toy teacher's real cache."""

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
import yaml
from cache_samples import contents
from tiny_run import make_recipe, make_teacher

from selkd.cli.main import main
from selkd.errors import InputError
from selkd.plugins import Sampler
from selkd.recipe.files import load_recipe
from selkd.recipe.part import parse_part
from selkd.recipe.recipe import Recipe
from selkd.run.pipeline import cache_only, start
from selkd.run.verify_cache import judged
from selkd.teacher import build_cache
from selkd.teacher.recheck_cache import Again, same_draws
from selkd_cache.reader import TeacherCache
from selkd_cache.rows import Rows, row_sums

Command = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def selkd_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs a command with ``--json`` in this process: its exit code, and its answer or error message."""

    def run(*arguments: object) -> tuple[int, dict[str, Any]]:
        monkeypatch.setattr(sys, "argv", ["selkd", *map(str, arguments), "--json"])
        with pytest.raises(SystemExit) as exit_info:
            main()
        captured = capsys.readouterr()
        return int(exit_info.value.code or 0), json.loads(captured.out) if captured.out else {"error": captured.err}

    return run


@contextmanager
def small_shards(folder: Path) -> Iterator[None]:
    """Several shards at toy size, and what is made once kept in ``folder``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build_cache, "SHARD_TOKENS", 400)
        patch.setattr(build_cache, "TOKENS_AT_ONCE", 128)
        patch.setenv("SELKD_CACHE", str(folder / "selkd"))
        yield


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``toy.yaml`` and ``run``, whose cache is of several shards."""
    folder = tmp_path_factory.mktemp("built")
    (folder / "toy.yaml").write_text(yaml.safe_dump(make_recipe(folder)))
    with small_shards(folder):
        run = cache_only(load_recipe(folder / "toy.yaml"), folder / "run")
    assert run.record["teacher_cache"]["shards"] >= 3
    return folder


@pytest.fixture
def run_path(built: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of the run, beside a copy of its recipe."""
    shutil.copy(built / "toy.yaml", tmp_path)
    with small_shards(built):
        yield Path(shutil.copytree(built / "run", tmp_path / "run"))


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 16
    path.write_bytes(data)


def test_repair_rebuilds_only_what_is_damaged(run_path: Path, selkd_json: Command) -> None:
    cache = run_path / "teacher_cache"
    before = contents(cache)
    stamps = {path.name: path.stat().st_mtime_ns for path in cache.iterdir()}
    flip(cache / "shard-00001.selkd", 900)
    flip(cache / "plan.json", 60)
    flip(cache / "index.selkd", 70)
    code, answer = selkd_json("cache", "verify", cache)
    assert code == 1
    assert [problem.split()[0] for problem in answer["problems"]] == ["plan.json", "shard-00001.selkd", "index.selkd"]
    code, answer = selkd_json("cache", "verify", cache, "--repair")
    assert code == 0, answer
    assert len(answer["problems"]) == 3
    assert answer["problems_left"] == []
    assert contents(cache) == before
    changed = {path.name for path in cache.iterdir() if path.stat().st_mtime_ns != stamps[path.name]}
    assert changed == {"shard-00001.selkd", "plan.json", "index.selkd"}


def test_a_lost_manifest_and_plan_are_written_again(run_path: Path, selkd_json: Command) -> None:
    cache = run_path / "teacher_cache"
    before = contents(cache)
    (cache / "manifest.json").unlink()
    flip(cache / "plan.json", 60)
    assert selkd_json("cache", "verify", cache)[0] == 1
    assert selkd_json("cache", "verify", cache, "--repair")[0] == 0
    assert contents(cache) == before


def test_repair_removes_nothing_that_it_did_not_write(run_path: Path, selkd_json: Command) -> None:
    cache = run_path / "teacher_cache"
    (cache / "shard-00099.selkd").write_bytes(b"mine")
    code, answer = selkd_json("cache", "verify", cache, "--repair")
    assert code == 1
    assert answer["problems_left"] == answer["problems"]
    assert "shard-00099.selkd is no shard of this cache" in answer["problems"][0]
    assert (cache / "shard-00099.selkd").read_bytes() == b"mine"


def test_a_cache_outside_its_run_needs_its_recipe(run_path: Path, selkd_json: Command, tmp_path: Path) -> None:
    cache = tmp_path / "elsewhere"
    recipe = tmp_path / "toy.yaml"
    shared = ("--out", tmp_path / "shared", "--set", f"cache.path={cache}")
    assert selkd_json("cache", "build", recipe, *shared)[0] == 0
    before = contents(cache)
    flip(cache / "shard-00000.selkd", 900)
    code, answer = selkd_json("cache", "verify", cache, "--repair")
    assert code == 2
    assert "give --recipe RECIPE" in answer["error"]
    code, answer = selkd_json("cache", "verify", cache, "--repair", "--recipe", recipe, "--out", run_path)
    assert code == 2
    assert f"this recipe keeps its cache in {run_path / 'teacher_cache'}" in answer["error"]
    code, answer = selkd_json("cache", "verify", cache, "--repair", "--recipe", recipe, *shared)
    assert code == 0, answer
    assert contents(cache) == before


@pytest.mark.parametrize("sampler", ["systematic", "top_k"])
def test_every_samplers_draws_are_the_same_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, selkd_json: Command, sampler: str
) -> None:
    monkeypatch.setenv("SELKD_CACHE", str(tmp_path / "selkd"))
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(make_recipe(tmp_path, classes={"sampler": sampler, "draws": 16})))
    cache_only(load_recipe(tmp_path / "toy.yaml"), tmp_path / "run")
    rescored = selkd_json("cache", "verify", tmp_path / "run" / "teacher_cache", "--rescore", 1000)[1]["rescored"]
    assert rescored["identical_positions"] == rescored["positions"] > 100
    assert rescored["same_draws"] == rescored["worst_same_draws"] == 1


def test_rescoring_with_the_same_teacher_finds_the_same_draws(run_path: Path, selkd_json: Command) -> None:
    cache = run_path / "teacher_cache"
    code, answer = selkd_json("cache", "verify", cache, "--rescore", 5)
    assert code == 0, answer
    rescored = answer["rescored"]
    assert rescored["samples"] == 5
    assert rescored["identical_positions"] == rescored["positions"] > 100
    assert rescored["same_draws"] == rescored["worst_same_draws"] == 1
    assert rescored["agrees"]
    everything = selkd_json("cache", "verify", cache, "--rescore", 10_000)[1]["rescored"]
    assert everything["samples"] == len(TeacherCache.open(cache))


def test_rescoring_finds_draws_that_are_not_the_teachers(
    run_path: Path, selkd_json: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fingerprint is right and the content is not, as if the teacher had been run in another way."""
    from selkd.run import workspace

    load = workspace.load_model
    other = make_teacher(run_path.parent / "other", seed=9)

    source = workspace.locate(str(other), run_path)
    monkeypatch.setattr(workspace, "load_model", lambda _, *arguments: load(source, *arguments))
    code, answer = selkd_json("cache", "verify", run_path / "teacher_cache", "--rescore", 5)
    assert code == 1
    assert answer["problems"] == []
    assert not answer["rescored"]["agrees"]
    assert answer["rescored"]["worst_same_draws"] < answer["rescored"]["same_draws"] < 0.5
    assert bytes.fromhex(answer["rescored"]["worst_sample"]) in TeacherCache.open(run_path / "teacher_cache")


def test_a_teacher_that_rounds_otherwise_agrees_and_another_temperature_does_not(
    run_path: Path, selkd_json: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some draws tip over by a rounding; many more do where the distribution is another."""
    from selkd.run import workspace

    load = workspace.load_model

    def altered(change: Callable[[Any], None]) -> dict[str, Any]:
        def loaded(*arguments: Any) -> Any:
            model = load(*arguments)
            change(model)
            return model

        monkeypatch.setattr(workspace, "load_model", loaded)
        answer: dict[str, Any] = selkd_json("cache", "verify", run_path / "teacher_cache", "--rescore", 10_000)[1]
        return answer["rescored"]

    rounded = altered(lambda model: [p.data.copy_(p.data.bfloat16()) for p in model.parameters()])
    assert rounded["identical_positions"] < rounded["positions"]
    assert rounded["agrees"], rounded
    hotter = altered(lambda model: model.model.norm.weight.data.div_(1.5))
    assert not hotter["agrees"], hotter


def test_another_recipe_is_refused_by_name(run_path: Path, selkd_json: Command, tmp_path: Path) -> None:
    (tmp_path / "other.yaml").write_text(
        yaml.safe_dump(make_recipe(tmp_path, classes={"sampler": "rs_kd", "draws": 8}))
    )
    arguments = ("--recipe", tmp_path / "other.yaml", "--out", tmp_path / "new")
    keeps = ("--set", f"cache.path={run_path / 'teacher_cache'}")
    code, answer = selkd_json("cache", "verify", run_path / "teacher_cache", "--rescore", 2, *arguments, *keeps)
    assert code == 2
    assert "draws: stored 32, expected 8" in answer["error"]


def test_inspect_says_what_is_there(run_path: Path, selkd_json: Command) -> None:
    folder = run_path / "teacher_cache"
    code, answer = selkd_json("cache", "inspect", folder)
    assert code == 0, answer
    cache = TeacherCache.open(folder)
    rows = [cache.get(sample_id) for sample_id in cache.sample_ids()]
    classes = np.concatenate([each.row_lengths for each in rows])
    counts = np.concatenate([each.counts for each in rows])
    assert all((row_sums(each) == 32).all() for each in rows)
    assert answer["samples_read"] == len(rows)
    assert answer["classes_median"] == np.median(classes)
    assert answer["classes_max"] == classes.max()
    assert answer["drawn_once_share"] == pytest.approx((counts == 1).mean())
    assert answer["fixed_width_bytes_per_position"] == 96
    assert answer["fingerprint"] == cache.fingerprint


def test_inspect_reads_as_many_samples_as_it_is_told(run_path: Path) -> None:
    assert TeacherCache.open(run_path / "teacher_cache").contents(3)["samples_read"] == 3


def test_a_complete_cache_serves_any_selection_of_its_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Built once for all samples; runs that keep fewer ask no teacher, and change no byte of it."""
    monkeypatch.setenv("SELKD_CACHE", str(tmp_path / "selkd"))
    recipe = make_recipe(tmp_path, cache={"path": str(tmp_path / "cache")})
    everything = recipe | {"samples": None}
    full = cache_only(parse_part(Recipe, everything), tmp_path / "full")
    assert full.record["teacher_tokens"]["cache"] > 0
    before = contents(tmp_path / "cache")
    few = cache_only(parse_part(Recipe, recipe), tmp_path / "few")
    assert few.record["teacher_tokens"].get("cache", 0) == 0
    assert contents(tmp_path / "cache") == before
    other = parse_part(Recipe, recipe | {"seed": 4})
    with pytest.raises(InputError, match="seed: stored 3, expected 4"):
        cache_only(other, tmp_path / "other")
    flip(tmp_path / "cache" / "shard-00000.selkd", -200)
    with pytest.raises(InputError, match=r"more samples than this recipe's and is damaged: .*shard-00000\.selkd"):
        cache_only(parse_part(Recipe, recipe), tmp_path / "few again")


def test_a_cache_that_lacks_a_sample_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may hold more samples than the recipe keeps, and yet not the same ones."""
    monkeypatch.setenv("SELKD_CACHE", str(tmp_path / "selkd"))
    shared = {"cache": {"path": str(tmp_path / "cache")}}
    larger = make_recipe(tmp_path, samples={"metric": "random", "fraction": 0.6}, **shared)
    cache_only(parse_part(Recipe, larger), tmp_path / "larger")
    with pytest.raises(InputError, match="was planned for other samples"):
        cache_only(parse_part(Recipe, make_recipe(tmp_path, **shared)), tmp_path / "few")


@pytest.mark.parametrize("lost", ["a shard", "half a shard", "a bit", "the index", "the plan's content"])
def test_the_recipe_that_built_a_cache_mends_it(run_path: Path, lost: str) -> None:
    cache = run_path / "teacher_cache"
    before = contents(cache)
    shard = cache / "shard-00001.selkd"
    match lost:
        case "a shard":
            shard.unlink()
        case "half a shard":
            shard.write_bytes(shard.read_bytes()[:1000])
        case "a bit":
            flip(shard, -200)
        case "the index":
            (cache / "index.selkd").unlink()
        case _:
            (cache / "plan.json").write_text("{}")
            with pytest.raises(InputError, match=r"plan\.json in .* is damaged"):
                cache_only(load_recipe(run_path / "recipe.yaml"), run_path)
            return
    cache_only(load_recipe(run_path / "recipe.yaml"), run_path)
    after = contents(cache)
    for file in before.keys() - {"cost.json"}:
        assert after[file] == before[file], file


def test_the_same_draws_of_a_position_are_counted_class_by_class() -> None:
    def rows(*positions: dict[int, int]) -> Rows:
        flat = [pair for position in positions for pair in sorted(position.items())]
        class_ids, counts = np.array(flat, np.int64).reshape(-1, 2).T
        lengths = np.array([len(position) for position in positions], np.uint16)
        return Rows(lengths, class_ids.astype(np.uint32), counts.astype(np.uint16))

    stored = rows({3: 5, 70_000: 3}, {1: 8}, {0: 4, 1: 4}, {2: 8})
    again = rows({3: 5, 70_000: 3}, {2: 8}, {0: 1, 1: 6, 2: 1}, {2: 7, 3: 1})
    assert same_draws(stored, again).tolist() == [1, 0, 5 / 8, 7 / 8]


@pytest.mark.parametrize("sampler", ["rs_kd", "systematic", "top_k"])
def test_what_is_judged_is_the_share_of_all_and_of_each_sample(sampler: str) -> None:
    """On made-up comparisons of 300 samples of 100 positions."""
    limits = least, least_of_sample = Sampler.find(sampler).least_same_draws
    fine = {number.to_bytes(16, "big"): Again(np.full(100, least + 0.005)) for number in range(300)}
    assert judged(fine, limits).agrees
    assert judged(fine, limits).same_draws == pytest.approx(least + 0.005)
    further = {sample_id: Again(each.same_draws - 0.01) for sample_id, each in fine.items()}
    assert min(further[bytes(16)].same_draws) > least_of_sample
    assert not judged(further, limits).agrees
    alien = bytes(15) + b"\x07"
    one_alien = judged({**fine, alien: Again(np.full(100, least_of_sample - 0.005))}, limits)
    assert one_alien.same_draws > least
    assert not one_alien.agrees
    assert one_alien.worst_sample == alien.hex()
    assert one_alien.worst_same_draws == pytest.approx(least_of_sample - 0.005)


def test_without_a_measured_limit_only_the_same_draws_are_judged() -> None:
    """With many draws other teachers' draws are nearly the same, too, so a share alone says nothing."""
    assert judged({bytes(16): Again(np.ones(4))}, None).agrees is True
    assert judged({bytes(16): Again(np.full(4, 0.99))}, None).agrees is None


def test_a_sample_without_positions_is_no_worst_one() -> None:
    answer = judged({bytes(16): Again(np.zeros(0)), bytes(15) + b"\x01": Again(np.ones(4))}, (0.7, 0.5))
    assert (answer.samples, answer.positions, answer.identical_positions) == (2, 4, 4)
    assert answer.worst_sample == (bytes(15) + b"\x01").hex()


def test_rows_and_ids_are_what_the_document_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The format: one row a valid position, none at a document's end; and how an id is made."""
    monkeypatch.setenv("SELKD_CACHE", str(tmp_path / "selkd"))
    recipe = make_recipe(tmp_path, samples=None)
    parsed = parse_part(Recipe, recipe)
    cache_only(parsed, tmp_path / "run")
    with start(parsed, tmp_path / "run") as (work, _):
        samples = work.splits.train
    cache = TeacherCache.open(tmp_path / "run" / "teacher_cache")
    n_documents = set()
    for sample in samples:
        numbers = [len(sample.token_ids), *sample.token_ids.tolist(), *sample.document_starts.tolist()]
        content = b"selkd sample 1" + b"".join(number.to_bytes(4, "little") for number in numbers)
        n_documents.add(len(sample.document_starts))
        rows = cache.get(xxhash.xxh3_128_digest(content))
        assert len(rows.row_lengths) == len(sample.token_ids) - len(sample.document_starts)
        assert rows.row_lengths.min() >= 1
    assert len(n_documents) > 1


def test_what_a_cache_cost_is_not_told_where_a_part_of_it_is_not_known(run_path: Path) -> None:
    """A build that was killed leaves shards and no word of their seconds."""
    cache, recipe = run_path / "teacher_cache", load_recipe(run_path / "recipe.yaml")
    assert json.loads((cache / "cost.json").read_text())["teacher_tokens"] > 0
    for lost in ("cost.json", "manifest.json", "shard-00001.selkd"):
        (cache / lost).unlink()
    cache_only(recipe, run_path)
    assert (cache / "shard-00001.selkd").exists()
    assert not (cache / "cost.json").exists()

"""Samples scored, positions chosen and the student trained from one cache: the teacher runs once over the text."""

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
from tiny_run import make_recipe

from selkd.errors import InputError
from selkd.run.pipeline import distill
from selkd_cache.reader import TeacherCache


def test_one_cache_scores_and_trains_and_the_true_kl_is_logged(tmp_path: Path) -> None:
    recipe = make_recipe(
        tmp_path,
        samples={"metric": "kl", "fraction": 0.3, "from_cache": True},
        positions={"metric": "soft_or", "fraction": 0.2, "scoring_draws": 12},
    )
    recipe["training"] |= {"max_steps": 2}
    run = distill(recipe, tmp_path / "run")
    tokens, counts = run.record["teacher_tokens"], run.record["counts"]
    assert tokens.get("score", 0) == 0
    assert tokens["cache"] > 0
    cache = TeacherCache.open(run.path / "teacher_cache")
    assert cache.fingerprint["scalars"] == 2
    assert counts["samples_kept"] < len(cache)  # it has the whole text
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    kl = [line["kl_nats"] for line in lines if "loss" in line]
    assert (run.record["train"]["kl_nats_first"], run.record["train"]["kl_nats_last"]) == (kl[0], kl[-1])
    assert kl[0] > 0
    again = distill(recipe, tmp_path / "run")
    assert again.record["teacher_tokens"] == tokens


@pytest.mark.parametrize(("metric", "is_refused"), [("kl", True), ("ce_ratio", False)])
def test_scores_that_were_estimated_from_other_draws_are_not_reused(
    tmp_path: Path, metric: str, is_refused: bool
) -> None:
    """KL is estimated from the cache's draws; the cross-entropies are stored, whatever was drawn."""
    scored = {"metric": metric, "fraction": 0.3, "from_cache": True, "path": str(tmp_path / "scores.parquet")}
    recipe = make_recipe(tmp_path, samples=scored, cache={"path": str(tmp_path / "cache")})
    recipe["training"] |= {"max_steps": 1}
    distill(recipe, tmp_path / "run")
    for number, classes in enumerate([{"draws": 16}, {"sampler": "systematic"}]):
        other = recipe | {"classes": recipe["classes"] | classes, "cache": {"path": str(tmp_path / f"cache{number}")}}
        with pytest.raises(InputError, match="these scores are of another metric") if is_refused else nullcontext():
            distill(other, tmp_path / f"run{number}")

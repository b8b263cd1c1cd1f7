"""Whose scores a run keeps, where several share a file of them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_run import make_recipe

from selkd.recipe.part import parse_part
from selkd.recipe.recipe import Recipe
from selkd.run import score
from selkd.run.pipeline import score_only
from selkd.selection.samples import SampleScores


def test_a_runs_own_choice_outlives_another_runs_shared_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs begin together: the other's scores come into the shared file while this one scores."""
    shared, own = tmp_path / "scores.parquet", tmp_path / "run" / "selection" / "samples.parquet"
    samples = {"metric": "student_entropy", "fraction": 0.3, "path": str(shared)}
    recipe = parse_part(Recipe, make_recipe(tmp_path, cache=None, samples=samples))
    scored = score.scored

    def scored_beside_another_run(*arguments: Any) -> SampleScores:
        scores = scored(*arguments)
        replace(scores, scores=-scores.scores, kept=~scores.kept).write(shared)  # as another machine rounds, only more
        return scores

    monkeypatch.setattr(score, "scored", scored_beside_another_run)
    kept = score_only(recipe, tmp_path / "run").record["counts"]["samples_kept"]
    files = [path.read_bytes() for path in (own, shared)]
    assert files[0] != files[1]
    for _ in range(2):
        assert score_only(recipe, tmp_path / "run").record["counts"]["samples_kept"] == kept
        assert [path.read_bytes() for path in (own, shared)] == files
        shared.unlink()
        files[1] = files[0]  # the shared file is made again from the run's own


def test_whether_scores_are_there_is_what_the_main_process_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that looks later may see a file that the main process does not: both then score, or neither does."""
    samples = {"metric": "random", "fraction": 0.3, "path": str(tmp_path / "scores.parquet")}
    recipe = parse_part(Recipe, make_recipe(tmp_path, cache=None, samples=samples))
    score_only(recipe, tmp_path / "first")
    own = tmp_path / "first" / "selection" / "samples.parquet"
    scored, counted = score.scored, []

    def counting(*arguments: Any) -> SampleScores:
        counted.append(1)
        return scored(*arguments)

    monkeypatch.setattr(score, "scored", counting)
    for name, main_finds, times in (("absent", None, 1), ("present", own, 0)):
        counted.clear()
        monkeypatch.setattr(score, "broadcast_object_list", lambda _, found=main_finds: [found])
        score_only(recipe, tmp_path / name)
        assert len(counted) == times

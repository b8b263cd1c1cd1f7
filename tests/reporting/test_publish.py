"""Pushing a finished student: to a fake hub at the boundary, nowhere else."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import HfHubHTTPError
from tiny_run import make_recipe
from transformers import AutoModelForCausalLM, AutoTokenizer

from selkd import distill
from selkd.errors import InputError, RunError
from selkd.recipe.files import load_recipe
from selkd.recipe.part import parse_part
from selkd.recipe.recipe import Recipe
from selkd.run.pipeline import cache_only, score_only

HUB = {"repo": "someone/a-student", "private": False}


class FakeHub:
    """Stands in for ``HfApi``: keeps what it was called with."""

    calls: list[tuple[str, dict[str, Any]]]

    def __init__(self, error: Exception | None = None) -> None:
        self.calls, self.error, self.files = [], error, set()

    def create_repo(self, repo: str, **options: Any) -> None:
        self.calls.append(("create", {"repo": repo, **options}))

    def upload_folder(self, **options: Any) -> Any:
        if self.error is not None:
            raise self.error
        self.calls.append(("upload", options))
        self.files = {path.name for path in Path(options["folder_path"]).iterdir()}
        return SimpleNamespace(commit_url="https://hub/commit/1", oid="1")


def recipe_of(folder: Path) -> dict[str, Any]:
    return make_recipe(folder, samples=None, cache=None, classes={"sampler": "all"}, hub=HUB)


def test_a_finished_student_is_pushed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = FakeHub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "token")
    run = distill(recipe_of(tmp_path), tmp_path / "run")
    assert hub.calls[0] == ("create", {"repo": "someone/a-student", "private": False, "exist_ok": True})
    assert hub.calls[1][1]["repo_id"] == "someone/a-student"
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= hub.files
    assert not [name for name in hub.files if name.endswith(".bin")]
    assert run.record["hub"]["commit"] == "1"
    assert distill(recipe_of(tmp_path), tmp_path / "run").record["hub"] == run.record["hub"]
    assert len(hub.calls) == 2
    assert AutoModelForCausalLM.from_pretrained(run.student).config.num_hidden_layers == 2
    assert len(AutoTokenizer.from_pretrained(run.student)) == 83


def test_a_hub_that_refuses_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    response = SimpleNamespace(headers={}, request=None, status_code=403, url="x")
    broken = FakeHub(HfHubHTTPError("403 forbidden", response=response))  # type: ignore[arg-type]
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: broken)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "token")
    with pytest.raises(RunError, match=r"hub: someone/a-student was not pushed.*403 forbidden.*run again to push"):
        distill(recipe_of(tmp_path), tmp_path / "run")
    hub = FakeHub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    run = distill(recipe_of(tmp_path), tmp_path / "run")
    assert run.record["hub"]["repo"] == "someone/a-student"


def test_nobody_logged_in_is_told_before_anything_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(InputError, match="hub: nobody is logged in"):
        distill(recipe_of(tmp_path), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match=r"hub.repo: string should match pattern"):
        load_recipe("se_kd", ["hub.repo=nobody"])


def test_who_pushes_nothing_need_not_log_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scoring and caching by themselves used to ask; so did a run whose student is on the hub already."""
    recipe = parse_part(Recipe, make_recipe(tmp_path, hub=HUB))
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    score_only(recipe, tmp_path / "run")
    cache_only(recipe, tmp_path / "run")
    with pytest.raises(InputError, match="hub: nobody is logged in"):
        distill(recipe, tmp_path / "run")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "token")
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeHub)
    pushed = distill(recipe, tmp_path / "run").record["hub"]
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert distill(recipe, tmp_path / "run").record["hub"] == pushed

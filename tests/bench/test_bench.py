"""``selkd bench`` at toy size: its JSON, its variants against each other, memory and its trace."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import make_recipe

from selkd.bench import variants
from selkd.bench.names import VARIANTS
from selkd.bench.report import bench
from selkd.bench.subject import BenchSubject
from selkd.bench.variants import step_of
from selkd.cli.main import main
from selkd.errors import InputError
from selkd.recipe.choices import PositionOptions
from selkd.recipe.part import parse_part
from selkd.recipe.recipe import Recipe


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return parse_part(Recipe, make_recipe(tmp_path))


def gradients(name: str, subject: BenchSubject, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """What the variant's backward pass leaves, caught before it is thrown away."""
    kept: dict[str, torch.Tensor] = {}

    def keep(set_to_none: bool = True) -> None:  # noqa: ARG001
        kept.update({key: p.grad.clone() for key, p in subject.student.named_parameters() if p.grad is not None})
        for parameter in subject.student.parameters():
            parameter.grad = None

    monkeypatch.setattr(subject.student, "zero_grad", keep)
    step_of(name, subject)()
    return kept


def test_variants_that_are_the_same_mathematics_give_the_same_gradients(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = BenchSubject(recipe)
    plain, chunked = (gradients(name, subject, monkeypatch) for name in ("full_kd_plain", "full_kd"))
    assert plain.keys() == chunked.keys()
    selective = [
        gradients(name, subject, monkeypatch)
        for name in (
            "se_kd_exact",
            "se_kd_two_stage",
            "se_kd_dense_heads",
            "se_kd_dense_student_head",
            "se_kd_dense_teacher_head",
        )
    ]
    for key in plain:
        # Plain Full KD is the mean over positions, ours the mean over samples of their means.
        assert torch.cosine_similarity(plain[key].flatten(), chunked[key].flatten(), dim=0) > 0.99
        for other in selective[1:]:
            cosine = torch.cosine_similarity(other[key].flatten(), selective[0][key].flatten(), dim=0)
            assert cosine > 0.99
    subject.close()


def test_cross_entropy_is_the_texts_loss(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every position, chunked and plain are the same mathematics but for the mean over samples."""
    subject = BenchSubject(recipe)
    everywhere = PositionOptions.model_validate({"policy": "all"})
    plain = gradients("cross_entropy_plain", subject, monkeypatch)
    monkeypatch.setattr(variants, "positions_of", lambda *_: everywhere)
    chunked = gradients("cross_entropy_chunked", subject, monkeypatch)
    for key in plain:
        assert torch.cosine_similarity(plain[key].flatten(), chunked[key].flatten(), dim=0) > 0.99
    subject.close()


def test_the_answer_is_what_the_design_page_names(recipe: Recipe, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    path = Path(recipe.data.path).parent / "toy.yaml"
    path.write_text(json.dumps(recipe.resolved()))
    monkeypatch.setattr(sys, "argv", ["selkd", "bench", str(path), "--json", "--repeats", "1", "--no-memory"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    answer: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert {"device", "dtype", "floor_seconds", "variants"} <= answer.keys()
    assert answer["shape"].items() >= {"batch": 4, "length": 32, "classes": 83}.items()
    found = {each["name"]: each for each in answer["variants"]}
    assert list(found) == list(VARIANTS)
    for each in found.values():
        assert each["ratio_to_floor"] == pytest.approx(each["seconds"] / answer["floor_seconds"])
        assert each["peak_bytes_above_floor"] is None
        assert each["cpu_seconds_range"][0] <= each["cpu_seconds"] <= each["cpu_seconds_range"][1]
        assert each["cpu_ratio_to_floor"] == pytest.approx(each["cpu_seconds"] / found["floor"]["cpu_seconds"])
    assert found["floor"]["ratio_to_floor"] == 1.0
    assert found["floor"]["selection_agreement"] is None
    assert found["se_kd_exact"]["selection_agreement"] == 1.0
    assert found["se_kd_two_stage"]["selection_agreement"] == 1.0  # 83 classes are fewer than it counts


def test_memory_and_trace_are_of_processes_of_their_own(recipe: Recipe, tmp_path: Path) -> None:
    answer = bench(recipe, repeats=1, variants=["floor"], trace=tmp_path / "trace")
    assert [each["peak_bytes_above_floor"] for each in answer["variants"]] == [0]
    series = json.loads((tmp_path / "trace" / "memory.json").read_text())
    assert len(series["floor"]["step_seconds"]) == 4
    assert len(series["floor"]["bytes"]) == len(series["floor"]["seconds"])
    assert min(series["floor"]["bytes"], default=1) > 0
    assert (tmp_path / "trace" / "memory.svg").read_text().startswith("<svg")


def test_what_cannot_be_measured_is_refused(recipe: Recipe) -> None:
    with pytest.raises(InputError, match=r"--variant: 'se_kd' is not known.*Did you mean 'se_kd_exact'"):
        bench(recipe, variants=["se_kd"])
    with pytest.raises(InputError, match=r"--repeats: expected at least 1, got 0"):
        bench(recipe, repeats=0)

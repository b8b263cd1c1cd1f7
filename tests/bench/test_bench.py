"""``selkd bench`` at toy size: its JSON, its variants against each other, memory and its trace."""

import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import make_recipe

from selkd.bench import report, variants
from selkd.bench.names import QUICK, VARIANTS
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
    assert {name: goal["at_most"] for name, goal in answer["cached_goals"].items()} == {
        "cross_entropy_chunked": 1.05,
        "cross_entropy_plain": 1.0,
    }
    for name, goal in answer["cached_goals"].items():
        assert goal["ratio"] == pytest.approx(found["se_kd_cached"]["seconds"] / found[name]["seconds"])
        assert any(note.startswith(f"se_kd_cached / {name}: {goal['ratio']:.2f}, aim") for note in answer["notes"])
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


def test_each_measurement_is_told_and_a_stopped_bench_keeps_them(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stopped by a real SIGTERM at its fifth step: two turns of three variants are begun, one and a third measured."""
    calls: list[str] = []
    made = report.step_of

    def counting(name: str, subject: BenchSubject) -> Callable[[], None]:
        step = made(name, subject)

        def counted() -> None:
            calls.append(name)
            if len(calls) == 5:
                signal.raise_signal(signal.SIGTERM)
            step()

        return counted

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(report, "step_of", counting)
    answer = bench(recipe, repeats=2, variants=["full_kd", "se_kd_exact"])
    assert signal.getsignal(signal.SIGTERM) == before
    assert len(calls) == 5, "nothing ran after the signal"
    assert [each["name"] for each in answer["variants"]] == ["floor", "full_kd", "se_kd_exact"]
    assert all(each["seconds"] > 0 and each["peak_bytes_above_floor"] is None for each in answer["variants"])
    assert "stopped: fewer than 2 turns of floor, full_kd, se_kd_exact; no memory" in answer["notes"][-1]
    told = [line.split() for line in capsys.readouterr().err.splitlines() if "left" in line]
    assert [line[:2] for line in told] == [
        ["1/12", "floor"],
        ["2/12", "full_kd"],
        ["3/12", "se_kd_exact"],
        ["4/12", "floor"],
    ], "turns, then memory"


def test_a_bench_that_is_stopped_while_it_compares_selections_keeps_its_times(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "_agreement", lambda *_: signal.raise_signal(signal.SIGTERM))
    answer = bench(recipe, repeats=1, variants=["se_kd_exact"])
    assert all(each["seconds"] > 0 for each in answer["variants"])
    assert answer["notes"][-1] == "stopped: no memory, and the agreement of some variants was not measured"


def test_a_quick_bench_is_one_turn_of_the_main_variants_with_few_samples(recipe: Recipe) -> None:
    answer = bench(recipe, quick=True)
    assert [each["name"] for each in answer["variants"]] == list(QUICK)
    assert answer["shape"]["batch"] == 2
    assert {each["peak_bytes_above_floor"] for each in answer["variants"]} == {None}


def test_what_cannot_be_measured_is_refused(recipe: Recipe) -> None:
    with pytest.raises(InputError, match=r"--variant: 'se_kd' is not known.*Did you mean 'se_kd_exact'"):
        bench(recipe, variants=["se_kd"])
    with pytest.raises(InputError, match=r"--repeats: expected at least 1, got 0"):
        bench(recipe, repeats=0)

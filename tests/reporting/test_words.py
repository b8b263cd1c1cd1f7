from typing import Any

import pytest

from selkd.reporting import words


@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        ({"policy": "all"}, "every position"),
        (
            {"policy": "top_k", "metric": "student_entropy", "fraction": 0.2},
            "the 20% of positions where the student’s entropy is highest",
        ),
        ({"policy": "top_k", "metric": "random", "fraction": 0.0025}, "a random 0.25% of the positions"),
        (
            {"policy": "top_k", "metric": "mine", "fraction": {"from": 1.0, "to": 0.2, "over": 0.3}},
            "the 100% to 20% of positions where mine is highest",
        ),
        ({"policy": "mine:pick", "fraction": 0.1}, "10% of the positions, by the policy mine:pick"),
    ],
)
def test_positions_in_words(positions: dict[str, Any], expected: str) -> None:
    assert words.positions({"positions": positions}) == expected


def test_samples_and_classes_in_words() -> None:
    assert words.samples({"samples": None}) == "every sample"
    assert words.samples({"samples": {"metric": "random", "fraction": 0.2}}) == "a random 20% of the samples"
    assert words.classes({"classes": {"sampler": "all"}}) == "the teacher’s whole distribution"
    assert words.classes({"classes": {"sampler": "top_k", "draws": 50}}) == "the teacher’s 50 most likely classes"


def test_a_local_model_shows_its_last_folder_only() -> None:
    assert words.model("/home/someone/models/qwen") == "qwen"
    assert words.model("Qwen/Qwen3-8B") == "Qwen3-8B"
    assert words.model("demo") == "SmolLM2-135M-Instruct"


def test_only_metrics_in_nats_say_so() -> None:
    assert words.metric_unit("kl") == "nats"
    assert words.metric_unit("ce_ratio") == ""
    assert words.metric_unit("my_metric") == ""


def test_the_summary_of_an_untrained_run_says_so(record: dict[str, Any]) -> None:
    assert words.summary(record).startswith("The student learned from the Python manual in 22 steps.")
    record["train"] = None
    assert words.summary(record).startswith("The student has not been trained yet.")

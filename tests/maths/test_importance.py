"""Statistics and metrics on chunks of logits against the specification and the oracle cases."""

from typing import Any

import pytest
import torch
from torch import Tensor

from selkd import reference
from selkd.maths.head import Head
from selkd.maths.importance import soft_or, statistics
from selkd.plugins import Metric
from selkd.recipe.choices import PositionOptions
from selkd.selection.position_scores import score_positions

B, T, D, V = 3, 7, 12, 41


def make() -> tuple[Tensor, Head, dict[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(B, T, D, generator=generator, dtype=torch.float64)
    head = Head(torch.randn(V, D, generator=generator, dtype=torch.float64))
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[0, 5:], mask[1] = False, False
    batch = {
        "valid_mask": mask,
        "targets": torch.randint(V, (B, T), generator=generator),
        "sample_ids": torch.zeros(B, 16, dtype=torch.uint8),
        "position_ids": torch.arange(T).expand(B, -1),
    }
    return hidden, head, batch, torch.randn(B, T, V, generator=generator, dtype=torch.float64) * 2


@pytest.mark.parametrize("metric", reference.METRICS)
@pytest.mark.parametrize("chunk_bytes", [1, 4 * V * 5, 1 << 24])
def test_scores_are_the_specifications(metric: str, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("selkd.maths.chunked").maths.chunked.CHUNK_BYTES, "cpu", chunk_bytes)
    hidden, head, batch, teacher = make()
    of_valid = teacher[batch["valid_mask"]]
    teacher_logits = (lambda rows: of_valid[rows].clone()) if Metric.find(metric).needs_teacher else None
    found = score_positions(metric, hidden, head, batch, teacher_logits)
    expected = reference.importance(metric, head.logits(hidden), teacher, batch["targets"], batch["valid_mask"])
    torch.testing.assert_close(found.values[batch["valid_mask"]], expected[batch["valid_mask"]], rtol=1e-9, atol=1e-10)
    if Metric.find(metric).needs_teacher:
        with pytest.raises(AssertionError, match="need the teacher's logits"):
            score_positions(metric, hidden, head, batch, None)
    assert set(found.statistics) == set(Metric.find(metric).statistics), "those that are needed, and only those"


# Noise; a metric that is not in the reference is named here, beside a test of it.
WITHOUT_SPECIFICATION = {"random"}


def test_every_other_metric_is_specified() -> None:
    assert set(Metric.builtin()) - WITHOUT_SPECIFICATION == set(reference.METRICS)


def test_statistics_are_the_oracles(case: dict[str, Any]) -> None:
    flat = {name: case[name].flatten(0, 1) for name in ("student_logits", "teacher_logits", "targets")}
    for metric, expected in case["importance"].items():
        names = Metric.find(metric).statistics
        columns = statistics(names, flat["student_logits"].clone(), flat["teacher_logits"].clone(), flat["targets"])
        of = {name: columns[:, i].view(case["targets"].shape) for i, name in enumerate(names)}
        values = Metric.find(metric).combine(of, case["valid_mask"])
        tolerance = {"rtol": 1e-8, "atol": 0} if "ratio" in metric else {"rtol": 0, "atol": 1e-8}
        torch.testing.assert_close(values, torch.tensor(expected, dtype=torch.float64), **tolerance, msg=metric)


def test_confidence_is_that_of_the_first_class_and_right_where_it_is_the_target() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 0.0]]).double()
    columns = statistics(("student_confidence", "student_right"), logits.clone(), None, torch.tensor([2, 0]))
    torch.testing.assert_close(columns[:, 0], logits.softmax(-1).amax(-1))
    assert columns[:, 1].tolist() == [0, 1]


def test_soft_or_with_a_maximum_of_zero_leaves_its_factor_at_one() -> None:
    mask = torch.tensor([[True, True, False]])
    nothing, some = torch.zeros(1, 3), torch.tensor([[1.0, 2.0, 9.0]])
    torch.testing.assert_close(soft_or(nothing, some, mask), torch.tensor([[0.5, 1.0, 0.0]]))
    torch.testing.assert_close(soft_or(some, nothing, mask), torch.tensor([[0.5, 1.0, 0.0]]))
    torch.testing.assert_close(soft_or(nothing, nothing, mask), torch.zeros(1, 3))


def test_random_is_noise_of_seed_and_step() -> None:
    hidden, head, batch, _ = make()
    first = score_positions("random", hidden, head, batch, None, (0, 0)).values
    assert ((first >= 0) & (first < 1)).all()
    assert (first[batch["valid_mask"]] > 0).all()
    assert not torch.equal(first, score_positions("random", hidden, head, batch, None, (0, 1)).values)
    assert PositionOptions.model_validate({"policy": "random"}).metric == "random"

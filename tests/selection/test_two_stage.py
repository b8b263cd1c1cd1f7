"""Two-stage scoring against its specification, against exact scoring, and in a run."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_trainer import logits_of, trainer_of, weights
from tiny import V, make_model, make_samples
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from selkd import reference
from selkd.data.collate import collate
from selkd.data.samples import SampleDataset
from selkd.errors import InputError
from selkd.maths.head import Head
from selkd.models.head import head_of, hidden_states
from selkd.recipe.choices import PositionOptions
from selkd.recipe.part import parse_part
from selkd.selection.position_scores import choose_positions, score_positions
from selkd.selection.positions import step_context
from selkd.selection.two_stage import (
    ClassSubset,
    Estimator,
    by_frequency,
    class_subset,
    estimated_entropy,
    score_in_two_stages,
)


def options_of(**changes: Any) -> PositionOptions:
    return parse_part(PositionOptions, {"scoring": "two_stage", "fraction": 0.3, **changes})


def counted(subset: ClassSubset) -> torch.Tensor:
    """The classes that count: the frequent ones, and those drawn that are not among them."""
    first, drawn = subset.ids.split([subset.n_frequent, len(subset.ids) - subset.n_frequent])
    return subset.ids if subset.tail_weights is None else torch.cat([first, drawn[subset.tail_weights > 0]])


def test_the_most_frequent_come_first_and_the_tail_stands_for_the_rest() -> None:
    counts = np.array([0, 5, 0, 9, 5, 1])
    ordered = by_frequency(counts)
    assert ordered.tolist() == [3, 1, 4, 5, 0, 2]
    ids = torch.from_numpy(ordered)
    subset = class_subset(ids[:2], ids, 2, 7, 0)
    assert subset.ids[:2].tolist() == [3, 1]
    assert subset.n_frequent == 2
    assert set(counted(subset)[2:].tolist()) <= {4, 5, 0, 2}
    assert subset.tail_weights is not None
    assert set(subset.tail_weights.tolist()) <= {0, 4 / len(counted(subset)[2:])}
    for tail in (2, 50):
        whole = class_subset(ids[:4], ids, tail, 7, 0)
        assert (whole.ids.tolist(), whole.tail_weights) == (ordered.tolist(), None)
    everything = class_subset(ids, ids, 2, 7, 0)
    assert (everything.ids.tolist(), everything.n_frequent) == (ordered.tolist(), 6)


def test_the_tail_is_a_function_of_seed_and_step_and_favours_none() -> None:
    ordered = torch.arange(40)
    first = torch.tensor([0, 1, 2, 3, 4, 5, 6, 20, 31, 39])

    def drawn(seed: int, step: int) -> list[int]:
        return counted(class_subset(first, ordered, 7, seed, step))[10:].tolist()

    assert drawn(1, 2) == drawn(1, 2)
    assert drawn(1, 2) != drawn(1, 3)
    assert drawn(1, 2) != drawn(2, 2)
    times = np.bincount([each for step in range(3000) for each in drawn(0, step)], minlength=40)
    assert not times[first].any()
    others = np.delete(times, first)
    expected = 3000 * 9 / 40  # one of each of 9 stretches: 7 among the 30 others, as nearly as can be
    assert others.sum() == pytest.approx(3000 * 7, rel=0.05)
    assert np.abs(others - expected).max() < 6 * expected**0.5


def test_another_frequent_class_leaves_the_other_draws_as_they_are() -> None:
    """Rounding moves which class is the last frequent one: with the padding, or with the batch."""
    ordered = torch.arange(4000)
    for step in range(50):
        one, other = (class_subset(torch.arange(300) + moved, ordered, 200, 0, step) for moved in (0, 1))
        draws, others = (set(counted(each)[300:].tolist()) for each in (one, other))
        assert len(draws ^ others) <= 1


def test_samples_are_counted() -> None:
    samples = make_samples(5)
    ids = np.concatenate([sample.token_ids for sample in samples])
    assert np.array_equal(samples.token_counts(V), np.bincount(ids, minlength=V))
    assert np.array_equal(samples.token_counts(40), np.bincount(ids, minlength=V)[:40])


@pytest.mark.parametrize("head_options", [{}, {"scale": 0.5, "softcap": 3.0}], ids=["plain", "scale and softcap"])
def test_the_estimate_is_the_weighted_entropy(head_options: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((17, 6), (30, 6), (30,))
    )
    head = Head(weight, bias, **head_options)
    tail_weights = torch.tensor([28 / 3, 0, 28 / 3, 28 / 3], dtype=torch.float64)
    subset = ClassSubset(torch.tensor([4, 9, 1, 9, 20, 7]), 2, tail_weights)
    z, w = head.logits(hidden)[:, subset.ids], torch.cat([torch.ones(2, dtype=torch.float64), tail_weights])
    total = (w * z.exp()).sum(-1)
    expected = total.log() - (w * z.exp() * z).sum(-1) / total
    for chunk in (1, 5, None):
        torch.testing.assert_close(estimated_entropy(hidden, head, subset, chunk), expected.clamp(min=0))
    everything = ClassSubset(torch.randperm(30, generator=generator), 30, None)
    exact = torch.distributions.Categorical(logits=head.logits(hidden)).entropy()
    torch.testing.assert_close(estimated_entropy(hidden, head, everything), exact)


def scored(options: PositionOptions, samples: SampleDataset) -> tuple[Any, ...]:
    batch, student = collate(list(samples), 1), make_model(1).double()
    hidden = hidden_states(student, batch["input_ids"], batch["position_ids"]).detach()
    ordered, context = by_frequency(samples.token_counts(V)), step_context(options, 3, 10)
    found = score_in_two_stages(Estimator(options, ordered, 5), hidden, head_of(student), batch, context)
    return batch, student, hidden, ordered, context, found


@pytest.mark.parametrize(("share", "probed"), [(0.01, 0.0), (0.2, 0.0), (0.6, 0.0), (0.01, 0.25), (0.2, 0.1), (0.2, 1)])
def test_scores_and_selection_are_the_specifications(share: float, probed: float) -> None:
    options = options_of(frequent_classes=20, tail_classes=9, rescored_share=share, calibration_fraction=probed)
    batch, student, _, ordered, context, found = scored(options, make_samples(6))
    logits, subsets = logits_of(student, batch).detach(), []
    for row, mask in enumerate(batch["valid_mask"]):
        first = ordered[:20].tolist()
        if probed:
            of_sample = logits[row, mask]
            n = len(of_sample)
            probes = torch.linspace(0, n - 1, math.ceil(probed * n)).round().long()
            mean = of_sample[probes].softmax(-1).mean(0)
            first = mean.argsort(descending=True)[:20].tolist()
        subsets.append(counted(class_subset(torch.tensor(first), torch.from_numpy(ordered), 9, 5, 3)))
    class_ids = pad_sequence(subsets, batch_first=True)
    sizes = torch.tensor([len(each) for each in subsets]).unsqueeze(-1)
    class_weights = ((V - 20) / (sizes - 20).double()).expand(class_ids.shape).clone()
    class_weights[:, :20] = 1.0
    class_weights[torch.arange(class_ids.shape[1]) >= sizes] = 0.0
    expected = reference.two_stage_scores(logits, batch["valid_mask"], 0.3, share, class_ids, class_weights)
    torch.testing.assert_close(found.values, expected)
    chosen = choose_positions(options, found.values, batch, context, seed=5)
    torch.testing.assert_close(chosen, reference.select("top_k", expected, batch["valid_mask"], 0.3))


@pytest.mark.parametrize("changes", [{"frequent_classes": V}, {"frequent_classes": 3, "rescored_share": 0.7}])
def test_with_every_class_or_every_position_it_is_exact(changes: dict[str, Any]) -> None:
    options = options_of(**changes)
    batch, student, hidden, _, context, found = scored(options, make_samples(6))
    exact = score_positions("student_entropy", hidden, head_of(student), batch, None)
    chosen, best = (choose_positions(options, each.values, batch, context, seed=5) for each in (found, exact))
    assert torch.equal(chosen, best)


def test_the_layout_of_a_batch_decides_nothing() -> None:
    samples = make_samples(6)
    options = options_of(frequent_classes=20, tail_classes=9, rescored_share=0.1)
    whole = scored(options, samples)
    student, ordered, context = whole[1], whole[3], whole[4]
    for row, sample in enumerate(samples):
        batch = collate([sample], 1, padding_side="left", pad_to=40)
        hidden = hidden_states(student, batch["input_ids"], batch["position_ids"]).detach()
        alone = score_in_two_stages(Estimator(options, ordered, 5), hidden, head_of(student), batch, context)
        first, second = (e.values[b["valid_mask"]] for e, b in ((alone, batch), (whole[5], _row(whole[0], row))))
        torch.testing.assert_close(first, second if second.ndim == 1 else second[row])


def _row(batch: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    mask = torch.zeros_like(batch["valid_mask"])
    mask[row] = batch["valid_mask"][row]
    return {"valid_mask": mask}


TWO_STAGE = {"positions": {"fraction": 0.3, "scoring": "two_stage", "frequent_classes": 40, "tail_classes": 12}}


def test_a_run_logs_how_far_it_agrees_with_exact_selection_and_resumes(tmp_path: Path) -> None:
    samples = make_samples(8)
    options = {"max_steps": 4, "per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 2}
    straight = trainer_of(tmp_path / "straight", samples, TWO_STAGE, **options)
    straight.train()
    logs = straight.state.log_history
    assert 0.5 < logs[0]["selection_agreement"] <= 1
    assert "selection_agreement" not in logs[1]
    resumed = trainer_of(tmp_path / "resumed", samples, TWO_STAGE, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-2"))
    for name, value in weights(straight.model).items():
        assert torch.equal(value, weights(resumed.model)[name]), name


def test_a_step_with_every_class_is_the_exact_one(tmp_path: Path) -> None:
    samples, students = make_samples(8), []
    for name, positions in (
        ("two", {**TWO_STAGE["positions"], "frequent_classes": V}),
        ("exact", {"metric": "student_entropy", "fraction": 0.3}),
    ):
        trainer = trainer_of(tmp_path / name, samples, {"positions": positions}, per_device_train_batch_size=8)
        trainer.train()
        students.append(weights(trainer.model))
    for name, value in students[0].items():
        torch.testing.assert_close(value, students[1][name], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("message", "changes"),
    {
        "positions.scoring: two_stage finds the highest .*; gls of student_entropy needs exact": {"policy": "gls"},
        "positions.scoring: two_stage .*; top_k of kl needs exact": {"metric": "kl"},
        "positions.scoring: two_stage .*; all of": {"policy": "all"},
        "positions.frequent_classes: an option of scoring: two_stage": {"scoring": "exact", "frequent_classes": 5},
        "positions.scoring: 'fast' is not known": {"scoring": "fast"},
    }.items(),
)
def test_what_it_does_not_go_with_is_refused(message: str, changes: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=message):
        parse_part(PositionOptions, {"scoring": "two_stage", **changes}, "positions")


def test_options_are_settled_and_read_back_equal() -> None:
    options = options_of()
    assert (options.frequent_classes, options.tail_classes, options.rescored_share) == (4096, 1024, 0.15)
    assert options.calibration_fraction == 1 / 32
    assert parse_part(PositionOptions, json.loads(options.model_dump_json(by_alias=True))) == options
    assert parse_part(PositionOptions, {"policy": "top_k"}).scoring == "exact"
    assert parse_part(PositionOptions, {"policy": "all"}).scoring is None


def test_one_position_that_is_not_finite_leaves_the_others_their_scores() -> None:
    options = options_of(frequent_classes=10, tail_classes=5)
    hidden = torch.randn(2, 20, 6, generator=torch.Generator().manual_seed(0))
    hidden[0, 13] = torch.nan
    mask = torch.ones(2, 20, dtype=torch.bool)
    head = Head(torch.randn(30, 6, generator=torch.Generator().manual_seed(1)))
    context = step_context(options, 0, 1)
    found = score_in_two_stages(Estimator(options, np.arange(30), 0), hidden, head, {"valid_mask": mask}, context)
    assert found.values.isfinite().logical_not().nonzero().tolist() == [[0, 13]]


def test_a_few_distributions_tell_the_classes_of_a_student_that_the_text_does_not() -> None:
    """Mass on classes that the text never has: frequencies of the text estimate badly, the student's own well."""
    generator = torch.Generator().manual_seed(0)
    vocab_size, width = 2000, 8
    weight = torch.randn(vocab_size, width, generator=generator, dtype=torch.float64)
    bias = torch.full((vocab_size,), -12.0, dtype=torch.float64)
    bias[-60:] = 0.0
    head, hidden = Head(weight, bias), torch.randn(1, 256, width, generator=generator, dtype=torch.float64)
    batch = {"valid_mask": torch.ones(1, 256, dtype=torch.bool), "position_ids": torch.arange(256).unsqueeze(0)}
    exact = torch.distributions.Categorical(logits=head.logits(hidden)).entropy()
    agreement = []
    for probed in (0.0, 1 / 32):
        options = options_of(frequent_classes=60, tail_classes=20, rescored_share=0.05, calibration_fraction=probed)
        context = step_context(options, 0, 1)
        estimate = Estimator(options, np.arange(vocab_size), 0)
        scores = score_in_two_stages(estimate, hidden, head, batch, context)
        chosen, best = (choose_positions(options, each, batch, context, seed=0) > 0 for each in (scores.values, exact))
        agreement.append(float((chosen & best).sum() / best.sum()))
    assert agreement[0] < 0.9
    assert agreement[1] == 1.0

"""What a step counts can't drift: cut, padded, packed or joined by samples that count nowhere, its gradient is one.

The truth is the specification on full logits, in one batch padded on the right.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from properties import examples
from steps import assert_gradients, gradients_of, own_logits, take_step
from test_trainer import RECIPES, dense_loss, trainer_of, weights
from tiny import V, make_model, make_samples
from torch import Tensor
from transformers import PreTrainedModel

from selkd import reference
from selkd.data.collate import collate
from selkd.data.samples import EMPTY_SAMPLE, Sample, SampleDataset

END = 1  # the tokenizer's end token, which also pads
PER_POSITION: dict[str, Any] = {"positions": {"policy": "all", "reduction": "per_position"}}
STEPS: dict[str, dict[str, Any]] = {
    **RECIPES,
    "all, per position": PER_POSITION,
    "by kl": {"positions": {"metric": "kl", "fraction": 0.3}, "criterion": {"name": "at_kd", "kd_weight": 0.7}},
    "curriculum": {"positions": {"policy": "curriculum", "fraction": 0.3, "reduction": "per_position"}},
    "weighted": {"positions": {"policy": "weighted", "metric": "reverse_kl"}},
}
# Samples without a valid position: a filler, documents of one token each, an end token alone.
NOWHERE = [
    EMPTY_SAMPLE,
    Sample(np.array([5, END, 7]), np.array([0, 1, 2])),
    Sample(np.array([END]), np.array([0])),
]


def with_ends(samples: SampleDataset) -> SampleDataset:
    """Each document ends with the end token, and one stands within: it is a target like any other."""
    changed = []
    for sample in samples:
        tokens = sample.token_ids.copy()
        tokens[sample.document_starts - 1] = END
        tokens[len(tokens) // 4] = END
        changed.append(Sample(tokens, sample.document_starts))
    return SampleDataset.from_samples(changed)


SAMPLES = with_ends(make_samples(5, length=20, seed=4))


@pytest.fixture(scope="module")
def models() -> tuple[PreTrainedModel, PreTrainedModel]:
    """The student and the teacher of ``dense_loss``."""
    return make_model(1), make_model(0, layers=3)


def specified(samples: SampleDataset, recipe: dict[str, Any]) -> tuple[float, dict[str, Tensor]]:
    """The specification's loss and gradients of one step on these samples."""
    student = make_model(1)
    loss = dense_loss(student, samples, recipe)
    loss.backward()
    return loss.item(), gradients_of(student)


@pytest.fixture(scope="module", params=STEPS)
def step(request: pytest.FixtureRequest) -> tuple[dict[str, Any], float, dict[str, Tensor]]:
    """A recipe with the specification's loss and gradients of a step on ``SAMPLES``."""
    recipe = STEPS[request.param]
    return recipe, *specified(SAMPLES, recipe)


def test_rounding_does_not_decide_what_is_picked(models: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    """So that the comparisons below are of gradients: scores are far apart for float32."""
    batch = collate(list(SAMPLES), END)
    with torch.no_grad():
        student, teacher = (own_logits(model, batch) for model in models)
    for metric in ("student_entropy", "kl"):
        scores = reference.importance(metric, student, teacher, batch["targets"])
        for u, valid in zip(scores, batch["valid_mask"], strict=True):
            assert u[valid].sort().values.diff().min() > 1e-4


@st.composite
def cuts(draw: st.DrawFn) -> tuple[list[list[Sample]], list[str], list[int], int]:
    """``SAMPLES`` among some that count nowhere, in any order, in micro-batches each padded in its own way."""
    rows = draw(st.permutations([*SAMPLES, *draw(st.lists(st.sampled_from(NOWHERE), max_size=4))]))
    borders = sorted(draw(st.sets(st.integers(1, len(rows) - 1), max_size=4)))
    parts = [rows[i:j] for i, j in zip([0, *borders], [*borders, len(rows)], strict=True)]
    n = len(parts)
    sides = draw(st.lists(st.sampled_from(["left", "right"]), min_size=n, max_size=n))
    widths = draw(st.lists(st.integers(20, 27), min_size=n, max_size=n))
    return parts, sides, widths, draw(st.sampled_from([END, 0, 50]))


@given(cut=cuts())
@examples(12)
def test_a_gradient_is_one_however_its_step_is_laid_out(
    step: tuple[dict[str, Any], float, dict[str, Tensor]],
    models: tuple[PreTrainedModel, PreTrainedModel],
    cut: tuple[list[list[Sample]], list[str], list[int], int],
) -> None:
    (recipe, loss, expected), (student, teacher) = step, models
    parts, sides, widths, pad_token_id = cut
    found = take_step(student, teacher, parts, recipe, padding_side=sides, pad_to=widths, pad_token_id=pad_token_id)
    assert found == pytest.approx(loss, rel=1e-5)
    assert_gradients(gradients_of(student), expected)


def test_a_sample_of_which_no_position_is_eligible_counts_nowhere(
    models: tuple[PreTrainedModel, PreTrainedModel],
) -> None:
    """It has valid positions, but ``skip_first`` leaves none of them."""
    recipe, (student, teacher) = RECIPES["corrected draws"], models
    loss, expected = specified(SAMPLES, recipe)
    short = Sample(np.array([5, 6, 7, 8, END]), np.array([0, 2]))
    assert short.n_valid == 3
    found = take_step(student, teacher, [[short], [*SAMPLES, short]], recipe, pad_token_id=END)
    assert found == pytest.approx(loss, rel=1e-5)
    assert_gradients(gradients_of(student), expected)


@pytest.mark.parametrize("metric", sorted(reference.METRICS))
def test_fillers_alone_are_a_micro_batch_as_good_as_any(
    metric: str, models: tuple[PreTrainedModel, PreTrainedModel]
) -> None:
    """As the last one of an epoch may be, on some of the ranks; whatever the metric is made of."""
    recipe = {"positions": {"metric": metric, "fraction": 0.3}}
    student, teacher = models
    loss = take_step(student, teacher, [list(SAMPLES)], recipe, pad_token_id=END)
    expected = gradients_of(student)
    assert take_step(student, teacher, [list(SAMPLES), NOWHERE[:1]], recipe, pad_token_id=END) == loss
    assert_gradients(gradients_of(student), expected)


@pytest.mark.parametrize("name", ["se-kd", "per position", "gls"])
def test_the_trainer_counts_no_sample_without_a_valid_position(name: str, tmp_path: Path) -> None:
    """Nor does it matter that it is all there is in a micro-batch, or in a whole step."""
    more = SampleDataset.from_samples([*SAMPLES, *NOWHERE, NOWHERE[1]])
    results = []
    for folder, samples in (("without", SAMPLES), ("with", more)):
        trainer = trainer_of(
            tmp_path / folder, samples, RECIPES[name], per_device_train_batch_size=1,
            gradient_accumulation_steps=len(samples),
        )  # fmt: skip
        trainer.train()
        results.append((weights(trainer.model), trainer.state.log_history[0], vars(trainer.totals)))
    (first, log, totals), (second, other_log, other_totals) = results
    for key, value in first.items():
        torch.testing.assert_close(second[key], value, rtol=0, atol=2e-6)
    for key in ("loss", "kd_nats", "selected_share"):
        assert other_log[key] == pytest.approx(log[key], rel=1e-5)
    for key in ("positions_valid", "positions_selected"):
        assert other_totals[key] == totals[key]

    nothing = trainer_of(tmp_path / "nothing", SampleDataset.from_samples(NOWHERE), RECIPES[name])
    before = weights(nothing.model)
    nothing.train()
    assert nothing.state.log_history[0]["loss"] == 0
    assert all(torch.equal(value, before[key]) for key, value in weights(nothing.model).items())


def documents() -> list[np.ndarray]:
    """Of 5, 10 and 15 valid positions, of which a fifth, where the next token is 60 or above, is marked for picking."""
    generator = np.random.default_rng(3)
    found = []
    for n_valid in (5, 10, 15):
        tokens = generator.integers(2, 60, n_valid + 1)
        marked = 1 + generator.choice(n_valid, n_valid // 5, replace=False)
        tokens[marked] = generator.permutation(np.arange(60, V))[: len(marked)]
        found.append(tokens)
    return found


def by_mark(targets: Tensor) -> Tensor:
    """An injected mask: what is marked scores above all else, whatever the models say."""
    return (targets >= 60).float()


def packed_and_apart() -> tuple[list[Sample], list[Sample]]:
    """The same documents as one sample, and as samples of their own."""
    pieces = documents()
    starts = np.cumsum([0, *(len(piece) for piece in pieces)])[:-1]
    return [Sample(np.concatenate(pieces), starts)], [Sample(piece, np.array([0])) for piece in pieces]


MARKED = {"metric": f"{__name__}:by_mark", "policy": "top_k", "fraction": 0.2}


@pytest.mark.parametrize("policy", [{"policy": "all"}, MARKED], ids=["all", "an injected mask"])
@pytest.mark.parametrize("criterion", [{}, {"name": "jsd", "kd_weight": 0.6}], ids=["forward kl", "jsd and text"])
def test_packing_changes_no_gradient_per_position(
    policy: dict[str, Any], criterion: dict[str, Any], models: tuple[PreTrainedModel, PreTrainedModel]
) -> None:
    """Each picked position weighs the same, so it does not matter which sample it is in."""
    (student, teacher), (packed, apart) = models, packed_and_apart()
    recipe = {"positions": {**policy, "reduction": "per_position"}, "criterion": criterion}
    share = 0.2 if policy is MARKED else 1.0
    assert sum(int(np.ceil(share * sample.n_valid - 1e-9)) for sample in apart) == np.ceil(share * packed[0].n_valid)
    together = take_step(student, teacher, [packed], recipe, pad_token_id=END)
    expected = gradients_of(student)
    assert max(gradient.abs().max().item() for gradient in expected.values()) > 1e-2
    alone = take_step(student, teacher, [apart[:1], apart[1:]], recipe, padding_side="left", pad_token_id=END)
    assert alone == pytest.approx(together, rel=1e-5)
    assert_gradients(gradients_of(student), expected)


def test_packing_changes_how_documents_weigh_per_sample(models: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    """``per_sample`` is the mean over samples of each one's mean. Apart, each document is a sample and weighs a third;
    packed, they share one mean, and each weighs its share of the positions: 5, 10 and 15 of 30. The default follows
    the paper, whose samples are packed to one length; who wants packing not to matter takes ``per_position``."""
    (student, teacher), (packed, apart) = models, packed_and_apart()
    recipe = {"positions": {"policy": "all"}}
    of_each = [specified(SampleDataset.from_samples([sample]), recipe)[1] for sample in apart]
    for layout, shares in ((packed, (5 / 30, 10 / 30, 15 / 30)), (apart, (1 / 3, 1 / 3, 1 / 3))):
        take_step(student, teacher, [layout], recipe, pad_token_id=END)
        expected = {
            name: sum(share * each[name] for share, each in zip(shares, of_each, strict=True)) for name in of_each[0]
        }
        assert_gradients(gradients_of(student), expected)
    third, sixth = (sum(of_each[i]["model.norm.weight"] * s[i] for i in range(3)) for s in ((1, 1, 1), (0.5, 1, 1.5)))
    assert (third - sixth).abs().max() > 1e-3 * third.abs().max()


def test_the_trainer_packs_without_changing_the_gradient_per_position(tmp_path: Path) -> None:
    """From texts: one sample that three documents fill, end tokens and all, or three samples."""
    texts = Dataset.from_dict(
        {"text": [" ".join(f"w{(7 * i + j) % 80 + 2}" for j in range(9 + 5 * i)) for i in range(3)]}
    )
    results = []
    for packing in (True, False):
        trainer = trainer_of(
            tmp_path / str(packing), texts, PER_POSITION, packing=packing, max_length=9 + 14 + 19 + 3,
            per_device_train_batch_size=1, gradient_accumulation_steps=3,
        )  # fmt: skip
        samples = trainer.train_dataset.samples
        assert [int(n) for n in samples.lengths] == ([45] if packing else [10, 15, 20])
        assert all(sample.token_ids[-1] == END for sample in samples)
        trainer.train()
        results.append((weights(trainer.model), trainer.state.log_history[0]["loss"]))
    (packed, loss), (apart, other_loss) = results
    for name, value in packed.items():
        torch.testing.assert_close(apart[name], value, rtol=0, atol=2e-6)
    assert other_loss == pytest.approx(loss, rel=1e-5)

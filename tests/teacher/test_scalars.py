"""Teacher scalars: stored within their bound, and what metrics, losses and evaluations make of them.

Against dense float64 expressions and expectations over many draws.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import V, make_arguments, make_model, make_samples, make_tokenizer
from torch import Tensor

from selkd import reference
from selkd.data.collate import collate
from selkd.data.samples import SampleDataset
from selkd.errors import InputError
from selkd.evaluation.sample_scores import score_samples
from selkd.models.head import head_of, hidden_states
from selkd.models.pair import ModelPair
from selkd.recipe.choices import ClassOptions
from selkd.selection.classes import ClassSampler, class_sampler, split_draws, split_evenly
from selkd.teacher.build_cache import build_cache
from selkd.teacher.cached import CachedTeacher, ScoringDraws
from selkd.teacher.live import LiveTargets, LiveTeacher
from selkd.teacher.recheck_cache import compare_again
from selkd.teacher.targets import DrawnClasses
from selkd.training.trainer import DistillTrainer
from selkd_cache.reader import TeacherCache
from selkd_cache.scalars import LARGEST_CODE, LARGEST_ERROR, bound_of

SEED = 11
SCALAR_METRICS = ("teacher_entropy", "teacher_ce", "ce_ratio", "ce_ratio_plus_student_entropy")
KL_METRICS = ("kl", "kl_plus_student_entropy", "soft_or")


def make_cache(
    folder: Path, samples: SampleDataset, temperature: float = 1.0, scalars: int = 2, **classes: Any
) -> TeacherCache:
    options = ClassOptions.model_validate({"sampler": "rs_kd", "draws": 32} | classes)
    about: dict[str, Any] = {
        "sampler": options.sampler,
        "draws": options.draws,
        "count_total": class_sampler(options).total,
        "temperature": temperature,
        "vocabulary": V,
        "seed": SEED,
    }
    about |= {"scalars": scalars} if scalars else {}
    about |= {"tail": "one class"} if options.tail else {}
    live = LiveTeacher(make_model(0, 3), options, temperature, SEED, V)
    build_cache(folder, about, samples, lambda: live, 1)
    return TeacherCache.open(folder, about)


def dense(seed: int, layers: int, batch: dict[str, Tensor]) -> Tensor:
    model = make_model(seed, layers).double()
    with torch.no_grad():
        return head_of(model).logits(hidden_states(model, batch["input_ids"], batch["position_ids"]))


def batch_of(samples: SampleDataset) -> dict[str, Tensor]:
    return collate([samples[index] for index in range(len(samples))], 1)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_cache_has_the_scalars_within_their_bound(tmp_path: Path, temperature: float) -> None:
    """Also those of a truncated teacher, which are of the whole distribution."""
    samples = make_samples(6)
    batch = batch_of(samples)
    logits = dense(0, 3, batch)
    for name, classes in (("drawn", {}), ("tail", {"sampler": "top_k", "draws": 4, "tail": True})):
        cache = make_cache(tmp_path / name, samples, temperature, 2 if temperature == 1 else 4, **classes)
        read = CachedTeacher(cache).read(batch)
        for ending, at in (("", 1.0), ("_at_temperature", temperature)):
            if ending and temperature == 1:
                assert not [each for each in read if each.endswith(ending)]
                continue
            for entry, metric in (("teacher_entropy_nats", "teacher_entropy"), ("teacher_ce_nats", "teacher_ce")):
                expected = reference.importance(metric, logits, logits / at, batch["targets"])
                got = read[entry + ending]
                assert got.dtype == torch.float32
                error = (got - expected)[batch["valid_mask"]].abs().numpy()
                bound = bound_of(expected[batch["valid_mask"]].numpy())
                assert (error <= bound + 1e-5).all()
                assert error.max() > LARGEST_ERROR / 4  # it is rounded
                assert (got[~batch["valid_mask"]] == 0).all()


@pytest.mark.parametrize("metric", [*SCALAR_METRICS, *KL_METRICS])
def test_training_from_a_cache_is_the_specification_with_draws_and_scalars(tmp_path: Path, metric: str) -> None:
    samples = make_samples(8)
    cache = make_cache(tmp_path / "cache", samples)
    positions = {"metric": metric, "policy": "top_k", "fraction": 0.4}
    classes = {"sampler": "rs_kd", "draws": 32}
    arguments = make_arguments(
        tmp_path / "run", positions=positions, classes=classes, per_device_train_batch_size=8, max_steps=1
    )
    student = make_model(1)
    trainer = DistillTrainer(student, cache, arguments, train_dataset=samples, processing_class=make_tokenizer())
    trainer.train()
    logged = trainer.state.log_history[0]

    batch = batch_of(samples)
    teacher = CachedTeacher(cache, ScoringDraws(8, SEED) if metric in KL_METRICS else None)
    targets = teacher.targets(batch, 0)
    shape = batch["valid_mask"].shape
    counts = targets.numbers.view(*shape, -1)
    scoring = None if targets.scoring is None else targets.scoring.view(*shape, -1)
    assert targets.scalars is not None
    scalars = (targets.scalars.entropy.view(shape).double(), targets.scalars.cross_entropy.view(shape).double())
    if scoring is not None:
        assert (scoring.sum(-1)[batch["valid_mask"]] == 8).all()
        assert (counts.sum(-1)[batch["valid_mask"]] == 24).all()
    expected = reference.loss(
        dense(1, 2, batch),
        torch.zeros(1),  # never looked at
        batch["targets"],
        batch["valid_mask"],
        {"positions": positions, "classes": classes},
        class_ids=targets.class_ids.view(*shape, -1).long(),
        counts=counts,
        scalars=scalars,
        scoring_counts=scoring,
    )
    assert logged["loss"] == pytest.approx(float(expected), rel=1e-4)
    # The logged KL is that of the draws of the loss, at the selected positions.
    u = reference.importance_of_draws(
        metric,
        dense(1, 2, batch),
        batch["targets"],
        targets.class_ids.view(*shape, -1).long(),
        counts if scoring is None else scoring,
        scalars,
        batch["valid_mask"],
    )
    picked = reference.select("top_k", u, batch["valid_mask"], 0.4) > 0
    kl = reference.importance_of_draws(
        "kl", dense(1, 2, batch), batch["targets"], targets.class_ids.view(*shape, -1).long(), counts, scalars
    )
    assert logged["kl_nats"] == pytest.approx(float(kl[picked].mean()), rel=1e-4)


def test_split_draws_is_a_draw_without_replacement_from_all_of_a_row() -> None:
    generator = torch.Generator().manual_seed(0)
    counts = torch.tensor([[5, 0, 2, 1], [0, 0, 0, 0], [8, 0, 0, 0]])
    uniforms = torch.rand(20_000, 3, 8, generator=generator, dtype=torch.float64)
    first, rest = split_draws(counts.repeat(20_000, 1), uniforms.flatten(0, 1), 3)
    first, rest = first.view(-1, 3, 4), rest.view(-1, 3, 4)
    assert (first + rest == counts).all()
    assert (first >= 0).all()
    assert (rest >= 0).all()
    assert (first.sum(-1) == torch.tensor([3, 0, 3])).all()
    share = first[:, 0].double().mean(0)
    # Hypergeometric: mean 3 c / 8, variance below 3 (c / 8) (1 - c / 8).
    p = counts[0] / 8
    assert ((share - 3 * p).abs() <= 4.5 * (3 * p * (1 - p) / 20_000).sqrt() + 1e-12).all()
    again = split_draws(counts, uniforms[0], 3)[0]
    assert torch.equal(again, split_draws(torch.nn.functional.pad(counts, (0, 3)), uniforms[0], 3)[0][:, :4])


def kl_of_draws(student: Tensor, entropy: Tensor, class_ids: Tensor, counts: Tensor) -> Tensor:
    """The estimate [n] of n independent drawn rows."""
    log_q = student.log_softmax(-1).gather(-1, class_ids)
    return -entropy - (counts * log_q).sum(-1) / counts.sum(-1)


def make_distributions(n: int, repeats: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Student logits, teacher probabilities, its entropy, and its true KL, of n positions, repeated."""
    generator = torch.Generator().manual_seed(3)
    p = (3 * torch.randn(n, V, generator=generator, dtype=torch.float64)).softmax(-1)
    student = p.log() + torch.randn(n, V, generator=generator, dtype=torch.float64)
    entropy = -(p * p.log()).sum(-1)
    kl = (p * (p.log() - student.log_softmax(-1))).sum(-1)
    return student.repeat(repeats, 1), p.repeat(repeats, 1), entropy.repeat(repeats), kl.repeat(repeats)


def drawn(sampler: ClassSampler, p: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    noise = torch.rand(len(p), sampler.n_uniforms, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return sampler(p, noise)


@pytest.mark.parametrize("name", ["rs_kd", "systematic"])
def test_the_estimate_of_kl_has_the_right_expectation(name: str) -> None:
    """Of all draws, and of either part of a split."""
    n, repeats = 20, 2000
    student, p, entropy, kl = make_distributions(n, repeats)
    class_ids, counts = drawn(class_sampler(ClassOptions(sampler=name, draws=16)), p, 1)
    noise = torch.rand(len(p), 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for part in (counts, *split_draws(counts, noise, 4), *split_evenly(counts, noise, 4)):
        error = (kl_of_draws(student, entropy, class_ids, part) - kl).view(repeats, n)
        deviation = error.std(0) / repeats**0.5
        assert (error.mean(0).abs() <= 4.5 * deviation).all()
        assert (deviation > 0).all()


@pytest.mark.parametrize("n_first", [1, 3, 4, 7])
def test_evenly_spaced_parts_are_every_so_many_draws_in_the_order_of_the_classes(n_first: int) -> None:
    counts = torch.tensor([[2, 0, 5, 1], [0, 0, 0, 0], [1, 1, 1, 5]])
    for place in range(8):
        first, rest = split_evenly(counts, torch.full((3, 8), (place + 0.5) / 8, dtype=torch.float64), n_first)
        for row, drawn in enumerate(counts.tolist()):
            classes = [v for v, count in enumerate(drawn) for _ in range(count)]
            taken = [classes[k] for k in range(len(classes)) if (k * n_first + place) % 8 < n_first]
            assert first[row].tolist() == [taken.count(v) for v in range(4)]
        assert (first + rest == counts).all()
        assert first.sum(-1).tolist() == [n_first, 0, n_first]


def test_an_even_part_of_evenly_spaced_draws_leaves_the_others_nearer_to_the_truth() -> None:
    """Both parts are spaced evenly, so each errs less than a random part, and so does the loss at what is selected."""
    n, repeats = 200, 300
    student, p, entropy, kl = make_distributions(n, repeats)
    class_ids, counts = drawn(class_sampler(ClassOptions(sampler="systematic", draws=32)), p, 4)
    noise = torch.rand(len(p), 32, generator=torch.Generator().manual_seed(5), dtype=torch.float64)

    def errors(split: Any) -> tuple[Tensor, Tensor, Tensor]:
        scored, trained = (kl_of_draws(student, entropy, class_ids, part) - kl for part in split(counts, noise, 8))
        picked = (scored + kl).view(repeats, n).topk(n // 5).indices
        return scored.square().mean(), trained.square().mean(), trained.view(repeats, n).gather(1, picked).mean().abs()

    for even, random in zip(errors(split_evenly), errors(split_draws), strict=True):
        assert even < 0.9 * random


def test_a_caches_sampler_decides_how_its_draws_are_split(tmp_path: Path) -> None:
    for sampler, is_even in (("rs_kd", False), ("systematic", True)):
        samples = make_samples(4)
        cache = make_cache(tmp_path / sampler, samples, sampler=sampler)
        arguments = make_arguments(tmp_path, positions={"metric": "kl"}, classes={"sampler": sampler, "draws": 32})
        model, tokenizer = make_model(1), make_tokenizer()
        teacher = DistillTrainer(model, cache, arguments, train_dataset=samples, processing_class=tokenizer).teacher
        assert isinstance(teacher, CachedTeacher)
        assert teacher.scoring == ScoringDraws(8, arguments.seed, is_even)


def test_scoring_and_training_on_the_same_draws_is_biased_and_on_others_is_not() -> None:
    """The mean loss at the top fifth, less the mean true KL there: 0 only if the loss has other draws."""
    n, repeats = 200, 300
    student, p, entropy, kl = make_distributions(n, repeats)
    class_ids, counts = drawn(class_sampler(ClassOptions(sampler="rs_kd", draws=32)), p, 4)
    noise = torch.rand(len(p), 32, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    scoring, training = split_draws(counts, noise, 8)

    def excess(scored: Tensor, trained: Tensor) -> tuple[float, float]:
        scores, losses = (kl_of_draws(student, entropy, class_ids, part).view(repeats, n) for part in (scored, trained))
        picked = scores.topk(n // 5).indices
        errors = (losses - kl.view(repeats, n)).gather(1, picked).mean(1)
        return float(errors.mean()), float(errors.std() / repeats**0.5)

    bias, deviation = excess(scoring, training)
    assert abs(bias) <= 4.5 * deviation
    for part in (counts, training):
        bias, deviation = excess(part, part)
        assert bias > 20 * deviation


def test_the_split_is_a_function_of_seed_sample_and_step_alone(tmp_path: Path) -> None:
    samples = make_samples(4)
    cache = make_cache(tmp_path, samples)
    batch = batch_of(samples)
    teacher = CachedTeacher(cache, ScoringDraws(8, SEED))

    def scoring(batch: dict[str, Tensor], step: int, teacher: CachedTeacher = teacher) -> list[Tensor]:
        part = teacher.targets(batch, step).scoring
        assert part is not None
        part = part.view(*batch["valid_mask"].shape, -1)
        return [row[valid] for row, valid in zip(part, batch["valid_mask"], strict=True)]

    together = scoring(batch, 3)
    alone = [scoring(collate([samples[index]], 1), 3)[0] for index in range(4)]
    for one, other in zip(together, alone, strict=True):
        assert torch.equal(one[:, : other.shape[1]], other)
    assert any(not torch.equal(a, b) for a, b in zip(together, scoring(batch, 4), strict=True))
    other_seed = CachedTeacher(cache, ScoringDraws(8, SEED + 1))
    assert any(not torch.equal(a, b) for a, b in zip(together, scoring(batch, 3, other_seed), strict=True))
    # It is no prefix by class id: the classes with the lowest ids get no more than their share.
    whole = teacher.targets(batch, 3, for_loss=False)
    assert whole.scoring is None
    assert (whole.numbers.sum(-1)[batch["valid_mask"].flatten()] == 32).all()


@pytest.mark.parametrize(
    ("about", "positions", "criterion", "message"),
    [
        ({"scalars": 0}, {"metric": "kl"}, {}, r"needs the teacher's entropy.*cache\.scalars: true"),
        ({"scalars": 0}, {"metric": "teacher_entropy"}, {}, r"cache\.scalars: true"),
        ({}, {"metric": "reverse_kl"}, {}, "full distribution.* were not drawn"),
        ({}, {"metric": "kl", "scoring_draws": 32}, {}, "expected fewer than the 32 draws"),
        ({}, {"metric": "student_ce", "scoring_draws": 4}, {}, "leave it out"),
        ({"sampler": "top_k", "draws": 4}, {"metric": "kl"}, {}, "unbiased draws.*rs_kd or systematic"),
        ({}, {"metric": "kl", "policy": "pos_rs_corrected"}, {}, "could never be drawn.*student_entropy"),
        ({}, {"metric": "soft_or", "policy": "pos_rs_corrected"}, {}, r"positions\.policy: pos_rs_.*live teacher"),
        ({"temperature": 2.0, "scalars": 4}, {"metric": "soft_or"}, {"temperature": 2.0}, "at temperature 1"),
    ],
)
def test_what_a_cache_can_not_score_is_refused_with_the_way_out(
    tmp_path: Path, about: dict[str, Any], positions: dict[str, Any], criterion: dict[str, Any], message: str
) -> None:
    samples = make_samples(4)
    cache = make_cache(tmp_path / "cache", samples, **about)
    classes = {"sampler": about.get("sampler", "rs_kd"), "draws": about.get("draws", 32)}
    arguments = make_arguments(tmp_path, positions=positions, classes=classes, criterion=criterion)
    with pytest.raises(InputError, match=message):
        DistillTrainer(make_model(1), cache, arguments, train_dataset=samples, processing_class=make_tokenizer())


def test_a_truncated_teachers_scalars_score_positions(tmp_path: Path) -> None:
    samples = make_samples(4)
    cache = make_cache(tmp_path / "cache", samples, sampler="top_k", draws=4, tail=True)
    classes = {"sampler": "top_k", "draws": 4, "tail": True}
    arguments = make_arguments(tmp_path, positions={"metric": "ce_ratio"}, classes=classes)
    trainer = DistillTrainer(make_model(1), cache, arguments, train_dataset=samples, processing_class=make_tokenizer())
    trainer.train()
    assert trainer.state.log_history[0]["loss"] > 0
    assert "kl_nats" not in trainer.state.log_history[0]


def test_evaluation_of_a_cache_with_scalars_is_the_true_kl(tmp_path: Path) -> None:
    samples = make_samples(8)
    cache = make_cache(tmp_path / "cache", samples, draws=512)
    arguments = make_arguments(tmp_path, positions={"metric": "kl"}, classes={"sampler": "rs_kd", "draws": 512})
    trainer = DistillTrainer(make_model(1), cache, arguments, eval_dataset=samples, processing_class=make_tokenizer())
    metrics = trainer.evaluate()
    batch = batch_of(samples)
    kl = reference.importance("kl", dense(1, 2, batch), dense(0, 3, batch), batch["targets"])[batch["valid_mask"]]
    assert metrics["eval_loss"] == metrics["eval_kl_nats"] == pytest.approx(float(kl.mean()), abs=0.05)
    assert "eval_cross_entropy_to_draws_nats" not in metrics


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_a_class_that_the_teacher_rules_out_adds_nothing(monkeypatch: pytest.MonkeyPatch, temperature: float) -> None:
    """Its logit is -inf. What is stored and what live draws know of the entropy are of the classes that are left."""
    batch, ruled_out = batch_of(make_samples(4)), 5
    valid = batch["valid_mask"].flatten().nonzero().flatten()
    logits_of = LiveTargets.logits

    def without_one(targets: LiveTargets, rows: slice) -> Tensor:
        return logits_of(targets, rows).index_fill_(-1, torch.tensor([ruled_out]), -torch.inf)

    monkeypatch.setattr(LiveTargets, "logits", without_one)
    live = LiveTeacher(make_model(0, 3), ClassOptions(sampler="rs_kd", draws=32), temperature, SEED, V)
    (_, stored), *others = live.draws_to_store(batch, with_scalars=True)
    assert not others
    kept = dense(0, 3, batch).flatten(0, 1)[valid][:, [v for v in range(V) if v != ruled_out]]
    for column, at in enumerate(dict.fromkeys((1.0, temperature))):
        log_p = (kept / at).log_softmax(-1)
        entropy = -(log_p.exp() * log_p).sum(-1)
        torch.testing.assert_close(stored[:, 2 * column].double(), entropy, atol=1e-5, rtol=1e-5)
        if at == temperature == 1.0:
            target = live.targets(batch, 0).at(valid).chunk(slice(0, len(valid)))
            assert isinstance(target, DrawnClasses)
            assert target.entropy is not None
            torch.testing.assert_close(target.entropy.double(), entropy, atol=1e-5, rtol=1e-5)
    is_ruled_out = batch["targets"].flatten()[valid] == ruled_out
    assert (stored[~is_ruled_out] < 100).all()
    assert (stored[is_ruled_out, 1] > 1e30).all()


@pytest.mark.parametrize("metric", ["kl", "ce_ratio"])
def test_samples_are_scored_from_a_cache_without_a_teacher(tmp_path: Path, metric: str) -> None:
    samples = make_samples(8)
    cache = make_cache(tmp_path, samples, draws=512)

    def no_teacher() -> Any:
        raise AssertionError("the teacher is not loaded")

    pair = ModelPair(lambda: make_model(1), no_teacher, make_tokenizer(), V, torch.float32)
    scores, tokens = score_samples(metric, samples, pair, SEED, CachedTeacher(cache))
    assert tokens == 0
    exact, _ = score_samples(
        metric,
        samples,
        ModelPair(lambda: make_model(1), lambda: make_model(0, 3), make_tokenizer(), V, torch.float32),
        0,
    )
    np.testing.assert_allclose(scores, exact, rtol=0.1 if metric == "kl" else 0.01)


def test_rechecking_compares_the_scalars(tmp_path: Path) -> None:
    samples = make_samples(4)
    cached = CachedTeacher(make_cache(tmp_path, samples))
    options = ClassOptions(sampler="rs_kd", draws=32)

    def again(temperature: float) -> Any:
        live = LiveTeacher(make_model(0, 3), options, temperature, SEED, V)
        return list(compare_again(live, cached, samples, range(4), 1).values())

    for each in again(1.0):
        assert each.is_within_bound
        assert (each.same_draws == 1).all()
        assert 0 < each.scalar_errors.max() <= LARGEST_ERROR * 1.001
    model = make_model(0, 3)
    with torch.no_grad():
        head_of(model).weight.mul_(1.02)
    live = LiveTeacher(model, options, 1.0, SEED, V)
    assert not all(each.is_within_bound for each in compare_again(live, cached, samples, range(4), 1).values())


def test_rechecking_compares_what_storing_cuts_with_the_largest_stored_number(tmp_path: Path) -> None:
    """At a low temperature a class may cost more nats than a code stands for; what is stored is the largest code."""
    samples, temperature = make_samples(4), 1e-3
    cache = make_cache(tmp_path, samples, temperature, scalars=4)
    assert max(cache.get(sample_id).scalars.max() for sample_id in samples.ids) == LARGEST_CODE
    live = LiveTeacher(make_model(0, 3), ClassOptions(sampler="rs_kd", draws=32), temperature, SEED, V)
    for each in compare_again(live, CachedTeacher(cache), samples, range(4), 1).values():
        assert (each.same_draws == 1).all()
        assert each.is_within_bound
        assert each.scalar_errors.max() <= LARGEST_ERROR * 1.001

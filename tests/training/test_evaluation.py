"""What ``eval_loss`` is: one dense figure, against the models' own full logits in float64, however it is cut."""

import json
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_distributed import WORKER, torchrun
from test_trainer import RECIPES, cached, drawn_of, logits_of, trainer_of
from tiny import V, make_arguments, make_model, make_prompts, make_samples, make_tokenizer
from torch import Tensor

from selkd import DistillTrainer, TeacherCache, reference
from selkd.data.collate import collate
from selkd.data.samples import Sample, SampleDataset
from selkd.errors import InputError, RunError
from selkd.recipe.choices import ClassOptions
from selkd.selection.classes import TOP_K_UNITS
from selkd.selection.queue import ScoreQueue
from selkd.teacher.build_cache import build_cache
from selkd.teacher.live import LiveTeacher

DRAWN = {"classes": {"sampler": "rs_kd", "draws": 8}}


def dense(samples: SampleDataset) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Float64 full logits of student and teacher, and their batch."""
    batch = collate(list(samples), 1)
    with torch.no_grad():
        student, teacher = (logits_of(model.double(), batch) for model in (make_model(1), make_model(0, layers=3)))
    return student, teacher, batch


def dense_kl(samples: SampleDataset) -> float:
    student, teacher, batch = dense(samples)
    kl = reference.divergence("forward_kl", student, teacher, batch["targets"])
    return kl[batch["valid_mask"]].mean().item()


def evaluator(out: Path, samples: Any, recipe: dict[str, Any] | None = None, **options: Any) -> DistillTrainer:
    """A trainer that only evaluates."""
    teacher = options.pop("teacher", None) or make_model(0, layers=3)
    student = options.pop("student", None) or make_model(1)
    return DistillTrainer(
        model=student, teacher=teacher, args=make_arguments(out, **(recipe or {}), **options), eval_dataset=samples,
        processing_class=make_tokenizer(),
    )  # fmt: skip


SELECTIONS: dict[str, dict[str, Any]] = {
    **RECIPES,
    "reverse KL at 2": {
        "criterion": {"name": "reverse_kl", "temperature": 2.0},
        "positions": {"metric": "student_entropy", "fraction": 0.2},
    },
    "dkd and text": {"criterion": {"name": "dkd", "kd_weight": 0.5}, "positions": {"metric": "kl", "fraction": 0.1}},
    "a schedule": {"positions": {"metric": "student_entropy", "fraction": {"from": 1.0, "to": 0.1}}},
    "a curriculum": {"positions": {"policy": "curriculum", "fraction": 0.3, "curriculum_steps": 5}},
    "weighted": {"positions": {"policy": "weighted"}},
    "draws of classes": {"positions": {"policy": "all"}, "classes": {"sampler": "rs_kd", "draws": 2}},
}


@pytest.mark.parametrize("recipe", SELECTIONS.values(), ids=SELECTIONS)
def test_it_is_the_dense_divergence_whatever_is_selected(recipe: dict[str, Any], tmp_path: Path) -> None:
    samples = make_samples(8)
    trainer = evaluator(tmp_path, samples, recipe, per_device_eval_batch_size=3)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(dense_kl(samples), rel=1e-6)
    assert metrics["eval_kl_nats"] == metrics["eval_loss"]
    assert metrics["eval_positions"] == int(samples.n_valid.sum())
    trainer.state.global_step, trainer.state.max_steps = 7, 10  # where a schedule or a curriculum has moved on
    assert trainer.evaluate()["eval_loss"] == metrics["eval_loss"]


@pytest.mark.parametrize("count", [8, 9])
@pytest.mark.parametrize("batch", [1, 2, 3, 8, 16])
def test_it_is_the_same_for_every_batch_size(count: int, batch: int, tmp_path: Path) -> None:
    samples = make_samples(count)
    metrics = evaluator(tmp_path, samples, RECIPES["se-kd"], per_device_eval_batch_size=batch).evaluate()
    assert metrics["eval_loss"] == pytest.approx(dense_kl(samples), rel=1e-6)
    assert metrics["eval_positions"] == int(samples.n_valid.sum())


def test_a_mean_of_batches_would_be_another_figure() -> None:
    """So the tests above tell the two apart: samples differ in length and in divergence."""
    samples = make_samples(9)
    of_samples = [dense_kl(samples.select([index])) for index in range(9)]
    assert abs(np.mean(of_samples) - dense_kl(samples)) > 1e-3 * dense_kl(samples)


def test_padding_may_be_on_the_left(tmp_path: Path) -> None:
    samples = make_samples(8)
    trainer = evaluator(tmp_path, samples, per_device_eval_batch_size=3)
    trainer.data_collator = partial(collate, pad_token_id=1, padding_side="left")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(dense_kl(samples), rel=1e-6)


def test_packed_documents_are_measured_as_if_each_were_alone(tmp_path: Path) -> None:
    samples = make_samples(4)
    pieces = []
    for sample in samples:
        borders = [*sample.document_starts, len(sample.token_ids)]
        for start, end in pairwise(borders):
            pieces.append(Sample(sample.token_ids[start:end], np.zeros(1, np.int32)))
    assert len(pieces) > len(samples)
    alone = evaluator(tmp_path / "a", SampleDataset.from_samples(pieces)).evaluate()
    packed = evaluator(tmp_path / "b", samples).evaluate()
    assert packed["eval_loss"] == pytest.approx(alone["eval_loss"], rel=1e-6)
    assert packed["eval_positions"] == alone["eval_positions"]


def test_completions_alone_are_measured(tmp_path: Path) -> None:
    samples = SampleDataset.from_samples(make_prompts(5))
    metrics = evaluator(tmp_path, samples, per_device_eval_batch_size=2).evaluate()
    assert metrics["eval_loss"] == pytest.approx(dense_kl(samples), rel=1e-6)
    assert metrics["eval_positions"] < int((samples.lengths - 1).sum())


def test_it_leaves_no_trace_in_a_training(tmp_path: Path) -> None:
    """Counts, the queue and the log of selections are those of a training that was never evaluated."""
    samples, options = make_samples(8), {"max_steps": 4, "learning_rate": 0.05}
    plain = trainer_of(tmp_path / "a", samples, RECIPES["gls"], **options)
    plain.train()
    watched = DistillTrainer(
        model=make_model(1), teacher=make_model(0, layers=3),
        args=make_arguments(
            tmp_path / "b", **RECIPES["gls"], **options, eval_strategy="steps", eval_steps=1, eval_on_start=True
        ),
        train_dataset=samples, eval_dataset=make_samples(9, seed=3), processing_class=make_tokenizer(),
    )  # fmt: skip
    watched.train()
    watched.evaluate()
    assert vars(watched.totals) == vars(plain.totals)
    assert isinstance(watched.queue, ScoreQueue)
    assert np.array_equal(watched.queue.scores, plain.queue.scores)
    logs = [[log for log in trainer.state.log_history if "loss" in log] for trainer in (plain, watched)]
    for one, other in zip(*logs, strict=True):
        assert one == other
    assert len([log for log in watched.state.log_history if "eval_loss" in log]) == 6


def dense_cross_entropy(cache: TeacherCache, samples: SampleDataset, temperature: float) -> float:
    student, _, batch = dense(samples)
    drawn = drawn_of(cache, samples)
    log_q = torch.log_softmax(student / temperature, dim=-1).gather(-1, drawn["class_ids"])
    weights = drawn["counts"].double() / drawn["counts"].sum(dim=-1, keepdim=True).clamp(min=1)
    return -(weights * log_q).sum(dim=-1)[batch["valid_mask"]].mean().item()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("batch", [1, 4, 16])
def test_from_a_cache_it_is_the_cross_entropy_to_the_draws(temperature: float, batch: int, tmp_path: Path) -> None:
    samples = make_samples(9)
    cache = cached(samples, tmp_path / "cache", temperature=temperature)
    recipe = DRAWN | {
        "criterion": {"temperature": temperature},
        "positions": {"metric": "student_entropy", "fraction": 0.2},
    }
    trainer = evaluator(tmp_path / "run", samples, recipe, teacher=cache, per_device_eval_batch_size=batch)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(dense_cross_entropy(cache, samples, temperature), rel=1e-6)
    assert metrics["eval_cross_entropy_to_draws_nats"] == metrics["eval_loss"]
    assert "eval_kl_nats" not in metrics


def test_from_a_cache_with_tails_it_is_the_cross_entropy_to_them(tmp_path: Path) -> None:
    samples, classes = make_samples(9), {"sampler": "top_k", "draws": 8, "tail": True}
    live = LiveTeacher(make_model(0, layers=3), ClassOptions(**classes), 1.0, 11, V)
    about = {"sampler": "top_k", "draws": 8, "count_total": TOP_K_UNITS, "temperature": 1.0, "vocabulary": V}
    build_cache(tmp_path / "cache", about | {"tail": "one class"}, samples, lambda: live, 1)
    student, teacher, batch = dense(samples)
    p, class_ids = teacher.double().softmax(-1).topk(8)
    q = student.double().softmax(-1)
    q_known, p_tail = q.gather(-1, class_ids), 1 - p.sum(-1)
    expected = -(p * q_known.log()).sum(-1) - p_tail * (1 - q_known.sum(-1)).log()
    metrics = evaluator(
        tmp_path / "run", samples, {"classes": classes}, teacher=TeacherCache.open(tmp_path / "cache")
    ).evaluate()
    assert metrics["eval_loss"] == pytest.approx(expected[batch["valid_mask"]].mean().item(), rel=1e-4)


def test_over_seeds_a_caches_figure_is_the_divergence_and_the_teachers_entropy(tmp_path: Path) -> None:
    samples, seeds, draws = make_samples(8), range(24), 32
    student, teacher, batch = dense(samples)
    entropy = reference.importance("teacher_entropy", student, teacher, batch["targets"])[batch["valid_mask"]]
    expected = dense_kl(samples) + entropy.mean().item()
    model, options = make_model(0, layers=3), ClassOptions(sampler="rs_kd", draws=draws)
    found = []
    for seed in seeds:
        folder = tmp_path / str(seed)
        about = {"sampler": "rs_kd", "draws": draws, "temperature": 1.0, "vocabulary": V, "seed": seed}
        build_cache(folder, about, samples, partial(LiveTeacher, model, options, 1.0, seed, V), 1)
        recipe = {"classes": {"sampler": "rs_kd", "draws": draws}}
        found.append(evaluator(tmp_path / "run", samples, recipe, teacher=TeacherCache.open(folder)).evaluate())
    losses = np.array([metrics["eval_loss"] for metrics in found])
    error = losses.std(ddof=1) / len(losses) ** 0.5
    assert 0 < error < 0.02 * expected
    assert abs(losses.mean() - expected) < 4 * error


def test_samples_that_the_cache_lacks_are_named(tmp_path: Path) -> None:
    samples = make_samples(4)
    cache = cached(samples.select([0, 1, 3]), tmp_path / "cache")
    lacking = f"the cache lacks 1 samples, the first {samples.ids[2].hex()}"
    with pytest.raises(InputError, match=lacking):
        evaluator(tmp_path / "run", samples, DRAWN, teacher=cache)
    trainer = evaluator(tmp_path / "run", samples.select([0]), DRAWN, teacher=cache)
    with pytest.raises(InputError, match=lacking):
        trainer.evaluate(samples)
    with pytest.raises(InputError, match=lacking):
        trainer.predict(samples)


def test_prompts_alone_are_refused_by_the_name_of_their_set(tmp_path: Path) -> None:
    prompts = SampleDataset.from_samples(make_prompts(3, with_completions=False))
    with pytest.raises(InputError, match="eval_dataset: prompts alone"):
        evaluator(tmp_path, prompts)
    with pytest.raises(InputError, match=r"eval_dataset\['asked'\]: prompts alone"):
        evaluator(tmp_path, {"told": make_samples(2), "asked": prompts})
    trainer = evaluator(tmp_path, make_samples(2))
    with pytest.raises(InputError, match="eval_dataset: prompts alone"):
        trainer.evaluate(prompts)
    with pytest.raises(InputError, match="test_dataset: prompts alone"):
        trainer.predict(prompts)


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_logit_that_is_not_finite_is_named(side: str, tmp_path: Path) -> None:
    samples = make_samples(6, ragged=False)
    trainer = evaluator(tmp_path, samples, per_device_eval_batch_size=4)
    trainer.evaluate()
    position = int(np.flatnonzero(samples[5].valid_mask)[4])

    def spoil(_: Any, inputs: Any, output: Tensor) -> Tensor:
        output = output.clone()
        if (inputs[0][1] != reached[0]).any():  # of the second batch alone
            output[1, position] = float("inf")
        return output

    model = trainer.model if side == "student" else trainer.teacher.model
    reached: list[Tensor] = []
    model.model.norm.register_forward_pre_hook(lambda _, inputs: reached.append(inputs[0][1]) and None)
    model.model.norm.register_forward_hook(spoil)
    with pytest.raises(RunError, match=f"position {position} of sample {samples.ids[5].hex()} gives nan"):
        trainer.evaluate()


@pytest.mark.slow
@pytest.mark.parametrize(("count", "recipe"), [(8, "full kd"), (9, "se-kd"), (9, "gls")])
def test_two_processes_measure_what_one_measures(count: int, recipe: str, tmp_path: Path) -> None:
    samples = make_samples(count)
    alone = evaluator(tmp_path / "alone", samples, RECIPES[recipe], per_device_eval_batch_size=4)
    metrics, predicted = alone.evaluate(), alone.predict(samples)
    options = RECIPES[recipe] | {"per_device_eval_batch_size": 2}
    done = torchrun(str(WORKER), str(tmp_path), "evaluate", json.dumps(options), str(count))
    assert done.returncode == 0, done.stderr[-3000:]
    answer = json.loads((tmp_path / "answer.json").read_text())
    assert answer["world"] == 2
    assert answer["metrics"]["eval_loss"] == pytest.approx(metrics["eval_loss"], rel=1e-6)
    assert answer["metrics"]["eval_loss"] == pytest.approx(dense_kl(samples), rel=1e-6)
    assert answer["metrics"]["eval_positions"] == metrics["eval_positions"] == int(samples.n_valid.sum())
    assert answer["labels"] == predicted.label_ids.tolist()
    assert answer["shape"] == list(predicted.predictions.shape)

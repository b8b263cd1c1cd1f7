"""DistillTrainer on tiny models in float32: against the specification, and against itself cut differently."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from tiny import V, make_arguments, make_model, make_samples, make_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainerCallback

from selkd import DistillTrainer, TeacherCache, reference
from selkd.data.collate import collate
from selkd.data.samples import Sample, SampleDataset
from selkd.errors import InputError, RunError
from selkd.maths.finite import require_all_finite
from selkd.maths.head import Head
from selkd.models.head import head_of, hidden_states
from selkd.recipe.choices import ClassOptions
from selkd.selection.classes import TOP_K_UNITS
from selkd.selection.positions import step_context
from selkd.teacher.build_cache import build_cache
from selkd.teacher.live import LiveTargets, LiveTeacher

RECIPES: dict[str, dict[str, Any]] = {
    "full kd": {"positions": {"policy": "all"}},
    "se-kd": {"positions": {"policy": "top_k", "metric": "student_entropy", "fraction": 0.3}},
    "random": {"positions": {"policy": "random", "fraction": 0.3}},
    "per position": {"positions": {"policy": "top_k", "fraction": 0.3, "reduction": "per_position"}},
    "lambda and temperature": {"criterion": {"kd_weight": 0.6, "temperature": 2.0}, "positions": {"policy": "all"}},
    "corrected draws": {"positions": {"policy": "pos_rs_corrected", "metric": "kl", "fraction": 0.4, "skip_first": 2}},
    "gls": {"positions": {"policy": "gls", "fraction": 0.3, "queue_size": 200}},
}
# Each runs as one step against the specification; together they take every metric, policy and criterion.
COMBINATIONS: dict[str, dict[str, Any]] = {
    **RECIPES,
    "unsquared": {
        "criterion": {"temperature": 2.0, "temperature_squared": False},
        "positions": {"metric": "student_entropy", "fraction": 0.5},
    },
    **{
        f"by {m}": {"positions": {"metric": m, "fraction": 0.3}}
        for m in (*reference.METRICS, "random")
        if m != "student_entropy"
    },
    **{
        f"criterion {c}": {"criterion": {"name": c}, "positions": {"metric": "student_entropy", "fraction": 0.5}}
        for c in reference.CRITERIA
    },
    "at-kd, temperature, text": {
        "criterion": {"name": "at_kd", "temperature": 1.5, "kd_weight": 0.7},
        "positions": {"metric": "kl", "fraction": 0.6, "reduction": "per_position"},
    },
    "curriculum": {"positions": {"policy": "curriculum", "fraction": 0.3}, "criterion": {"name": "jsd", "beta": 0.2}},
    "draws": {
        "positions": {"policy": "pos_rs", "fraction": 0.4, "smoothing": 2.0, "clip": 0.8, "coverage": 0.3},
        "criterion": {"name": "reverse_kl"},
    },
    "weighted": {"positions": {"policy": "weighted", "metric": "kl"}, "criterion": {"kd_weight": 0.5}},
    "scheduled": {"positions": {"metric": "student_entropy", "fraction": {"from": 0.8, "to": 0.2, "over": 0.5}}},
    "random, scheduled": {"positions": {"policy": "random", "fraction": {"from": 0.8, "to": 0.2, "over": 0.5}}},
}


def trainer_of(
    out: Path, samples: SampleDataset, recipe: dict[str, Any], teacher: Any = None, student: Any = None, **options: Any
) -> DistillTrainer:
    return DistillTrainer(
        model=make_model(1) if student is None else student,
        teacher=make_model(0, layers=3) if teacher is None else teacher,
        args=make_arguments(out, **recipe, **options),
        train_dataset=samples,
        processing_class=make_tokenizer(),
    )


def logits_of(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """The model's own logits; a key-value cache would switch the isolation of packed documents off."""
    return model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits


def dense_loss(student: PreTrainedModel, samples: SampleDataset, recipe: dict[str, Any], **extra: Any) -> Tensor:
    """The specification on full logits, all samples one step."""
    batch = collate(list(samples), 1)
    with torch.no_grad():
        teacher_logits = logits_of(make_model(0, layers=3), batch)
    ids = batch["sample_ids"].numpy()
    return reference.loss(
        logits_of(student, batch),
        teacher_logits,
        batch["targets"],
        batch["valid_mask"],
        recipe,
        seed=11,
        sample_ids=ids,
        step=0,
        position_ids=batch["position_ids"],
        **extra,
    )


def weights(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor], tolerance: float = 2e-6) -> None:
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=0, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("recipe", COMBINATIONS.values(), ids=COMBINATIONS)
def test_a_step_is_the_specifications(recipe: dict[str, Any], tmp_path: Path) -> None:
    samples = make_samples(8)
    student = make_model(1)
    loss = dense_loss(student, samples, recipe)
    loss.backward()
    expected = {name: p.detach() - 0.5 * p.grad for name, p in student.named_parameters()}

    trainer = trainer_of(tmp_path, samples, recipe, per_device_train_batch_size=8)
    trainer.train()
    assert_same(weights(trainer.model), expected)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize(("batch", "accumulation", "side"), [(1, 8, "right"), (2, 4, "left"), (3, 3, "right")])
def test_a_step_does_not_depend_on_how_it_is_cut(
    recipe: dict[str, Any], batch: int, accumulation: int, side: str, tmp_path: Path
) -> None:
    samples = make_samples(8)
    whole = trainer_of(tmp_path / "a", samples, recipe, per_device_train_batch_size=8)
    whole.train()
    cut = trainer_of(
        tmp_path / "b", samples, recipe, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation
    )
    cut.data_collator = partial(collate, pad_token_id=1, padding_side=side)
    cut.train()
    assert_same(weights(whole.model), weights(cut.model))
    assert whole.state.log_history[0]["loss"] == pytest.approx(cut.state.log_history[0]["loss"], rel=1e-5)


def test_what_is_logged_is_what_was_selected(tmp_path: Path) -> None:
    samples = make_samples(8)
    trainer = trainer_of(
        tmp_path, samples, RECIPES["se-kd"], per_device_train_batch_size=3, gradient_accumulation_steps=3
    )
    batch = collate(list(samples), 1)
    student_logits = logits_of(make_model(1), batch)
    teacher_logits = logits_of(make_model(0, layers=3), batch)
    entropy = reference.importance("student_entropy", student_logits, None, batch["targets"])
    picked = reference.select("top_k", entropy, batch["valid_mask"], 0.3) > 0
    kl = reference.divergence("forward_kl", student_logits, teacher_logits, batch["targets"])
    trainer.train()
    logs = trainer.state.log_history[0]
    assert logs["selected_share"] == pytest.approx(picked.sum().item() / batch["valid_mask"].sum().item())
    assert logs["kd_nats"] == pytest.approx(kl[picked].mean().item(), rel=1e-4)
    assert logs["selected_entropy_nats"] == pytest.approx(entropy[picked].mean().item(), rel=1e-4)
    assert logs["mean_entropy_nats"] == pytest.approx(entropy[batch["valid_mask"]].mean().item(), rel=1e-4)
    assert trainer.totals.positions_selected == int(picked.sum())
    assert trainer.totals.positions_valid == int(batch["valid_mask"].sum())


RESUMED = {
    "drawn anew each step": {**RECIPES["random"], "classes": {"sampler": "rs_kd", "draws": 4}},
    "a queue": {"positions": {"policy": "gls", "fraction": 0.3, "queue_size": 60}},
    "a schedule": {"positions": {"metric": "student_entropy", "fraction": {"from": 1.0, "to": 0.1}}},
    "a curriculum": {"positions": {"policy": "curriculum", "fraction": 0.3, "curriculum_steps": 5}},
}


@pytest.mark.parametrize("recipe", RESUMED.values(), ids=RESUMED)
def test_resuming_gives_the_same_student(recipe: dict[str, Any], tmp_path: Path) -> None:
    samples = make_samples(7)
    options = {
        "max_steps": 6, "per_device_train_batch_size": 2, "optim": "adamw_torch", "learning_rate": 1e-2,
        "save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "linear",
    }  # fmt: skip
    straight = trainer_of(tmp_path / "straight", samples, recipe, **options)
    straight.train()
    resumed = trainer_of(tmp_path / "resumed", samples, recipe, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-3"))
    assert resumed.state.global_step == 6
    assert_same(weights(straight.model), weights(resumed.model), tolerance=0)
    assert vars(resumed.totals) == vars(straight.totals)
    assert straight.totals.teacher_tokens > 0
    if straight.queue is not None:
        assert np.array_equal(straight.queue.scores, resumed.queue.scores)
        assert len(straight.queue.scores) == 60


def test_the_queue_decides_what_gls_selects(tmp_path: Path) -> None:
    """The second step's threshold is the quantile of the first step's scores, in the order of its samples."""
    samples, student = make_samples(8), make_model(1)
    batch = collate(list(samples), 1)
    trainer = trainer_of(
        tmp_path, samples, RECIPES["gls"], student=student, max_steps=2, learning_rate=0.0,
        per_device_train_batch_size=3, gradient_accumulation_steps=3,
    )  # fmt: skip
    entropies = reference.importance("student_entropy", logits_of(student, batch), None, batch["targets"]).detach()
    order = list(trainer._get_train_sampler())[:8]
    expected = torch.cat([entropies[i][batch["valid_mask"][i]] for i in order])
    trainer.train()
    of_first_step = trainer.queue.scores[: 200 - len(expected)]  # the queue holds 200, the second step came after
    assert 0 < len(of_first_step) < len(expected)
    assert of_first_step.tolist() == pytest.approx(expected[-len(of_first_step) :].tolist(), rel=1e-4)
    logs = trainer.state.log_history[1]
    assert logs["threshold"] == pytest.approx(float(np.quantile(expected.numpy(), 0.7)), rel=1e-4)
    assert logs["selected_share"] == pytest.approx(float((expected >= logs["threshold"]).float().mean()))
    trainer.eval_dataset = trainer.train_dataset
    before = trainer.queue.scores.copy()
    trainer.evaluate()
    assert np.array_equal(trainer.queue.scores, before), "evaluation pushes nothing"


def test_epochs_are_shuffled_differently_and_last_batches_filled(tmp_path: Path) -> None:
    seen: list[list[bytes]] = []
    samples = make_samples(7)

    def recording(group: list[Any]) -> dict[str, Tensor]:
        seen.append([sample.id for sample in group])
        return collate(group, 1)

    trainer = trainer_of(
        tmp_path, samples, RECIPES["full kd"], per_device_train_batch_size=4, max_steps=-1, num_train_epochs=2
    )
    trainer.data_collator = recording
    trainer.train()
    first, second = [i for batch in seen[:2] for i in batch], [i for batch in seen[2:] for i in batch]
    assert [len(batch) for batch in seen] == [4, 4, 4, 4]
    assert set(first) == set(second)
    assert len(set(first) - set(samples.ids)) == 1  # the filler
    assert first != second
    assert trainer.totals.positions_valid == 2 * int(samples.n_valid.sum())


def cached(
    samples: SampleDataset, folder: Path, draws: int = 8, temperature: float = 1.0, teacher: Any = None, **more: Any
) -> TeacherCache:
    fingerprint = {"sampler": "rs_kd", "draws": draws, "temperature": temperature, "vocabulary": V, "seed": 11, **more}
    options = ClassOptions(sampler="rs_kd", draws=draws)
    model = make_model(0, layers=3) if teacher is None else teacher
    build_cache(folder, fingerprint, samples, lambda: LiveTeacher(model, options, temperature, 11, V), 1)
    return TeacherCache.open(folder)


def drawn_of(cache: TeacherCache, samples: SampleDataset) -> dict[str, Tensor]:
    """The cache's rows, put one by one into dense [B, T, C] tensors."""
    batch = collate(list(samples), 1)
    class_ids = torch.zeros(*batch["valid_mask"].shape, 16, dtype=torch.int64)
    counts = torch.zeros_like(class_ids)
    for row, sample in enumerate(samples):
        lengths, ids, numbers, _ = cache.get(sample.id)
        start = 0
        for position, length in zip(np.flatnonzero(sample.valid_mask), lengths, strict=True):
            class_ids[row, position, :length] = torch.from_numpy(ids[start : start + length].astype(np.int64))
            counts[row, position, :length] = torch.from_numpy(numbers[start : start + length].astype(np.int64))
            start += int(length)
    return {"class_ids": class_ids, "counts": counts}


@pytest.mark.parametrize("name", ["full kd", "se-kd", "lambda and temperature"])
def test_a_step_from_the_cache_is_the_specifications(name: str, tmp_path: Path) -> None:
    samples = make_samples(8)
    recipe = RECIPES[name] | {"classes": {"sampler": "rs_kd", "draws": 8}}
    temperature = recipe.get("criterion", {}).get("temperature", 1.0)
    cache = cached(samples, tmp_path / "cache", temperature=temperature)
    student = make_model(1)
    loss = dense_loss(student, samples, recipe, **drawn_of(cache, samples))
    loss.backward()
    expected = {name: p.detach() - 0.5 * p.grad for name, p in student.named_parameters()}
    trainer = trainer_of(
        tmp_path / "run", samples, recipe, teacher=cache, per_device_train_batch_size=3, gradient_accumulation_steps=3
    )
    trainer.train()
    assert_same(weights(trainer.model), expected)
    assert trainer.totals.teacher_tokens == 0


TAIL = {"sampler": "top_k", "draws": 8, "tail": True}


def truncated(samples: SampleDataset, temperature: float) -> dict[str, Tensor]:
    """The teacher's 8 most probable classes and their probabilities, [B, T, 8]."""
    batch = collate(list(samples), 1)
    with torch.no_grad():
        p = torch.softmax(logits_of(make_model(0, layers=3), batch) / temperature, dim=-1)
    counts, class_ids = p.topk(8)
    return {"class_ids": class_ids, "counts": counts}


@pytest.mark.parametrize("teacher", ["live", "cached"])
def test_a_step_on_the_top_classes_with_their_tail_is_the_specifications(teacher: str, tmp_path: Path) -> None:
    """A cache rounds probabilities to 1/65,535, which moves the step as little."""
    samples, temperature = make_samples(8), 1.7
    recipe = {
        "classes": TAIL,
        "criterion": {"temperature": temperature},
        "positions": {"metric": "student_entropy", "fraction": 0.5},
    }
    about = {"sampler": "top_k", "draws": 8, "count_total": TOP_K_UNITS, "temperature": temperature, "vocabulary": V}
    live = LiveTeacher(make_model(0, layers=3), ClassOptions(**TAIL), temperature, 11, V)
    build_cache(tmp_path / "cache", about | {"tail": "one class"}, samples, lambda: live, 1)
    student = make_model(1)
    loss = dense_loss(student, samples, recipe, **truncated(samples, temperature))
    loss.backward()
    expected = {name: p.detach() - 0.5 * p.grad for name, p in student.named_parameters()}
    trainer = trainer_of(
        tmp_path / "run", samples, recipe, teacher=None if teacher == "live" else TeacherCache.open(tmp_path / "cache"),
        per_device_train_batch_size=3, gradient_accumulation_steps=3,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), rel=1e-5 if teacher == "live" else 1e-3)
    assert_same(weights(trainer.model), expected, 2e-6 if teacher == "live" else 1e-4)


def test_a_cache_without_the_tail_is_not_taken_for_one_with_it(tmp_path: Path) -> None:
    samples = make_samples(4)
    about = {"sampler": "top_k", "draws": 8, "count_total": TOP_K_UNITS, "temperature": 1.0, "vocabulary": V}
    options = ClassOptions(sampler="top_k", draws=8)
    live = LiveTeacher(make_model(0, layers=3), options, 1.0, 11, V)
    build_cache(tmp_path / "cache", about, samples, lambda: live, 1)
    with pytest.raises(InputError, match="the cache's tail is None, these arguments say 'one class'"):
        trainer_of(tmp_path / "run", samples, {"classes": TAIL}, teacher=TeacherCache.open(tmp_path / "cache"))


def test_selection_works_with_the_cache(tmp_path: Path) -> None:
    """The cached top-k differs from the cached Full KD, and picks what the live top-k picks."""
    samples = make_samples(8)
    cache = cached(samples, tmp_path / "cache")
    classes = {"classes": {"sampler": "rs_kd", "draws": 8}}
    logs = {}
    for name, teacher, recipe in (
        ("cached full", cache, RECIPES["full kd"] | classes),
        ("cached top-k", cache, RECIPES["se-kd"] | classes),
        ("live top-k", None, RECIPES["se-kd"]),
    ):
        trainer = trainer_of(tmp_path / name, samples, recipe, teacher=teacher, per_device_train_batch_size=8)
        trainer.train()
        logs[name] = trainer.state.log_history[0]
    assert logs["cached full"]["loss"] != logs["cached top-k"]["loss"]
    assert logs["cached top-k"]["selected_entropy_nats"] == logs["live top-k"]["selected_entropy_nats"]


def test_live_draws_change_with_the_step_and_average_to_the_teacher(tmp_path: Path) -> None:
    trainer = trainer_of(
        tmp_path, make_samples(2), {"classes": {"sampler": "rs_kd", "draws": 64}, "positions": {"policy": "all"}}
    )
    batch = collate(list(make_samples(2)), 1)
    index = batch["valid_mask"].flatten().nonzero().flatten()
    dense = torch.zeros(len(index), V)
    steps = 300
    for step in range(steps):
        target = trainer.teacher.targets(batch, step).at(index).chunk(slice(0, len(index)))
        assert (target.counts.sum(-1) == 64).all()
        dense.scatter_add_(-1, target.class_ids, target.counts.float())
    logits = logits_of(trainer.teacher.model, batch)
    expected = torch.softmax(logits.flatten(0, 1)[index], -1) * 64 * steps
    chi_square = ((dense - expected) ** 2 / expected).sum().item()
    freedom = len(index) * (V - 1)
    assert abs(chi_square - freedom) < 5 * (2 * freedom) ** 0.5


def test_gradient_checkpointing_changes_nothing(tmp_path: Path) -> None:
    trainers, calls = {}, {}
    for is_on in (False, True):
        trainer = trainer_of(tmp_path / str(is_on), make_samples(4), RECIPES["se-kd"], activation_checkpointing=is_on)
        seen: list[int] = []
        trainer.model.model.layers[0].mlp.register_forward_pre_hook(
            lambda module, _, seen=seen: seen.append(1) if module.training else None  # the check of the head is no step
        )
        trainer.train()
        trainers[is_on], calls[is_on] = trainer, len(seen)
    assert calls == {False: 1, True: 2}  # the forward pass runs again in the backward pass
    assert_same(weights(trainers[False].model), weights(trainers[True].model))


def test_bf16_computes_in_bf16_over_float32_weights(tmp_path: Path) -> None:
    samples = make_samples(4)
    exact = trainer_of(tmp_path / "a", samples, RECIPES["full kd"])
    exact.train()
    low = trainer_of(tmp_path / "b", samples, RECIPES["full kd"], bf16=True)
    low.train()
    assert {p.dtype for p in low.model.parameters()} == {torch.float32}
    first, second = (t.state.log_history[0]["loss"] for t in (exact, low))
    assert first != second
    assert first == pytest.approx(second, rel=0.05)


def test_the_model_is_still_a_transformers_model(tmp_path: Path) -> None:
    names = set(make_model(1).state_dict())
    trainer = trainer_of(tmp_path, make_samples(4), RECIPES["se-kd"])
    trainer.train()
    assert set(trainer.model.state_dict()) == names
    assert trainer.model.config.use_cache is True
    assert not any("teacher" in name for name, _ in trainer.model.named_modules())
    prompt = torch.tensor([[5, 6, 7]])
    generated = trainer.model.generate(prompt, max_new_tokens=4, do_sample=False)
    assert generated.shape == (1, 7)
    trainer.save_model(str(tmp_path / "student"))
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert torch.equal(back.generate(prompt, max_new_tokens=4, do_sample=False), generated)


def test_a_data_set_of_texts_becomes_samples(tmp_path: Path) -> None:
    texts = Dataset.from_dict({"text": [" ".join(f"w{(7 * i + j) % V}" for j in range(40)) for i in range(6)]})
    trainer = trainer_of(tmp_path, texts, RECIPES["se-kd"], max_length=16)
    trainer.train()
    assert len(trainer.train_dataset) == 6 * 41 // 16
    with pytest.raises(InputError, match="train_dataset, row 0 has no field 'body'"):
        trainer_of(tmp_path, texts, RECIPES["se-kd"], text_field="body")


class _Damage(TrainerCallback):
    """Spoils a weight when the first step is done, and keeps what the weights were then."""

    def on_step_end(self, *_: Any, model: Any, **__: Any) -> None:
        with torch.no_grad():
            model.model.norm.weight[0] = float("nan")
        self.weights = weights(model)


def test_a_loss_that_is_not_finite_stops_before_the_update(tmp_path: Path) -> None:
    student = make_model(1)
    trainer = trainer_of(tmp_path, make_samples(4), RECIPES["full kd"], student=student, max_steps=2)
    damage = _Damage()
    trainer.add_callback(damage)
    with pytest.raises(
        RunError, match="of the student's or the teacher's logits at optimiser step 1, before its update"
    ):
        trainer.train()
    for name, value in weights(student).items():
        torch.testing.assert_close(value, damage.weights[name], rtol=0, atol=0, equal_nan=True)


def test_what_is_not_finite_in_an_earlier_micro_batch_is_named_before_the_update(tmp_path: Path) -> None:
    """A step's checks are read together; the message names the sample of the first of its two micro-batches."""
    rare, tokens = V - 1, [np.arange(2, 20) + i for i in range(4)]
    tokens[1][0] = rare
    samples = SampleDataset.from_samples([Sample(each, np.zeros(1, np.int32)) for each in tokens])
    student = make_model(1, tie_word_embeddings=False)
    at_end: dict[str, Tensor] = {}

    class Spoil(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            with torch.no_grad():
                student.model.embed_tokens.weight[rare] = float("nan")
            at_end.update(weights(student))

    trainer = trainer_of(
        tmp_path, samples, RECIPES["corrected draws"], student=student, max_steps=2, per_device_train_batch_size=2,
        gradient_accumulation_steps=2, train_sampling_strategy="sequential",
    )  # fmt: skip
    trainer.add_callback(Spoil())
    with pytest.raises(RunError, match=f"position 0 of sample {samples.ids[1].hex()} gives nan .* optimiser step 1"):
        trainer.train()
    for name, value in weights(student).items():
        torch.testing.assert_close(value, at_end[name], rtol=0, atol=0, equal_nan=True)


def test_an_update_within_the_backward_pass_comes_after_the_checks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepSpeed's engine makes the update in a step's last backward pass."""
    student = make_model(1)
    trainer = trainer_of(tmp_path, make_samples(8), RECIPES["se-kd"], student=student, max_steps=2)
    damage, backward, steps = _Damage(), trainer.accelerator.backward, []

    class AsDeepSpeed(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            trainer.is_deepspeed_enabled = True

    def noted(*args: Any, **kwargs: Any) -> None:
        steps.append(trainer.state.global_step)
        backward(*args, **kwargs)

    monkeypatch.setattr(trainer.accelerator, "backward", noted)
    trainer.add_callback(damage)
    trainer.add_callback(AsDeepSpeed())
    with pytest.raises(RunError, match="at optimiser step 1, before its update"):
        trainer.train()
    assert steps == [0]
    assert trainer.totals.positions_selected > 0


def test_a_loss_computed_between_steps_is_counted_nowhere(tmp_path: Path) -> None:
    """As a callback or a notebook may ask for it; what is not finite is told at once."""
    recipe = RECIPES["gls"]
    seen: list[float] = []

    class Asks(TrainerCallback):
        def on_step_end(self, *_: Any, model: Any, **__: Any) -> None:
            seen.append(asking.compute_loss(model, collate(list(make_samples(3)), 1)).item())

    found = []
    for name in ("plain", "asking"):
        asking = trainer_of(tmp_path / name, make_samples(8), recipe, max_steps=3, logging_steps=1)
        if name == "asking":
            asking.add_callback(Asks())
        asking.train()
        lines = [{key: line[key] for key in line if "second" not in key} for line in asking.state.log_history[:-1]]
        found.append((lines, vars(asking.totals), asking.queue.scores.tolist()))
    assert found[0] == found[1]
    assert len(seen) == 3
    with torch.no_grad():
        asking.model.model.norm.weight[0] = float("nan")
    with pytest.raises(RunError, match="gives nan"):
        asking.compute_loss(asking.model, collate(list(make_samples(3)), 1))


def test_a_student_of_damaged_weights_is_refused_before_the_first_step(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, make_samples(4), RECIPES["full kd"])
    with torch.no_grad():
        trainer.model.model.norm.weight[0] = float("nan")
    with pytest.raises(InputError, match="expected numbers as logits, got nan"):
        trainer.train()


@pytest.mark.parametrize("recipe", ["full kd", "se-kd"])
def test_logits_that_are_not_finite_are_named_by_sample_and_position(recipe: str, tmp_path: Path) -> None:
    batch, student = collate(list(make_samples(4)), 1), make_model(1)
    objective = make_arguments(tmp_path, **RECIPES[recipe]).objective
    teacher = LiveTeacher(make_model(0), ClassOptions.model_validate({}), 1.0, 0, V)
    hidden = hidden_states(student, batch["input_ids"], batch["position_ids"]).detach()
    position = int(batch["valid_mask"][2].nonzero()[3])
    hidden[2, position, 0] = float("inf")
    sample_id = batch["sample_ids"][2].numpy().tobytes().hex()
    context = step_context(objective.positions, 7, 10)
    outputs = objective(hidden, head_of(student), batch, teacher.targets(batch, 7), context=context, normaliser=4)
    with pytest.raises(RunError, match=f"position {position} of sample {sample_id} gives nan .* at optimiser step 7"):
        require_all_finite(outputs["checks"])


@pytest.mark.parametrize("sampler", ["rs_kd", "systematic", "top_k"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_teacher_that_is_not_finite_is_named_although_classes_are_drawn(sampler: str, bad: float) -> None:
    batch, teacher = collate(list(make_samples(3)), 1), make_model(0, tie_word_embeddings=False)
    with torch.no_grad():
        teacher.lm_head.weight[7] = bad
    live = LiveTeacher(teacher, ClassOptions.model_validate({"sampler": sampler, "draws": 4}), 1.0, 0, V)
    index = batch["valid_mask"].flatten().nonzero().flatten()[5:]
    row, position = divmod(int(index[0]), batch["valid_mask"].shape[1])
    sample_id = batch["sample_ids"][row].numpy().tobytes().hex()
    targets = live.targets(batch, 0)
    targets.at(index).chunk(slice(0, 9))
    with pytest.raises(
        RunError, match=f"position {position} of sample {sample_id} gives nan from the teacher's logits"
    ):
        require_all_finite(targets.checks)


def test_a_teacher_that_is_not_finite_leaves_no_cache(tmp_path: Path) -> None:
    teacher = make_model(0, layers=3, tie_word_embeddings=False)
    with torch.no_grad():
        teacher.lm_head.weight[7] = float("inf")
    with pytest.raises(RunError, match="gives nan from the teacher's logits, for its cache"):
        cached(make_samples(3), tmp_path / "cache", teacher=teacher)
    assert not list((tmp_path / "cache").glob("shard*.selkd"))


def test_what_does_not_fit_together_is_refused(tmp_path: Path) -> None:
    samples = make_samples(4)
    cache = cached(make_samples(3), tmp_path / "cache")
    classes = {"classes": {"sampler": "rs_kd", "draws": 8}}
    with pytest.raises(InputError, match=r"positions.metric: kl needs the teacher's entropy.* cache\.scalars: true"):
        trainer_of(tmp_path, samples, classes | {"positions": {"metric": "kl"}}, teacher=cache)
    with pytest.raises(InputError, match=r"criterion.name: jsd of drawn classes"):
        trainer_of(tmp_path, samples, classes | {"criterion": {"name": "jsd"}})
    with pytest.raises(InputError, match=r"the cache lacks 1 samples"):
        trainer_of(tmp_path, samples, classes, teacher=cache)
    with pytest.raises(InputError, match=r"the cache's draws is 8, these arguments say 12"):
        trainer_of(tmp_path, samples, {"classes": {"sampler": "rs_kd", "draws": 12}}, teacher=cache)
    with pytest.raises(InputError, match=r"the cache's temperature is 1.0, these arguments say 2.0"):
        trainer_of(tmp_path, samples, classes | {"criterion": {"temperature": 2.0}}, teacher=cache)
    with pytest.raises(InputError, match=r"the teacher has 40 classes, but the tokenizer uses 83 ids"):
        trainer_of(tmp_path, samples, {}, teacher=make_model(0, vocab_size=40))
    with pytest.raises(InputError, match=r"positions.metric: 'entropy' is not known"):
        make_arguments(tmp_path, positions={"metric": "entropy"})


def test_padding_rows_of_a_larger_vocabulary_are_left_out(tmp_path: Path) -> None:
    """A teacher with unused rows teaches as if they were not there."""
    samples = make_samples(4)
    larger = make_model(0, layers=3, tie_word_embeddings=False)
    padded = make_model(0, layers=3, tie_word_embeddings=False)
    padded.resize_token_embeddings(V + 13)
    padded.load_state_dict({**padded.state_dict(), **{k: v for k, v in larger.state_dict().items() if v.shape[0] != V}})
    with torch.no_grad():
        for target, source in (
            (padded.model.embed_tokens, larger.model.embed_tokens),
            (padded.lm_head, larger.lm_head),
        ):
            target.weight[:V] = source.weight
    results = []
    for name, teacher in (("a", larger), ("b", padded)):
        trainer = trainer_of(tmp_path / name, samples, RECIPES["full kd"], teacher=teacher)
        trainer.train()
        results.append(weights(trainer.model))
    assert_same(*results)


def test_checkpoints_hold_the_totals(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, make_samples(4), RECIPES["se-kd"], save_strategy="steps", save_steps=1)
    trainer.train()
    state = json.loads((tmp_path / "checkpoint-1" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["Totals"]["attributes"] == vars(trainer.totals)


def test_a_student_in_low_precision_or_that_teaches_itself_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"trainable weights are torch.bfloat16.*Load the student in float32"):
        trainer_of(tmp_path, make_samples(2), {}, student=make_model(1).bfloat16())
    student = make_model(1)
    with pytest.raises(InputError, match="its own teacher"):
        trainer_of(tmp_path, make_samples(2), {}, student=student, teacher=student)


def test_a_tokenizer_without_padding_token_serves(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    trainer = DistillTrainer(
        model=make_model(1), teacher=make_model(0, layers=3), args=make_arguments(tmp_path),
        train_dataset=make_samples(4), processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 1


class WritesThroughData(torch.optim.Optimizer):
    """Plain gradient descent as some optimisers write it: past autograd, so that the weights' version stays."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.05})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # noqa: ARG002
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.data.sub_(parameter.grad, alpha=group["lr"])


@pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "a head of its own"])
def test_the_narrow_head_is_made_once_a_step_and_changes_nothing(
    is_tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three steps of four micro-batches, with an optimiser that no version shows, evaluated after each step."""
    samples = make_samples(48)
    recipe = {**RECIPES["se-kd"], "criterion": {}}
    options = {
        "bf16": True, "max_steps": 3, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 4,
        "eval_strategy": "steps", "eval_steps": 1,
    }  # fmt: skip
    made: list[torch.dtype] = []
    product = Head.to
    monkeypatch.setattr(Head, "to", lambda self, dtype: made.append(dtype) or product(self, dtype))

    def trained(is_kept: bool) -> tuple[dict[str, torch.Tensor], int]:
        student = make_model(1, tie_word_embeddings=is_tied)
        trainer = DistillTrainer(
            model=student,
            teacher=make_model(0, layers=3),
            args=make_arguments(tmp_path / str(is_kept), **recipe, **options),
            train_dataset=samples,
            eval_dataset=samples.select(range(4)),
            processing_class=make_tokenizer(),
            optimizers=(WritesThroughData(student.parameters()), None),
        )
        assert trainer.distillation_loss.narrow is not None
        if not is_kept:
            trainer.distillation_loss = replace(trainer.distillation_loss, narrow=None)
        made.clear()
        trainer.train()
        measured = {
            f"{name} {line['step']}": torch.tensor(line[name])
            for line in trainer.state.log_history
            for name in line
            if name.startswith("eval_") and "second" not in name and "runtime" not in name
        }
        assert measured
        weights = {name: p.detach().clone() for name, p in student.named_parameters()}
        return weights | measured, made.count(torch.bfloat16)

    kept, once_a_step = trained(True)
    anew, once_a_micro_batch = trained(False)
    assert once_a_micro_batch - once_a_step == 3 * (4 - 1), "beside those of the evaluations"
    for name, parameter in anew.items():
        assert torch.equal(kept[name], parameter), name
    before = dict(make_model(1, tie_word_embeddings=is_tied).named_parameters())
    assert any(not torch.equal(kept[name], parameter) for name, parameter in before.items()), (
        "the steps moved the student"
    )


@pytest.mark.parametrize("metric", ["student_entropy", "kl"])
def test_without_weight_the_teacher_is_asked_only_by_a_metric(
    metric: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``kd_weight: 0``: cross-entropy at selected positions. Its gradient is the specification's."""
    samples, asked = make_samples(8), []
    targets = LiveTeacher.targets
    monkeypatch.setattr(LiveTeacher, "targets", lambda self, *a, **k: asked.append(1) or targets(self, *a, **k))
    chunk = LiveTargets.chunk
    monkeypatch.setattr(LiveTargets, "chunk", lambda self, rows: asked.append("chunk") or chunk(self, rows))
    recipe = {"criterion": {"name": "at_kd", "kd_weight": 0.0}, "positions": {"metric": metric, "fraction": 0.3}}
    trainer = trainer_of(tmp_path, samples, recipe, max_steps=2, per_device_train_batch_size=4, logging_steps=1)
    trainer.train()
    assert asked == ([] if metric == "student_entropy" else [1, 1]), "its body for the metric, its criterion never"
    logged = [line for line in trainer.state.log_history if "loss" in line]
    assert len(logged) == 2
    assert all("kd_nats" not in line and line["ce_nats"] > 0 for line in logged)

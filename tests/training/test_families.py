"""Every family that users bring: distilled through DistillTrainer, against the specification on its own logits."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from steps import assert_gradients, gradients_of, own_logits, take_step
from test_trainer import drawn_of
from tiny import make_arguments, make_samples, make_tokenizer
from tiny_families import FAMILIES, VOCABULARY, randomised, tiny_model
from tiny_run import make_recipe
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    RecurrentGemmaConfig,
    TrainerCallback,
    TrainerState,
)

from selkd import DistillTrainer, TeacherCache, distill, reference
from selkd.data.collate import collate
from selkd.data.samples import EMPTY_SAMPLE, Sample, SampleDataset
from selkd.errors import InputError
from selkd.models.head import head_of, hidden_states
from selkd.models.loading import load_model
from selkd.models.sources import ModelSource
from selkd.recipe.choices import ClassOptions
from selkd.selection.randomness import position_uniforms
from selkd.teacher.build_cache import build_cache
from selkd.teacher.live import LiveTeacher

SE_KD: dict[str, Any] = {"positions": {"policy": "top_k", "metric": "student_entropy", "fraction": 0.3}}
BY_KL: dict[str, Any] = {
    "positions": {"policy": "top_k", "metric": "kl", "fraction": 0.4},
    "criterion": {"name": "reverse_kl", "temperature": 1.5, "kd_weight": 0.8},
}
DRAWN: dict[str, Any] = {"classes": {"sampler": "rs_kd", "draws": 8}}
RATE = 0.02
MIXTURES = ("qwen3_moe", "mixtral")


def student_of(family: str, **changes: object) -> PreTrainedModel:
    """Without dropout, which draws anew in each forward pass: two passes can then be compared."""
    model = tiny_model(family, torch.float32, seed=1, **changes)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def teacher_of(family: str, **changes: object) -> PreTrainedModel:
    return tiny_model(family, torch.float32, seed=2, **changes)


def samples_of(count: int = 5) -> SampleDataset:
    return make_samples(count, length=16)


def specified(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    samples: SampleDataset,
    recipe: dict[str, Any],
    vocab_size: int = VOCABULARY,
    **extra: Any,
) -> tuple[float, dict[str, Tensor]]:
    """The specification's loss of one step and its gradients, from both models' own logits over the shared classes."""
    batch = collate(list(samples), 1)
    with torch.no_grad():
        teacher_logits = own_logits(teacher, batch)[..., :vocab_size]
    was_training = student.training
    student_logits = own_logits(student.train(), batch)[..., :vocab_size]
    require_gap(student_logits, teacher_logits, batch, recipe)
    loss = reference.loss(
        student_logits, teacher_logits, batch["targets"], batch["valid_mask"], recipe,
        seed=11, sample_ids=batch["sample_ids"].numpy(), position_ids=batch["position_ids"], **extra,
    )  # fmt: skip
    loss.backward()
    gradients = gradients_of(student)
    student.zero_grad(set_to_none=True)
    student.train(was_training)
    return loss.item(), gradients


def require_gap(student: Tensor, teacher: Tensor, batch: dict[str, Tensor], recipe: dict[str, Any]) -> None:
    """Rounding must not decide what is picked: the scores on the two sides of the cut are apart."""
    options = recipe["positions"]
    scores = reference.importance(options["metric"], student.detach(), teacher, batch["targets"])
    for u, valid in zip(scores, batch["valid_mask"], strict=True):
        ordered = u[valid].sort(descending=True).values
        k = int(np.ceil(options["fraction"] * len(ordered) - 1e-9))
        assert k == len(ordered) or ordered[k - 1] - ordered[k] > 1e-5 * ordered[0]


class FirstGradients(TrainerCallback):
    """Keeps the gradients that the first optimiser step goes by."""

    found: dict[str, Tensor]

    def on_pre_optimizer_step(self, _: Any, state: TrainerState, *others: Any, **given: Any) -> None:  # noqa: ARG002
        if state.global_step == 0:
            self.found = gradients_of(given["model"])


def trained(
    out: Path,
    student: PreTrainedModel,
    teacher: PreTrainedModel | TeacherCache,
    samples: SampleDataset,
    recipe: dict[str, Any],
    **options: Any,
) -> tuple[dict[str, Tensor], list[float]]:
    """The gradients of the first step and the losses of all; each step three micro-batches, padded on the left."""
    first = FirstGradients()
    defaults = {"learning_rate": RATE, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}
    trainer = DistillTrainer(
        model=student, teacher=teacher, args=make_arguments(out, **(defaults | recipe | options)),
        train_dataset=samples, processing_class=make_tokenizer(), callbacks=[first],
    )  # fmt: skip
    trainer.data_collator = partial(collate, pad_token_id=1, padding_side="left")
    trainer.train()
    return first.found, [line["loss"] for line in trainer.state.log_history if "loss" in line]


def divergence_of(student: PreTrainedModel, teacher: PreTrainedModel, batch: dict[str, Tensor]) -> float:
    """The mean KL(p || q) over the valid positions, from both models' own logits."""
    with torch.no_grad():
        of_student, of_teacher = own_logits(student, batch), own_logits(teacher, batch)
    kl = reference.divergence("forward_kl", of_student, of_teacher, batch["targets"])
    return kl[batch["valid_mask"]].mean().item()


@pytest.mark.parametrize("recipe", [SE_KD, BY_KL], ids=["se-kd", "by kl"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_distilled_as_specified(family: str, recipe: dict[str, Any], tmp_path: Path) -> None:
    """The trainer cuts its steps and pads on the left; the specification sees one batch, padded on the right."""
    samples, batch = samples_of(), collate(list(samples_of()), 1)
    student, teacher = student_of(family), teacher_of(family)
    loss, expected = specified(student, teacher, samples, recipe)
    assert max(gradient.abs().max().item() for gradient in expected.values()) > 1e-2
    before = divergence_of(student, teacher, batch)
    gradients, losses = trained(tmp_path, student, teacher, samples, recipe, max_steps=3)
    assert_gradients(gradients, expected)
    assert losses[0] == pytest.approx(loss, rel=1e-5)
    assert losses[-1] < losses[0]
    assert divergence_of(student.eval(), teacher, batch) < before

    with torch.no_grad():  # the trained model's halves are still the model
        hidden = hidden_states(student, batch["input_ids"], batch["position_ids"])
        expected_logits = own_logits(student, batch)
    largest = expected_logits.abs().max().item()
    torch.testing.assert_close(head_of(student).logits(hidden), expected_logits, rtol=0, atol=1e-6 * largest)


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_to_learn_from_leaves_every_parameter_a_gradient_of_zero(family: str) -> None:
    """Samples without a valid position alone: the loss is zero, and still attached to what training updates."""
    student = student_of(family).train()
    nothing = [EMPTY_SAMPLE, Sample(np.array([5, 6]), np.array([0, 1]))]
    assert take_step(student, teacher_of(family), [nothing], SE_KD, pad_token_id=1) == 0
    of_text = [p for name, p in student.named_parameters() if "vision" not in name and "projector" not in name]
    assert all(p.grad is not None and not p.grad.any() for p in of_text)


# Teacher and student of different shapes of head, and how many rows each pads the tokenizer's 83 ids to.
PAIRS = [
    ("gemma3", 101, "llama", 96),
    ("llama", 90, "gemma2", 101),
    ("cohere", 101, "phi", 96),
    ("phi", 96, "gpt2", 101),
    ("qwen3_moe", 101, "granite", 96),
    ("gemma3_vision", 101, "llama_tied", 96),
]


def padded_to(rows: int, model_of: Callable[..., PreTrainedModel], family: str) -> PreTrainedModel:
    return model_of(family) if rows == VOCABULARY else model_of(family, vocab_size=rows)


@pytest.mark.parametrize(("teaching", "teacher_rows", "learning", "student_rows"), PAIRS)
def test_a_family_teaches_another_whose_vocabulary_is_padded_otherwise(
    teaching: str, teacher_rows: int, learning: str, student_rows: int, tmp_path: Path
) -> None:
    samples, shared = samples_of(), min(teacher_rows, student_rows)
    student, teacher = padded_to(student_rows, student_of, learning), padded_to(teacher_rows, teacher_of, teaching)
    assert head_of(student).vocab_size == student_rows
    assert head_of(teacher).vocab_size == teacher_rows
    loss, expected = specified(student, teacher, samples, BY_KL, shared)
    # Else the rows beyond the shared ones might as well have been kept.
    everything = collate(list(samples), 1)
    with torch.no_grad():
        logits = own_logits(teacher if teacher_rows > student_rows else student, everything)
    assert torch.softmax(logits, -1)[..., shared:].sum(-1).max() > 0.01
    gradients, losses = trained(tmp_path, student, teacher, samples, BY_KL)
    assert_gradients(gradients, expected)
    assert losses[0] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize(("teaching", "teacher_rows", "learning", "student_rows"), PAIRS[:2])
def test_a_cache_teaches_another_family(
    teaching: str, teacher_rows: int, learning: str, student_rows: int, tmp_path: Path
) -> None:
    """The classes drawn are those of the teacher's own logits over the shared classes; the step is the draws'."""
    samples, shared = samples_of(), min(teacher_rows, student_rows)
    student, teacher = padded_to(student_rows, student_of, learning), padded_to(teacher_rows, teacher_of, teaching)
    cache = cached(tmp_path / "cache", teacher, samples, shared)
    batch, drawn = collate(list(samples), 1), drawn_of(cache, samples)
    with torch.no_grad():
        p = torch.softmax(own_logits(teacher, batch)[..., :shared].double(), -1).numpy()
    valid = batch["valid_mask"].numpy()
    points = position_uniforms(11, batch["sample_ids"].numpy(), valid, "cache", draws=8)
    dense = torch.zeros(*valid.shape, shared, dtype=torch.int64).scatter_add_(-1, drawn["class_ids"], drawn["counts"])
    for row, position in zip(*valid.nonzero(), strict=True):
        classes = np.searchsorted(p[row, position].cumsum(), points[row, position] * p[row, position].sum(), "right")
        assert dense[row, position].tolist() == np.bincount(classes, minlength=shared).tolist()

    loss, expected = specified(student, teacher, samples, SE_KD | DRAWN, shared, **drawn)
    gradients, losses = trained(tmp_path / "run", student, cache, samples, SE_KD | DRAWN)
    assert_gradients(gradients, expected)
    assert losses[0] == pytest.approx(loss, rel=1e-5)


def cached(folder: Path, teacher: PreTrainedModel, samples: SampleDataset, vocabulary: int) -> TeacherCache:
    fingerprint = {"sampler": "rs_kd", "draws": 8, "temperature": 1.0, "vocabulary": vocabulary, "seed": 11}
    live = LiveTeacher(teacher, ClassOptions(sampler="rs_kd", draws=8), 1.0, 11, vocabulary)
    build_cache(folder, fingerprint, samples, lambda: live, 1)
    return TeacherCache.open(folder)


def test_a_cache_of_more_classes_than_the_student_has_is_refused(tmp_path: Path) -> None:
    teacher, samples = teacher_of("llama"), samples_of()
    cache = cached(tmp_path / "cache", teacher, samples, VOCABULARY)
    with pytest.raises(InputError, match=r"101 classes.*the student has 84"):
        trained(tmp_path / "run", student_of("llama", vocab_size=84), cache, samples, SE_KD | DRAWN)


@pytest.mark.parametrize("classes", [{"sampler": "all"}, {"sampler": "rs_kd", "draws": 16}], ids=["live", "cached"])
def test_families_meet_in_a_whole_run(classes: dict[str, Any], tmp_path: Path) -> None:
    """From two folders of models and a recipe: other families, other padding rows, one tokenizer."""
    folders = {"teacher": teacher_of("gemma3"), "student": student_of("llama", vocab_size=96)}
    for name, model in folders.items():
        model.save_pretrained(tmp_path / name)
        make_tokenizer().save_pretrained(tmp_path / name)
    is_cached = classes["sampler"] != "all"
    recipe = make_recipe(
        tmp_path, student={"model": str(tmp_path / "student")}, samples=None, classes=classes,
        cache={"path": None} if is_cached else None,
    )  # fmt: skip
    run = distill(recipe | {"training": recipe["training"] | {"num_train_epochs": 1}}, tmp_path / "run")
    assert (run.record["teacher_cache"] is not None) == is_cached
    assert run.record["fidelity"]["after"]["kl_nats"] < run.record["fidelity"]["before"]["kl_nats"]
    assert AutoModelForCausalLM.from_pretrained(run.student).config.vocab_size == 96


@pytest.mark.parametrize("family", MIXTURES)
def test_a_mixtures_router_loss_is_not_added(family: str, tmp_path: Path) -> None:
    """Even where the configuration asks for it and weighs it heavily, the loss is the distillation's alone."""
    samples, batch = samples_of(), collate(list(samples_of()), 1)
    asking = student_of(family, output_router_logits=True, router_aux_loss_coef=100.0)
    own = asking(input_ids=batch["input_ids"], labels=batch["input_ids"], use_cache=False)
    assert own.aux_loss > 0.1
    own.aux_loss.backward()
    of_routers = {name for name, gradient in gradients_of(asking).items() if gradient.abs().max() > 1e-4}
    assert any("gate" in name for name in of_routers)  # it would show in the gradients
    asking.zero_grad(set_to_none=True)

    plain = student_of(family)
    teacher = teacher_of(family, output_router_logits=True, router_aux_loss_coef=100.0)
    loss, expected = specified(plain, teacher, samples, SE_KD)
    gradients, losses = trained(tmp_path, asking, teacher, samples, SE_KD)
    assert_gradients(gradients, expected)
    assert losses[0] == pytest.approx(loss, rel=1e-5)


def scaled(model: PreTrainedModel) -> PreTrainedModel:
    """A forward pass that does to its logits what no head view knows."""
    original = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        output.logits = output.logits * 1.001
        return output

    model.forward = forward
    return model


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_logits_that_the_head_does_not_give_are_refused_before_training(side: str, tmp_path: Path) -> None:
    models = {"student": student_of("qwen3"), "teacher": teacher_of("llama")}
    scaled(models[side])
    name = type(models[side]).__name__
    with pytest.raises(InputError, match=rf"{name} computes its logits in a way that selkd does not know.*difference"):
        trained(tmp_path, models["student"], models["teacher"], samples_of(), SE_KD)


def test_a_family_with_a_cap_of_its_own_name_is_refused(tmp_path: Path) -> None:
    """RecurrentGemma's ``logits_soft_cap`` is not Gemma's ``final_logit_softcapping``."""
    config = RecurrentGemmaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, lru_width=32, logits_soft_cap=2.0, w_init_variance_scale=1.0,
    )  # fmt: skip
    teacher = randomised(config, torch.float32)
    with pytest.raises(InputError, match=r"RecurrentGemmaForCausalLM computes its logits"):
        trained(tmp_path, student_of("llama"), teacher, samples_of(), SE_KD, packing=False)


@pytest.mark.parametrize(("family", "dtype"), [("mixtral", torch.float32), ("qwen3_moe", torch.bfloat16)])
def test_a_mixture_from_disk_teaches(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """With the kernels for experts that a user gets, in the dtypes that a teacher has."""
    teacher_of(family).save_pretrained(tmp_path / "teacher")
    source = ModelSource("teacher", tmp_path / "teacher", "0" * 32)
    teacher = load_model(source, dtype, torch.device("cpu"))
    _, losses = trained(tmp_path / "run", student_of("llama"), teacher, samples_of(), SE_KD, max_steps=2)
    assert losses[-1] < losses[0]

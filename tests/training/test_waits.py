"""How often the host waits for the device in a training, by the tests' own accelerator that is none."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from tiny import V, make_arguments, make_model, make_samples, make_tokenizer
from waits import DEVICE, Accelerator, Wait, accelerator, moved

from selkd import DistillTrainer, TeacherCache, distillation_loss
from selkd.models.head import body_of
from selkd.recipe.choices import ClassOptions
from selkd.selection.host import first_marked
from selkd.teacher.build_cache import build_cache
from selkd.teacher.live import LiveTeacher

ENTROPY = {"metric": "student_entropy", "fraction": 0.3}
RECIPES: dict[str, dict[str, Any]] = {
    "full kd": {"positions": {"policy": "all"}},
    "se-kd": {"positions": ENTROPY},
    "two-stage": {
        "positions": {
            "fraction": 0.2, "scoring": "two_stage", "rescored_share": 0.2, "frequent_classes": 20, "tail_classes": 20,
        }
    },
    "gls": {"positions": {"policy": "gls", "fraction": 0.3, "queue_size": 60}},
    "curriculum": {"positions": {"policy": "curriculum", "fraction": 0.3, "metric": "kl"}},
    "random": {"positions": {"policy": "random", "fraction": 0.3}},
    "pos_rs": {"positions": {"policy": "pos_rs", "fraction": 0.3, "smoothing": 2.0, "clip": 0.8, "coverage": 0.3}},
    "pos_rs_corrected": {"positions": {"policy": "pos_rs_corrected", "fraction": 0.3, "metric": "kl", "skip_first": 2}},
    "weighted": {"positions": {"policy": "weighted"}},
    "per position": {"positions": {**ENTROPY, "reduction": "per_position"}},
    "soft_or": {"positions": {"metric": "soft_or", "fraction": 0.3}},
    "kd_weight": {"positions": ENTROPY, "criterion": {"kd_weight": 0.6, "temperature": 2.0}},
    "dkd": {"positions": {"policy": "all"}, "criterion": {"name": "dkd"}},
    "at_kd": {"positions": {**ENTROPY, "fraction": 0.6}, "criterion": {"name": "at_kd"}},
    "rs_kd": {"positions": ENTROPY, "classes": {"sampler": "rs_kd", "draws": 8}},
    "systematic": {"positions": {"policy": "all"}, "classes": {"sampler": "systematic", "draws": 8}},
    "top_k": {"positions": ENTROPY, "classes": {"sampler": "top_k", "draws": 8}},
    "tail": {"positions": ENTROPY, "classes": {"sampler": "top_k", "draws": 8, "tail": True}},
}  # fmt: skip


SIZED_BY_SCORES = {"gls", "pos_rs", "pos_rs_corrected", "weighted"}


MICRO_BATCHES = 6


class Count(NamedTuple):
    """The waits of each micro-batch but the first and the last, and those between the teacher's and the student's body.

    What belongs to a step is counted with its last micro-batch, and the next step's beginning, too.
    """

    by_micro_batch: list[list[Wait]]
    between_bodies: list[Wait]


class Counted(DistillTrainer):
    """Notes where each micro-batch begins."""

    seen: Accelerator
    begun: list[int]

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.begun.append(len(self.seen.waits))
        return super().training_step(*args, **kwargs)


def count(
    out: Path,
    recipe: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    cache: TeacherCache | None = None,
    **options: Any,
) -> Count:
    """The waits of a training none of whose steps is logged or saved, on the tests' accelerator."""
    student, teacher = make_model(1, attn_implementation="eager"), make_model(0, 3, attn_implementation="eager")
    settings = {
        "logging_steps": 100, "max_steps": MICRO_BATCHES, "max_grad_norm": 1.0,
        "accelerator_config": {"non_blocking": True},
    }  # fmt: skip
    trainer = Counted(
        model=student,
        teacher=teacher if cache is None else cache,
        args=make_arguments(out, **recipe, **settings | options),
        train_dataset=make_samples(24),
        processing_class=make_tokenizer(),
    )
    between: list[Wait] = []
    teacher_ended = 0
    with accelerator(monkeypatch) as seen:
        trainer.seen, trainer.begun = seen, []
        for state in (PartialState._shared_state, AcceleratorState._shared_state):
            monkeypatch.setitem(state, "device", DEVICE)
        monkeypatch.setitem(vars(trainer.args), "_setup_devices", DEVICE)
        moved(student), moved(teacher)
        trainer._set_up()

        def note_end(*_: Any) -> None:
            nonlocal teacher_ended
            teacher_ended = len(seen.waits)

        # The student's first layer, as what comes before it in its body may ask the device about the batch.
        body_of(teacher).register_forward_hook(note_end)
        body_of(student).layers[0].register_forward_pre_hook(
            lambda *_: between.extend(seen.waits[teacher_ended:]) if cache is None and trainer.begun[1:] else None
        )
        trainer.train()
    return Count([seen.waits[begin:end] for begin, end in pairwise(trainer.begun[1:])], between)


@pytest.mark.parametrize(
    ("name", "accumulation"), [*((name, 2) for name in RECIPES), *((name, 1) for name in ("full kd", "gls", "pos_rs"))]
)
def test_the_host_waits_at_most_twice_a_micro_batch(
    name: str, accumulation: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once to size the selection, where scores alone tell, and once before the update."""
    steps = {"gradient_accumulation_steps": accumulation, "max_steps": MICRO_BATCHES // accumulation}
    counted = count(tmp_path, RECIPES[name], monkeypatch, **steps)
    for number, waits in enumerate(counted.by_micro_batch, start=1):
        is_last = (number + 1) % accumulation == 0
        is_sized = name in SIZED_BY_SCORES and (name != "gls" or number >= accumulation)  # no queue in the first step
        assert len(waits) == is_last + is_sized, waits
    assert not counted.between_bodies


def test_a_cached_teacher_adds_no_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ClassOptions(sampler="rs_kd", draws=8)
    about = {"sampler": "rs_kd", "draws": 8, "temperature": 1.0, "vocabulary": V, "seed": 11}
    live = LiveTeacher(make_model(0, 3), options, 1.0, 11, V)
    build_cache(tmp_path / "cache", about, make_samples(24), lambda: live, 1)
    cache = TeacherCache.open(tmp_path / "cache")
    counted = count(tmp_path, RECIPES["rs_kd"], monkeypatch, cache)
    assert [len(waits) for waits in counted.by_micro_batch] == [1] * (MICRO_BATCHES - 2)


KNOWN = ["valid_mask", "sample_ids"]
# What is given -> how often the host waits: for the mask, the targets that name samples, the selection's size, the end.
CALLS: dict[str, tuple[dict[str, Any], int]] = {
    "mask on the host": ({"on_host": ["valid_mask"]}, 1),
    "mask on the device": ({}, 2),
    "full kd": ({"on_host": ["valid_mask"], "positions": {"policy": "all"}, "criterion": {"name": "dkd"}}, 1),
    "drawn": ({"on_host": KNOWN, "classes": {"sampler": "rs_kd", "draws": 8}}, 1),
    "drawn, named by its targets": ({"classes": {"sampler": "rs_kd", "draws": 8}}, 3),
    "drawn positions": ({"on_host": KNOWN, "positions": {"policy": "pos_rs", "fraction": 0.3}}, 2),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_a_loop_of_ones_own_waits_as_often(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options, expected = CALLS[name]
    generator = torch.Generator().manual_seed(0)
    hidden, of_teacher = (torch.randn(3, 10, 8, generator=generator) for _ in range(2))
    heads = [torch.randn(V, 8, generator=generator) for _ in range(2)]
    given = {
        "targets": torch.randint(V, (3, 10), generator=generator),
        "valid_mask": torch.rand(3, 10, generator=generator) > 0.3,
    }
    if "sample_ids" in options.get("on_host", ()):
        given["sample_ids"] = torch.arange(48, dtype=torch.uint8).view(3, 16)
    parts = {key: value for key, value in options.items() if key != "on_host"}
    losses = []
    with accelerator(monkeypatch) as seen:
        for device in (torch.device("cpu"), DEVICE):
            placed = {k: v if k in options.get("on_host", ()) else v.to(device) for k, v in given.items()}
            student = torch.nn.Parameter(heads[0].to(device))
            teacher = {"hidden_states": of_teacher.to(device), "lm_head": heads[1].to(device)}
            on_device = hidden.to(device)
            seen.waits.clear()
            loss = distillation_loss(on_device, student, teacher, **placed, **parts).loss
            loss.backward()
            assert len(seen.waits) == (expected if device == DEVICE else 0), seen.waits
            losses.append((loss.detach().cpu(), student.grad.cpu()))
    for on_cpu, on_device in zip(*losses, strict=True):
        torch.testing.assert_close(on_cpu, on_device)


def test_batches_that_are_not_kept_on_the_host_train_alike(tmp_path: Path) -> None:
    """A batch without the host's copy is read from its device, so that waits are all that the copy spares."""
    weights = []
    for name in ("kept", "read"):
        recipe = RECIPES["pos_rs"] | {"classes": {"sampler": "rs_kd", "draws": 8}}
        trainer = DistillTrainer(
            model=make_model(1), teacher=make_model(0, 3), train_dataset=make_samples(12),
            args=make_arguments(tmp_path / name, **recipe, max_steps=3), processing_class=make_tokenizer(),
        )  # fmt: skip
        if name == "read":
            trainer.data_collator = trainer.data_collator.collate
        trainer.train()
        weights.append([parameter.detach().clone() for parameter in trainer.model.parameters()])
    assert all(torch.equal(kept, read) for kept, read in zip(*weights, strict=True))


class Held(NamedTuple):
    """Some tensors, [6], of the host or the device."""

    a: torch.Tensor = torch.arange(6.0)
    mask: torch.Tensor = torch.tensor([True, False, True, True, False, False])
    k: torch.Tensor = torch.tensor([2, 0, 1, 3, 2, 1])


# What is done with tensors on the device -> how often the host waits.
DONE: dict[str, tuple[Callable[..., Any], int]] = {
    "item": (lambda d: d.a.sum().item(), 1),
    "bool": (lambda d: bool(d.mask.any()), 1),
    "int": (lambda d: int(d.k[0]), 1),
    "float": (lambda d: float(d.a[0]), 1),
    "if": (lambda d: 1 if (d.a > 3).all() else 0, 1),
    "tolist": (lambda d: d.a.tolist(), 1),
    "cpu": (lambda d: d.a.cpu(), 1),
    "to the host": (lambda d: d.a.to("cpu", non_blocking=True), 1),
    "nonzero": (lambda d: d.mask.nonzero(), 1),
    "masked_select": (lambda d: d.a.masked_select(d.mask), 1),
    "by a mask": (lambda d: d.a[d.mask], 1),
    "set by a mask": (lambda d: d.a.clone().__setitem__(d.mask, d.a[:3].clone()), 1),
    "by the host's index": (lambda d: d.a[torch.tensor([0, 1])], 1),
    "by an index on the device": (lambda d: d.a[d.k], 0),
    "equal": (lambda d: torch.equal(d.a, d.a), 1),
    "unique": (lambda d: d.k.unique(), 1),
    "bincount": (lambda d: d.k.bincount(), 1),
    "repeat": (lambda d: d.a.repeat_interleave(d.k), 1),
    "repeat, size known": (lambda d: d.a.repeat_interleave(d.k, output_size=9), 0),
    "made of numbers": (lambda d: d.a.new_tensor([1.0, 2.0]), 1),
    "filled": (lambda d: d.a.new_full((2,), 3.0), 0),
    "moved": (lambda d: Held().a.to(d.a.device), 1),
    "moved meanwhile": (lambda d: Held().a.to(d.a.device, non_blocking=True), 0),
    "copied into": (lambda d: d.a.clone().copy_(torch.ones(6)), 1),
    "with a number": (lambda d: torch.where(d.mask, d.a * 2 + torch.tensor(1.0), 0.0).masked_fill(d.mask, 3.0), 0),
    "sorted": (lambda d: d.a.sort().values.cumsum(0).gather(0, d.k[:2]), 0),
    "first marked": (lambda d: first_marked(d.mask, 3), 0),
}  # fmt: skip


@pytest.mark.parametrize("name", DONE)
def test_what_waits_is_counted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    do, expected = DONE[name]
    with accelerator(monkeypatch) as seen:
        held = Held(*(tensor.to(DEVICE) for tensor in Held()))
        seen.waits.clear()
        do(held)
        assert len(seen.waits) == expected, seen.waits


def test_a_tensor_of_the_host_does_not_mix_with_the_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    with accelerator(monkeypatch):
        a = Held().a.to(DEVICE)
        with pytest.raises(AssertionError, match="a tensor of the host among the device's"):
            a + Held().a
        with pytest.raises(RuntimeError, match="numpy"):
            a.numpy()


def test_gradients_on_the_device_are_those_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    gradients = []
    with accelerator(monkeypatch):
        for device in (torch.device("cpu"), DEVICE):
            leaf = torch.nn.Parameter(weight.to(device))
            (leaf.softmax(-1) * Held().a.to(device)).sum(-1).log().mean().backward()
            gradients.append(leaf.grad.cpu())
    assert torch.equal(*gradients)

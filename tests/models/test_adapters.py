"""Low-rank adapters: what is trained, what is saved, what is merged, and that the head is left alone or refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import make_arguments, make_model, make_samples, make_tokenizer
from tiny_run import make_recipe, make_task
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, PreTrainedModel

from selkd import DistillTrainer, distill
from selkd.errors import InputError
from selkd.models.adapters import merged, with_adapters
from selkd.recipe.files import load_recipe
from selkd.recipe.models import LoraOptions
from selkd.recipe.part import parse_part

peft = pytest.importorskip("peft")
IDS = torch.arange(2, 20)[None]
# Of float32 logits with a merged weight in the place of two products: 1.7e-5 with AVX2, below 1e-5 with AVX-512.
ROUNDING = 1e-4


def options(**given: Any) -> LoraOptions:
    return parse_part(LoraOptions, {"rank": 4, **given}, "student.lora")


@pytest.mark.parametrize("is_tied", [True, False])
def test_a_new_adapter_changes_nothing_and_is_all_that_trains(is_tied: bool) -> None:
    model = make_model(3, tie_word_embeddings=is_tied)
    expected = model(IDS).logits
    wrapped = with_adapters(model, options(), seed=1)
    assert torch.equal(wrapped(input_ids=IDS).logits, expected)
    trained = [name for name, p in wrapped.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    assert not any("lm_head" in name or "embed" in name for name in trained)


def test_an_adapter_on_the_head_is_refused_loudly() -> None:
    for name in ("lm_head", "model.embed_tokens"):
        with pytest.raises(
            InputError, match=f"{name} is the head or an embedding, and the loss reads the head's weight"
        ):
            options(target_modules=[name, "q_proj"])
    with pytest.raises(InputError, match="none; give names, or all-linear"):
        options(target_modules=[])
    model = make_model(3)
    taken_in = LoraOptions.model_construct(rank=4, alpha=8.0, dropout=0.0, target_modules=["lm_head"])
    with pytest.raises(InputError, match="includes the head or an embedding"):
        with_adapters(model, taken_in, seed=1)
    with pytest.raises(InputError, match=r"student.lora.target_modules: \['nothing'\]"):
        with_adapters(make_model(3), options(target_modules=["nothing"]), seed=1)
    with pytest.raises(InputError, match="no layer is called 'q_porj'"):
        with_adapters(make_model(3), options(target_modules=["v_proj", "q_porj"]), seed=1)
    with_adapters(make_model(3), options(target_modules=["v_proj", "self_attn.q_proj"]), seed=1)


def test_training_moves_the_adapters_alone_and_merging_computes_the_same(tmp_path: Path) -> None:
    student = with_adapters(make_model(3), options(), seed=1)
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    trainer = DistillTrainer(
        model=student,
        teacher=make_model(0),
        args=make_arguments(tmp_path, max_steps=3, positions={"metric": "student_entropy", "fraction": 0.5}),
        train_dataset=make_samples(),
        processing_class=make_tokenizer(),
    )
    trainer.train()
    for name, parameter in student.named_parameters():
        assert torch.equal(parameter, before[name]) == ("lora_" not in name), name
    whole = merged(student)
    torch.testing.assert_close(whole(IDS).logits, student(input_ids=IDS).logits, rtol=0, atol=ROUNDING)
    assert (whole(IDS).logits - make_model(3)(IDS).logits).abs().max() > 100 * ROUNDING
    assert "lora" not in " ".join(whole.state_dict())
    assert any("lora_" in name for name in student.state_dict()), "the student itself is left as it was"
    assert merged(whole) is whole


def trained_student(tmp_path: Path, **config: object) -> PreTrainedModel:
    """With an adapter that computes something, and the loss bound to its forward."""
    student = with_adapters(make_model(3, **config), options(), seed=1)
    DistillTrainer(
        model=student,
        teacher=make_model(0),
        args=make_arguments(tmp_path, max_steps=3, positions={"metric": "student_entropy", "fraction": 0.5}),
        train_dataset=make_samples(),
        processing_class=make_tokenizer(),
    ).train()
    return student


@pytest.mark.parametrize("is_tied", [True, False])
def test_merging_leaves_the_student_bit_for_bit_and_what_is_saved_computes_what_it_does(
    tmp_path: Path, is_tied: bool
) -> None:
    student = trained_student(tmp_path, tie_word_embeddings=is_tied)
    logits = student(input_ids=IDS).logits
    tensors = {**dict(student.named_parameters()), **dict(student.named_buffers())}
    before = {name: (tensor.data_ptr(), tensor.detach().clone()) for name, tensor in tensors.items()}
    whole = merged(student)
    assert not {each.data_ptr() for each in whole.parameters()} & {place for place, _ in before.values()}
    whole.save_pretrained(tmp_path / "student")
    for name, tensor in {**dict(student.named_parameters()), **dict(student.named_buffers())}.items():
        place, value = before[name]
        assert tensor.data_ptr() == place, name
        assert torch.equal(tensor, value), name
    assert torch.equal(student(input_ids=IDS).logits, logits)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    torch.testing.assert_close(saved(IDS).logits, logits, rtol=0, atol=ROUNDING)
    assert (saved(IDS).logits - make_model(3, tie_word_embeddings=is_tied)(IDS).logits).abs().max() > 100 * ROUNDING
    assert ("lm_head.weight" in load_file(tmp_path / "student" / "model.safetensors")) != is_tied


class Copies(TorchDispatchMode):
    """Counts copies of tensors that are not asked for in main memory, whatever device they are on."""

    def __init__(self) -> None:
        super().__init__()
        self.on_the_device = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_copy = func in (torch.ops.aten.clone.default, torch.ops.aten._to_copy.default)
        if is_copy and (kwargs or {}).get("device") != torch.device("cpu"):
            self.on_the_device += args[0].numel()
        return func(*args, **(kwargs or {}))


def test_merging_asks_the_students_device_for_no_second_student(tmp_path: Path) -> None:
    student = trained_student(tmp_path)
    with Copies() as copies:
        merged(student)
    assert copies.on_the_device == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs memory that is counted")
def test_merging_takes_no_memory_of_the_accelerator(tmp_path: Path) -> None:
    student = trained_student(tmp_path).to("cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    whole = merged(student)
    assert torch.cuda.max_memory_allocated() == before
    assert {each.device.type for each in whole.parameters()} == {"cpu"}


@pytest.mark.parametrize("is_on_policy", [False, True])
def test_a_run_keeps_the_adapters_and_a_merged_student(tmp_path: Path, is_on_policy: bool) -> None:
    recipe = make_recipe(tmp_path, samples=None, cache=None, classes={"sampler": "all"})
    recipe["student"] = {"prune_from_teacher": {"layers": 2}, "lora": {"rank": 4, "alpha": 16}}
    recipe["evaluation"] = {"suite": ["fidelity"], "every_steps": 4, "keep_best": "kl_nats"}
    recipe["training"] = {**recipe["training"], "learning_rate": 0.01}
    if is_on_policy:
        recipe |= {"data": make_task(tmp_path, packing=False), "on_policy": {"max_new_tokens": 8}}
    run = distill(recipe, tmp_path / "run")
    adapters = load_file(run.path / "adapter" / "adapter_model.safetensors")
    assert all("lora_" in name for name in adapters)
    assert json.loads((run.path / "adapter" / "adapter_config.json").read_text())["r"] == 4
    student = AutoModelForCausalLM.from_pretrained(run.student)
    assert not [name for name in student.state_dict() if "lora" in name]
    again = distill(recipe, tmp_path / "run")
    assert again.record["fidelity"] == run.record["fidelity"]
    best = AutoModelForCausalLM.from_pretrained(run.path / "best_student")
    assert not [name for name in best.state_dict() if "lora" in name]
    assert not list(run.path.glob("*/training_args.bin"))
    if not is_on_policy:
        assert run.record["fidelity"]["after"]["kl_nats"] < run.record["fidelity"]["before"]["kl_nats"]


def test_adapters_resume_from_a_checkpoint(tmp_path: Path) -> None:
    def trained(resume: bool) -> torch.Tensor:
        arguments = make_arguments(tmp_path, max_steps=4, save_strategy="steps", save_steps=2)
        student = with_adapters(make_model(3), options(), seed=1)
        trainer = DistillTrainer(
            model=student,
            teacher=make_model(0),
            args=arguments,
            train_dataset=make_samples(),
            processing_class=make_tokenizer(),
        )
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2") if resume else None)
        return torch.cat([p.detach().flatten() for n, p in student.named_parameters() if "lora_" in n])

    torch.testing.assert_close(trained(resume=False), trained(resume=True), rtol=0, atol=1e-6)


def test_sharding_is_refused() -> None:
    with pytest.raises(InputError, match=r"fsdp: adapters \(a recipe's student.lora\)"):
        load_recipe("se_kd", ["student.lora={}", "training.fsdp=full_shard"])

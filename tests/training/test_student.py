"""The student and the teacher as a training finds them: copies, adapters, devices, precision, packed documents."""

import copy
import inspect
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from datasets import Dataset
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from test_trainer import RECIPES, assert_same, trainer_of, weights
from tiny import V, make_arguments, make_model, make_samples, make_tokenizer
from torch import Tensor
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    TrainerCallback,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.training_args import ParallelMode

from selkd import DistillTrainer
from selkd.data.collate import collate
from selkd.errors import InputError
from selkd.models.head import check_head, head_of
from selkd.training.student import bind_distillation

BATCH = collate(list(make_samples(4)), 1)


def whole(hidden: Tensor, head: Any) -> dict[str, Tensor]:
    return {"logits": head.logits(hidden)}


def logits_of(model: Any, **options: Any) -> Tensor:
    output = model(input_ids=BATCH["input_ids"], position_ids=BATCH["position_ids"], **options)
    return (output["logits"] if "distillation" in options else output.logits).detach()


@pytest.mark.parametrize("bf16", [False, True])
def test_a_copy_of_a_student_computes_with_its_own_weights(bf16: bool, tmp_path: Path) -> None:
    """An average of weights, a frozen reference, the best so far: all are deep copies, before training and after."""
    student = make_model(1)
    trainer = trainer_of(tmp_path, make_samples(4), RECIPES["full kd"], student=student, bf16=bf16)
    before = copy.deepcopy(student)
    trainer.train()
    after = copy.deepcopy(student)
    for made, source in ((before, make_model(1)), (after, make_model(1))):
        source.load_state_dict(made.state_dict())
        expected = source(BATCH["input_ids"], position_ids=BATCH["position_ids"], use_cache=False).logits.detach()
        precision = {"rtol": 0, "atol": 0.3 if bf16 and made is after else 1e-5}
        for found in (logits_of(made, use_cache=False), logits_of(made, distillation=whole)):
            torch.testing.assert_close(found.float(), expected, **precision)
    with torch.no_grad():
        for parameter in after.parameters():
            parameter.zero_()
    assert logits_of(after, distillation=whole).abs().max() == 0
    assert logits_of(student, distillation=whole).abs().max() > 0
    assert logits_of(before, use_cache=False).sub(logits_of(student, use_cache=False)).abs().max() > 1e-3


def test_the_distillations_forward_keeps_the_signature_and_takes_hooks_along() -> None:
    plain, student = make_model(1), make_model(1)
    bind_distillation(student, V)
    bind_distillation(student, V)  # a second trainer of one student
    assert inspect.signature(student.forward) == inspect.signature(plain.forward)
    hooked = dispatch_model(make_model(1), {"": "cpu"}, force_hooks=True)
    assert "forward" in vars(hooked)
    bind_distillation(hooked, V)
    made = copy.deepcopy(hooked)
    with torch.no_grad():
        made.lm_head.weight.zero_()
    assert logits_of(made, use_cache=False).abs().max() == 0
    assert torch.equal(logits_of(hooked, use_cache=False), logits_of(plain, use_cache=False))


def test_an_average_of_weights_kept_while_training_is_the_average(tmp_path: Path) -> None:
    """As users write it: a copy in a callback, updated after each step, measured with its own weights."""

    class Averaged(TrainerCallback):
        def on_train_begin(self, *_: Any, model: Any, **__: Any) -> None:
            self.copy = copy.deepcopy(model)

        def on_step_end(self, *_: Any, model: Any, **__: Any) -> None:
            with torch.no_grad():
                for mine, its in zip(self.copy.parameters(), model.parameters(), strict=True):
                    mine.lerp_(its, 0.5)

    averaged = Averaged()
    trainer = trainer_of(tmp_path, make_samples(4), RECIPES["full kd"], max_steps=3)
    trainer.add_callback(averaged)
    trainer.train()
    same = make_model(5)
    same.load_state_dict(averaged.copy.state_dict())
    torch.testing.assert_close(logits_of(averaged.copy, use_cache=False), logits_of(same, use_cache=False))


def with_trained_head(student: LlamaForCausalLM) -> PeftModel:
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    torch.manual_seed(0)
    return get_peft_model(student, config)


def test_a_head_that_peft_trains_beside_adapters_is_trained(tmp_path: Path) -> None:
    base = make_model(1, tie_word_embeddings=False)
    student = with_trained_head(copy.deepcopy(base))
    check_head(student)
    saved = head_of(student).weight
    assert saved.requires_grad
    trainer = trainer_of(tmp_path, make_samples(4), RECIPES["full kd"], student=student, max_steps=2)
    trainer.train()
    # The same step on the whole student moves the head alike: the first step's adapters are still zero.
    alone = trainer_of(tmp_path / "alone", make_samples(4), RECIPES["full kd"], student=copy.deepcopy(base))
    alone.train()
    first = trainer_of(
        tmp_path / "one", make_samples(4), RECIPES["full kd"], student=with_trained_head(copy.deepcopy(base))
    )
    first.train()
    torch.testing.assert_close(head_of(first.model).weight, alone.model.lm_head.weight, rtol=0, atol=2e-6)
    assert not torch.equal(saved, base.lm_head.weight)
    trainer.save_model(str(tmp_path / "adapter"))
    back = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter")
    torch.testing.assert_close(head_of(back).weight, saved)
    torch.testing.assert_close(logits_of(back.merge_and_unload(), use_cache=False), logits_of(student, use_cache=False))


def offloaded(tmp_path: Path, where: dict[str, str]) -> LlamaForCausalLM:
    """A teacher whose parts Accelerate keeps on disk or in main memory and loads when they are needed."""
    model = make_model(0, layers=3, tie_word_embeddings=False)
    parts = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    parts |= {f"model.layers.{index}": "cpu" for index in range(3)} | where
    return dispatch_model(model, parts, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True)


def test_a_teacher_whose_layers_are_offloaded_teaches_the_same(tmp_path: Path) -> None:
    plain = make_model(0, layers=3, tie_word_embeddings=False)
    teacher = offloaded(tmp_path / "disk", {"model.layers.1": "disk", "model.embed_tokens": "disk"})
    assert {str(p.device) for p in teacher.parameters()} == {"cpu", "meta"}
    found = [
        trainer_of(tmp_path / name, make_samples(4), RECIPES["se-kd"], teacher=given)
        for name, given in (("plain", plain), ("offloaded", teacher))
    ]
    for trainer in found:
        trainer.train()
        trainer.evaluate(make_samples(3, seed=5))
    assert_same(weights(found[0].model), weights(found[1].model), tolerance=0)
    with pytest.raises(InputError, match=r"teacher_device: cpu, but the teacher's device_map spreads it over 2 places"):
        trainer_of(tmp_path / "both", make_samples(4), {}, teacher=teacher, teacher_device="cpu")


def test_a_head_that_is_offloaded_and_a_student_that_is_spread_are_refused(tmp_path: Path) -> None:
    teacher = offloaded(tmp_path / "a", {"lm_head": "disk"})
    with pytest.raises(InputError, match=r"the head of LlamaForCausalLM is offloaded by its device_map"):
        trainer_of(tmp_path / "run", make_samples(4), {}, teacher=teacher)
    student = offloaded(tmp_path / "b", {"model.layers.1": "disk"})
    with pytest.raises(InputError, match=r"model: its device_map spreads it over 2 devices"):
        trainer_of(tmp_path / "run", make_samples(4), {}, student=student)


def test_a_process_trains_on_one_device_however_many_it_sees(tmp_path: Path) -> None:
    """What Transformers finds where two GPUs are visible would be DataParallel."""
    args = make_arguments(tmp_path, per_device_train_batch_size=3)
    args._n_gpu = 2
    assert (args.n_gpu, args.train_batch_size, args.parallel_mode) == (1, 3, ParallelMode.NOT_PARALLEL)
    trainer = DistillTrainer(make_model(1), make_model(0), args, make_samples(4), processing_class=make_tokenizer())
    trainer.train()
    assert not isinstance(trainer.model_wrapped, torch.nn.DataParallel)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_teacher_on_the_second_gpu_teaches_a_student_on_the_first(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, make_samples(4), RECIPES["se-kd"], teacher_device="cuda:1", use_cpu=False)
    trainer.train()
    assert (trainer.model.device.index, trainer.teacher.model.device.index) == (0, 1)


def only_low_precision(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Any:
    """Attention as Transformers calls FlashAttention's kernels: in autocast's dtype; float32 is an error."""
    if torch.is_autocast_enabled("cpu"):
        query, key, value = (part.to(torch.get_autocast_dtype("cpu")) for part in (query, key, value))
    if query.dtype not in (torch.bfloat16, torch.float16):
        raise RuntimeError("FlashAttention only supports fp16 and bf16 data type")
    return sdpa_attention_forward(module, query, key, value, *args, **options)


@pytest.fixture
def _flash() -> None:
    AttentionInterface.register("only_low_precision", only_low_precision)
    AttentionMaskInterface.register("only_low_precision", sdpa_mask)


@pytest.mark.usefixtures("_flash")
def test_a_student_whose_attention_takes_bfloat16_alone_is_checked_as_it_trains(tmp_path: Path) -> None:
    def student() -> LlamaForCausalLM:
        model = make_model(1)
        model.set_attn_implementation("only_low_precision")
        return model

    trainer = trainer_of(tmp_path / "a", make_samples(4), RECIPES["se-kd"], student=student(), bf16=True)
    trainer.train()
    trainer.evaluate(make_samples(3, seed=5))
    plain = trainer_of(tmp_path / "b", make_samples(4), RECIPES["se-kd"], bf16=True)
    plain.train()
    assert_same(weights(trainer.model), weights(plain.model), tolerance=2e-2)
    with pytest.raises(RuntimeError, match="only supports fp16 and bf16"):  # its own words, not those of a check
        trainer_of(tmp_path / "c", make_samples(4), RECIPES["se-kd"], student=student()).train()


def mamba(seed: int) -> MambaForCausalLM:
    torch.manual_seed(seed)
    return MambaForCausalLM(MambaConfig(vocab_size=V, hidden_size=32, num_hidden_layers=2, state_size=4)).eval()


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_packed_documents_are_refused_where_they_see_each_other_whatever_packing_says(
    side: str, tmp_path: Path
) -> None:
    """Samples of several documents come ready-made, too, with ``packing=False``."""
    given = {side: mamba(3)}
    with pytest.raises(InputError, match="MambaForCausalLM does not keep packed documents apart"):
        trainer_of(tmp_path, make_samples(4), RECIPES["full kd"], packing=False, **given).train()
    texts = Dataset.from_dict({"text": [" ".join(f"w{(7 * i + j) % V}" for j in range(12)) for i in range(6)]})
    trainer = trainer_of(tmp_path, texts, RECIPES["full kd"], packing=False, max_length=16, **given)
    trainer.train()
    with pytest.raises(InputError, match="MambaForCausalLM does not keep packed documents apart"):
        trainer.evaluate(make_samples(4))


def test_a_student_that_was_pickled_or_unwrapped_is_bound_again(tmp_path: Path) -> None:
    """A pickle takes the class's forward along, and Accelerate can unwrap a forward down to it."""
    trainer = trainer_of(tmp_path / "a", make_samples(4), RECIPES["full kd"], bf16=True)
    trainer.train()
    unwrapped = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    loaded = pickle.loads(pickle.dumps(unwrapped))
    figures = []
    for name, student in (("b", copy.deepcopy(unwrapped)), ("c", loaded)):
        again = trainer_of(tmp_path / name, make_samples(4), RECIPES["full kd"], student=student)
        again.train()
        figures.append(again.evaluate(make_samples(3, seed=5))["eval_loss"])
    assert figures[0] == figures[1]
    assert "eval_loss" in trainer.evaluate(make_samples(3, seed=5))


@pytest.mark.parametrize("bf16", [False, True])
def test_a_copy_of_the_last_student_can_be_the_next_ones_teacher(bf16: bool, tmp_path: Path) -> None:
    first = trainer_of(tmp_path / "a", make_samples(4), RECIPES["full kd"], bf16=bf16)
    first.train()
    teacher = copy.deepcopy(first.model)
    student = copy.deepcopy(teacher)
    same = trainer_of(tmp_path / "b", make_samples(4), RECIPES["full kd"], student=student, teacher=teacher)
    assert same.evaluate(make_samples(3, seed=5))["eval_loss"] == pytest.approx(0, abs=1e-6)


def test_a_head_whose_adapters_are_off_is_the_base_models(tmp_path: Path) -> None:
    base, held_out = make_model(1, tie_word_embeddings=False), make_samples(3, seed=5)
    trainer = trainer_of(
        tmp_path / "a", make_samples(4), RECIPES["full kd"], student=with_trained_head(copy.deepcopy(base))
    )
    trainer.train()
    plain = trainer_of(tmp_path / "b", make_samples(4), RECIPES["full kd"], student=base)
    adapted = trainer.evaluate(held_out)["eval_loss"]
    with trainer.model.disable_adapter():
        assert trainer.evaluate(held_out)["eval_loss"] == pytest.approx(plain.evaluate(held_out)["eval_loss"], rel=1e-6)
    assert trainer.evaluate(held_out)["eval_loss"] == adapted != plain.evaluate(held_out)["eval_loss"]


def test_what_cannot_learn_is_refused_by_name(tmp_path: Path) -> None:
    prompted = get_peft_model(make_model(1), PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"))
    with pytest.raises(InputError, match="model: its adapter learns a prompt"):
        trainer_of(tmp_path, make_samples(4), {}, student=prompted)
    frozen = trainer_of(tmp_path, make_samples(4), {}, student=make_model(1).requires_grad_(False))
    assert frozen.evaluate(make_samples(3))["eval_loss"] > 0
    with pytest.raises(InputError, match="model: none of its weights is trained"):
        frozen.train()
    few = trainer_of(tmp_path, make_samples(6), {}, per_device_train_batch_size=4, dataloader_drop_last=True)
    few.train()
    with pytest.raises(InputError, match=r"train_dataset: 3 samples don't fill a micro-batch of 4"):
        trainer_of(tmp_path, make_samples(3), {}, per_device_train_batch_size=4, dataloader_drop_last=True)
    later = make_arguments(tmp_path)
    later.label_smoothing_factor = 0.1
    with pytest.raises(InputError, match=r"label_smoothing_factor: 0.1 can't be honoured"):
        DistillTrainer(make_model(1), make_model(0), later, make_samples(4), processing_class=make_tokenizer())
    late = make_arguments(tmp_path)
    late.bf16 = True
    with pytest.raises(InputError, match="bf16 was set when the arguments had been made"):
        DistillTrainer(make_model(1), make_model(0), late, make_samples(4), processing_class=make_tokenizer())


def test_packed_samples_that_were_refused_leave_the_others_as_they_were(tmp_path: Path) -> None:
    texts = Dataset.from_dict({"text": [" ".join(f"w{(7 * i + j) % V}" for j in range(12)) for i in range(6)]})
    trainer = trainer_of(tmp_path, texts, RECIPES["full kd"], packing=False, max_length=16, student=mamba(3))
    with pytest.raises(InputError, match="does not keep packed documents apart"):
        trainer.evaluate(make_samples(4))
    assert trainer.evaluate(list(texts))["eval_loss"] > 0
    trainer.train()


def test_an_epoch_that_is_cut_short_is_followed_by_the_next_ones_order(tmp_path: Path) -> None:
    class OneStep(TrainerCallback):
        def on_step_end(self, _: Any, __: Any, control: Any, **___: Any) -> None:
            control.should_epoch_stop = True

    def batches_of_steps(is_cut: bool) -> list[list[bytes]]:
        trainer = trainer_of(
            tmp_path, make_samples(9), RECIPES["full kd"], max_steps=-1, num_train_epochs=3,
            per_device_train_batch_size=3,
        )  # fmt: skip
        seen: list[list[bytes]] = []
        original = trainer.get_batch_samples

        def noting(*arguments: Any) -> Any:
            found = original(*arguments)
            seen.append([bytes(row.numpy().tobytes()) for row in found[0][0]["sample_ids"]])
            return found

        trainer.get_batch_samples = noting  # type: ignore[method-assign]
        if is_cut:
            trainer.add_callback(OneStep())
        trainer.train()
        return seen

    assert batches_of_steps(is_cut=True) == batches_of_steps(is_cut=False)[::3]

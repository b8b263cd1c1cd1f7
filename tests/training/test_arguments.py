"""Every argument of Transformers' Trainer acts, or is refused by its name: one row a field.

A field that a new version of Transformers brings fails the test of completeness until somebody decides about it.
"""

import copy
import inspect
import os
import pickle
import signal
import sys
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator, ParallelismConfig, PartialState
from bench import Bench, digest, put_back  # noqa: F401  a fixture
from tiny import make_model, make_samples, make_tokenizer
from transformers import EvalPrediction, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import EvalLoopContainer
from transformers.utils import logging

from selkd import DistillTrainer
from selkd.errors import InputError
from selkd.training.arguments import DistillArguments

pytestmark = pytest.mark.usefixtures("put_back")

Proof = Callable[[Bench], Any]
ANOTHER: Any = object()
"""What is to be seen where no more can be said beforehand than that it is not what the default gives."""


# ----- What shows that a field acts: each function trains, or makes, what the field is about, and says what it saw.


def student(bench: Bench) -> str:
    return digest(bench.trained().model)


def state(name: str) -> Proof:
    return lambda bench: getattr(bench.trained().state, name)


def logged_steps(bench: Bench) -> list[int]:
    return [entry["step"] for entry in bench.trained().state.log_history if "loss" in entry]


def evaluated_steps(bench: Bench) -> list[int]:
    return [entry["step"] for entry in bench.trained().state.log_history if "eval_loss" in entry]


def logs(name: str) -> Proof:
    """Whether the log has the key."""
    return lambda bench: any(name in entry for entry in bench.trained().state.log_history)


def counted_tokens(bench: Bench) -> list[int | None]:
    history = bench.trained().state.log_history
    return [entry.get("num_input_tokens_seen") for entry in history if "loss" in entry]


def learning_rates(bench: Bench) -> list[float]:
    return [entry["learning_rate"] for entry in bench.trained().state.log_history if "loss" in entry]


def checkpoints(bench: Bench) -> list[str]:
    output_dir = Path(bench.trained().args.output_dir)
    return sorted(path.name for path in output_dir.glob("checkpoint-*"))


def checkpoint_without_optimizer(bench: Bench) -> bool:
    bench.trained()
    assert (bench.folder / "checkpoint-1" / "model.safetensors").exists()
    return not (bench.folder / "checkpoint-1" / "optimizer.pt").exists()


def optimizer_class(bench: Bench) -> str:
    trainer = bench.trained()
    return type(trainer.optimizer.optimizer).__name__


def scheduled_by(bench: Bench) -> str:
    return type(bench.trained().lr_scheduler).__name__


def low_rank_groups(bench: Bench) -> list[int]:
    """How many parameters GaLore's stand-in is told to treat as of low rank; the package is absent here."""

    class Stand(torch.optim.SGD):
        def __init__(self, groups: Any, lr: float) -> None:
            self.told = [len(group["params"]) for group in groups if "rank" in group]
            super().__init__([{"params": group["params"]} for group in groups], lr=lr)

    module = ModuleType("galore_torch")
    module.GaLoreAdafactor = module.GaLoreAdamW = module.GaLoreAdamW8bit = Stand  # type: ignore[attr-defined]
    bench.patch.setitem(sys.modules, "galore_torch", module)
    bench.patch.setattr("transformers.trainer_optimizer.is_galore_torch_available", lambda: True)
    try:
        return bench.trained().optimizer.optimizer.told
    except ValueError:  # GaLore asks for the modules
        return []


def products(bench: Bench) -> torch.dtype:
    """The dtype in which the student's layers multiply."""
    trainer, seen = bench.trainer(), set()
    trainer.model.model.layers[0].mlp.gate_proj.register_forward_hook(lambda *args: seen.add(args[2].dtype))
    trainer.train()
    (dtype,) = seen
    return dtype


def recomputed(bench: Bench) -> list[int]:
    """How often each layer computes in a training of one step, the check of the student apart."""
    model = make_model(1)
    counts = [0] * len(model.model.layers)
    for index, layer in enumerate(model.model.layers):

        def count(*_: Any, index: int = index) -> None:
            counts[index] += int(model.training)

        layer.mlp.register_forward_pre_hook(count)  # computing again ends before the last product
    bench.trained(model=model)
    return counts


def calls(target: str) -> Proof:
    """How often a function of Transformers is called in a training."""

    def count(bench: Bench) -> int:
        found = []
        bench.patch.setattr(target, lambda *_: found.append(None))
        bench.trained()
        return len(found)

    return count


def tf32_set_to(bench: Bench) -> list[bool]:
    """What the switch of the GPU's products is set to; there is none here."""
    found: list[bool] = []
    bench.patch.setattr("transformers.training_args.is_torch_tf32_available", lambda: True)
    bench.patch.setattr("transformers.training_args.enable_tf32", found.append)
    bench.arguments()
    return found


def batch_size_found(bench: Bench) -> int:
    """The samples of a batch in a training that runs out of memory above 2 of them; 0: it died."""
    compute_loss = DistillTrainer.compute_loss

    def limited(self: DistillTrainer, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if len(inputs["input_ids"]) > 2:
            raise RuntimeError("CUDA out of memory.")
        return compute_loss(self, model, inputs, *args, **kwargs)

    bench.patch.setattr(DistillTrainer, "compute_loss", limited)
    try:
        return bench.trained()._train_batch_size
    except RuntimeError:
        return 0


def on_another_process(name: str, **place: int) -> Proof:
    """A property of the arguments in a process that is elsewhere: the first of the second node, or a replica."""

    def look(bench: Bench) -> Any:
        arguments = bench.arguments()
        arguments.distributed_state = SimpleNamespace(**place)
        found = getattr(arguments, name)
        return found() if callable(found) else found

    return look


def verbosity(bench: Bench) -> int:
    logging.set_verbosity_warning()
    bench.trainer()
    return logging.get_verbosity()


def callbacks(name: str) -> Proof:
    """Whether a callback of that class hears of the training."""
    return lambda bench: any(type(c).__name__ == name for c in bench.trainer().callback_handler.callbacks)


def tracked(call: str, key: str) -> Proof:
    """An argument of a call of Trackio, by a stand-in for the package; None: it was not called."""

    def look(bench: Bench) -> Any:
        heard: dict[str, dict[str, Any]] = {}
        module = ModuleType("trackio")
        for name in ("init", "log", "finish", "freeze", "sync"):
            setattr(module, name, lambda *_, _name=name, **given: heard.setdefault(_name, given))
        space = SimpleNamespace(get=lambda: heard["init"]["space_id"])
        module.context_vars = SimpleNamespace(current_space_id=space)  # type: ignore[attr-defined]
        module.config = type("Config", (dict,), {"update": lambda *_, **__: None})()  # type: ignore[attr-defined]
        module.__version__ = "99.0"  # type: ignore[attr-defined]
        bench.patch.setitem(sys.modules, "trackio", module)
        bench.patch.setattr("transformers.integrations.integration_utils.is_trackio_available", lambda: True)
        bench.trained()
        return heard.get(call, {}).get(key)

    return look


def eval_batches(bench: Bench) -> int:
    return len(bench.trainer().get_eval_dataloader())


def predicted(bench: Bench) -> str:
    return type(bench.trainer().predict(make_samples(6, seed=1)).predictions).__name__


def gathered_as_objects(bench: Bench) -> set[bool]:
    """How an evaluation gathers."""
    gather, seen = Accelerator.gather_for_metrics, set()

    def gather_for_metrics(self: Accelerator, input_data: Any, use_gather_object: bool = False) -> Any:
        seen.add(use_gather_object)
        return gather(self, input_data, use_gather_object)

    bench.patch.setattr(Accelerator, "gather_for_metrics", gather_for_metrics)
    bench.trainer().evaluate()
    return seen


def moved_to_cpu(bench: Bench) -> int:
    """How often an evaluation moves what it has gathered."""
    move, count = EvalLoopContainer.to_cpu_and_numpy, []

    def to_cpu_and_numpy(self: EvalLoopContainer) -> None:
        count.append(None)
        move(self)

    bench.patch.setattr(EvalLoopContainer, "to_cpu_and_numpy", to_cpu_and_numpy)
    bench.trainer().evaluate()
    return len(count)


def metrics_computed(look: Callable[[EvalPrediction, Any], Any]) -> Proof:
    """What ``compute_metrics`` gets, call by call."""

    def found(bench: Bench) -> list[Any]:
        seen = []

        def compute_metrics(prediction: EvalPrediction, compute_result: bool | None = None) -> dict[str, float]:
            seen.append(look(prediction, compute_result))
            return {}

        bench.trainer(compute_metrics=compute_metrics).evaluate()
        return seen

    return found


def stopped_by_a_signal(bench: Bench) -> tuple[int, list[str]]:
    """The steps and the checkpoints of a training that gets SIGTERM in its second step of four."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

    class Terminate(TrainerCallback):
        def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
            if state.global_step == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    def at_once(_: float, act: Callable[[], None]) -> Any:  # instead of three seconds later
        return SimpleNamespace(start=act)

    bench.patch.setattr("transformers.trainer_jit_checkpoint.threading.Timer", at_once)
    trainer = bench.trained(callbacks=[Terminate()])
    return trainer.state.global_step, sorted(path.name for path in bench.folder.glob("checkpoint-*"))


class Hub:
    """A stand-in for the Hub: what is asked of it."""

    def __init__(self, is_slow: bool) -> None:
        self.created: list[dict[str, Any]] = []
        self.uploaded: list[dict[str, Any]] = []
        self.is_slow = is_slow

    def create_repo(self, name: str, **given: Any) -> Any:
        self.created.append({"name": name, **given})
        return SimpleNamespace(repo_id=name)

    def upload_folder(self, **given: Any) -> Future[None]:
        self.uploaded.append(given)
        future: Future[None] = Future()
        if not self.is_slow:
            future.set_result(None)
        return future


def hub(look: Callable[[Hub], Any], is_slow: bool = False) -> Proof:
    """What a training with a checkpoint a step asks of the Hub."""

    def found(bench: Bench) -> Any:
        stand = Hub(is_slow)
        bench.patch.setattr("transformers.trainer.hf_api", lambda: stand)
        bench.patch.setattr("transformers.utils.hub.PushInProgress.wait_until_done", lambda _: None)
        bench.trained()
        return look(stand)

    return found


def created(name: str) -> Proof:
    return hub(lambda stand: stand.created[0][name])


def is_deterministic(bench: Bench) -> bool:
    torch.use_deterministic_algorithms(False)
    bench.trained()
    return torch.are_deterministic_algorithms_enabled()


def device(bench: Bench) -> str:
    """Where a process trains whose machine has another device than its CPU."""
    bench.patch.setenv("ACCELERATE_TORCH_DEVICE", "meta")
    return bench.arguments().device.type


def sample_order(bench: Bench) -> list[int]:
    return list(bench.trainer()._get_train_sampler())


def loader(look: Callable[[Any], Any]) -> Proof:
    return lambda bench: look(bench.trainer().get_train_dataloader())


def trained_by_workers(bench: Bench) -> set[bool]:
    """Whether samples were put together outside this process."""
    here, seen = os.getpid(), set()
    trainer = bench.trainer()
    collate = trainer.data_collator
    trainer.data_collator = lambda samples: collate(samples) | {"sample_ids": torch.full((len(samples), 16), _pid())}
    for batch in trainer.get_train_dataloader():
        seen.add(int(batch["sample_ids"][0, 0]) != here)
    return seen


def _pid() -> int:
    return os.getpid()


def ddp(name: str) -> Proof:
    """A keyword of ``DistributedDataParallel``, as Accelerate would pass it on."""
    return lambda bench: bench.trainer().accelerator.ddp_handler.to_kwargs().get(name)


def process_group(name: str) -> Proof:
    """How processes are told to find each other; here is one."""

    def look(bench: Bench) -> Any:
        heard = {}

        def record(**given: Any) -> PartialState:
            heard.update(given)
            return PartialState(cpu=True)

        record._shared_state = {}  # type: ignore[attr-defined]
        bench.patch.setattr("transformers.training_args.PartialState", record)
        bench.arguments()
        return heard.get(name)

    return look


def sharded(bench: Bench) -> dict[str, Any] | None:
    """What is asked of FSDP."""
    arguments = bench.arguments()
    assert arguments.is_sharded == (arguments.fsdp_plugin_args is not None)
    return arguments.fsdp_plugin_args and {
        name: arguments.fsdp_plugin_args[name] for name in ("fsdp_version", "reshard_after_forward")
    }


def watched_modules(bench: Bench) -> int:
    """How many modules of a student are watched in a training."""
    return sum(bool(module._forward_hooks) for module in bench.trained().model.modules())


# ----- The table.


@dataclass(frozen=True)
class Row:
    """A field that acts.

    Attributes:
        value: other than the field's default.
        proof: what is seen with it differs from what is seen with the default.
        expected: what is seen.
        given: arguments that the field needs beside it.
    """

    value: Any
    proof: Proof
    expected: Any = ANOTHER
    given: dict[str, Any] = field(default_factory=dict)


ADAM = {"optim": "adamw_torch", "learning_rate": 1e-3}
SAVED = {"save_strategy": "steps", "save_steps": 1}
MEASURED = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 4}
PUSHED = {**SAVED, "push_to_hub": True}
TRACKED = {"report_to": "trackio"}
TWO_EPOCHS = {"max_steps": 4, "logging_steps": 1}
SECOND_NODE = {"process_index": 4, "local_process_index": 0}
REPLICA = {"process_index": 1, "local_process_index": 1}
BEST = {**MEASURED, **SAVED, "greater_is_better": True}  # the first one is best so: the loss only falls
WORKER = {"dataloader_num_workers": 1}

HONOURED = {
    "output_dir": Row("elsewhere", lambda bench: bench.trained().args.output_dir, "elsewhere"),
    # The optimiser and its steps.
    "per_device_train_batch_size": Row(2, state("epoch"), 0.5),
    "num_train_epochs": Row(1, state("global_step"), 2, {"max_steps": -1}),
    "max_steps": Row(3, state("global_step"), 3),
    "learning_rate": Row(0.25, learning_rates, [0.25, 0.25]),
    "lr_scheduler_type": Row("constant", learning_rates, [0.5, 0.5]),
    "lr_scheduler_kwargs": Row(
        {"power": 2.0}, learning_rates, pytest.approx([0.5, 0.125], abs=1e-6), {"lr_scheduler_type": "polynomial"}
    ),
    "warmup_steps": Row(2, learning_rates, [0.0, 0.25], {"lr_scheduler_type": "constant_with_warmup"}),
    "optim": Row("adagrad", optimizer_class, "Adagrad"),
    "optim_args": Row("momentum=0.9", student),
    "weight_decay": Row(0.5, student),
    "adam_beta1": Row(0.5, student, given=ADAM),
    "adam_beta2": Row(0.5, student, given=ADAM),
    "adam_epsilon": Row(0.1, student, given=ADAM),
    "optim_target_modules": Row(["q_proj"], low_rank_groups, [2], {"optim": "galore_adamw"}),
    "gradient_accumulation_steps": Row(2, state("epoch"), 2.0),
    "max_grad_norm": Row(1e-3, student),
    # Precision and memory.
    "bf16": Row(True, products, torch.bfloat16),
    "tf32": Row(True, tf32_set_to, [True]),
    "activation_checkpointing": Row(True, recomputed, [2, 2], {"max_steps": 1, "per_device_train_batch_size": 8}),
    "activation_checkpointing_kwargs": Row(
        {"every_n_layers": 2}, recomputed, [2, 1],
        {"activation_checkpointing": True, "max_steps": 1, "per_device_train_batch_size": 8},
    ),
    "gradient_checkpointing": Row(True, recomputed, [2, 2], {"max_steps": 1, "per_device_train_batch_size": 8}),
    "gradient_checkpointing_kwargs": Row(
        {"every_n_layers": 2}, recomputed, [2, 1],
        {"gradient_checkpointing": True, "max_steps": 1, "per_device_train_batch_size": 8},
    ),
    "torch_empty_cache_steps": Row(1, calls("transformers.trainer.clear_device_cache"), 2),
    "auto_find_batch_size": Row(True, batch_size_found, 2, {"per_device_train_batch_size": 4}),
    # The log.
    "logging_strategy": Row("epoch", logged_steps, [2, 4], TWO_EPOCHS),
    "logging_steps": Row(2, logged_steps, [2]),
    "logging_first_step": Row(True, logged_steps, [1, 2, 4], {"max_steps": 4, "logging_steps": 2}),
    "log_on_each_node": Row(False, on_another_process("should_log", **SECOND_NODE), False),
    "include_num_input_tokens_seen": Row("all", counted_tokens),
    "log_level": Row("error", verbosity, 40),
    "log_level_replica": Row("info", on_another_process("get_process_log_level", **REPLICA), 20),
    "disable_tqdm": Row(True, callbacks("PrinterCallback"), True),
    "report_to": Row("trackio", tracked("init", "project"), "huggingface"),
    "run_name": Row("mine", tracked("init", "name"), "mine", TRACKED),
    "project": Row("mine", tracked("init", "project"), "mine", TRACKED),
    "trackio_space_id": Row("me/space", tracked("init", "space_id"), "me/space", TRACKED),
    "trackio_bucket_id": Row("me/bucket", tracked("init", "bucket_id"), "me/bucket", TRACKED),
    "trackio_static_space_id": Row(
        "me/static", tracked("freeze", "new_space_id"), "me/static", {**TRACKED, "trackio_space_id": "me/space"}
    ),
    "skip_memory_metrics": Row(False, logs("train_mem_cpu_alloc_delta"), True),
    # Evaluation.
    "eval_strategy": Row("epoch", evaluated_steps, [2]),
    "eval_steps": Row(2, evaluated_steps, [2, 4], {**MEASURED, "logging_steps": 1}),
    "eval_delay": Row(3, evaluated_steps, [3, 4], MEASURED),
    "per_device_eval_batch_size": Row(2, eval_batches, 3),
    "prediction_loss_only": Row(True, predicted, "NoneType"),
    "eval_on_start": Row(True, evaluated_steps, [0, 1, 2, 3, 4], MEASURED),
    "eval_do_concat_batches": Row(False, predicted, "list"),
    "eval_use_gather_object": Row(True, gathered_as_objects, {True}),
    "eval_accumulation_steps": Row(1, moved_to_cpu),
    "include_for_metrics": Row(["inputs"], metrics_computed(lambda found, _: found.inputs is not None), [True]),
    "batch_eval_metrics": Row(
        True, metrics_computed(lambda _, is_last: is_last), [False, False, True], {"per_device_eval_batch_size": 2}
    ),
    # Checkpoints.
    "save_only_model": Row(True, checkpoint_without_optimizer, True, SAVED),
    "save_strategy": Row("epoch", checkpoints, ["checkpoint-2", "checkpoint-4"], TWO_EPOCHS),
    "save_steps": Row(3, checkpoints, ["checkpoint-3", "checkpoint-4"], {"save_strategy": "steps", "max_steps": 4}),
    "save_on_each_node": Row(True, on_another_process("should_save", **SECOND_NODE), True),
    "save_total_limit": Row(1, checkpoints, ["checkpoint-2"], SAVED),
    "enable_jit_checkpoint": Row(
        True, stopped_by_a_signal, (2, ["checkpoint-2"]), {"max_steps": 4, "gradient_accumulation_steps": 2}
    ),
    "load_best_model_at_end": Row(True, student, given=BEST),
    "metric_for_best_model": Row("kl_nats", state("best_global_step"), 1, BEST),
    "greater_is_better": Row(
        True, state("best_global_step"), 1, {**MEASURED, **SAVED, "metric_for_best_model": "loss"}
    ),
    # The Hub.
    "push_to_hub": Row(True, hub(lambda stand: len(stand.uploaded)), 2, SAVED),
    "hub_model_id": Row("me/student", created("name"), "me/student", PUSHED),
    "hub_token": Row("secret", created("token"), "secret", PUSHED),
    "hub_private_repo": Row(True, created("private"), True, PUSHED),
    "hub_strategy": Row(
        "checkpoint", hub(lambda stand: [upload.get("path_in_repo") for upload in stand.uploaded]),
        [None, "last-checkpoint"] * 2, PUSHED,
    ),
    "hub_always_push": Row(True, hub(lambda stand: len(stand.uploaded), is_slow=True), 2, PUSHED),
    "hub_revision": Row("branch", hub(lambda stand: stand.uploaded[0]["revision"]), "branch", PUSHED),
    # Seeds and devices.
    "full_determinism": Row(True, is_deterministic, True),
    "seed": Row(5, student),
    "data_seed": Row(5, student),
    "use_cpu": Row(True, device, "cpu"),
    "accelerator_config": Row(
        {"non_blocking": True}, lambda bench: bench.trainer().accelerator.dataloader_config.non_blocking, True
    ),
    # The data loader.
    "dataloader_drop_last": Row(True, loader(len), 2, {"per_device_train_batch_size": 3}),
    "dataloader_num_workers": Row(1, trained_by_workers, {True}),
    "dataloader_pin_memory": Row(False, loader(lambda found: found.pin_memory), False, {"use_cpu": False}),
    "dataloader_persistent_workers": Row(True, loader(lambda found: found.persistent_workers), True, WORKER),
    "dataloader_prefetch_factor": Row(7, loader(lambda found: found.prefetch_factor), 7, WORKER),
    "dataloader_multiprocessing_context": Row(
        "spawn", loader(lambda found: type(found.multiprocessing_context).__name__), "SpawnContext", WORKER,
    ),
    "train_sampling_strategy": Row("sequential", sample_order, list(range(8))),
    # Several processes.
    "ddp_find_unused_parameters": Row(False, ddp("find_unused_parameters")),
    "ddp_bucket_cap_mb": Row(3, ddp("bucket_cap_mb"), 3),
    "ddp_broadcast_buffers": Row(False, ddp("broadcast_buffers"), False),
    "ddp_static_graph": Row(True, ddp("static_graph"), True),
    "ddp_backend": Row("gloo", process_group("backend"), "gloo"),
    "ddp_timeout": Row(
        7, lambda bench: process_group("timeout")(bench).total_seconds(), 7, {"use_cpu": False}
    ),
    "fsdp": Row(True, sharded, {"fsdp_version": 2, "reshard_after_forward": True}),
    "fsdp_config": Row(
        {"reshard_after_forward": False}, sharded, {"fsdp_version": 2, "reshard_after_forward": False}, {"fsdp": True}
    ),
    "debug": Row("underflow_overflow", watched_modules),
}  # fmt: skip

REFUSED = {
    "fp16": True,
    "fp16_full_eval": True,
    "bf16_full_eval": True,
    "torch_compile": True,
    "torch_compile_backend": "inductor",
    "torch_compile_mode": "default",
    "use_liger_kernel": True,
    "liger_kernel_config": {"rope": True},
    "parallelism_config": ParallelismConfig(tp_size=2),
    "use_cache": True,
    "label_smoothing_factor": 0.1,
    "average_tokens_across_devices": False,
    "neftune_noise_alpha": 5.0,
    "train_sampling_strategy": "group_by_length",
    "length_column_name": "n_tokens",
    "label_names": ["labels"],
    "remove_unused_columns": False,
    "ignore_data_skip": True,
    "restore_callback_states_from_checkpoint": False,
    "logging_nan_inf_filter": True,
    "dataloader_in_order": False,
    "include_num_input_tokens_seen": "non_padding",
    "accelerator_config": {"split_batches": True},
    "per_device_train_batch_size": 0,
    "gradient_accumulation_steps": 0,
    "num_train_epochs": 0.0,
    "max_steps": 0,
    "learning_rate": float("nan"),
    "dataloader_num_workers": -1,
    "logging_steps": 0,
    "save_steps": 0,
}

NOT_OURS = {
    "do_train": (True, "Transformers' example scripts"),
    "do_eval": (True, "Transformers' example scripts"),
    "do_predict": (True, "Transformers' example scripts"),
    "resume_from_checkpoint": ("checkpoint-1", "scripts, which hand it to train()"),
    "local_rank": (3, "torch.distributed.launch of old; a process finds its rank in the environment"),
}

# Proved in a file of its own, where the package is installed.
ELSEWHERE = {"deepspeed": "test_zero.py"}


def names_of(arguments: type) -> set[str]:
    return {each.name for each in fields(arguments) if each.init}


def default_of(name: str) -> Any:
    """The default of DistillArguments."""
    (found,) = (each for each in fields(DistillArguments) if each.name == name)
    return found.default if found.default is not MISSING else found.default_factory()  # type: ignore[misc]


def test_every_field_is_decided() -> None:
    decided = HONOURED.keys() | REFUSED.keys() | NOT_OURS.keys() | ELSEWHERE.keys()
    new = names_of(TrainingArguments) - decided
    assert not new, (
        f"transformers.TrainingArguments has fields that nobody decided about: {sorted(new)}. Add each to HONOURED "
        "with a proof that it acts, to REFUSED here and in selkd.recipe.training, or to NOT_OURS with its reader."
    )
    assert not decided - names_of(TrainingArguments), "fields that this version of Transformers lacks"
    assert not NOT_OURS.keys() & (HONOURED.keys() | REFUSED.keys())


@pytest.mark.parametrize("name", HONOURED)
def test_a_field_acts(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = HONOURED[name]
    monkeypatch.chdir(tmp_path)
    seen = []
    for folder, value in (("default", default_of(name)), ("changed", row.value)):
        given = {**row.given} if name == "output_dir" and value is None else {**row.given, name: value}
        with monkeypatch.context() as patch:
            seen.append(row.proof(Bench(tmp_path / folder, patch, **given)))
    by_default, changed = seen
    assert by_default != changed, f"{name}={row.value!r} does what {default_of(name)!r} does"
    if row.expected is not ANOTHER:
        assert changed == row.expected


@pytest.mark.parametrize("name", REFUSED)
def test_a_field_that_is_not_honoured_is_refused_by_its_name(name: str, tmp_path: Path) -> None:
    neutral = DistillArguments(output_dir=str(tmp_path), use_cpu=True, **{name: default_of(name)})
    assert neutral is not None
    with pytest.raises(InputError, match=rf"\b{name}\b.*(can't be honoured|expected)"):
        DistillArguments(output_dir=str(tmp_path), use_cpu=True, **{name: REFUSED[name]})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("adam_beta1", 5.0),
        ("adam_beta2", float("nan")),
        ("adam_epsilon", float("nan")),
        ("weight_decay", float("nan")),
        ("max_grad_norm", float("nan")),
        ("save_total_limit", -4),
        ("warmup_steps", 2.7),
        ("max_steps", 10**15),
        ("per_device_train_batch_size", 10**9),
        ("dataloader_prefetch_factor", 2),
        ("gradient_checkpointing_kwargs", {"x": 1}),
        ("accelerator_config", {"x": 1}),
    ],
)
def test_a_value_that_would_fail_late_or_change_nothing_is_refused_by_its_key(
    name: str, value: Any, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=rf"{name}\b"):
        DistillArguments(output_dir=str(tmp_path), use_cpu=True, **{name: value})


def test_a_schedule_that_cant_be_made_is_told_by_trying_it(tmp_path: Path) -> None:
    given = {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycles": 2}}
    DistillArguments(output_dir=str(tmp_path), use_cpu=True, **given).try_optimiser()
    given["lr_scheduler_kwargs"] = {"cycles": 2}
    with pytest.raises(TypeError, match="cycles"):
        DistillArguments(output_dir=str(tmp_path), use_cpu=True, **given).try_optimiser()


@pytest.mark.parametrize("name", NOT_OURS)
def test_what_others_read_changes_nothing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    value, _ = NOT_OURS[name]
    plain = Bench(tmp_path / "plain", monkeypatch, **SAVED).trained()
    given = Bench(tmp_path / "given", monkeypatch, **SAVED, **{name: value}).trained()
    assert digest(plain.model) == digest(given.model)
    assert without_times(plain) == without_times(given)
    assert {p.name for p in (tmp_path / "plain").rglob("*")} == {p.name for p in (tmp_path / "given").rglob("*")}


def without_times(trainer: DistillTrainer) -> list[dict[str, Any]]:
    timed = ("runtime", "per_second", "seconds", "preparation_time")
    return [
        {name: value for name, value in entry.items() if not name.endswith(timed)}
        for entry in trainer.state.log_history
    ]


# ----- The Trainer's parameters.


@dataclass(frozen=True)
class Parameter:
    """A parameter of ``Trainer`` that acts: what is seen with ``value`` differs from what is seen without it."""

    value: Callable[[Bench], Any]
    look: Callable[[DistillTrainer], Any]
    expected: Any = ANOTHER


class Counter(TrainerCallback):
    steps = 0

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.steps += 1


def trained_student(trainer: DistillTrainer) -> str:
    trainer.train()
    return digest(trainer.model)


def adagrad_of(trainer: DistillTrainer) -> str:
    trainer.train()
    return type(trainer.optimizer.optimizer).__name__


def steps_heard(trainer: DistillTrainer) -> int:
    trainer.train()
    return sum(callback.steps for callback in trainer.callback_handler.callbacks if isinstance(callback, Counter))


def pads_saved(trainer: DistillTrainer) -> str:
    trainer.save_model()
    return (Path(trainer.args.output_dir) / "tokenizer_config.json").read_text()


def other_tokenizer(_: Bench) -> Any:
    tokenizer = make_tokenizer()
    tokenizer.pad_token = "<unk>"
    return tokenizer


def given_optimizer(_: Bench) -> Any:
    return torch.optim.Adagrad, {"lr": 0.1}


PARAMETERS = {
    "model": Parameter(lambda _: make_model(2), trained_student),
    "args": Parameter(lambda bench: bench.arguments(max_steps=3), lambda trainer: trainer.train().global_step, 3),
    "train_dataset": Parameter(lambda _: make_samples(8, seed=5), trained_student),
    "eval_dataset": Parameter(lambda _: make_samples(6, seed=5), lambda trainer: trainer.evaluate()["eval_loss"]),
    "processing_class": Parameter(other_tokenizer, pads_saved),
    "model_init": Parameter(lambda _: lambda: make_model(2), trained_student),
    "compute_metrics": Parameter(
        lambda _: lambda found: {"rows": len(found.label_ids)}, lambda trainer: trainer.evaluate().get("eval_rows"), 6
    ),
    "callbacks": Parameter(lambda _: [Counter()], steps_heard, 2),
    "optimizers": Parameter(lambda _: None, adagrad_of, "Adagrad"),
    "optimizer_cls_and_kwargs": Parameter(given_optimizer, adagrad_of, "Adagrad"),
    "preprocess_logits_for_metrics": Parameter(
        lambda _: lambda logits, _: logits.argmax(-1),
        lambda trainer: trainer.predict(make_samples(6)).predictions.ndim,
        2,
    ),
}
REFUSED_PARAMETERS = {"data_collator": lambda rows: rows, "compute_loss_func": lambda *_: 0.0}


def test_every_parameter_of_the_trainer_is_decided() -> None:
    existing = set(inspect.signature(Trainer.__init__).parameters) - {"self"}
    decided = PARAMETERS.keys() | REFUSED_PARAMETERS.keys()
    new = existing - decided
    assert not new, (
        f"transformers.Trainer has parameters that nobody decided about: {sorted(new)}. Add each to PARAMETERS with a "
        "proof that it acts, or to REFUSED_PARAMETERS here and to DistillTrainer."
    )
    assert not decided - existing, "parameters that this version of Transformers lacks"


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_parameter_acts(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = PARAMETERS[name]
    by_default = row.look(Bench(tmp_path / "default", monkeypatch).trainer())
    bench = Bench(tmp_path / "changed", monkeypatch)
    given: dict[str, Any] = {name: row.value(bench)}
    if name == "optimizers":  # of this student's own weights
        model = make_model(1)
        given = {"model": model, name: (torch.optim.Adagrad(model.parameters()), None)}
    changed = row.look(bench.trainer(**given))
    assert changed != by_default
    if row.expected is not ANOTHER:
        assert changed == row.expected


@pytest.mark.parametrize("name", REFUSED_PARAMETERS)
def test_a_parameter_is_refused_by_its_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(tmp_path, monkeypatch)
    bench.trainer(**{name: None})
    with pytest.raises(InputError, match=f"^{name}: "):
        bench.trainer(**{name: REFUSED_PARAMETERS[name]})


# ----- What one row a field can't say.


@pytest.mark.parametrize("value", ["no", False, "all", True])
def test_tokens_are_counted_or_not(value: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is computed: padding and fillers, too."""
    samples = make_samples(7)
    bench = Bench(tmp_path, monkeypatch, include_num_input_tokens_seen=value)
    trainer = bench.trainer(train_dataset=samples)
    computed = np.cumsum([batch["input_ids"].numel() for batch in trainer.get_train_dataloader()]).tolist()
    trainer.train()
    found = [entry.get("num_input_tokens_seen") for entry in trainer.state.log_history if "loss" in entry]
    assert found == (computed if value in ("all", True) else [None, None])


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ({"split_batches": True}, "split_batches"),
        ({"dispatch_batches": True}, "dispatch_batches"),
        ({"even_batches": False}, "even_batches"),
        ({"use_seedable_sampler": False}, "use_seedable_sampler"),
    ],
)
def test_accelerators_own_configuration_is_refused_by_name(config: dict[str, Any], key: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"accelerator_config\.{key}: "):
        DistillArguments(output_dir=str(tmp_path), use_cpu=True, accelerator_config=config)


def test_accelerators_own_configuration_acts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def synchronised(**config: Any) -> bool:
        bench = Bench(tmp_path, monkeypatch, accelerator_config={"gradient_accumulation_kwargs": config})
        return bench.trainer().accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False)

    assert synchronised(sync_each_batch=True)
    assert not synchronised()
    accumulated = Bench(tmp_path, monkeypatch, accelerator_config={"gradient_accumulation_kwargs": {"num_steps": 2}})
    assert accumulated.trained().state.epoch == 2
    configured = PartialState(cpu=True)
    arguments = Bench(tmp_path, monkeypatch, accelerator_config={"use_configured_state": True}).arguments()
    assert arguments.distributed_state.__dict__ is configured.__dict__


def test_a_checkpoint_on_a_signal_goes_on_as_if_there_had_been_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is written between steps: amid one, the step's positions and scores would count twice."""
    options = {
        "max_steps": 4, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2,
        "positions": {"policy": "gls", "fraction": 0.3, "queue_size": 60}, "enable_jit_checkpoint": True,
    }  # fmt: skip
    straight = Bench(tmp_path / "straight", monkeypatch, **options).trained()
    stopped_by_a_signal(Bench(tmp_path / "stopped", monkeypatch, **options))
    resumed = Bench(tmp_path / "resumed", monkeypatch, **options).trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "stopped" / "checkpoint-2"))
    assert digest(straight.model) == digest(resumed.model)
    assert vars(straight.totals) == vars(resumed.totals)
    assert np.array_equal(straight.queue.scores, resumed.queue.scores)


def test_a_process_trains_on_one_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DataParallel over several would split the loss wrongly."""
    bench = Bench(tmp_path, monkeypatch)
    arguments = bench.arguments()
    arguments._n_gpu = 4
    assert (arguments.n_gpu, arguments.train_batch_size, arguments.eval_batch_size) == (1, 4, 8)
    assert arguments.parallel_mode.value == "not_parallel"
    trainer = bench.trainer(args=arguments)
    trainer.train()
    assert trainer.model_wrapped is trainer.model
    arguments._n_gpu = 0
    assert (arguments.n_gpu, arguments.train_batch_size) == (0, 4)


def test_a_key_of_data_beside_the_others_is_refused_with_where_it_belongs(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"max_length, packing belong in data; give data=\{'max_length': …, 'packing'"):
        DistillArguments(output_dir=str(tmp_path), packing=False, max_length=64)  # type: ignore[call-arg]
    args = DistillArguments(output_dir=str(tmp_path), use_cpu=True, data={"packing": False})
    assert copy.deepcopy(args).data == args.data
    assert pickle.loads(pickle.dumps(args)).data == args.data


def test_an_optimiser_that_is_missing_is_missed_by_the_training_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Arguments may be made to estimate what a training would need."""
    monkeypatch.setattr("selkd.recipe.packages.is_installed", lambda _: False)
    arguments = DistillArguments(output_dir=str(tmp_path), use_cpu=True, optim="adamw_bnb_8bit")
    for refuse in (arguments.try_optimiser, lambda: DistillTrainer("none", "none", arguments, processing_class=1)):
        with pytest.raises(InputError, match=r"optim: adamw_bnb_8bit needs the package bitsandbytes"):
            refuse()

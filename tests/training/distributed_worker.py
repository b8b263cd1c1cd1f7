"""One process of a distributed run, started by torchrun. Usage: distributed_worker.py OUT STRATEGY RECIPE_JSON [COUNT]

``evaluate``: DistillTrainer measures COUNT samples, and predicts them. ``ddp``: it trains, from the cache in
OUT if there is one, on COUNT samples if that is given. ``fsdp2``: the same
student and loss under ``fully_shard`` (Accelerate shards on accelerators only), whose gradients then take the same
plain SGD step.
"""

import json
import sys
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny import V, make_arguments, make_model, make_prompts, make_samples, make_tokenizer
from torch import distributed as dist
from torch.distributed.fsdp import fully_shard

from selkd import DistillTrainer
from selkd.data.collate import collate
from selkd.data.samples import SampleDataset
from selkd.recipe.choices import ClassOptions
from selkd.selection.positions import step_context
from selkd.teacher.live import LiveTeacher
from selkd.training.arguments import DistillArguments
from selkd.training.student import bind_distillation
from selkd_cache import TeacherCache


def ddp(out: Path, arguments: DistillArguments) -> None:
    samples = make_samples(7) if arguments.on_policy is None else SampleDataset.from_samples(make_prompts(7))
    trainer = DistillTrainer(
        model=make_model(1),
        teacher=TeacherCache.open(out / "cache") if (out / "cache").is_dir() else make_model(0, layers=3),
        args=arguments,
        train_dataset=make_samples(int(sys.argv[4])) if len(sys.argv) > 4 else samples,
        processing_class=make_tokenizer(),
    )
    trainer.train()
    if trainer.is_world_process_zero():
        save_file(
            {name: p.detach().clone() for name, p in trainer.model.named_parameters()}, out / "weights.safetensors"
        )
        answer = {
            "log": trainer.state.log_history[-2],  # the last step's; the training's summary follows
            "totals": vars(trainer.totals),
            "world": trainer.args.world_size,
            "rollouts": None if trainer.answering is None else trainer.rollouts.figures(),
            "queue": None if trainer.queue is None else trainer.queue.scores.tolist(),
        }
        (out / "answer.json").write_text(json.dumps(answer))


def evaluate(out: Path, arguments: DistillArguments) -> None:
    samples = make_samples(int(sys.argv[4]))
    trainer = DistillTrainer(
        model=make_model(1),
        teacher=make_model(0, layers=3),
        args=arguments,
        eval_dataset=samples,
        processing_class=make_tokenizer(),
    )
    metrics, predicted = trainer.evaluate(), trainer.predict(samples)
    if trainer.is_world_process_zero():
        answer = {
            "metrics": metrics,
            "world": trainer.args.world_size,
            "labels": predicted.label_ids.tolist(),
            "shape": predicted.predictions.shape,
        }
        (out / "answer.json").write_text(json.dumps(answer))


def fsdp2(out: Path, arguments: DistillArguments) -> None:  # the arguments have set the process group up
    student = make_model(1)
    bind_distillation(student, V)
    for layer in student.model.layers:
        fully_shard(layer)
    fully_shard(student)
    objective = arguments.objective
    samples = list(make_samples(7))
    mine = collate(samples[dist.get_rank() :: dist.get_world_size()], 1)
    context = step_context(objective.positions, 0, 1)
    teacher = LiveTeacher(make_model(0, layers=3), ClassOptions.model_validate({}), 1.0, 11, V)
    normaliser = sum(objective.normaliser(collate([s], 1), context) for s in samples)
    loss = partial(objective, batch=mine, teacher=teacher.targets(mine, 0), context=context, normaliser=normaliser)
    outputs = student(input_ids=mine["input_ids"], position_ids=mine["position_ids"], distillation=loss)
    (outputs["loss"] * dist.get_world_size()).backward()  # FSDP averages gradients over the ranks
    stepped = {
        name: (p.full_tensor() - arguments.learning_rate * p.grad.full_tensor()).detach()
        for name, p in student.named_parameters()
    }
    total = outputs["loss"].detach().clone()
    dist.all_reduce(total)
    if dist.get_rank() == 0:
        save_file(stepped, out / "weights.safetensors")
        answer = {"log": {"loss": total.item()}, "world": dist.get_world_size()}
        (out / "answer.json").write_text(json.dumps(answer))


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, strategy, recipe = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2} | recipe
    strategies = {"ddp": ddp, "evaluate": evaluate, "fsdp2": fsdp2}
    strategies[strategy](folder, make_arguments(folder, **options, ddp_backend="gloo"))
    dist.barrier()
    dist.destroy_process_group()

"""FSDP2 over several processes. torchrun --nproc-per-node 2 fsdp2.py TEACHER STUDENT TEXT OUT

The loss is called inside the forward of the module that FSDP wraps: there the head is whole.
"""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import pad
from transformers import AutoModelForCausalLM, AutoTokenizer

import selkd


class Student(nn.Module):
    """A causal language model whose forward returns the distillation's loss."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, targets: Tensor, teacher: dict[str, Any], **options: Any) -> Tensor:
        hidden_states = self.model.get_decoder()(input_ids).last_hidden_state
        positions = {"metric": "student_entropy", "fraction": 0.2}
        return selkd.distillation_loss(hidden_states, self.model, teacher, targets, positions=positions, **options).loss


def main(teacher_path: str, student_path: str, text: str, out: str) -> list[float]:
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    teacher = AutoModelForCausalLM.from_pretrained(teacher_path).eval()
    student = Student(AutoModelForCausalLM.from_pretrained(student_path))
    for layer in student.model.get_decoder().layers:
        fully_shard(layer)
    fully_shard(student)
    tokens = AutoTokenizer.from_pretrained(teacher_path)(Path(text).read_text())["input_ids"]
    windows = torch.tensor(tokens[: len(tokens) // 64 * 64]).view(-1, 64)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    losses = []
    for step, whole in enumerate(windows.split(2 * ranks)[: len(windows) // (2 * ranks)]):
        input_ids = whole.chunk(ranks)[rank]
        targets = pad(input_ids[:, 1:], (0, 1), value=-100)
        with torch.no_grad():
            known = {"hidden_states": teacher.get_decoder()(input_ids).last_hidden_state, "lm_head": teacher}
        loss = student(input_ids, targets, known, step=step)
        loss.backward()  # FSDP averages the gradients of the ranks
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(total.item() / ranks)
    weights = get_model_state_dict(student, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        whole_student = AutoModelForCausalLM.from_pretrained(student_path)
        whole_student.load_state_dict({name.removeprefix("model."): value for name, value in weights.items()})
        whole_student.save_pretrained(out)
        print(losses)
    dist.destroy_process_group()
    return losses


if __name__ == "__main__":
    main(*sys.argv[1:])

"""A plain PyTorch loop that distils where the student is least sure. python plain_loop.py TEACHER STUDENT TEXT OUT"""

import sys
from pathlib import Path

import torch
from torch.nn.functional import pad
from transformers import AutoModelForCausalLM, AutoTokenizer

import selkd


def main(teacher_path: str, student_path: str, text: str, out: str) -> list[float]:
    teacher = AutoModelForCausalLM.from_pretrained(teacher_path).eval()
    student = AutoModelForCausalLM.from_pretrained(student_path)
    tokens = AutoTokenizer.from_pretrained(teacher_path)(Path(text).read_text())["input_ids"]
    windows = torch.tensor(tokens[: len(tokens) // 64 * 64]).view(-1, 64)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    losses = []
    for step, input_ids in enumerate(windows.split(4)):
        targets = pad(input_ids[:, 1:], (0, 1), value=-100)  # index t is about token t + 1
        with torch.no_grad():
            known = {"hidden_states": teacher.get_decoder()(input_ids).last_hidden_state, "lm_head": teacher}
        hidden_states = student.get_decoder()(input_ids).last_hidden_state
        result = selkd.distillation_loss(
            hidden_states, student, known, targets, positions={"metric": "student_entropy", "fraction": 0.2}, step=step
        )
        result.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(result.loss.item())
    student.save_pretrained(out)
    return losses


if __name__ == "__main__":
    print(main(*sys.argv[1:]))

"""Your own ``transformers.Trainer``: only ``compute_loss`` changes. python own_trainer.py TEACHER STUDENT TEXT OUT"""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import selkd


class SelectiveTrainer(Trainer):
    """Trains ``model`` towards ``teacher`` at a tenth of the positions, with cross-entropy beside."""

    def __init__(self, *args: Any, teacher: nn.Module, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.teacher = teacher.eval().to(self.args.device)
        self.model_accepts_loss_kwargs = False  # the Trainer divides by the number of micro-batches of a step

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        targets = pad(inputs["labels"][:, 1:], (0, 1), value=-100)  # the Trainer's labels stand at their own token
        body = {name: inputs[name] for name in ("input_ids", "attention_mask") if name in inputs}
        with torch.no_grad():
            hidden = self.teacher.get_decoder()(**body).last_hidden_state
        result = selkd.distillation_loss(
            model.get_decoder()(**body).last_hidden_state,
            model,
            {"hidden_states": hidden, "lm_head": self.teacher},
            targets,
            criterion={"name": "forward_kl", "kd_weight": 0.9},
            positions={"metric": "student_entropy", "fraction": 0.1},
            step=self.state.global_step,
        )
        return (result.loss, result._asdict()) if return_outputs else result.loss


def main(teacher: str, student: str, text: str, out: str) -> list[float]:
    tokens = AutoTokenizer.from_pretrained(teacher)(Path(text).read_text())["input_ids"]
    windows = [tokens[i : i + 64] for i in range(0, len(tokens) - 63, 64)]
    trainer = SelectiveTrainer(
        model=AutoModelForCausalLM.from_pretrained(student),
        teacher=AutoModelForCausalLM.from_pretrained(teacher),
        args=TrainingArguments(out, max_steps=6, logging_steps=1, learning_rate=1e-3, use_cpu=True, report_to="none"),
        train_dataset=[{"input_ids": window, "labels": window} for window in windows],
    )
    trainer.train()
    trainer.save_model()
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


if __name__ == "__main__":
    print(main(*sys.argv[1:]))

"""TRL's ``SFTTrainer`` with a teacher: only ``compute_loss`` changes. python trl_sft.py TEACHER STUDENT TEXT OUT"""

import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from torch.nn.functional import pad
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import selkd


class SelectiveSFTTrainer(SFTTrainer):
    """``SFTTrainer`` whose loss is forward KL to ``teacher`` at the 20% of positions with the highest entropy."""

    def __init__(self, *args: Any, teacher: nn.Module, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.teacher = teacher.eval().to(self.args.device)
        self.model_accepts_loss_kwargs = False

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        targets = pad(inputs["labels"][:, 1:], (0, 1), value=-100)
        body = {name: inputs[name] for name in ("input_ids", "attention_mask", "position_ids") if name in inputs}
        with torch.no_grad():
            hidden = self.teacher.get_decoder()(**body).last_hidden_state
        result = selkd.distillation_loss(
            model.get_decoder()(**body).last_hidden_state,
            model,
            {"hidden_states": hidden, "lm_head": self.teacher},
            targets,
            positions={"metric": "student_entropy", "fraction": 0.2},
            step=self.state.global_step,
        )
        return (result.loss, result._asdict()) if return_outputs else result.loss


def main(teacher: str, student: str, text: str, out: str) -> list[float]:
    lines = [line for line in Path(text).read_text().splitlines() if line.strip()]
    trainer = SelectiveSFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(student),
        teacher=AutoModelForCausalLM.from_pretrained(teacher),
        args=SFTConfig(
            out,
            max_steps=6,
            logging_steps=1,
            learning_rate=1e-3,
            max_length=64,
            bf16=False,
            use_cpu=True,
            report_to="none",
        ),
        train_dataset=Dataset.from_dict({"text": lines}),
        processing_class=AutoTokenizer.from_pretrained(teacher),
    )
    trainer.train()
    trainer.save_model()
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


if __name__ == "__main__":
    print(main(*sys.argv[1:]))

"""A plain ``transformers.Trainer`` that learns from a teacher's cache. python cached_trainer.py RUN STUDENT OUT

RUN is the folder of `selkd cache build RECIPE --out RUN`: the teacher ran there, and is not loaded here.
"""

import sys
from typing import Any

from torch import nn
from torch.nn.functional import pad
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

import selkd


class CachedTrainer(Trainer):
    """Trains ``model`` towards the teacher's draws at a fifth of the positions, with cross-entropy beside."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False  # the Trainer divides by the number of micro-batches of a step

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        body = {name: inputs[name] for name in ("input_ids", "position_ids") if name in inputs}
        result = selkd.distillation_loss(
            model.get_decoder()(**body).last_hidden_state,
            model,
            {"class_ids": inputs["teacher_class_ids"], "counts": inputs["teacher_counts"]},
            pad(inputs["labels"][:, 1:], (0, 1), value=-100),  # the Trainer's labels stand at their own token
            inputs["valid_mask"],
            criterion={"name": "forward_kl", "kd_weight": 0.9},
            positions={"metric": "student_entropy", "fraction": 0.2},
            sample_ids=inputs["sample_ids"],
            step=self.state.global_step,
        )
        return (result.loss, result._asdict()) if return_outputs else result.loss


def main(run: str, student: str, out: str) -> list[float]:
    dataset = selkd.TeacherDataset.open(run)
    padding = DataCollatorForSeq2Seq(AutoTokenizer.from_pretrained(student), return_tensors="pt")
    trainer = CachedTrainer(
        model=AutoModelForCausalLM.from_pretrained(student),
        args=TrainingArguments(out, max_steps=6, logging_steps=1, learning_rate=1e-3, use_cpu=True, report_to="none"),
        train_dataset=dataset,
        data_collator=selkd.TeacherCollator(dataset.cache, padding),
    )
    trainer.train()
    trainer.save_model()
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


if __name__ == "__main__":
    print(main(*sys.argv[1:]))

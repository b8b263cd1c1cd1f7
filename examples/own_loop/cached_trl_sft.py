"""TRL's ``SFTTrainer`` that learns from a teacher's cache. python cached_trl_sft.py RUN STUDENT OUT

RUN is the folder of `selkd cache build RECIPE --out RUN`: the teacher ran there, and is not loaded here. The
recipe has `data: {packing: false, …}`, a document a sample.
"""

import sys
from typing import Any

from datasets import Dataset
from torch import nn
from torch.nn.functional import pad
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import selkd
import selkd.errors


class CachedSFTTrainer(SFTTrainer):
    """``SFTTrainer`` whose loss is forward KL to the teacher's draws where the student's entropy is highest."""

    def __init__(self, *args: Any, cache: selkd.TeacherCache, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.data_collator = selkd.TeacherCollator(cache, self.data_collator)
        self.model_accepts_loss_kwargs = False

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        body = {name: inputs[name] for name in ("input_ids", "attention_mask") if name in inputs}
        result = selkd.distillation_loss(
            model.get_decoder()(**body).last_hidden_state,
            model,
            {"class_ids": inputs["teacher_class_ids"], "counts": inputs["teacher_counts"]},
            pad(inputs["labels"][:, 1:], (0, 1), value=-100),
            inputs["valid_mask"],
            positions={"metric": "student_entropy", "fraction": 0.2},
            sample_ids=inputs["sample_ids"],
            step=self.state.global_step,
        )
        return (result.loss, result._asdict()) if return_outputs else result.loss


def main(run: str, student: str, out: str) -> list[float]:
    samples = selkd.TeacherDataset.open(run)
    if samples.is_packed:
        raise selkd.errors.InputError(f"{run}: TRL can't keep packed documents apart; build with data.packing: false")
    trainer = CachedSFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(student),
        cache=samples.cache,
        args=SFTConfig(
            out,
            max_steps=6,
            logging_steps=1,
            learning_rate=1e-3,
            max_length=None,  # the samples are those of the cache, and are not cut
            bf16=False,
            use_cpu=True,
            report_to="none",
        ),
        train_dataset=Dataset.from_list(list(samples)),
        processing_class=AutoTokenizer.from_pretrained(student),
    )
    trainer.train()
    trainer.save_model()
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


if __name__ == "__main__":
    print(main(*sys.argv[1:]))

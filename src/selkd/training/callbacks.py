"""What happens beside the training steps: metrics' file, progress, held-out fidelity every so many steps."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_jit_checkpoint import JITCheckpointCallback

from selkd.files import write_whole
from selkd.training.on_policy import RolloutSums

_KEPT = ("loss", "held_out_", "benchmark_")  # how the names of what is worth a line begin


class StepLines:
    """A file of JSON lines, each with its optimiser ``step``."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self, up_to_step: int | None = None) -> list[dict[str, Any]]:
        """The lines of the steps up to one; a last line that was cut off while it was written is left out."""
        lines: list[dict[str, Any]] = []
        if self.path.exists():
            for text in self.path.read_text(encoding="utf-8").splitlines(keepends=True):
                if text.endswith("\n") and text.strip():
                    lines.append(json.loads(text))
        return [line for line in lines if up_to_step is None or line["step"] <= up_to_step]

    def cut(self, step: int) -> None:
        """Drop the lines after a step, from which a resumed training goes on: it runs the steps after it again."""
        write_whole(self.path, "".join(_line(line) for line in self.read(step)))

    def append(self, lines: list[dict[str, Any]]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(_line(line) for line in lines))


def _line(content: dict[str, Any]) -> str:
    return json.dumps(content, ensure_ascii=False) + "\n"


class MetricsFile(TrainerCallback, ExportableState):
    """Appends one line to ``metrics.jsonl`` for each logged step, and keeps the training time, in every checkpoint."""

    lines: StepLines  # located as training begins: a run that was moved goes on where it is now

    def __init__(self, place: str) -> None:
        """``place``: the file's, from the trainer's ``output_dir``."""
        self.place = place
        self.earlier_seconds = 0.0
        self._started = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Training time so far, over all sessions that led here."""
        return self.earlier_seconds + time.perf_counter() - self._started

    def state(self) -> dict[str, Any]:
        return {"args": {"place": self.place}, "attributes": {"earlier_seconds": self.seconds}}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        self.lines = StepLines(Path(os.path.normpath(Path(args.output_dir) / self.place)))
        self._started = time.perf_counter()
        if state.is_world_process_zero:
            self.lines.cut(state.global_step)

    def on_log(self, args: TrainingArguments, state: TrainerState, *_: Any, logs: Any = None, **__: Any) -> None:
        if state.is_world_process_zero and logs and any(name.startswith(_KEPT) for name in logs):
            self.lines.append([{"step": state.global_step, **logs, "seconds": round(self.seconds, 3)}])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_log = True  # the last step's loss is always told


class RolloutLog(TrainerCallback, ExportableState):
    """Sums over the student's answers so far, in every checkpoint, and a file with some of them, one a line."""

    lines: StepLines  # located as training begins, as ``MetricsFile.lines``

    def __init__(self) -> None:
        self.sums: dict[str, float] = dict(vars(RolloutSums()))

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"sums": self.sums}}

    def add(self, sums: RolloutSums) -> None:
        total = RolloutSums(**self.sums)  # type: ignore[arg-type]
        total.add(sums)
        self.sums = dict(vars(total))

    def figures(self) -> dict[str, float | int | None]:
        """Means and shares over all answers of the run."""
        return RolloutSums(**self.sums).figures()  # type: ignore[arg-type]

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        file = getattr(args, "rollouts_file", None)
        self.lines = StepLines(Path(file or Path(args.output_dir) / "rollouts.jsonl"))
        if state.is_world_process_zero:
            self.lines.cut(state.global_step)


class EverySteps(TrainerCallback):
    """Measures the student every ``every_steps`` optimiser steps and logs it.

    Args:
        measure_and_log: called on every process.
        also_last: measure after the last step, too.
    """

    def __init__(self, every_steps: int, measure_and_log: Callable[[], None], also_last: bool = False) -> None:
        self.every_steps = every_steps
        self.measure_and_log = measure_and_log
        self.also_last = also_last

    def on_step_end(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        is_last = self.also_last and state.global_step >= state.max_steps
        if is_last or state.global_step % self.every_steps == 0:
            self.measure_and_log()


class TrainingProgress(TrainerCallback):
    """One progress bar on standard error, with rate, time left and the last loss; standard output stays free."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        is_off = args.disable_tqdm or not state.is_world_process_zero
        self._bar = tqdm(
            total=state.max_steps, initial=state.global_step, desc="training", unit=" steps", disable=is_off
        )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(self, *_: Any, logs: Any = None, **__: Any) -> None:
        if self._bar is not None and logs and "loss" in logs:
            self._bar.set_postfix_str(f"loss {logs['loss']:.3f}", refresh=False)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        if self._bar is not None:
            self._bar.close()


class CheckpointAfterStep(JITCheckpointCallback):
    """``enable_jit_checkpoint``, once the step that runs is over.

    The Trainer's own also writes amid a step, whose positions, answers and scores are counted by then: a training that
    went on from there would count them twice.
    """

    @classmethod
    def instead_of(cls, asked: JITCheckpointCallback) -> "CheckpointAfterStep":
        """The same signal, heard by ``asked``, told to another callback."""
        waiting = cls()
        waiting.trainer, waiting.jit_manager = asked.trainer, asked.jit_manager
        return waiting

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        pass

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        pass

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

from selkd.training.on_policy import RolloutSums

_KEPT = ("loss", "held_out_", "benchmark_")  # how the names of what is worth a line begin


class MetricsFile(TrainerCallback, ExportableState):
    """Appends one line to ``metrics.jsonl`` for each logged step, and keeps the training time.

    The time is part of every checkpoint. On resuming, lines after the checkpoint's step are dropped: those steps run
    again.
    """

    path: Path  # found as training begins: a run that was moved goes on where it is now

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

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.path = Path(os.path.normpath(Path(args.output_dir) / self.place))
        lines = read_metrics(self.path, up_to_step=state.global_step)
        self._started = time.perf_counter()
        if state.is_world_process_zero:
            temporary = self.path.with_name(f".{self.path.name}.partial")
            temporary.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
            temporary.replace(self.path)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero and logs and any(name.startswith(_KEPT) for name in logs):
            line = {"step": state.global_step, **logs, "seconds": round(self.seconds, 3)}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_log = True  # the last step's loss is always told


def read_metrics(path: Path, up_to_step: int | None = None) -> list[dict[str, Any]]:
    """The lines of a metrics file; a last line that was cut off while written is left out."""
    lines: list[dict[str, Any]] = []
    if path.exists():
        for text in path.read_text(encoding="utf-8").splitlines(keepends=True):
            if text.endswith("\n") and text.strip():
                lines.append(json.loads(text))
    return [line for line in lines if up_to_step is None or line["step"] <= up_to_step]


class RolloutLog(TrainerCallback, ExportableState):
    """Sums over the student's answers so far, and a file with some of them, one a line. Part of every checkpoint.

    On resuming, lines after the checkpoint's step are dropped: those steps run again.
    """

    path: Path  # the arguments' as training begins: a run that was moved goes on where it is now

    def __init__(self) -> None:
        self.sums: dict[str, float] = dict(vars(RolloutSums()))

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"sums": self.sums}}

    def add(self, sums: RolloutSums) -> None:
        total = RolloutSums(**self.sums)  # type: ignore[arg-type]
        total.add(sums)
        self.sums = dict(vars(total))

    def figures(self) -> dict[str, float | int | None]:
        """Of the whole run."""
        return RolloutSums(**self.sums).figures()  # type: ignore[arg-type]

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        given = getattr(args, "rollouts_file", None)
        self.path = Path(given or Path(args.output_dir) / "rollouts.jsonl")
        if state.is_world_process_zero:
            lines = read_metrics(self.path, up_to_step=state.global_step)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary = self.path.with_name(f".{self.path.name}.partial")
            temporary.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
            temporary.replace(self.path)

    def write(self, lines: list[dict[str, Any]]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


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

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        is_last = self.also_last and state.global_step >= state.max_steps
        if is_last or state.global_step % self.every_steps == 0:
            self.measure_and_log()


class TrainingProgress(TrainerCallback):
    """One progress bar on standard error, with rate, time left and the last loss; standard output stays free."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        is_off = args.disable_tqdm or not state.is_world_process_zero
        self._bar = tqdm(
            total=state.max_steps, initial=state.global_step, desc="training", unit=" steps", disable=is_off
        )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self._bar is not None and logs and "loss" in logs:
            self._bar.set_postfix_str(f"loss {logs['loss']:.3f}", refresh=False)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
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

"""Callbacks of a training: the metrics' file, the progress bar, measurements on the way, checkpoints on a signal."""

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

from selkd.errors import InputError
from selkd.files import saving, write_whole

_WRITTEN = ("loss", "held_out_", "benchmark_")  # logs with a name that begins so are written to the metrics' file


class StepLines:
    """A file of JSON lines, each with its optimiser ``step``."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self, up_to_step: int | None = None) -> list[dict[str, Any]]:
        """The lines of the steps up to ``up_to_step``, without a last line that was cut off while it was written.

        Raises:
            InputError: a line is damaged.
        """
        lines: list[dict[str, Any]] = []
        if self.path.exists():
            # Not splitlines: an answer may hold one of the other characters that it takes for a line's end.
            for number, text in enumerate(self.path.read_bytes().split(b"\n")[:-1], start=1):
                if text.strip():
                    lines.append(_content(text, f"{self.path}, line {number}"))
        return [line for line in lines if up_to_step is None or line["step"] <= up_to_step]

    def cut(self, step: int) -> None:
        """Drop the lines after ``step``, at which a resumed training begins: it runs the later steps again."""
        write_whole(self.path, "".join(_line(line) for line in (self.read(step) if step else ())))

    def append(self, lines: list[dict[str, Any]]) -> None:
        with saving(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write("".join(_line(line) for line in lines))


def _content(text: bytes, place: str) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(text.decode("utf-8"))
        int(content["step"])
    except (ValueError, TypeError, KeyError):
        raise InputError(f"{place}: damaged. Put it back, or remove that line; then run again to continue.") from None
    return content


def _line(content: dict[str, Any]) -> str:
    return json.dumps(content, ensure_ascii=False) + "\n"


class MetricsFile(TrainerCallback, ExportableState):
    """Writes one line of metrics for each logged step, and counts the training time, in every checkpoint.

    Args:
        place: the file's path, relative to the trainer's ``output_dir``.
    """

    lines: StepLines  # opened when training begins, so that a run that was moved goes on where it is now

    def __init__(self, place: str) -> None:
        self.place = place
        self.earlier_seconds = 0.0
        self._started = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Training time so far in seconds, over all interrupted and resumed trainings."""
        return self.earlier_seconds + time.perf_counter() - self._started

    def state(self) -> dict[str, Any]:
        return {"args": {"place": self.place}, "attributes": {"earlier_seconds": self.seconds}}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        self.lines = StepLines(Path(os.path.normpath(Path(args.output_dir) / self.place)))
        self._started = time.perf_counter()
        if state.is_world_process_zero:
            self.lines.cut(state.global_step)

    def on_log(self, args: TrainingArguments, state: TrainerState, *_: Any, logs: Any = None, **__: Any) -> None:
        if state.is_world_process_zero and logs and any(name.startswith(_WRITTEN) for name in logs):
            kl = {} if "loss" not in logs or "kl_nats" in logs else {"kl_nats": None}  # it can't be had
            self.lines.append([{"step": state.global_step, **logs, **kl, "seconds": round(self.seconds, 3)}])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_log = True  # always log the last step's loss


class Measured(TrainerCallback, ExportableState):
    """The last optimiser ``step`` at which the student was measured. Part of every checkpoint."""

    def __init__(self) -> None:
        self.step = 0

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"step": self.step}}


class EverySteps(TrainerCallback):
    """Has the trainer evaluate each ``every_steps`` optimiser steps: after a step is logged, before it is saved.

    Args:
        measured: the last step that was measured. A training that was interrupted while it measured goes on with that.
        evaluate: called on every process when a training goes on with a measurement.
        also_last: evaluate after the last step, too.
    """

    def __init__(
        self, every_steps: int, measured: Callable[[], int], evaluate: Callable[[], Any], also_last: bool = False
    ) -> None:
        self.every_steps = every_steps
        self.measured = measured
        self.evaluate = evaluate
        self.also_last = also_last

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        if self._is_due(state) and self.measured() < state.global_step:
            self.evaluate()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._is_due(state):
            control.should_evaluate = True

    def _is_due(self, state: TrainerState) -> bool:
        is_last = self.also_last and state.global_step >= state.max_steps
        return is_last or state.global_step % self.every_steps == 0


class TrainingProgress(TrainerCallback):
    """A progress bar on standard error, with rate, time left and the last loss; nothing goes to standard output."""

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
    """Takes the signal of ``enable_jit_checkpoint``; the trainer saves and ends when the current step is over.

    The Trainer's own callback writes in the middle of a step, after the step's positions, answers and scores have been
    counted: a training that resumed from that checkpoint would count them twice. It also writes on the process that
    got the signal alone.

    Args:
        replaced: the Trainer's own callback, which this one takes the signal from.
    """

    def __init__(self, replaced: JITCheckpointCallback) -> None:
        super().__init__()
        self.trainer, self.jit_manager = replaced.trainer, replaced.jit_manager

    @property
    def is_asked(self) -> bool:
        """Whether this process got the signal."""
        return self.jit_manager is not None and self.jit_manager.is_checkpoint_requested

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        pass

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        pass

    def on_step_end(self, *_: Any, **__: Any) -> None:
        pass

    def on_epoch_end(self, *_: Any, **__: Any) -> None:
        pass

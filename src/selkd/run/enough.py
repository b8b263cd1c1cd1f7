"""Before a stage begins, what it needs of memory and disk is compared with what there is, and a lack is told."""

import logging
import os
import shutil
from contextlib import suppress
from pathlib import Path
from weakref import WeakKeyDictionary

import psutil
import torch

from selkd.needs.architecture import teacher_and_student
from selkd.needs.disk import disk
from selkd.needs.memory import memory
from selkd.needs.plan import make_plan
from selkd.reporting.formats import data_size
from selkd.run.workspace import Workspace

_logger = logging.getLogger(__name__)
_counted: "WeakKeyDictionary[Workspace, tuple[dict[str, int], dict[str, int]]]" = WeakKeyDictionary()


def warn_if_short(work: Workspace, stage: str, folder: Path | None = None) -> None:
    """Warn, with both figures, where ``stage`` is expected to need more than there is. The counts are estimates.

    Args:
        folder: where the stage writes; None: it writes little.
    """
    if not work.state.is_main_process or work.recipe.teacher.is_foreign:  # the counts begin with the teacher's model
        return
    try:
        in_memory, on_disk = _needs(work)
    except Exception as error:  # noqa: BLE001  a formula that does not know every family is no reason to end a run
        _logger.warning("%s: what it needs can't be counted (%s: %s).", stage, type(error).__name__, error)
        return
    free, of = _memory_left(work.device)
    # Processes on one machine share its memory, but each has its own accelerator.
    needed = in_memory.get(stage, 0) * (_processes_here() if of == "this machine" else 1)
    if needed > free:
        _logger.warning(
            "%s is expected to take %s of memory at its peak, and %s has %s left. It may be ended by the system: lower "
            "training.per_device_train_batch_size or data.max_length, or take smaller models. "
            "`selkd estimate` tells what takes how much.",
            stage, data_size(needed), of, data_size(free),
        )  # fmt: skip
    if folder is None:
        return
    written = max(0, on_disk.get(stage, 0) - _size(folder))
    left = shutil.disk_usage(_existing(folder)).free
    if written > left:
        _logger.warning(
            "%s is expected to write %s into %s, where %s are free. When the disk is full it ends, and goes on once "
            "there is room: free space, or set training.save_total_limit.",
            stage, data_size(written), folder, data_size(left),
        )  # fmt: skip


def _needs(work: Workspace) -> tuple[dict[str, int], dict[str, int]]:
    """The peaks of memory and the bytes written, by stage; of memory what is beside the process itself."""
    if work not in _counted:
        source = work.student_source if work.recipe.student.model is not None else None
        teacher, student = teacher_and_student(work.recipe, work.teacher_source, source)
        plan = make_plan(work.recipe, work.arguments, work.state.num_processes, work.splits)
        is_cpu = work.device.type == "cpu"
        needed = memory(student, teacher, plan, (work.dtype, work.teacher_dtype), is_cpu=is_cpu)
        process = needed.parts["process"]
        _counted[work] = {name: peak - process for name, peak in needed.stages.items()}, disk(student, plan)
    return _counted[work]


def _memory_left(device: torch.device) -> tuple[int, str]:
    """The memory that the stage may have, what this process already holds of it included; and whose it is."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device), "the accelerator"
    return psutil.virtual_memory().available + psutil.Process().memory_info().rss, "this machine"


def _processes_here() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _size(folder: Path) -> int:
    size = 0
    with suppress(OSError):  # what another run is writing there comes and goes; without it the count is rougher
        for path in folder.rglob("*"):
            with suppress(OSError):
                size += path.stat().st_size if path.is_file() else 0
    return size


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())

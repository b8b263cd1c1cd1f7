"""One process of runs, started by a launcher. Usage: sharded_run.py OUT RECIPES_JSON, a mapping of names to recipes.

A run called ``cut`` ends when its training has written its last checkpoint, and before its student is saved.
"""

import gc
import json
import sys
from contextlib import nullcontext, suppress
from pathlib import Path
from unittest.mock import patch

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType

from selkd import DistillArguments, distill

_made = DistillArguments.__post_init__


class Cut(BaseException):
    """Stands for the end of a process."""


def on_cpus(arguments: DistillArguments) -> None:
    """Accelerate shards on accelerators only; FSDP2 itself runs on CPUs, too."""
    _made(arguments)
    if arguments.is_sharded:
        arguments.distributed_state.distributed_type = DistributedType.MULTI_GPU
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


if __name__ == "__main__":
    torch.set_num_threads(1)
    gc.freeze()  # as conftest.py does
    DistillArguments.__post_init__ = on_cpus  # type: ignore[method-assign]
    for name, recipe in json.loads(sys.argv[2]).items():
        with patch("selkd.run.train._save", side_effect=Cut) if name == "cut" else nullcontext(), suppress(Cut):
            distill(recipe, Path(sys.argv[1]) / name)

"""One process of runs, started by a launcher. Usage: sharded_run.py OUT RECIPES_JSON, a mapping of names to recipes."""

import json
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType

from selkd import DistillArguments, distill

_made = DistillArguments.__post_init__


def on_cpus(arguments: DistillArguments) -> None:
    """Accelerate shards on accelerators only; FSDP2 itself runs on CPUs, too."""
    _made(arguments)
    if arguments.is_sharded:
        arguments.distributed_state.distributed_type = DistributedType.MULTI_GPU
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


if __name__ == "__main__":
    torch.set_num_threads(1)
    DistillArguments.__post_init__ = on_cpus  # type: ignore[method-assign]
    for name, recipe in json.loads(sys.argv[2]).items():
        distill(recipe, Path(sys.argv[1]) / name)

"""One training on tiny models, made anew for each proof, and what is put back after it."""

import hashlib
import logging as standard_logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from tiny import make_arguments, make_model, make_samples, make_tokenizer
from transformers import PreTrainedModel
from transformers.utils import logging

from selkd import DistillArguments, DistillTrainer


def digest(model: PreTrainedModel) -> str:
    """The weights to the last bit."""
    found = hashlib.sha256()
    for parameter in model.parameters():
        found.update(parameter.detach().numpy().tobytes())
    return found.hexdigest()


class Bench:
    """Makes arguments and trainers whose arguments are ``options``, each in a folder of its own.

    Attributes:
        options: of ``DistillArguments``; ``tiny.make_arguments`` sets the others.
        patch: what a proof replaces is put back when the test ends.
        folder: the ``output_dir``, unless the options say another.
    """

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch, **options: Any) -> None:
        self.folder, self.patch, self.options = folder, patch, options

    def arguments(self, **more: Any) -> DistillArguments:
        return make_arguments(self.folder, **({"max_steps": 2} | self.options | more))

    def trainer(self, **parameters: Any) -> DistillTrainer:
        """8 samples to learn, 6 to measure; ``parameters`` are those of the trainer."""
        models = {} if "model_init" in parameters else {"model": make_model(1)}
        given: dict[str, Any] = {
            **models,
            "teacher": make_model(0, layers=3),
            "train_dataset": make_samples(8),
            "eval_dataset": make_samples(6, seed=1),
            "processing_class": make_tokenizer(),
        } | parameters
        return DistillTrainer(args=given.pop("args", None) or self.arguments(), **given)

    def trained(self, **parameters: Any) -> DistillTrainer:
        trainer = self.trainer(**parameters)
        trainer.train()
        return trainer


@pytest.fixture
def put_back() -> Iterator[None]:
    """Leaves the process as it was: environment, Accelerate's shared state, verbosity, determinism, signals."""
    environment, verbosity = dict(os.environ), logging.get_verbosity()
    handler, level = signal.getsignal(signal.SIGTERM), standard_logging.getLogger().level
    yield
    os.environ.clear()
    os.environ.update(environment)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    logging.set_verbosity(verbosity)
    standard_logging.getLogger().setLevel(level)
    signal.signal(signal.SIGTERM, handler)
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = False

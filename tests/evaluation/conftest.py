"""What the evaluation's tests share."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from lm_eval.models import huggingface


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small are slower on several threads, much slower on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers of four tokens: a random model would never end them."""
    normalize = huggingface.normalize_gen_kwargs
    monkeypatch.setattr(huggingface, "normalize_gen_kwargs", lambda *a, **k: normalize(*a, **k) | {"max_gen_toks": 4})


@pytest.fixture
def no_measuring(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Call it, and from then on whatever would run a model through the harness or fidelity fails."""

    def forbid() -> None:
        def refuse(*_: Any, **__: Any) -> None:
            raise AssertionError("it was measured again")

        monkeypatch.setattr("selkd.evaluation.measuring.run_task", refuse)
        monkeypatch.setattr("selkd.evaluation.held_out.fidelity", refuse)

    return forbid

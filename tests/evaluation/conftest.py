"""What the evaluation's tests share."""

from typing import Any

import pytest
from lm_eval.models import huggingface


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

        monkeypatch.setattr("selkd.evaluation.benchmark_tasks.run_task", refuse)
        monkeypatch.setattr("selkd.evaluation.fidelity_task.fidelity", refuse)

    return forbid

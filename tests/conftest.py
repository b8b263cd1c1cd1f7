"""What several tests share: oracle cases, tiny models and a tiny tokenizer, made on the spot."""

import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from properties import register_profiles

CASES = sorted((Path(__file__).parent / "conformance").glob("case_*.json"))
TENSORS = {"student_logits": torch.float64, "teacher_logits": torch.float64, "targets": torch.int64}

register_profiles()


@pytest.fixture(params=CASES, ids=lambda path: path.stem)
def case(request: pytest.FixtureRequest) -> dict[str, Any]:
    """An oracle case, computed in float64 by numpy code that shares nothing with the project."""
    content: dict[str, Any] = json.loads(request.param.read_text())
    for name, dtype in TENSORS.items():
        content[name] = torch.tensor(content[name], dtype=dtype)
    content["valid_mask"] = torch.tensor(content["valid_mask"], dtype=torch.bool)
    return content


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first, so that two processes end at about the same time."""
    items.sort(key=lambda item: [item.get_closest_marker(name) is None for name in ("real_teacher", "slow")])


def pytest_collection_finish() -> None:
    """What was imported stays, and is not looked through whenever a run lets go of a model."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _one_thread(request: pytest.FixtureRequest) -> Iterator[None]:
    """Models this small lose more to a second thread than they gain; the real ones keep theirs."""
    threads = torch.get_num_threads()
    if request.node.get_closest_marker("real_teacher") is None:
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _own_cache_folder(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tests leave the user's cache folder alone, but for those that run the real teacher and would convert it anew."""
    if request.node.get_closest_marker("real_teacher") is None:
        monkeypatch.setenv("SELKD_CACHE", str(tmp_path_factory.mktemp("selkd-cache")))

from pathlib import Path

import pytest

from selkd_cache.cost import COST, add_cost, read_cost


def test_seconds_add_up_and_tokens_are_those_of_the_whole_cache(tmp_path: Path) -> None:
    assert read_cost(tmp_path) is None
    add_cost(tmp_path, {"seconds": 1.5, "teacher_tokens": 40})
    add_cost(tmp_path, {"seconds": 2.25, "teacher_tokens": 40})
    assert read_cost(tmp_path) == {"seconds": 3.75, "teacher_tokens": 40}
    assert [path.name for path in tmp_path.iterdir()] == [COST]


@pytest.mark.parametrize("text", ["", "[]", '{"seconds": 1}', '{"seconds": "1", "teacher_tokens": 2}', "[" * 99_999])
def test_what_is_no_cost_stands_for_none(tmp_path: Path, text: str) -> None:
    (tmp_path / COST).write_text(text)
    assert read_cost(tmp_path) is None
    add_cost(tmp_path, {"seconds": 1.0, "teacher_tokens": 2})
    assert read_cost(tmp_path) == {"seconds": 1.0, "teacher_tokens": 2}

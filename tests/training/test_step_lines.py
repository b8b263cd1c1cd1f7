"""The lines that a training writes."""

from pathlib import Path

import pytest

from selkd.errors import InputError
from selkd.training.callbacks import StepLines


@pytest.mark.parametrize("damaged", [b'{"step": 1, "lo', b'{"ste\xf1": 1}', b'{"stfp": 1}', b"7"])
def test_a_damaged_line_is_named_and_is_no_matter_to_a_training_that_begins_anew(
    tmp_path: Path, damaged: bytes
) -> None:
    lines = StepLines(tmp_path / "metrics.jsonl")
    lines.path.write_bytes(b'{"step": 1, "loss": 2.0}\n' + damaged + b"\n")
    with pytest.raises(InputError, match=r"metrics\.jsonl, line 2: damaged"):
        lines.cut(1)
    lines.cut(0)
    assert lines.read() == []

"""The hand-made run directory as fixtures."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_run import TEXT, demo_metrics, demo_record, example, held_out, write_run

from selkd.selection.samples import SampleScores


@pytest.fixture
def record() -> dict[str, Any]:
    return demo_record()


@pytest.fixture
def run_dir(tmp_path: Path, record: dict[str, Any]) -> Path:
    folder = write_run(tmp_path / "demo", record)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in demo_metrics()))
    (folder / "selection").mkdir()
    # Scores with one hump and a tail; the 84 highest kept.
    scores = [3.0 + 0.5 * math.sin(0.37 * i) + 0.6 * math.sin(1.9 * i) ** 3 + 0.2 * math.cos(5 * i) for i in range(417)]
    cut = sorted(scores)[-84]
    ids, kept = [f"{i:032x}" for i in range(417)], [score >= cut for score in scores]
    SampleScores(ids, np.array(scores), {}, np.array(kept)).write(folder / "selection" / "samples.parquet")
    halves = TEXT.partition("If a target")
    samples = [example(halves[0], ids[3]), example(halves[1] + halves[2], ids[7])]
    (folder / "selection" / "examples.json").write_text(json.dumps({"metric": "student_entropy", "samples": samples}))
    (folder / "held_out.json").write_text(json.dumps(held_out()))
    return folder

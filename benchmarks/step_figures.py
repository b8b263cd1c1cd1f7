"""The ``figures`` of ``docs/results/figures.yaml`` for one step, from ``selkd bench ... --json``.

selkd bench demo ... --json > step.json
python benchmarks/step_figures.py step.json
"""

import json
import sys
from pathlib import Path
from typing import Any


def lines_of(answer: dict[str, Any]) -> list[str]:
    """One line a figure: the floor's seconds, the others' multiples of it, then the memory above it."""
    floor, *others = answer["variants"]
    lines = [f"floor: {floor['seconds']:.3g} s", *(f"{v['name']}: {v['ratio_to_floor']:.2f} x" for v in others)]
    memory = [(v["name"], v["peak_bytes_above_floor"]) for v in others]
    lines += [f"{name}_memory: {above / 1e9:.2f} GB" for name, above in memory if above is not None]
    return lines + [f"se_kd_cached_of_{name}: {goal['ratio']:.2f}" for name, goal in answer["cached_goals"].items()]


if __name__ == "__main__":
    print("    figures:", *lines_of(json.loads(Path(sys.argv[1]).read_text())), sep="\n      ")

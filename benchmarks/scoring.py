"""What an estimated entropy is worth: sample scores and position selection from it, against exact ones, and its time.

    python benchmarks/scoring.py [RECIPE] [--set KEY=VALUE ...] [--samples 96]

Time: the student's body alone over the samples, the same with exact and with approximate scores, in turns, medians,
of the processor's own seconds (all threads; with OMP_NUM_THREADS=1 other work on the machine hardly changes them).
Agreement of samples: the share of the exact top 20% that the approximate scores keep, with the frequent classes told
by the text, and by some of each sample's own distributions. Agreement of positions: the share of the exact top 20% of
each sample, all in float32, likewise.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from selkd.bench.subject import BenchSubject
from selkd.data.collate import TOKENS_AT_ONCE, group_by_tokens
from selkd.data.samples import SampleDataset
from selkd.evaluation.sample_scores import score_samples
from selkd.models.head import hidden_states
from selkd.recipe.choices import CriterionOptions, PositionOptions, SampleOptions
from selkd.recipe.files import load_recipe
from selkd.selection.positions import step_context
from selkd.selection.samples import highest
from selkd.selection.two_stage import Estimator
from selkd.training.objective import Objective

FRACTION = 0.2
PROBED = {
    "exact": None,
    "by frequency in the text": 0.0,
    "by 1/32 of the sample": 1 / 32,
    "by 1/16 of the sample": 1 / 16,
}
SETTINGS = ((4096, 1024, 0.10), (4096, 1024, 0.15), (8192, 2048, 0.10), (8192, 2048, 0.15))


def scores_of(subject: BenchSubject, samples: SampleDataset, probed: float | None) -> np.ndarray:
    """Exact, or estimated from classes that the share ``probed`` of each sample tells (0: the text)."""
    estimate = None
    if probed is not None:
        options = SampleOptions.model_validate({"scoring": "approximate", "calibration_fraction": probed})
        estimate = Estimator(options, subject.classes_by_frequency, subject.recipe.seed)
    return score_samples("student_entropy", samples, subject.work.models, subject.recipe.seed, estimate)[0]


@torch.inference_mode()
def body_alone(subject: BenchSubject, samples: SampleDataset) -> None:
    subject.student.eval()
    for group in group_by_tokens(samples.lengths, TOKENS_AT_ONCE):
        batch = subject.batch_of(samples.select(group))
        with subject.autocast():
            hidden_states(subject.student, batch["input_ids"], batch["position_ids"])


def position_agreement(subject: BenchSubject, samples: SampleDataset, probed: float) -> dict[str, float]:
    found = {}
    for frequent, tail, share in SETTINGS:
        options = PositionOptions.model_validate(
            {"fraction": FRACTION, "scoring": "two_stage", "frequent_classes": frequent, "tail_classes": tail,
             "rescored_share": share, "calibration_fraction": probed}
        )  # fmt: skip
        objective = Objective(CriterionOptions(), options, subject.recipe.seed, subject.classes_by_frequency)
        counted = np.zeros(2, dtype=np.int64)
        for sample in range(len(samples)):
            batch = subject.batch_of(samples.select([sample]))
            sums = objective.agreement(subject.student_hidden(batch), subject.head, batch, step_context(options, 1, 1))
            counted += int(sums["agreeing_positions"]), int(sums["compared_positions"])
        found[f"{frequent} + {tail}, best {FRACTION + share:.0%}"] = counted[0] / counted[1]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="demo")
    parser.add_argument("--set", action="append", metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--samples", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()

    subject = BenchSubject(load_recipe(given.recipe, given.overrides))
    train = subject.train
    samples = train.select(range(min(given.samples, len(train))))
    jobs: dict[str, Callable[[], object]] = {"body": lambda: body_alone(subject, samples)}
    jobs |= {name: partial(scores_of, subject, samples, probed) for name, probed in PROBED.items()}
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    found: dict[str, Any] = {}
    some = samples.select(range(min(32, len(samples))))
    body_alone(subject, some)
    for _ in range(given.repeats):
        for name, job in jobs.items():
            started = time.process_time()
            found[name] = job()
            seconds[name].append(time.process_time() - started)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    exact = found["exact"]
    best = highest(exact, FRACTION)
    some = samples.select(range(min(16, len(samples))))
    answer = {
        "samples": len(samples),
        "cpu_seconds": medians,
        "cpu_seconds_range": {name: [min(values), max(values)] for name, values in seconds.items()},
        "ratio_to_body": {name: value / medians["body"] for name, value in medians.items()},
        "samples_agreement": {
            name: len(np.intersect1d(best, highest(found[name], FRACTION))) / len(best) for name in PROBED
        },
        "samples_correlation": {name: float(np.corrcoef(exact, found[name])[0, 1]) for name in PROBED},
        "positions_agreement": {
            "by frequency in the text": position_agreement(subject, some, 0.0),
            "by the student's own distributions": position_agreement(subject, some, 1 / 32),
        },
    }
    subject.close()
    print(json.dumps(answer, indent=2))


if __name__ == "__main__":
    main()

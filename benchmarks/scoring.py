"""What an estimated entropy is worth: sample scores and position selection from it, against exact ones, and its time.

    python benchmarks/scoring.py [RECIPE] [--set KEY=VALUE ...] [--samples 96]

Time: the student's body alone over the samples, the same with exact and with approximate scores, in turns, medians of
three, of the processor's own seconds (all threads; with OMP_NUM_THREADS=1 other work on the machine hardly changes
them). Agreement of samples: the share of the exact top 20% that the approximate scores keep. Agreement of positions:
the share of the exact top 20% of each sample, all in float32, with the classes ordered by their frequency in the text,
and by the probability that the student itself gives them at every 32nd position of the sample.
"""

import argparse
import json
import statistics
import time

import numpy as np
import torch

from selkd.bench.subject import Subject
from selkd.data.grouping import group_by_tokens
from selkd.data.samples import SampleDataset
from selkd.models.head import hidden_states
from selkd.recipe_choices import CriterionOptions, PositionOptions
from selkd.recipe_files import load_recipe
from selkd.scoring import TOKENS_AT_ONCE, score_samples
from selkd.selection.positions import place_of
from selkd.selection.samples import highest
from selkd.selection.two_stage import class_subset
from selkd.training.objective import Objective

FRACTION = 0.2
SETTINGS = ((4096, 1024, 0.10), (4096, 1024, 0.15), (8192, 2048, 0.10), (8192, 2048, 0.15))


def scores_of(
    subject: Subject, samples: SampleDataset, ordered: np.ndarray | None, classes: tuple[int, int]
) -> np.ndarray:
    work, subset = subject.work, None
    if ordered is not None:
        subset = class_subset(ordered, *classes, subject.recipe.seed, "samples", device=subject.device)
    student = subject.student
    return score_samples(
        "student_entropy", samples, lambda: student, work.teacher, work.dtype, work.pad_token_id, work.n_classes,
        subject.recipe.seed, subset,
    )[0]  # fmt: skip


@torch.inference_mode()
def body_alone(subject: Subject, samples: SampleDataset) -> None:
    subject.student.eval()
    for group in group_by_tokens(samples.lengths, TOKENS_AT_ONCE):
        batch = subject.batch_of(samples.select(group))
        with subject.autocast():
            hidden_states(subject.student, batch["input_ids"], batch["position_ids"])


def position_agreement(subject: Subject, samples: SampleDataset, probed: float) -> dict[str, float]:
    found = {}
    for frequent, tail, share in SETTINGS:
        options = PositionOptions.model_validate(
            {"fraction": FRACTION, "scoring": "two_stage", "frequent_classes": frequent, "tail_classes": tail,
             "rescored_share": share, "probed_share": probed}
        )  # fmt: skip
        objective = Objective(CriterionOptions(), options, subject.recipe.seed, subject.classes_by_frequency)
        counted = np.zeros(2, dtype=np.int64)
        for sample in range(len(samples)):
            batch = subject.batch_of(samples.select([sample]))
            sums = objective.agreement(subject.student_hidden(batch), subject.head, batch, place_of(options, 1, 1))
            counted += int(sums["agreeing_positions"]), int(sums["compared_positions"])
        found[f"{frequent} + {tail}, best {FRACTION + share:.0%}"] = counted[0] / counted[1]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="demo")
    parser.add_argument("--set", action="append", metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--samples", type=int, default=96)

    given = parser.parse_args()

    subject = Subject(load_recipe(given.recipe, given.overrides))
    train = subject.train
    samples = train.select(range(min(given.samples, len(train))))
    ordered, classes = subject.classes_by_frequency, (4096, 1024)
    jobs = {
        "body": lambda: body_alone(subject, samples),
        "exact": lambda: scores_of(subject, samples, None, classes),
        "approximate": lambda: scores_of(subject, samples, ordered, classes),
    }
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for repeat in range(4):
        for name, job in jobs.items():
            started = time.process_time()
            job()
            if repeat:
                seconds[name].append(time.process_time() - started)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    exact, found = scores_of(subject, samples, None, classes), scores_of(subject, samples, ordered, classes)
    best = highest(exact, FRACTION)
    some = samples.select(range(min(16, len(samples))))
    answer = {
        "samples": len(samples),
        "cpu_seconds": medians,
        "cpu_seconds_range": {name: [min(values), max(values)] for name, values in seconds.items()},
        "ratio_to_body": {name: value / medians["body"] for name, value in medians.items()},
        "samples_agreement": len(np.intersect1d(best, highest(found, FRACTION))) / len(best),
        "samples_correlation": float(np.corrcoef(exact, found)[0, 1]),
        "positions_agreement": {
            "by frequency in the text": position_agreement(subject, some, 0.0),
            "by the student's own distributions": position_agreement(subject, some, 1 / 32),
        },
    }
    subject.close()
    print(json.dumps(answer, indent=2))


if __name__ == "__main__":
    main()

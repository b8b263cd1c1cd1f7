"""Memory of one variant in a process of its own: ``python -m selkd.bench peak|trace VARIANT``, the recipe on stdin."""

import json
import sys

from selkd.bench.measure import bytes_over_time, peak_bytes
from selkd.bench.subject import Subject
from selkd.bench.variants import step_of
from selkd.recipe.part import parse_part
from selkd.recipe.recipe import Recipe

TRACED_STEPS = 3


def main() -> None:
    job, variant = sys.argv[1:]
    subject = Subject(parse_part(Recipe, json.load(sys.stdin)))
    try:
        step = step_of(variant, subject)
        if job == "peak":
            print(json.dumps({"peak_bytes": peak_bytes(step, subject.device)}))
        else:
            print(json.dumps(bytes_over_time(step, subject.device, TRACED_STEPS)))
    finally:
        subject.close()


if __name__ == "__main__":
    main()

"""Measures the memory of one variant: ``python -m selkd.bench peak|trace VARIANT`` reads the recipe from stdin."""

import json
import sys

from selkd.bench.measure import MEMORY_JOBS
from selkd.bench.subject import BenchSubject
from selkd.bench.variants import step_of
from selkd.recipe.part import parse_part
from selkd.recipe.recipe import Recipe


def main() -> None:
    job, variant = sys.argv[1:]
    subject = BenchSubject(parse_part(Recipe, json.load(sys.stdin)))
    try:
        print(json.dumps(MEMORY_JOBS[job](step_of(variant, subject), subject.device)))
    finally:
        subject.close()


if __name__ == "__main__":
    main()

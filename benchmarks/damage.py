"""Random bit flips over all files of a finished run and its cache: is each found by ``selkd verify``?

    python benchmarks/damage.py RUN [--flips 1000] [--seed 0]

RUN is copied, and each flip is taken back before the next. A file is drawn first, then a byte and a bit of it. A flip
is ``found`` if verify names a problem; ``noted`` if it says that a file which may differ (the card, the page, the note
of the cache's cost) is another; ``without effect`` if verify says nothing, and what is read of the file is the same;
else ``missed``.
"""

import argparse
import json
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from selkd.files import LOCK
from selkd.run.verify import verify_run

FOUND, NOTED, NO_EFFECT, MISSED = "found", "noted", "without effect", "missed"


def flips(run: Path, count: int, seed: int) -> Iterator[tuple[str, str]]:
    """Flip ``count`` bits in the run's folder, one at a time: each file, and what became of the flip."""
    generator = random.Random(seed)
    files = sorted(path for path in run.rglob("*") if path.is_file() and path.name != LOCK and path.stat().st_size)
    notes = verify_run(run).notes
    for _ in range(count):
        path = generator.choice(files)
        whole = path.read_bytes()
        damaged = bytearray(whole)
        damaged[generator.randrange(len(whole))] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        try:
            yield path.relative_to(run).as_posix(), _verdict(run, path, whole, notes)
        finally:
            path.write_bytes(whole)


def _verdict(run: Path, path: Path, whole: bytes, notes: list[str]) -> str:
    checked = verify_run(run)
    if checked.problems:
        return FOUND
    if checked.notes != notes:
        return NOTED
    return NO_EFFECT if path.suffix == ".json" and _read(path.read_bytes()) == _read(whole) else MISSED


def _read(content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        return content


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a finished run")
    parser.add_argument("--flips", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(shutil.copytree(options.run, Path(folder) / "run"))
        verdicts = list(flips(copy, options.flips, options.seed))
    for verdict, count in Counter(verdict for _, verdict in verdicts).most_common():
        print(f"{verdict:15} {count:5}")
    for file, count in Counter(file for file, verdict in verdicts if verdict == MISSED).most_common():
        print(f"missed in {file}: {count}")


if __name__ == "__main__":
    main()

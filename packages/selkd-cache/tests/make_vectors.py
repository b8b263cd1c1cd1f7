"""Test vectors for other readers: ``python make_vectors.py [FOLDER]`` writes small caches and what they hold as JSON.

``NAME/`` is a cache and ``NAME.json`` its content: the fingerprint and, in the stored order, each sample's id with its
rows, a list of [class id, count] for each position; and of a cache with scalars, ``scalars``, the numbers of each
position as a reader gives them. ``sample_ids.json`` has samples and the ids that selkd gives them.

``version-2`` has caches without scalars, ``version-3`` those with them.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from selkd_cache import CacheWriter
from selkd_cache.scalars import codes_of, values_of

HERE = Path(__file__).parent / "vectors"
Rows = list[list[tuple[int, int]]]


def drawn(seed: int, n_positions: int, n_classes: int, total: int) -> Rows:
    """Rows of classes drawn ``total`` times from a skewed distribution, each position from another."""
    rng = np.random.default_rng(seed)
    weights = 1 / np.arange(1, n_classes + 1) ** 1.3
    found = []
    for _ in range(n_positions):
        draws = rng.permutation(n_classes)[rng.choice(n_classes, size=total, p=weights / weights.sum())]
        found.append(
            [(int(each), int(count)) for each, count in zip(*np.unique(draws, return_counts=True), strict=True)]
        )
    return found


def caches() -> dict[str, tuple[dict[str, str | int | float], list[list[Rows]]]]:
    """The fingerprint, and the samples of each shard, by version and name."""
    extremes: list[list[Rows]] = [
        [
            [[(2**32 - 1, 65535)], [], [(0, 65534), (2**32 - 1, 1)], [(0, 1), (1, 65534)]],
            [],  # a sample without positions
            [[(7 * each, 1) for each in range(200)] + [(2**31, 65335)]],
            [[(each, 2) for each in range(40)] + [(2**32 - 2, 65455)], [(3, 40000), (5, 25535)]],
        ],
        [[[], []]],  # a shard without any class
    ]
    return {
        "version-2/draws": (
            {"teacher": "made up", "draws": 12, "vocabulary": 300, "temperature": 1.0, "seed": 1337},
            [[drawn(5 * shard + at, 6 + at, 300, 12) for at in range(5)] for shard in range(2)],
        ),
        "version-2/tail": (
            {"teacher": "made up", "draws": 4, "count_total": 1000, "vocabulary": 40, "tail": "one class"},
            [[drawn(100 + at, 5, 41, 1000) for at in range(2)]],
        ),
        "version-2/extremes": ({"draws": 65535, "vocabulary": 2**32}, extremes),
        "version-3/scalars": (
            {"teacher": "made up", "draws": 12, "vocabulary": 300, "temperature": 1.0, "scalars": 2},
            [[drawn(200 + 4 * shard + at, 5 + at, 300, 12) for at in range(4)] for shard in range(2)],
        ),
        "version-3/at-temperature": (
            {"teacher": "made up", "draws": 12, "vocabulary": 300, "temperature": 2.0, "scalars": 4},
            [[drawn(300 + at, 4 + at, 300, 12) for at in range(3)]],
        ),
    }


def texts() -> list[tuple[list[int], list[int], list[int] | None]]:
    """Token ids, starts of the documents, and which tokens are targets: None for all but the first of each document."""
    return [
        ([5], [0], None),
        ([1, 2, 3, 2**31 - 1], [0], None),
        (list(range(100, 120)), [0, 7, 8], None),
        (list(range(100, 120)), [0, 7, 8], [0, 1, 0, 1, 1, 1, 1] + [0] + [0, 0, 0] + [1] * 9),
    ]


def write(folder: Path) -> None:
    for path, (fingerprint, shards) in caches().items():
        name = path.partition("/")[2]
        ids = [
            [xxhash.xxh3_128_digest(f"{name} {shard} {at}".encode()) for at in range(len(held))]
            for shard, held in enumerate(shards)
        ]
        writer = CacheWriter(folder / path, fingerprint, ids)
        content: dict[str, Any] = {"fingerprint": fingerprint, "samples": {}}
        for shard, held in enumerate(shards):
            samples = dict(zip(ids[shard], held, strict=True))
            n_scalars = int(fingerprint.get("scalars", 0))
            given = {each: scalars(each, len(rows), n_scalars) for each, rows in samples.items() if n_scalars}
            writer.write_shard(
                shard,
                [(each, *arrays(rows), *([given[each]] if given else [])) for each, rows in samples.items()],
            )
            content["samples"] |= {each.hex(): rows for each, rows in samples.items()}
            for each, numbers in given.items():
                content.setdefault("scalars", {})[each.hex()] = numbers.tolist()
        writer.finish()
        (folder / f"{path}.json").write_text(json.dumps(content) + "\n")
    with_ids = [
        {"token_ids": tokens, "document_starts": starts, "is_target": targets, "id": sample_id(tokens, starts, targets)}
        for tokens, starts, targets in texts()
    ]
    (folder / "sample_ids.json").write_text(json.dumps(with_ids, indent=1) + "\n")


def scalars(sample_id: bytes, n_positions: int, n_scalars: int) -> np.ndarray:
    """Numbers of very different sizes, [n, s], that come back as they are."""
    rng = np.random.default_rng(list(sample_id))
    shape = (n_positions, n_scalars)
    codes = codes_of(rng.exponential(3, shape) * 10.0 ** rng.integers(-5, 3, shape))
    return values_of(codes)


def arrays(rows: Rows) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    pairs = np.array([pair for row in rows for pair in row], np.int64).reshape(-1, 2)
    return np.array([len(row) for row in rows], np.int64), pairs[:, 0], pairs[:, 1]


def sample_id(token_ids: list[int], starts: list[int], is_target: list[int] | None) -> str:
    """As the README defines it."""
    tag, bits = b"selkd sample 1", b""
    if is_target is not None:
        tag += b", some targets"
        bits = bytes(
            int("".join(map(str, is_target[at : at + 8])).ljust(8, "0"), 2) for at in range(0, len(is_target), 8)
        )
    counted, tokens, places = (np.array(numbers, "<u4").tobytes() for numbers in ([len(token_ids)], token_ids, starts))
    return xxhash.xxh3_128_hexdigest(tag + counted + tokens + bits + places)


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)

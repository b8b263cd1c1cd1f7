"""Verifying a cache: read every byte of its folder and list what is wrong."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from selkd_cache.errors import InputError
from selkd_cache.manifest import MANIFEST, PLAN, contradictions, read_complete, read_plan, settled_files
from selkd_cache.sample_index import INDEX_FILE, SampleIndex, describe_index
from selkd_cache.shard import read_shard, shard_name, shard_problem


def verify_cache(directory: str | Path, *, blocks: bool = True, decode: bool = True) -> list[str]:
    """Every problem of a cache's folder, named by file. Works, too, where ``TeacherCache.open`` refuses the folder.

    Args:
        blocks: read every byte and compare all checksums. Without it, as a run starts: all sizes are compared, and
            digests of what was written since the manifest. No sample is read. Other damage is found when a reader comes
            to it, before it returns anything of that sample.
        decode: also decode every sample that is read.
    """
    directory = Path(directory)
    problems: list[str] = []
    manifest = plan = None
    try:
        manifest = read_complete(directory)
    except InputError as error:
        problems.append(str(error))
    try:
        plan, checksum = read_plan(directory / PLAN)
        if manifest is not None and checksum != manifest["plan"]:
            problems.append(f"{PLAN} in {directory} is another cache's")
        elif manifest is not None and (keys := contradictions(manifest, plan)):
            problems.append(f"{MANIFEST} in {directory} has another {' and '.join(keys)} than {PLAN}")
    except InputError as error:
        problems.append(str(error))
    document = plan if manifest is None else manifest  # the plan, too, says which samples each shard is to hold
    if document is None:
        return problems
    shards = document["shards"]
    if manifest is not None:
        checksum = manifest["plan"]
    settled = set() if blocks or manifest is None else settled_files(directory, manifest)
    for number in range(len(shards)):
        if shard_name(number) in settled:
            continue
        if problem := shard_problem(directory, number, checksum, document, blocks=blocks, decode=decode):
            problems.append(problem)
    try:
        if manifest is not None:
            if INDEX_FILE not in settled and describe_index(directory / INDEX_FILE) != manifest["index"]:
                problems.append(f"{INDEX_FILE} is damaged: it does not match the manifest's digest")
        elif (directory / INDEX_FILE).exists():
            problems += _index_problems(directory, checksum, [entry["samples"] for entry in shards])
    except InputError as error:
        problems.append(str(error))
    known = {INDEX_FILE, *map(shard_name, range(len(shards)))}
    for path in sorted(directory.iterdir()):
        if path.suffix == ".selkd" and path.name not in known:
            problems.append(f"{path.name} is no shard of this cache: it has {len(known) - 1} shards")
    return problems


def _index_problems(directory: Path, plan_checksum: str, n_samples: Sequence[int]) -> list[str]:
    """What is wrong with an index that no manifest describes: it must lead to the samples of each readable shard."""
    index = SampleIndex(directory / INDEX_FILE, plan_checksum, sum(n_samples))
    ids = np.split(index.ids(), np.cumsum(n_samples)[:-1])
    wrong = []
    for number, found in enumerate(ids):
        with suppress(InputError):  # told already, as the shard's
            if found.tobytes() != read_shard(directory, number, plan_checksum).index["sample_id"].tobytes():
                wrong.append(shard_name(number))
    if wrong:
        return [f"{INDEX_FILE} is damaged: it does not lead to the samples of {', '.join(wrong[:3])}"]
    return [] if index.is_sorted() else [f"{INDEX_FILE} is damaged: its ids do not ascend"]

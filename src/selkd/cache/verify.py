"""Every problem of a cache's folder, found by reading every byte of it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from selkd.cache.manifest import PLAN, check_same_shard, read_complete, read_plan
from selkd.cache.sample_index import INDEX_FILE, describe_index
from selkd.cache.shard import check_shard, shard_name
from selkd.errors import InputError


def verify_cache(directory: str | Path, *, decode: bool = True) -> list[str]:
    """Every problem of a cache's folder, each naming its file; works where ``TeacherCache.open`` refuses.

    Args:
        decode: not only read every byte and compare the checksums, but also decode every sample.
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
    except InputError as error:
        problems.append(str(error))
    if manifest is not None:
        checksum, shards = manifest["plan"], manifest["shards"]
    elif plan is not None:  # what the shards are to hold is known from the plan, too
        shards = plan["shards"]
    else:
        return problems
    for number, entry in enumerate(shards):
        if problem := shard_problem(directory, number, checksum, entry, decode=decode):
            problems.append(problem)
    try:
        if manifest is not None and describe_index(directory / INDEX_FILE) != manifest["index"]:
            problems.append(f"{INDEX_FILE} is damaged: it does not match the manifest's digest")
    except InputError as error:
        problems.append(str(error))
    known = {INDEX_FILE, *map(shard_name, range(len(shards)))}
    for path in sorted(directory.iterdir()):
        if path.suffix == ".selkd" and path.name not in known:
            problems.append(f"{path.name} is no shard of this cache: it has {len(known) - 1} shards")
    return problems


def shard_problem(
    directory: Path, number: int, plan_checksum: str, entry: Mapping[str, Any], *, decode: bool
) -> str | None:
    """What is wrong with a shard, every byte of which is read; None if nothing is.

    Args:
        entry: the shard's in the manifest, or in the plan where there is no manifest.
    """
    try:
        path = directory / shard_name(number)
        shard = check_shard(path, number, plan_checksum, entry["ids_digest"], decode=decode)
        check_same_shard(number, shard, entry)
    except InputError as error:
        return str(error)
    return None

"""Verifying a cache: read every byte of its folder and list what is wrong."""

from pathlib import Path

from selkd_cache.errors import InputError
from selkd_cache.manifest import PLAN, read_complete, read_plan
from selkd_cache.sample_index import INDEX_FILE, describe_index
from selkd_cache.shard import shard_name, shard_problem


def verify_cache(directory: str | Path, *, decode: bool = True) -> list[str]:
    """Every problem of a cache's folder, named by file. Works, too, where ``TeacherCache.open`` refuses the folder.

    Args:
        decode: also decode every sample, beside reading every byte and comparing the checksums.
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
    elif plan is not None:  # the plan, too, says which samples each shard is to hold
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

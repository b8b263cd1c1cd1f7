"""Every problem of a cache's folder, found by reading every byte of it."""

from pathlib import Path

from selkd.cache.manifest import PLAN, check_same_shard, read_complete, read_plan
from selkd.cache.sample_index import INDEX_FILE, describe_index
from selkd.cache.shard import check_shard
from selkd.errors import InputError


def verify_cache(directory: str | Path) -> list[str]:
    """Every problem of a cache's folder, each naming its file; works where ``TeacherCache.open`` refuses."""
    directory = Path(directory)
    try:
        manifest = read_complete(directory)
    except InputError as error:
        return [str(error)]
    problems = []
    try:
        if read_plan(directory / PLAN)[1] != manifest["plan"]:
            problems.append(f"{PLAN} in {directory} is another cache's")
    except InputError as error:
        problems.append(str(error))
    for number, entry in enumerate(manifest["shards"]):
        try:
            path = directory / entry["name"]
            shard = check_shard(path, number, manifest["plan"], entry["ids_digest"], decode=True)
            check_same_shard(number, shard, entry)
        except InputError as error:
            problems.append(str(error))
    try:
        if describe_index(directory / INDEX_FILE) != manifest["index"]:
            problems.append(f"{INDEX_FILE} is damaged: it does not match the manifest's digest")
    except InputError as error:
        problems.append(str(error))
    known = {INDEX_FILE, *(entry["name"] for entry in manifest["shards"])}
    for path in sorted(directory.iterdir()):
        if path.suffix == ".selkd" and path.name not in known:
            problems.append(f"{path.name} is no shard of this cache: it has {len(known) - 1} shards")
    return problems

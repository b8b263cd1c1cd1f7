"""Builds killed by SIGKILL at random moments, and two builds in one folder at once.

``SELKD_KILLS=50 python -m pytest`` with this file kills as often as docs/results/cache.md says.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from cache_samples import build, contents

N_KILLS = int(os.environ.get("SELKD_KILLS", "8"))

KILLING = """
import json, os, random, signal, sys, time
from pathlib import Path
from cache_samples import build, contents
from selkd_cache.files import is_temporary
from selkd_cache.verify import verify_cache

root, n_kills, n_shards = Path(sys.argv[1]), int(sys.argv[2]), 8
build(root / "warm", n_shards)
started = time.perf_counter()
build(root / "undisturbed", n_shards)
duration = time.perf_counter() - started
expected = contents(root / "undisturbed")
rng = random.Random(7)
folder, seen = 0, {"kills": 0, "half_written_files": 0, "finished_shards_kept": 0, "finished": 0}
while seen["kills"] < n_kills:
    cache = root / f"killed-{folder}"
    child = os.fork()
    if child == 0:
        build(cache, n_shards)
        os._exit(0)
    time.sleep(rng.uniform(0, 0.9 * duration))
    os.kill(child, signal.SIGKILL)
    died = os.waitpid(child, 0)[1] == signal.SIGKILL
    seen["kills"] += died
    names = [path.name for path in cache.iterdir()] if cache.exists() else []
    seen["half_written_files"] += any(map(is_temporary, names))
    # Whatever stands under its own name is whole, and what an undisturbed build writes.
    for name in names:
        if not is_temporary(name):
            assert (cache / name).read_bytes() == expected[name], name
    seen["finished_shards_kept"] += sum(name.startswith("shard-") and not is_temporary(name) for name in names)
    if "manifest.json" in names:
        seen["finished"] += 1
        build(cache, n_shards)
        assert contents(cache) == expected
        folder += 1
build(cache, n_shards)
assert contents(cache) == expected
assert verify_cache(cache) == []
print(json.dumps(seen))
"""


def run(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)


def test_builds_killed_at_random_moments_end_as_an_undisturbed_one(tmp_path: Path) -> None:
    done = run(KILLING, tmp_path, N_KILLS)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["kills"] == N_KILLS
    # The kills came while something was under way, and what was finished before them was kept.
    assert seen["half_written_files"] > N_KILLS / 4
    assert seen["finished_shards_kept"] > N_KILLS


SLOW_WRITER = """
import sys, time
from pathlib import Path
from cache_samples import FINGERPRINT, plan, shard_samples
from selkd_cache.writer import CacheWriter

writer = CacheWriter(Path(sys.argv[1]), FINGERPRINT, plan())

def halfway():
    yield shard_samples(1)[0]
    print("halfway", flush=True)
    sys.stdin.readline()  # until the other build is finished
    yield from shard_samples(1)[1:]

writer.write_shard(1, halfway())
print("written", flush=True)
"""


def test_a_build_that_finishes_leaves_another_builds_files_alone(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", SLOW_WRITER, str(tmp_path / "cache")]
    process = subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "halfway\n"
    (tmp_path / "cache" / "shard-00002.selkd.0123456789abcdef.tmp").write_bytes(b"left over")
    build(tmp_path / "cache")
    left = [path.name for path in (tmp_path / "cache").glob("*.tmp")]
    assert len(left) == 1  # the one that is being written; the other was a remnant
    assert left[0].startswith("shard-00001.selkd.")
    finished = contents(tmp_path / "cache")
    output, errors = process.communicate("go on\n", timeout=60)
    assert process.returncode == 0, errors
    assert output == "written\n"
    del finished[left[0]]
    assert contents(tmp_path / "cache") == finished


READ_ONLY = """
import sys
from pathlib import Path
from cache_samples import FINGERPRINT, plan
from selkd_cache import files
from selkd_cache.writer import CacheWriter
from selkd_cache.errors import RunError

def samples():
    raise SystemExit("the teacher ran although nothing can be written")
    yield

writer = CacheWriter(Path(sys.argv[1]), FINGERPRINT, plan())
Path(sys.argv[1]).chmod(0o555)
import os
if os.geteuid() == 0:  # permissions do not bind root: another user writes
    os.setuid(65534)
try:
    writer.require_writable()
except RunError as error:
    assert "can't be written" in str(error) and "Permission denied" in str(error), error
else:
    raise SystemExit("the folder passed for writable")
try:
    writer.write_shard(0, samples())
except RunError as error:
    assert "shard-00000.selkd" in str(error) and "Permission denied" in str(error), error
else:
    raise SystemExit("the write went through")
"""


def test_a_read_only_folder_is_refused_before_the_teacher_runs(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    try:
        done = run(READ_ONLY, folder)
        assert done.returncode == 0, done.stderr
        assert list(contents(folder)) == ["plan.json"]
    finally:
        folder.chmod(0o755)
    build(folder)
    build(tmp_path / "other")
    assert contents(folder) == contents(tmp_path / "other")

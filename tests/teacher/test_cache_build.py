import errno
import fcntl
import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from cache_samples import (
    FINGERPRINT,
    assert_same_rows,
    build,
    contents,
    make_rows,
    plan,
    sample_id,
    shard_samples,
)
from tiny import make_samples

from selkd import files
from selkd.data.samples import Sample
from selkd.errors import InputError, RunError
from selkd.teacher.build_cache import CacheBuild
from selkd_cache.reader import TeacherCache
from selkd_cache.shard import shard_name, write_shard
from selkd_cache.writer import CacheWriter, SampleRows


def start_python(code: str, *arguments: str) -> subprocess.Popen:
    """Runs code that may import cache_samples in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(process: subprocess.Popen) -> None:
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors


def test_what_was_written_is_read(tmp_path: Path) -> None:
    build(tmp_path / "cache")
    cache = TeacherCache.open(tmp_path / "cache", FINGERPRINT)
    assert len(cache) == 12
    for number in (7, 0, 11, 3, 7):
        assert_same_rows(cache.get(sample_id(number)), make_rows(number))


def test_the_manifest_says_what_there_is(tmp_path: Path) -> None:
    build(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["format"] == "selkd-teacher-cache"
    assert manifest["version"] == 2
    assert manifest["complete"] is True
    assert manifest["fingerprint"] == FINGERPRINT
    assert manifest["n_samples"] == 12
    assert [entry["name"] for entry in manifest["shards"]] == [shard_name(0), shard_name(1), shard_name(2)]
    for number, entry in enumerate(manifest["shards"]):
        assert entry["bytes"] == (tmp_path / entry["name"]).stat().st_size
        assert entry["samples"] == 4
        assert entry["positions"] == 4 * 16  # a fifth of the 20 rows is empty
        assert entry["classes"] == sum(len(rows[3]) for rows in shard_samples(number))


def test_a_rebuild_is_byte_identical(tmp_path: Path) -> None:
    build(tmp_path / "one")
    build(tmp_path / "two")
    first = contents(tmp_path / "one")
    assert first == contents(tmp_path / "two")
    build(tmp_path / "one")
    assert first == contents(tmp_path / "one")
    assert len(first) == 6


def test_a_partial_build_continues_and_ends_the_same(tmp_path: Path) -> None:
    build(tmp_path / "whole")
    writer = CacheWriter(tmp_path / "parts", FINGERPRINT, plan())
    assert writer.missing_shards() == [0, 1, 2]
    writer.write_shard(1, shard_samples(1))
    finished_at = (tmp_path / "parts" / shard_name(1)).stat().st_mtime_ns
    assert CacheWriter(tmp_path / "parts", FINGERPRINT, plan()).missing_shards() == [0, 2]
    build(tmp_path / "parts")
    assert (tmp_path / "parts" / shard_name(1)).stat().st_mtime_ns == finished_at
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_an_incomplete_cache_is_not_finished_and_not_opened(tmp_path: Path) -> None:
    writer = CacheWriter(tmp_path, FINGERPRINT, plan())
    for shard in (0, 2):
        writer.write_shard(shard, shard_samples(shard))
    with pytest.raises(
        RunError, match=r"incomplete: 1 of 3 shards are missing or damaged \(shard-00001.selkd can't be"
    ):
        writer.finish()
    with pytest.raises(InputError, match="incomplete: 2 of 3 shards are there and it was not finished"):
        TeacherCache.open(tmp_path)


def test_samples_that_are_not_as_planned_are_refused_and_leave_no_shard(tmp_path: Path) -> None:
    writer = CacheWriter(tmp_path, FINGERPRINT, plan())
    samples = shard_samples(0)
    cases = [
        (samples[:3], "shard 0 expected 4 samples and got 3"),
        (
            [samples[1], samples[0], *samples[2:]],
            f"expected {sample_id(0).hex()} after 0 samples, got {sample_id(1).hex()}",
        ),
        ([*samples, samples[0]], f"expected no more after 4 samples, got {sample_id(0).hex()}"),
        ([("a text", *samples[0][1:])], "got 'a text'"),
    ]
    for wrong, message in cases:
        with pytest.raises(InputError, match=message):
            writer.write_shard(0, wrong)
    with pytest.raises(InputError, match="shard 3 is not planned: there are shards 0 to 2"):
        writer.write_shard(3, samples)
    assert list(contents(tmp_path)) == ["plan.json"]


def test_counts_that_do_not_sum_to_the_draws_are_refused(tmp_path: Path) -> None:
    writer = CacheWriter(tmp_path, FINGERPRINT, plan())
    samples = shard_samples(0)
    counts = samples[2][3].copy()
    counts[0] += 1
    samples[2] = (*samples[2][:3], counts)
    with pytest.raises(InputError, match=f"sample {sample_id(2).hex()}: the counts of a row must sum to 64; got 65 at"):
        writer.write_shard(0, samples)
    assert list(contents(tmp_path)) == ["plan.json"]


def test_a_fingerprint_may_say_another_total_than_its_draws(tmp_path: Path) -> None:
    fingerprint = {**FINGERPRINT, "draws": 12, "count_total": 64}
    writer = CacheWriter(tmp_path, fingerprint, plan(1))
    writer.write_shard(0, shard_samples(0))
    writer.finish()
    assert_same_rows(TeacherCache.open(tmp_path, fingerprint).get(sample_id(3)), make_rows(3))


def test_a_class_outside_the_vocabulary_is_refused(tmp_path: Path) -> None:
    writer = CacheWriter(tmp_path, {**FINGERPRINT, "vocabulary": 1000}, plan())
    with pytest.raises(InputError, match="by its fingerprint the cache holds 1000 classes"):
        writer.write_shard(0, shard_samples(0))


def test_bad_plans_and_fingerprints_are_refused_before_anything_is_made(tmp_path: Path) -> None:
    twice = [[sample_id(0)], [sample_id(0)]]
    cases = [
        (FINGERPRINT, twice, f"sample {sample_id(0).hex()} is planned twice"),
        (FINGERPRINT, [[b"short"]], "a sample id must be 16 raw bytes; got b'short'"),
        (FINGERPRINT, [], "at least one shard"),
        (FINGERPRINT, [[]], "each shard at least one sample"),
        ({**FINGERPRINT, "draws": 0}, plan(), "fingerprint field draws must be an integer of at least 1; got 0"),
        ({**FINGERPRINT, "draws": 2**16}, plan(), "sum to at most 65535; got 65536"),
        ({"draws": 64}, plan(), "fingerprint field vocabulary must be an integer of at least 1; got None"),
        ({**FINGERPRINT, "seed": None}, plan(), "strings, integers or floats; got 'seed': None"),
        ({**FINGERPRINT, "temperature": float("nan")}, plan(), "fingerprint field temperature must be finite; got nan"),
    ]
    for fingerprint, shard_ids, message in cases:
        with pytest.raises(InputError, match=message):
            CacheWriter(tmp_path / "cache", fingerprint, shard_ids)
    assert not (tmp_path / "cache").exists()


def test_another_fingerprint_is_refused_by_writer_and_reader(tmp_path: Path) -> None:
    build(tmp_path)
    before = contents(tmp_path)
    other = {**FINGERPRINT, "temperature": 2.0, "teacher": "fedcba"}
    message = 'teacher: stored "0123456789abcdef", expected "fedcba"; temperature: stored 1.0, expected 2.0'
    with pytest.raises(InputError, match=message):
        CacheWriter(tmp_path, other, plan())
    with pytest.raises(InputError, match=message):
        TeacherCache.open(tmp_path, other)
    assert contents(tmp_path) == before


def test_a_field_on_one_side_only_is_a_mismatch(tmp_path: Path) -> None:
    build(tmp_path)
    with pytest.raises(InputError, match='softcap: stored none, expected "30"'):
        TeacherCache.open(tmp_path, {**FINGERPRINT, "softcap": "30"})
    with pytest.raises(InputError, match="seed: stored 1337, expected none"):
        TeacherCache.open(tmp_path, {field: value for field, value in FINGERPRINT.items() if field != "seed"})


def test_another_plan_of_the_same_fingerprint_is_refused(tmp_path: Path) -> None:
    build(tmp_path)
    with pytest.raises(InputError, match="planned for other samples: stored 12 in 3 shards, expected 8 in 2"):
        CacheWriter(tmp_path, FINGERPRINT, plan(2))


def test_a_foreign_folder_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("three years of work")
    with pytest.raises(InputError, match=r"is not a teacher cache and not empty \(it holds 'thesis.txt'\)"):
        CacheWriter(tmp_path, FINGERPRINT, plan())
    with pytest.raises(InputError, match=r"is not a teacher cache: it has neither manifest\.json nor plan\.json"):
        TeacherCache.open(tmp_path)
    assert contents(tmp_path) == {"thesis.txt": b"three years of work"}


def test_a_plan_of_something_else_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text('{"format": "terraform"}')
    with pytest.raises(InputError, match="its format is not 'selkd-teacher-cache'"):
        CacheWriter(tmp_path, FINGERPRINT, plan())
    assert contents(tmp_path) == {"plan.json": b'{"format": "terraform"}'}


def test_a_file_in_the_folders_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "cache"):
        with pytest.raises(InputError, match=r"is no folder: use another cache\.path"):
            CacheWriter(path, FINGERPRINT, plan())
    with pytest.raises(InputError, match="there is no teacher cache at"):
        TeacherCache.open(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


KILLED_BUILD = """
import sys, time
from pathlib import Path
from typing import Any
from cache_samples import FINGERPRINT, plan, shard_samples
from selkd_cache.writer import CacheWriter

def halfway():
    yield from shard_samples(1)[:2]
    print("halfway", flush=True)
    time.sleep(600)

writer = CacheWriter(Path(sys.argv[1]), FINGERPRINT, plan())
writer.write_shard(0, shard_samples(0))
writer.write_shard(1, halfway())
"""


def test_a_killed_build_continues_and_ends_the_same(tmp_path: Path) -> None:
    build(tmp_path / "undisturbed")
    killed = tmp_path / "killed"
    process = start_python(KILLED_BUILD, str(killed))
    assert process.stdout is not None
    assert process.stdout.readline() == "halfway\n"
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    names = sorted(contents(killed))
    assert names[:2] == ["plan.json", "shard-00000.selkd"]
    assert len(names) == 3
    assert files.is_temporary(names[2])
    with pytest.raises(InputError, match="incomplete: 1 of 3 shards"):
        TeacherCache.open(killed)
    assert CacheWriter(killed, FINGERPRINT, plan()).missing_shards() == [1, 2]
    build(killed)
    assert contents(killed) == contents(tmp_path / "undisturbed")


def test_a_build_killed_before_its_plan_was_in_place_starts_anew(tmp_path: Path) -> None:
    (tmp_path / "plan.json.0123456789abcdef.tmp").write_bytes(b"{")
    build(tmp_path)
    assert TeacherCache.open(tmp_path).verify() == []
    assert not list(tmp_path.glob("*.tmp"))


ONE_OF_TWO = """
import sys
from pathlib import Path
from typing import Any
from cache_samples import FINGERPRINT, plan, shard_samples
from selkd_cache.writer import CacheWriter

writer = CacheWriter(Path(sys.argv[1]), FINGERPRINT, plan(6))
for shard in range(int(sys.argv[2]), 6, 2):
    writer.write_shard(shard, shard_samples(shard))
"""


def test_two_processes_build_what_one_builds(tmp_path: Path) -> None:
    build(tmp_path / "one", n_shards=6)
    processes = [start_python(ONE_OF_TWO, str(tmp_path / "two"), str(rank)) for rank in range(2)]
    for process in processes:
        wait_for(process)
    writer = CacheWriter(tmp_path / "two", FINGERPRINT, plan(6))
    assert writer.missing_shards() == []
    writer.finish()
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


FULL_DISK = """
import resource, sys
from pathlib import Path
from typing import Any
from cache_samples import FINGERPRINT, plan, shard_samples
from selkd_cache.writer import CacheWriter
from selkd.errors import RunError

writer = CacheWriter(Path(sys.argv[1]), FINGERPRINT, plan())
writer.write_shard(0, shard_samples(0))
resource.setrlimit(resource.RLIMIT_FSIZE, (500, resource.RLIM_INFINITY))
try:
    writer.write_shard(1, shard_samples(1))
except RunError as error:
    assert "shard-00001.selkd" in str(error) and "run again to continue" in str(error), error
else:
    raise SystemExit("the write went through")
"""


def test_a_disk_that_takes_no_more_leaves_the_finished_shards(tmp_path: Path) -> None:
    wait_for(start_python(FULL_DISK, str(tmp_path / "full")))
    assert sorted(contents(tmp_path / "full")) == ["plan.json", "shard-00000.selkd"]
    build(tmp_path / "roomy")
    build(tmp_path / "full")
    assert contents(tmp_path / "full") == contents(tmp_path / "roomy")


def test_a_failed_sync_is_an_error_and_no_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = CacheWriter(tmp_path, FINGERPRINT, plan())

    def no_space(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(RunError, match=r"shard-00000\.selkd in .* could not be finished: .*No space left on device"):
        writer.write_shard(0, shard_samples(0))
    assert list(contents(tmp_path)) == ["plan.json"]


def test_an_error_of_the_teacher_passes_through_and_leaves_no_shard(tmp_path: Path) -> None:
    writer = CacheWriter(tmp_path, FINGERPRINT, plan())

    def failing() -> Iterator[SampleRows]:
        yield shard_samples(0)[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        writer.write_shard(0, failing())
    assert list(contents(tmp_path)) == ["plan.json"]


def test_two_builds_in_one_folder_do_not_finish(tmp_path: Path) -> None:
    writer = CacheWriter(tmp_path / "cache", FINGERPRINT, plan())
    for shard in range(3):
        writer.write_shard(shard, shard_samples(shard))
    CacheWriter(tmp_path / "other", {**FINGERPRINT, "seed": 1}, plan())
    (tmp_path / "other" / "plan.json").replace(tmp_path / "cache" / "plan.json")
    with pytest.raises(RunError, match="changed during the build: another build uses the same folder"):
        writer.finish()


def test_a_shard_that_strayed_in_does_not_hand_a_cache_over(tmp_path: Path) -> None:
    """Repairing with another cache's recipe: its shard lies there, but the folder's plan and manifest are another's."""
    build(tmp_path / "mine")
    other = FINGERPRINT | {"seed": 7}
    writer = CacheWriter(tmp_path / "other", other, plan())
    for shard in writer.missing_shards():
        writer.write_shard(shard, shard_samples(shard))
    writer.finish()
    (tmp_path / "mine" / shard_name(1)).write_bytes((tmp_path / "other" / shard_name(1)).read_bytes())
    before = contents(tmp_path / "mine")
    with pytest.raises(InputError, match="seed: stored 1337, expected 7"):
        CacheWriter(tmp_path / "mine", other, plan(), repair=True)
    (tmp_path / "mine" / "manifest.json").unlink()  # a plan that can be read is enough to tell
    with pytest.raises(InputError, match="seed: stored 1337, expected 7"):
        CacheWriter(tmp_path / "mine", other, plan(), repair=True)
    assert contents(tmp_path / "mine") == {name: data for name, data in before.items() if name != "manifest.json"}


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_or_synced_folders_still_takes_a_cache(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    sync = os.fsync

    def files_only(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "folders are not synced")
        sync(descriptor)

    build(tmp_path / "usual")
    monkeypatch.setattr(fcntl, "flock", no_locks)
    monkeypatch.setattr(os, "fsync", files_only)
    remnant = tmp_path / "cache" / f"{shard_name(0)}.{'0' * 16}.tmp"
    remnant.parent.mkdir()
    remnant.write_bytes(b"half")
    build(tmp_path / "cache")
    assert remnant.read_bytes() == b"half", "whether it is being written can't be known"
    remnant.unlink()
    assert contents(tmp_path / "cache") == contents(tmp_path / "usual")


def test_remains_are_locked_for_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over NFS a lock is refused (EBADF) to one who opened the file for reading only."""
    lock = fcntl.flock

    def as_over_nfs(file: Any, operation: int) -> None:
        if not file.writable():
            raise OSError(errno.EBADF, "Bad file descriptor")
        lock(file, operation)

    monkeypatch.setattr(fcntl, "flock", as_over_nfs)
    remnant = tmp_path / f"{shard_name(0)}.{'0' * 16}.tmp"
    remnant.write_bytes(b"half")
    build(tmp_path)
    assert not remnant.exists()


def test_a_lock_that_fails_leaves_no_remnant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr(fcntl, "flock", broken)
    with pytest.raises(RunError, match=r"plan.json in .* could not be finished"):
        build(tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


class Counting(NamedTuple):
    """Gives every position two classes, the first of them drawn so often."""

    count: int

    def rows(self, samples: Sequence[Sample]) -> list[SampleRows]:
        return [
            (
                sample.id,
                np.full(sample.n_valid, 2),
                np.tile([3, 5], sample.n_valid),
                np.tile([self.count, 64 - self.count], sample.n_valid),
            )
            for sample in samples
        ]


@pytest.mark.parametrize("has_links", [True, False])
def test_of_two_builds_at_once_the_shards_that_were_first_stay(
    has_links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server's answers vary. While one build encodes a shard, another writes its own and completes the cache."""
    if not has_links:

        def no_links(*_: object) -> None:
            raise OSError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr(os, "link", no_links)
    samples, opened = make_samples(4), []
    first, second = (CacheBuild(tmp_path, FINGERPRINT, samples) for _ in range(2))

    def overtaken(*given: Any) -> None:
        monkeypatch.setattr("selkd_cache.writer.write_shard", write_shard)
        first.run(lambda: Counting(60), 1)
        opened.append(TeacherCache.open(tmp_path))
        write_shard(*given)

    monkeypatch.setattr("selkd_cache.writer.write_shard", overtaken)
    second.run(lambda: Counting(61), 1)
    for cache in (*opened, TeacherCache.open(tmp_path)):
        assert cache.verify() == []
        assert {count for rows in cache for count in rows.counts.tolist()} == {60, 4}
    assert not list(tmp_path.glob("*.tmp"))
    shard = tmp_path / shard_name(0)
    shard.write_bytes(shard.read_bytes()[:-1])
    CacheBuild(tmp_path, FINGERPRINT, samples).run(lambda: Counting(61), 1)
    assert 61 in TeacherCache.open(tmp_path)[0].counts  # a damaged one does not stay

import json
import os
import pickle
import random
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import xxhash
from cache_samples import FINGERPRINT, assert_same_rows, build, contents, make_rows, plan, sample_id, shard_samples
from second_reader import read_cache

from selkd_cache.errors import InputError, RunError
from selkd_cache.manifest import MANIFEST, PLAN, make_manifest, read_plan, render, write_document
from selkd_cache.reader import TeacherCache
from selkd_cache.rows import Rows
from selkd_cache.sample_index import INDEX_FILE, describe_index, write_sample_index
from selkd_cache.shard import INDEX, read_shard, shard_name, write_shard
from selkd_cache.verify import verify_cache
from selkd_cache.writer import CacheWriter


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    build(tmp_path / "cache")
    return tmp_path / "cache"


def flip(path: Path, at: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


def entries_of(path: Path) -> np.ndarray:
    """The index of a shard with four samples."""
    return np.frombuffer(path.read_bytes()[-40 - 4 * INDEX.itemsize : -40], INDEX)


def test_a_sample_that_is_not_there_is_named(folder: Path) -> None:
    cache = TeacherCache.open(folder)
    with pytest.raises(InputError, match=f"sample {sample_id(99).hex()} is not in the teacher cache"):
        cache.get(sample_id(99))
    with pytest.raises(InputError, match="a sample id must be 16 raw bytes; got 'text'"):
        cache.get("text")
    assert sample_id(5) in cache
    assert sample_id(99) not in cache
    assert b"short" not in cache


def test_ids_that_share_their_first_half_are_told_apart(tmp_path: Path) -> None:
    ids = [b"same 8 b" + bytes([0, 0, 0, 0, 0, 0, 0, last]) for last in (9, 3, 255)]
    writer = CacheWriter(tmp_path, FINGERPRINT, [ids])
    writer.write_shard(0, [(each, *make_rows(number)) for number, each in enumerate(ids)])
    writer.finish()
    cache = TeacherCache.open(tmp_path)
    assert cache.sample_ids() == ids
    for number, each in enumerate(ids):
        assert_same_rows(cache.get(each), make_rows(number))
    assert b"same 8 b" + bytes(8) not in cache


def test_a_cache_can_be_shared_by_threads_and_sent_to_processes(folder: Path) -> None:
    cache = TeacherCache.open(folder)
    with ThreadPoolExecutor(4) as pool:
        for number, rows in enumerate(pool.map(lambda number: cache.get(sample_id(number)), range(12))):
            assert_same_rows(rows, make_rows(number))
    assert_same_rows(pickle.loads(pickle.dumps(cache)).get(sample_id(2)), make_rows(2))


def test_stats_count_every_file(folder: Path) -> None:
    stats = TeacherCache.open(folder).stats()
    assert stats["bytes"] == sum(path.stat().st_size for path in folder.iterdir())
    assert stats["positions"] == 12 * 16
    assert stats["samples"] == 12
    assert stats["shards"] == 3
    assert stats["bytes_per_position"] == stats["bytes"] / (12 * 16)
    assert stats["classes_per_position"] == sum(len(make_rows(n).counts) for n in range(12)) / (12 * 16)
    assert stats["fixed_width_bytes_per_position"] == 192
    assert stats["full_logits_bytes_per_position"] == 2 * 2**18


def test_an_intact_cache_verifies(folder: Path) -> None:
    assert TeacherCache.open(folder).verify() == []


def truncate(folder: Path) -> None:
    path = folder / shard_name(1)
    path.write_bytes(path.read_bytes()[:-100])


def empty(folder: Path) -> None:
    (folder / shard_name(1)).write_bytes(b"")


def replace_by_noise(folder: Path) -> None:
    (folder / shard_name(1)).write_bytes(random.Random(0).randbytes(5000))


def copy_another(folder: Path) -> None:
    shutil.copy(folder / shard_name(0), folder / shard_name(1))


def take_from_another_cache(folder: Path) -> None:
    other = folder.parent / "other"
    writer = CacheWriter(other, {**FINGERPRINT, "seed": 1}, plan())
    writer.write_shard(1, shard_samples(1))
    shutil.copy(other / shard_name(1), folder / shard_name(1))


def append(folder: Path) -> None:
    path = folder / shard_name(1)
    path.write_bytes(path.read_bytes() + b"\0")


def take_other_draws_of_the_same_plan(folder: Path) -> None:
    """Whole and ours, but not what the manifest lists: as if another machine had rebuilt it."""
    writer = CacheWriter(folder.parent / "other", FINGERPRINT, plan())
    writer.write_shard(1, [(each[0], *make_rows(50)) for each in shard_samples(1)])
    shutil.copy(folder.parent / "other" / shard_name(1), folder / shard_name(1))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "shard-00001.selkd is truncated or damaged"),
        (empty, "shard-00001.selkd is truncated: 0 bytes"),
        (append, "shard-00001.selkd is truncated or damaged"),
        (replace_by_noise, "shard-00001.selkd is damaged or not a selkd shard"),
        (copy_another, "shard-00001.selkd holds shard 0 under the name of shard 1: swapped or copied"),
        (take_from_another_cache, "shard-00001.selkd belongs to another cache"),
        (take_other_draws_of_the_same_plan, "shard-00001.selkd is not the shard that the manifest lists"),
    ],
)
def test_a_wrong_shard_is_found_refused_and_repaired(
    folder: Path, damage: Callable[[Path], None], message: str
) -> None:
    untouched = {name: (folder / shard_name(name)).read_bytes() for name in (0, 2)}
    damage(folder)
    cache = TeacherCache.open(folder)
    problems = cache.verify()
    assert len(problems) == 1
    assert message in problems[0]
    for number in range(4, 8):
        with pytest.raises(InputError, match=message):
            cache.get(sample_id(number))
    for number in (*range(4), *range(8, 12)):  # the other shards are as good as before
        assert_same_rows(cache.get(sample_id(number)), make_rows(number))
    build(folder)
    assert verify_cache(folder) == []
    assert untouched == {name: (folder / shard_name(name)).read_bytes() for name in (0, 2)}


def test_swapped_shards_are_both_found(folder: Path) -> None:
    first, second = (folder / shard_name(number) for number in (0, 1))
    first.rename(folder / "aside")
    second.rename(first)
    (folder / "aside").rename(second)
    problems = verify_cache(folder)
    assert [problem.split()[0] for problem in problems] == [first.name, second.name]
    assert CacheWriter(folder, FINGERPRINT, plan()).missing_shards() == [0, 1]


def test_a_shard_too_many_is_found(folder: Path) -> None:
    shutil.copy(folder / shard_name(0), folder / shard_name(3))
    (folder / "notes.txt").write_text("a user's own file is no problem")
    assert verify_cache(folder) == ["shard-00003.selkd is no shard of this cache: it has 3 shards"]


def test_a_missing_shard_is_refused_on_opening_and_found(folder: Path) -> None:
    (folder / shard_name(2)).unlink()
    with pytest.raises(InputError, match=r"incomplete: 1 of 3 shards are missing, the first shard-00002\.selkd"):
        TeacherCache.open(folder)
    assert "shard-00002.selkd can't be read" in verify_cache(folder)[0]


def test_a_shard_damaged_after_opening_is_refused_on_reading(folder: Path) -> None:
    cache = TeacherCache.open(folder)
    cache.get(sample_id(0))
    path = folder / shard_name(0)
    begin = int(entries_of(path)["offset"][0])
    flip(path, begin + 1)
    with pytest.raises(InputError, match=f"shard-00000.selkd is damaged at sample {sample_id(0).hex()}"):
        cache.get(sample_id(0))
    assert_same_rows(cache.get(sample_id(1)), make_rows(1))
    path.write_bytes(path.read_bytes()[:begin])
    with pytest.raises(InputError, match=f"shard-00000.selkd is damaged at sample {sample_id(3).hex()}: its 0 bytes"):
        cache.get(sample_id(3))


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    """A thousand random bits over all files of the cache, and each byte of a shard's header and footer."""
    folder = tmp_path / "cache"
    build(folder, n_shards=1)
    rng = random.Random(1)
    paths = sorted(folder.iterdir())
    size = (folder / shard_name(0)).stat().st_size
    places = [(folder / shard_name(0), at) for at in [*range(36), *range(size - 40, size)]]
    places += [(path, rng.randrange(path.stat().st_size)) for path in rng.choices(paths, k=1000)]
    for path, at in places:
        intact = path.read_bytes()
        flip(path, at, rng.randrange(8))
        problems = verify_cache(folder)
        assert problems, (path.name, at)
        assert path.name in problems[0]
        path.write_bytes(intact)
    assert verify_cache(folder) == []


def test_a_changed_fingerprint_value_does_not_pass_as_the_builds_own(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"seed": 1337', '"seed": 1338'))
    with pytest.raises(InputError, match=r"manifest\.json in .* is damaged"):
        TeacherCache.open(folder, {**FINGERPRINT, "seed": 1338})


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("version", 1, "has version 1; this selkd reads 2"),
        ("codec", "gap-planes-zstd", "has codec 'gap-planes-zstd'; this selkd reads 'ranked-gaps-ans'"),
        ("index", {"bytes": 3}, "does not describe a complete teacher cache"),
        ("format", "other", "its format is not 'selkd-teacher-cache'"),
        ("complete", False, "does not describe a complete teacher cache"),
        ("n_samples", 11, "does not describe a complete teacher cache"),
        ("shards", [], "does not describe a complete teacher cache"),
        ("fingerprint", {"draws": 64}, "does not describe a complete teacher cache"),
    ],
)
def test_a_manifest_of_another_kind_is_refused(folder: Path, field: str, value: object, message: str) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_bytes(render({**manifest, field: value})[0])
    with pytest.raises(InputError, match=message):
        TeacherCache.open(folder)


def test_a_manifest_can_not_lead_out_of_the_folder(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"][0]["name"] = "../secret.selkd"
    (folder / "manifest.json").write_bytes(render(manifest)[0])
    with pytest.raises(InputError, match="does not describe a complete teacher cache"):
        TeacherCache.open(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format": "selkd-teacher-cache"}', "\xff", "[" * 100_000])
def test_a_manifest_that_is_none_is_refused(folder: Path, text: str) -> None:
    (folder / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=r"manifest\.json in"):
        TeacherCache.open(folder)
    assert len(verify_cache(folder)) == 1


def test_a_reader_written_from_the_document_reads_the_same(folder: Path) -> None:
    """The document is enough, and stays true: the second reader shares no code with this, and checks all digests."""
    fingerprint, samples = read_cache(folder)
    assert fingerprint == FINGERPRINT
    assert list(samples) == [sample_id(number).hex() for number in range(12)]
    for number, rows in enumerate(samples.values()):
        expected = make_rows(number)
        assert [len(row) for row in rows] == expected.row_lengths.tolist()
        assert [each for row in rows for each in row] == expected.class_ids.tolist()
        assert [count for row in rows for count in row.values()] == expected.counts.tolist()


def test_a_lost_index_is_refused_on_opening_and_made_again(folder: Path) -> None:
    path = folder / "index.selkd"
    before = path.read_bytes()
    path.unlink()
    with pytest.raises(InputError, match=r"index\.selkd in .* can't be read"):
        TeacherCache.open(folder)
    assert "index.selkd can't be read" in verify_cache(folder)[0]
    path.write_bytes(before[:-1])
    with pytest.raises(InputError, match=r"index\.selkd in .* is damaged or another cache's: expected 12 samples"):
        TeacherCache.open(folder)
    build(folder)
    assert path.read_bytes() == before


def test_no_flipped_bit_of_the_index_makes_a_look_up_return_something_else(folder: Path) -> None:
    path = folder / "index.selkd"
    intact = path.read_bytes()
    for at in range(40, len(intact), 5):
        flip(path, at, at % 8)
        cache = TeacherCache.open(folder)
        n_refused = 0
        for number in range(12):
            try:
                assert_same_rows(cache.get(sample_id(number)), make_rows(number))
            except InputError:
                n_refused += 1
        assert n_refused >= 1
        path.write_bytes(intact)


@pytest.mark.parametrize("from_end", [40 + 44, 40 + 4 * 44 - 20], ids=["last entry", "first entry"])
def test_a_damaged_index_of_a_shard_is_refused_before_any_sample_of_it_is_returned(folder: Path, from_end: int) -> None:
    path = folder / shard_name(1)
    flip(path, path.stat().st_size - from_end)
    message = r"shard-00001\.selkd is damaged: header, model or index do not match their digest"
    for number in range(4, 8):
        with pytest.raises(InputError, match=message):
            TeacherCache.open(folder).get(sample_id(number))


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("positions", "its rows do not agree with the index"),
        ("classes", "its rows do not agree with the index"),
        ("offset", "its blocks do not follow one another up to the index"),
        ("length", "its blocks do not follow one another up to the index"),
    ],
)
def test_an_index_that_does_not_describe_its_blocks_is_refused(folder: Path, field: str, message: str) -> None:
    """The shard's digest is right: only the meaning is wrong."""
    path = folder / shard_name(0)
    data = bytearray(path.read_bytes())
    index = np.frombuffer(bytes(data[-40 - 4 * INDEX.itemsize : -40]), INDEX).copy()
    index[field][0] += 1
    data[-40 - 4 * INDEX.itemsize : -40] = index.tobytes()
    model_end = 36 + int.from_bytes(data[32:36], "little")
    data[-24:-8] = xxhash.xxh3_128_digest(bytes(data[:model_end]) + index.tobytes())
    path.write_bytes(data)
    assert message in verify_cache(folder)[0]
    assert CacheWriter(folder, FINGERPRINT, plan()).missing_shards() == [0]


def test_a_shard_of_other_samples_is_not_taken_for_the_planned_one(folder: Path) -> None:
    plan_checksum = json.loads((folder / "plan.json").read_text())["checksum"]
    with (folder / shard_name(0)).open("wb") as file:
        write_shard(file, 0, plan_checksum, [(sample_id(number), make_rows(number)) for number in range(20, 24)])
    assert verify_cache(folder) == ["shard-00000.selkd holds other samples than planned, or in another order"]
    writer = CacheWriter(folder, FINGERPRINT, plan())
    assert writer.missing_shards() == [0]
    with pytest.raises(RunError, match=r"shard-00000\.selkd holds other samples than planned"):
        writer.finish()


def test_an_expected_fingerprint_of_other_types_is_refused_in_words(folder: Path) -> None:
    with pytest.raises(InputError, match="strings, integers or floats; got 'seed': None"):
        TeacherCache.open(folder, {**FINGERPRINT, "seed": None})


def test_many_samples_are_found_by_id(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    ids = [rng.bytes(16) for _ in range(2000)]
    rows = [make_rows(number, n_positions=2) for number in range(7)]
    writer = CacheWriter(tmp_path, FINGERPRINT, [ids[:1000], ids[1000:]])
    for shard in range(2):
        numbers = range(1000 * shard, 1000 * (shard + 1))
        writer.write_shard(shard, ((ids[number], *rows[number % 7]) for number in numbers))
    writer.finish()
    cache = TeacherCache.open(tmp_path)
    assert cache.sample_ids() == ids
    for number in rng.permutation(2000)[:500]:
        assert_same_rows(cache.get(ids[number]), rows[number % 7])


def test_a_damaged_manifest_hides_no_other_damage(tmp_path: Path) -> None:
    build(tmp_path)
    for name in (MANIFEST, shard_name(1)):
        flip(tmp_path / name, (tmp_path / name).stat().st_size // 2)
    problems = verify_cache(tmp_path)
    assert len(problems) == 2
    assert MANIFEST in problems[0]
    assert shard_name(1) in problems[1]


def test_a_damaged_index_denies_no_sample(tmp_path: Path) -> None:
    """One flipped bit: samples can't be found any more, and ids are others'."""
    build(tmp_path)
    flip(tmp_path / INDEX_FILE, 45)
    cache = TeacherCache.open(tmp_path)
    with pytest.raises(InputError, match=r"index.selkd .* is damaged"):
        _ = [sample_id(number) in cache for number in range(12)]
    with pytest.raises(InputError, match=r"index.selkd .* is damaged"):
        cache.sample_ids()


@pytest.mark.parametrize("damage", ["another order", "another place", "its end"])
def test_an_index_is_checked_without_a_manifest(folder: Path, damage: str) -> None:
    """What the plan and the shards say of it is known; a build that was interrupted has none, which is no problem."""
    (folder / MANIFEST).write_text("{}")
    assert len(verify_cache(folder)) == 1
    path = folder / INDEX_FILE
    intact = path.read_bytes()
    if damage == "another order":  # each id leads to its sample still, but half of them can't be found
        columns = (
            np.frombuffer(intact[40:][at : at + width], f"<u{width // 12}")
            for at, width in ((0, 96), (96, 96), (192, 48), (240, 48))
        )
        path.write_bytes(intact[:40] + b"".join(column[::-1].tobytes() for column in columns))
        expected = "its ids do not ascend"
    elif damage == "another place":
        flip(path, 40 + 16 * 12)
        expected = "does not lead to the samples of shard-0000"
    else:
        path.write_bytes(intact[:-1])
        expected = "is damaged or another cache's"
    problems = verify_cache(folder)
    assert len(problems) == 2
    assert expected in problems[1]
    (folder / MANIFEST).unlink()
    path.unlink()
    assert len(verify_cache(folder)) == 1


def test_a_start_reads_no_sample_and_no_damaged_one_is_ever_returned(folder: Path) -> None:
    """What says which samples a shard holds is read; a sample's own bytes are compared when they are read."""
    shard = folder / shard_name(1)
    where = int(entries_of(shard)["offset"][2])
    flip(shard, where + 5)
    writer = CacheWriter(folder, FINGERPRINT, plan())
    assert writer.missing_shards(blocks=False) == []
    assert verify_cache(folder, blocks=False) == []
    cache = TeacherCache.open(folder)
    for number in range(12):
        if number == 6:
            with pytest.raises(
                InputError, match=rf"shard-00001\.selkd is damaged at sample {sample_id(6).hex()}.*--repair"
            ):
                cache.get(sample_id(number))
        else:
            assert_same_rows(cache.get(sample_id(number)), make_rows(number))
    read = []
    with pytest.raises(InputError, match="damaged at sample"):
        read += [each for each, _ in cache.items()]
    assert writer.missing_shards() == [1]
    assert len(verify_cache(folder)) == 1


@pytest.mark.parametrize("damaged", [shard_name(1), INDEX_FILE])
def test_a_start_reads_what_was_written_since_the_manifest_and_the_rest_is_found_before_its_use(
    folder: Path, damaged: str
) -> None:
    """Bits that rot leave a file's time as it was: a start does not look, a reader does before it returns anything."""
    for path in folder.iterdir():
        os.utime(path, (1, 2 if path.name == MANIFEST else 1))
    before = contents(folder)
    flip(folder / damaged, 50)
    os.utime(folder / damaged, (1, 1))
    writer = CacheWriter(folder, FINGERPRINT, plan())
    assert writer.missing_shards(blocks=False) == []
    assert verify_cache(folder, blocks=False) == []
    writer.finish()
    assert [name for name, data in contents(folder).items() if data != before[name]] == [damaged]
    cache, lost = TeacherCache.open(folder), []
    for number in range(12):
        with suppress(InputError):
            assert_same_rows(cache.get(sample_id(number)), make_rows(number))
            continue
        lost.append(number)
    assert len(lost) == (1 if damaged == INDEX_FILE else 4)
    for number in lost:
        with pytest.raises(InputError, match=rf"{damaged} .*--repair"):
            cache.get(sample_id(number))

    os.utime(folder / damaged, (3, 3))
    assert writer.missing_shards(blocks=False) == ([] if damaged == INDEX_FILE else [1])
    assert [damaged in problem for problem in verify_cache(folder, blocks=False)] == [True]
    for shard in writer.missing_shards(blocks=False):
        writer.write_shard(shard, shard_samples(shard))
    writer.finish()
    assert contents(folder) == before


def test_a_start_compares_sizes(folder: Path) -> None:
    (folder / shard_name(2)).write_bytes((folder / shard_name(2)).read_bytes()[:-1])
    for path in folder.iterdir():
        os.utime(path, (1, 2 if path.name == MANIFEST else 1))
    assert CacheWriter(folder, FINGERPRINT, plan()).missing_shards(blocks=False) == [2]
    assert "shard-00002.selkd is truncated" in verify_cache(folder, blocks=False)[0]


def test_samples_are_read_by_their_place_in_the_stored_order(folder: Path) -> None:
    cache = TeacherCache.open(folder)
    for at in (0, 3, 4, 11, -1, -12):
        assert_same_rows(cache[at], make_rows(at % 12))
    for at in (12, -13):
        with pytest.raises(IndexError, match=rf"sample {at} of the teacher cache in .*, which has 12"):
            cache[at]
    for places in (slice(None), slice(2, 9), slice(9, 2, -3), slice(20, 30)):
        numbers = range(12)[places]
        assert len(cache[places]) == len(numbers)
        for rows, number in zip(cache[places], numbers, strict=True):
            assert_same_rows(rows, make_rows(number))
        assert [each for each, _ in cache.items(places)] == [sample_id(number) for number in numbers]
    assert [each for each, _ in cache.items()] == cache.sample_ids()
    for rows, number in zip(cache, range(12), strict=True):
        assert_same_rows(rows, make_rows(number))


def forge(folder: Path, fingerprint: dict[str, str | int | float], samples: list[tuple[bytes, Rows]]) -> None:
    """A complete cache of one shard, as a writer makes it that compares nothing with the fingerprint."""
    CacheWriter(folder, fingerprint, [[each for each, _ in samples]])
    planned, checksum = read_plan(folder / PLAN)
    with (folder / shard_name(0)).open("wb") as file:
        write_shard(file, 0, checksum, samples)
    shard = read_shard(folder, 0, checksum)
    write_sample_index(folder, checksum, [shard.index["sample_id"]])
    index = describe_index(folder / INDEX_FILE)
    write_document(folder / MANIFEST, make_manifest(planned, checksum, [shard.entry], index))


@pytest.mark.parametrize(
    ("fingerprint", "n_scalars", "message"),
    [
        ({"scalars": 2}, 0, "0 scalars a position, expected 2"),
        ({"scalars": 4}, 2, "2 scalars a position, expected 4"),
        ({}, 2, "2 scalars a position, expected 0"),
        ({"draws": 63}, 0, "rows whose counts sum to 64, expected 63"),
        ({"draws": 12, "count_total": 65}, 0, "rows whose counts sum to 64, expected 65"),
        ({"vocabulary": 1000}, 0, r"class \d+, expected classes below 1000"),
        ({"vocabulary": 1000, "tail": "one class"}, 0, r"class \d+, expected classes below 1001"),
    ],
)
def test_a_shard_that_does_not_hold_what_the_fingerprint_says_is_refused(
    tmp_path: Path, fingerprint: dict[str, str | int], n_scalars: int, message: str
) -> None:
    """By this reader and by one that was written from the document. All digests are right."""
    samples = []
    for number in range(4):
        rows = make_rows(number)
        codes = np.full((len(rows.row_lengths), n_scalars), 700, np.uint16) if n_scalars else None
        samples.append((sample_id(number), rows._replace(scalars=codes)))
    forge(tmp_path / "right", FINGERPRINT | ({"scalars": n_scalars} if n_scalars else {}), samples)
    assert verify_cache(tmp_path / "right") == []
    read_cache(tmp_path / "right")

    folder = tmp_path / "wrong"
    forge(folder, FINGERPRINT | fingerprint, samples)
    message = rf"shard-00000\.selkd has {message}"
    for decode in (True, False):
        (problem,) = verify_cache(folder, decode=decode)
        assert re.match(message, problem)
    with pytest.raises(InputError, match=message):
        TeacherCache.open(folder).get(sample_id(0))
    with pytest.raises(AssertionError):
        read_cache(folder)
    writer = CacheWriter(folder, FINGERPRINT | fingerprint, plan(1))
    assert writer.missing_shards() == [0]
    (folder / MANIFEST).unlink()  # what it lists is not read again
    with pytest.raises(RunError, match=message):
        writer.finish()


def test_a_manifest_of_another_fingerprint_than_its_plans_is_found_and_mended(folder: Path) -> None:
    path = folder / MANIFEST
    intact = path.read_bytes()
    manifest = json.loads(intact)
    path.write_bytes(render(manifest | {"fingerprint": FINGERPRINT | {"seed": 1338}})[0])
    for blocks in (True, False):
        (problem,) = verify_cache(folder, blocks=blocks)
        assert "manifest.json" in problem
        assert "another fingerprint than plan.json" in problem
    with pytest.raises(AssertionError):
        read_cache(folder)
    build(folder)
    assert path.read_bytes() == intact
    path.write_bytes(render(manifest | {"version": 3, "codec": "grouped-gaps-ans"})[0])
    with pytest.raises(InputError, match=r"manifest\.json in .* does not describe a complete teacher cache"):
        TeacherCache.open(folder)
    build(folder)
    assert path.read_bytes() == intact

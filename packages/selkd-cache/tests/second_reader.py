"""A second reader of a cache, written from the package's README in plain Python: it shares no code with selkd.

What the README says a reader refuses is an assertion here.
"""

import json
import struct
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path

import xxhash
import zstandard

Row = dict[int, int]


def read_cache(folder: Path) -> tuple[dict, dict[str, list[Row]]]:
    """The fingerprint, and the rows of every sample by the hex digits of its id, in the stored order."""
    plan, manifest = read_json(folder / "plan.json"), read_json(folder / "manifest.json")
    assert (manifest["complete"], manifest["plan"]) == (True, plan["checksum"])
    assert all(manifest[key] == plan[key] for key in ("fingerprint", "n_samples"))
    places = read_index(folder / "index.selkd", manifest)
    samples: dict[str, list[Row]] = {}
    for shard, (planned, listed) in enumerate(zip(plan["shards"], manifest["shards"], strict=True)):
        assert listed["name"] == f"shard-{shard:05}.selkd"
        assert all(listed[key] == planned[key] for key in ("ids_digest", "samples"))
        for row, (sample_id, rows) in enumerate(read_shard(folder, shard, manifest).items()):
            assert places.pop(sample_id) == (shard, row)
            samples[sample_id] = rows
    assert not places
    return manifest["fingerprint"], samples


def read_json(path: Path) -> dict:
    data = path.read_bytes()
    content = json.loads(data)
    version = 3 if "scalars" in content["fingerprint"] else 2
    codec = {2: "ranked-gaps-ans", 3: "grouped-gaps-ans"}[version]
    assert (content["format"], content["version"], content["codec"]) == ("selkd-teacher-cache", version, codec)
    blank = data.replace(content["checksum"].encode(), b"0" * 32)
    assert xxhash.xxh3_128_hexdigest(blank) == content["checksum"]
    return content


def read_index(path: Path, manifest: dict) -> dict[str, tuple[int, int]]:
    """The shard and the row of each sample."""
    data, n = path.read_bytes(), manifest["n_samples"]
    assert manifest["index"] == {"bytes": len(data), "digest": xxhash.xxh3_128_hexdigest(data)}
    assert data[:40] == struct.pack("<8sI16s4xQ", b"SELKDIDX", 1, bytes.fromhex(manifest["plan"]), n)
    columns = struct.unpack(f"<{2 * n}Q{2 * n}I", data[40:])
    first, last, shards, rows = (columns[at * n : (at + 1) * n] for at in range(4))
    ids = list(zip(first, last, strict=True))
    assert ids == sorted(set(ids))
    places = zip(shards, rows, strict=True)
    return {f"{one:016x}{two:016x}": place for (one, two), place in zip(ids, places, strict=True)}


def read_shard(folder: Path, shard: int, manifest: dict) -> dict[str, list[Row]]:
    """The rows of each sample."""
    listed = manifest["shards"][shard]
    data = (folder / listed["name"]).read_bytes()
    begin, (end, n_samples) = 36 + unsigned(data[32:36]), struct.unpack("<QQ", data[-40:-24])
    digest = xxhash.xxh3_128_digest(data[:begin] + data[end:-40])
    version = 3 if "scalars" in manifest["fingerprint"] else 2
    assert data[:32] == struct.pack("<8sI16sI", b"SELKDSHD", version, bytes.fromhex(manifest["plan"]), shard)
    assert data[-24:] == digest + b"SELKDEND"
    entries = list(struct.iter_unpack("<16sQQIII", data[end:-40]))
    model, samples, positions, classes = read_model(data[36:begin], version), {}, 0, 0
    check_model(model, entries, manifest["fingerprint"])
    for sample_id, checksum, offset, *sizes in entries:
        block = data[offset : offset + sizes[0]]
        rows = samples[sample_id.hex()] = read_block(model, block, sizes[2])
        assert (offset, checksum) == (begin, xxhash.xxh3_64_intdigest(sample_id + block))
        drawn = [row for row, _ in rows] if version == 3 else rows
        assert sizes == [len(block), sum(bool(row) for row in drawn), sum(map(len, drawn))]
        begin, positions, classes = begin + sizes[0], positions + sizes[1], classes + sizes[2]
    assert (begin, len(entries)) == (end, n_samples)
    ids_digest = xxhash.xxh3_128_hexdigest(b"".join(entry[0] for entry in entries))
    counted = {"bytes": len(data), "samples": n_samples, "positions": positions, "classes": classes}
    assert listed == {"name": listed["name"], "digest": digest.hex(), "ids_digest": ids_digest, **counted}
    return samples


def check_model(model: dict, entries: list, fingerprint: dict) -> None:
    """The fingerprint says how many scalars there are, the total of a row that is not empty, and the classes."""
    assert len(model["largest"]) == fingerprint.get("scalars", 0)
    assert model["total"] == fingerprint.get("count_total", fingerprint["draws"]) or not any(e[-1] for e in entries)
    n_classes = fingerprint["vocabulary"] + ("tail" in fingerprint)
    assert all(each < n_classes for group in model["classes"] for each in group)


def unsigned(data: bytes) -> int:
    return int.from_bytes(data, "little")


def read_model(data: bytes, version: int = 2) -> dict:
    total, n_classes, n_groups, largest, at = unsigned(data[:4]), unsigned(data[4:8]), 1, [], 8
    if version == 3:
        n_groups, n_scalars = unsigned(data[8:12]), unsigned(data[12:16])
        at = 16 + 2 * n_scalars
        largest = [unsigned(data[place : place + 2]) for place in range(16, at, 2)]
    frames = []
    while at < len(data):
        end = at + 4 + unsigned(data[at : at + 4])
        frames.append(zstandard.decompress(data[at + 4 : end]))
        at = end
    assert at == len(data)
    gaps = [sum(part << 8 * at for at, part in enumerate(parts)) for parts in zip(*frames[:4], strict=True)]
    ids = [end - 1 for end in accumulate(gap + 1 for gap in gaps)]
    groups = frames.pop(5) if version == 3 else bytes(n_classes)
    ranked = sorted(range(n_classes), key=lambda place: (-frames[4][place], ids[place]))
    classes = [[ids[place] for place in ranked if groups[place] == group] for group in range(n_groups)]
    assert sum(map(len, classes)) == n_classes
    octaves, of_singles, of_counts = n_classes.bit_length() + 1, bucket(3, total) + 1, bucket(1, total) + 1
    shapes = {"singles": (1, of_singles), "heavies": (of_singles, bucket(3, total // 2) + 1)}
    if version == 3:
        shapes["parts"] = (2 * (n_groups - 1) * of_singles, of_singles)
    shapes["gaps"] = (2 * n_groups * octaves * 16, bucket(1, max(n_classes - 1, 0)) + 1)
    shapes["counts"] = (16 * of_counts, of_counts)
    uncertain = log2(total) // 4 + 1
    for number, code in enumerate(largest):
        nats, before = code // 32 + 1, largest[number - 1] // 32 + 1
        shapes[f"nats {number}"] = ((uncertain, 9 * before)[number % 2], nats)
        shapes[f"quarters {number}"] = ((uncertain, 17)[number % 2] * nats, 4)
    tables = {}
    for (name, (contexts, symbols)), cells in zip(shapes.items(), frames[5:], strict=True):
        width = max(2, symbols)
        tables[name] = [cells[start : start + width] for start in range(0, len(cells), width)]
        assert len(cells) == contexts * width
    return {"total": total, "classes": classes, "octaves": octaves, "tables": tables, "largest": largest}


def log2(number: int) -> int:
    """Sixteen times the logarithm to base 2, rounded down."""
    return (number**16).bit_length() - 1 if number else 0


def bucket(mantissa_bits: int, value: int) -> int:
    octave = max(0, value.bit_length() - 1 - mantissa_bits)
    return octave * 2**mantissa_bits + value // 2**octave


def frequencies(cells: bytes) -> list[int]:
    numbers = [cell if cell < 4 else (4 + cell % 4) * 2 ** (cell // 4 - 1) for cell in cells]
    if not any(numbers):
        numbers = [1] * len(numbers)
    to_share = 2**24 - len(numbers)
    shares = [each * to_share // sum(numbers) for each in numbers]
    shares[numbers.index(max(numbers))] += to_share - sum(shares)
    return [share + 1 for share in shares]


class Ans:
    def __init__(self, data: bytes) -> None:
        self.stack, self.state = list(struct.unpack(f"<{len(data) // 4}I", data)), 0
        self.refill()
        self.refill()

    def refill(self) -> None:
        if self.state < 2**32 and self.stack:
            self.state = self.state * 2**32 + self.stack.pop()

    def symbol(self, freqs: list[int]) -> int:
        below = [0, *accumulate(freqs)]
        found = bisect_right(below, self.state % 2**24) - 1
        return self.take(found, below[found], freqs[found])

    def low_bits(self, n_bits: int) -> int:
        found, each = self.state % 2**24 >> 24 - n_bits, 2 ** (24 - n_bits)
        return self.take(found, found * each, each)

    def take(self, found: int, below: int, frequency: int) -> int:
        self.state = self.state // 2**24 * frequency + self.state % 2**24 - below
        self.refill()
        return found


def read_block(model: dict, data: bytes, n_classes: int | None = None) -> list:
    """The rows of a block: each maps class ids to counts; with scalars, each row is that and a list of numbers.

    ``n_classes`` is what the index says; it is compared before there is room for the classes."""
    n, ans, groups, total = unsigned(data[:4]), Ans(data[4:]), len(model["classes"]), model["total"]

    def values(table: str, mantissa_bits: int, contexts: list[int]) -> list[int]:
        found = [ans.symbol(frequencies(model["tables"][table][context])) for context in contexts]
        octaves = [max(0, (each >> mantissa_bits) - 1) for each in found]
        firsts = [each - (octave << mantissa_bits) << octave for each, octave in zip(found, octaves, strict=True)]
        return [first + (ans.low_bits(octave) if octave else 0) for first, octave in zip(firsts, octaves, strict=True)]

    def parts(kind: int, left: list[int]) -> list[int]:
        found, width = [], bucket(3, total) + 1
        for group in range(groups - 1):
            contexts = [(kind * (groups - 1) + group) * width + bucket(3, each) for each in left]
            found += (part := values("parts", 3, contexts))
            left = [all_ - each for all_, each in zip(left, part, strict=True)]
        return found + left

    def active(sizes: list[int], column: int) -> list[int]:
        return sorted((each for each, size in enumerate(sizes) if size > column), key=lambda k: (-sizes[k], k))

    singles = values("singles", 3, [0] * n)
    heavies = values("heavies", 3, [bucket(3, each) for each in singles])
    assert n <= 2**24
    assert sum(singles + heavies) <= 2**26
    assert n_classes in (None, sum(singles + heavies))
    of_singles = parts(1, singles)
    sizes = parts(0, heavies) + of_singles
    assert all(size <= len(model["classes"][at // n % groups]) for at, size in enumerate(sizes))
    lists = [[-1] for _ in sizes]
    for column in range(max(sizes, default=0)):
        open_lists, contexts = active(sizes, column), []
        for each in open_lists:
            context = each // n * model["octaves"] + (lists[each][-1] + 1).bit_length()
            contexts.append(context * 16 + min(sizes[each] - column, 16) - 1)
        for each, gap in zip(open_lists, values("gaps", 1, contexts), strict=True):
            lists[each].append(lists[each][-1] + gap + 1)
    excess = [total - one - 2 * more for one, more in zip(singles, heavies, strict=True)]
    beyond: list[list[int]] = [[] for _ in range(n)]
    for column in range(max(heavies, default=0) - 1):
        open_rows = active(heavies, column + 1)
        contexts = [bucket(1, excess[row]) * 16 + min(heavies[row] - column, 16) - 1 for row in open_rows]
        for row, value in zip(open_rows, values("counts", 1, contexts), strict=True):
            beyond[row].append(value)
            excess[row] -= value
    rows = []
    for row in range(n):
        counts = [2 + value for value in [*beyond[row], excess[row]][: heavies[row]]] + [1] * singles[row]
        ids = [model["classes"][k // n % groups][rank] for k in range(row, len(lists), n) for rank in lists[k][1:]]
        rows.append(dict(sorted(zip(ids, counts, strict=True))))
    flat = [(total * log2(total) - sum(c * log2(c) for c in row.values())) // total // 4 if row else 0 for row in rows]
    most = [max(row.values(), default=0) for row in rows]
    codes: list[list[int]] = []
    for number, largest in enumerate(model["largest"]):
        first, second = flat, flat
        if number % 2:
            first = [code // 32 * 9 + 8 * each // max(total, 1) for code, each in zip(codes[-1], most, strict=True)]
            second = [16 * each // max(total, 1) for each in most]
        nats = values(f"nats {number}", 16, first)  # below 2^16 a bucket is its value
        contexts = [each * (largest // 32 + 1) + nat for each, nat in zip(second, nats, strict=True)]
        quarters = values(f"quarters {number}", 16, contexts)
        codes.append([32 * nat + 8 * quarter + ans.low_bits(3) for nat, quarter in zip(nats, quarters, strict=True)])
        assert max(codes[-1], default=0) <= largest
    assert (ans.state, ans.stack) == (0, [])
    return [(row, [scalar(column[at]) for column in codes]) for at, row in enumerate(rows)] if codes else rows


def scalar(code: int) -> float:
    if code >= 672:
        return 1 + (code - 672) / 32
    return (32 + code % 32) * 2.0 ** (code // 32 - 26) if code >= 32 else code * 2.0**-25

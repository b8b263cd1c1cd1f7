"""A second reader of shards, written from the package's README in plain Python: it shares no code with selkd."""

import zstandard

Row = dict[int, int]


def read_model(data: bytes) -> dict:
    total, vocab_size = (int.from_bytes(data[at : at + 4], "little") for at in (0, 4))
    frames, at = [], 8
    for _ in range(9):
        length = int.from_bytes(data[at : at + 4], "little")
        frames.append(zstandard.decompress(data[at + 4 : at + 4 + length]))
        at += 4 + length
    assert at == len(data)
    ids, previous = [], -1
    for lowest, second, third, highest in zip(*frames[:4], strict=True):
        previous += 1 + lowest + (second << 8) + (third << 16) + (highest << 24)
        ids.append(previous)
    ranked = sorted(range(vocab_size), key=lambda place: (-frames[4][place], ids[place]))
    n_symbols = {
        "singles": bucket(3, total) + 1,
        "heavies": bucket(3, total // 2) + 1,
        "gaps": bucket(1, max(vocab_size - 1, 0)) + 1,
        "counts": bucket(1, total) + 1,
    }
    tables = {}
    for (name, symbols), cells in zip(n_symbols.items(), frames[5:], strict=True):
        width = max(2, symbols)
        tables[name] = [cells[start : start + width] for start in range(0, len(cells), width)]
    octaves = vocab_size.bit_length() + 1
    assert [len(table) for table in tables.values()] == [
        1,
        n_symbols["singles"],
        32 * octaves,
        16 * n_symbols["counts"],
    ]
    return {"total": total, "classes": [ids[place] for place in ranked], "octaves": octaves, "tables": tables}


def bucket(mantissa_bits: int, value: int) -> int:
    octave = max(0, value.bit_length() - 1 - mantissa_bits)
    return octave * 2**mantissa_bits + value // 2**octave


def frequencies(cells: bytes) -> list[int]:
    numbers = [cell if cell < 4 else (4 + cell % 4) * 2 ** (cell // 4 - 1) for cell in cells]
    if not any(numbers):
        numbers = [1] * len(numbers)
    to_share = 2**24 - len(numbers)
    shares = [number * to_share // sum(numbers) for number in numbers]
    shares[numbers.index(max(numbers))] += to_share - sum(shares)
    return [share + 1 for share in shares]


class Ans:
    def __init__(self, data: bytes) -> None:
        self.stack = [int.from_bytes(data[at : at + 4], "little") for at in range(0, len(data), 4)]
        self.state = 0
        for _ in range(2):
            self.refill()

    def refill(self) -> None:
        if self.stack:
            self.state = self.state * 2**32 + self.stack.pop()

    def symbol(self, freqs: list[int]) -> int:
        quantile, below, found = self.state % 2**24, 0, 0
        while below + freqs[found] <= quantile:
            below += freqs[found]
            found += 1
        self.step(quantile, below, freqs[found])
        return found

    def low_bits(self, n_bits: int) -> int:
        quantile = self.state % 2**24
        each = 2 ** (24 - n_bits)
        self.step(quantile, quantile // each * each, each)
        return quantile // each

    def step(self, quantile: int, below: int, frequency: int) -> None:
        self.state = self.state // 2**24 * frequency + quantile - below
        if self.state < 2**32:
            self.refill()


def read_block(model: dict, data: bytes) -> list[Row]:
    """The rows of a block: each maps class ids to counts."""
    n = int.from_bytes(data[:4], "little")
    ans = Ans(data[4:])

    def values(table: str, mantissa_bits: int, contexts: list[int]) -> list[int]:
        buckets = [ans.symbol(frequencies(model["tables"][table][context])) for context in contexts]
        found = []
        for each in buckets:
            octave = max(0, each // 2**mantissa_bits - 1)
            found.append((each - octave * 2**mantissa_bits) * 2**octave + (ans.low_bits(octave) if octave else 0))
        return found

    singles = values("singles", 3, [0] * n)
    heavies = values("heavies", 3, [bucket(3, number) for number in singles])
    sizes = heavies + singles
    lists: list[list[int]] = [[] for _ in sizes]
    for column in range(max(sizes, default=0)):
        active = sorted((number for number in range(2 * n) if sizes[number] > column), key=lambda k: (-sizes[k], k))
        contexts = []
        for number in active:
            octave = (lists[number][-1] + 1).bit_length() if lists[number] else 0
            group = number >= n
            contexts.append((group * model["octaves"] + octave) * 16 + min(sizes[number] - column, 16) - 1)
        for number, gap in zip(active, values("gaps", 1, contexts), strict=True):
            lists[number].append((lists[number][-1] if lists[number] else -1) + gap + 1)
    excess = [model["total"] - one - 2 * more for one, more in zip(singles, heavies, strict=True)]
    beyond: list[list[int]] = [[] for _ in range(n)]
    for column in range(max(heavies, default=0) - 1):
        active = sorted((row for row in range(n) if heavies[row] > column + 1), key=lambda k: (-heavies[k], k))
        contexts = [bucket(1, excess[row]) * 16 + min(heavies[row] - column, 16) - 1 for row in active]
        for row, value in zip(active, values("counts", 1, contexts), strict=True):
            beyond[row].append(value)
            excess[row] -= value
    assert ans.state == 0
    assert not ans.stack
    rows = []
    for row in range(n):
        counts = [2 + value for value in [*beyond[row], excess[row]][: heavies[row]]] + [1] * singles[row]
        ids = [model["classes"][rank] for rank in lists[row] + lists[n + row]]
        rows.append(dict(sorted(zip(ids, counts, strict=True))))
    return rows

"""The teacher cache measured: bytes a position, speed, error of the drawn targets, and a cache of a million samples.

    python benchmarks/cache.py size  --data DIR [--positions 204800]    real teacher, real text: bytes, reading, writing
    python benchmarks/cache.py draws --data DIR [--plot FILE.svg]       squared error of the targets against bytes
    python benchmarks/cache.py scale [--samples 1000000]                a synthetic cache: opening, look-up, memory

``DIR`` has ``textbooks_openstax.jsonl``, ``encyclopedia_wikipedia.jsonl``, ``books_fiction.jsonl`` and
``web_c4_sample.jsonl``. ``--json`` prints the figures as JSON. Speeds are in seconds of one core's time.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor

from selkd import load_recipe
from selkd.data.collate import collate
from selkd.data.samples import Sample, SampleDataset
from selkd.data.splits import load_splits
from selkd.maths.chunked import wide
from selkd.maths.head import Head
from selkd.maths.importance import statistics
from selkd.models.head import head_of, hidden_states
from selkd.models.loading import load_model, native_dtype
from selkd.models.sources import default_cache_dir, locate
from selkd.models.tokenizers import load_tokenizer, tokenizer_fingerprint
from selkd.recipe.choices import ClassOptions
from selkd.selection.classes import ClassSampler, class_sampler, in_units
from selkd.selection.randomness import position_uniforms
from selkd.teacher.build_cache import plan_shards
from selkd.teacher.cached import CachedTeacher
from selkd_cache import codec, shard
from selkd_cache.reader import TeacherCache
from selkd_cache.rows import Rows
from selkd_cache.scalars import bound_of, values_of
from selkd_cache.writer import CacheWriter

CPU = torch.device("cpu")
SEED = 1337
TEXTS = {
    "textbooks and encyclopedia": ("textbooks_openstax", "encyclopedia_wikipedia"),
    "fiction": ("books_fiction",),
    "web": ("web_c4_sample",),
}
ROWS_AT_ONCE = 256
SAMPLES_AT_ONCE = 8
COLD_READS = 100
DRAWS = (8, 16, 32, 64, 96, 128, 256)


class Teacher:
    """The embedded default, and text cut and packed to 512 tokens for it."""

    def __init__(self, data: Path) -> None:
        source = locate("demo", default_cache_dir())
        self.model = load_model(source, native_dtype(CPU), CPU)
        self.head: Head = head_of(self.model)
        self.tokenizer = load_tokenizer(source)
        self.data = data

    def samples(self, files: tuple[str, ...], positions: int) -> list[Sample]:
        found: list[Sample] = []
        for name in files:
            options = load_recipe("demo").data.model_copy(
                update={
                    "path": str(self.data / f"{name}.jsonl"),
                    "max_length": 512,
                    "tokens": positions // len(files) + 1024,
                    "held_out_fraction": 0.0,
                }
            )
            fingerprint = tokenizer_fingerprint(self.tokenizer)
            found += list(load_splits(options, self.tokenizer, fingerprint, default_cache_dir()).train)
        return found

    def probabilities(self, samples: list[Sample]) -> Iterator[tuple[list[Sample], Tensor, Tensor]]:
        """For some samples at a time: the samples, their hidden states [n, D], and uniforms [n, 256]."""
        for at in range(0, len(samples), SAMPLES_AT_ONCE):
            group = samples[at : at + SAMPLES_AT_ONCE]
            batch = collate(group, int(self.tokenizer.pad_token_id))
            valid = batch["valid_mask"].numpy()
            noise = position_uniforms(SEED, batch["sample_ids"].numpy(), valid, "cache", draws=256)[valid]
            hidden = hidden_states(self.model, batch["input_ids"], batch["position_ids"])[batch["valid_mask"]]
            yield group, hidden, torch.from_numpy(noise)


def ragged(class_ids: Tensor, counts: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    drawn = counts > 0
    return (
        drawn.sum(-1).numpy().astype(np.uint16),
        class_ids[drawn].numpy().astype(np.uint32),
        counts[drawn].numpy().astype(np.uint16),
    )


def joined(parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> Rows:
    return Rows(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def cut(rows: Rows, sizes: list[int]) -> list[Rows]:
    """Rows of several samples, cut into those of each."""
    ends = np.cumsum([0, *sizes])
    entries = np.concatenate([[0], np.cumsum(rows.row_lengths, dtype=np.int64)])[ends]
    return [
        Rows(rows.row_lengths[a:b], rows.class_ids[x:y], rows.counts[x:y])
        for a, b, x, y in zip(ends, ends[1:], entries, entries[1:], strict=False)
    ]


def sampler(name: str, draws: int) -> ClassSampler:
    return class_sampler(ClassOptions(sampler=name, draws=draws))


@torch.inference_mode()
def measure_size(data: Path, positions: int, texts: list[str]) -> dict[str, Any]:
    """Real caches of each text and of two numbers of draws: every byte of their folders counted, every sample read."""
    teacher = Teacher(data)
    kinds = {
        "rs_kd 64": sampler("rs_kd", 64),
        "rs_kd 12": sampler("rs_kd", 12),
        "systematic 64": sampler("systematic", 64),
    }
    figures: dict[str, Any] = {}
    for text in texts:
        samples = teacher.samples(TEXTS[text], positions)
        rows: dict[str, list[Rows]] = {kind: [] for kind in kinds}
        scalars: list[np.ndarray] = []
        forward = 0.0
        draw_seconds = dict.fromkeys(kinds, 0.0)
        clock = time.process_time()
        for group, hidden, noise in teacher.probabilities(samples):
            batch = collate(group, int(teacher.tokenizer.pad_token_id))
            targets = batch["targets"][batch["valid_mask"]]
            numbers: list[Tensor] = []
            parts: dict[str, list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = {kind: [] for kind in kinds}
            for at in range(0, len(hidden), ROWS_AT_ONCE):
                logits = wide(teacher.head.logits(hidden[at : at + ROWS_AT_ONCE]))
                p = torch.softmax(logits, dim=-1)
                forward += time.process_time() - clock
                of_rows = targets[at : at + ROWS_AT_ONCE]
                numbers.append(statistics(("teacher_entropy", "teacher_ce"), logits, logits, of_rows))
                for kind, draw in kinds.items():
                    clock = time.process_time()
                    u = noise[at : at + ROWS_AT_ONCE, : draw.n_uniforms]
                    parts[kind].append(ragged(*draw.integers(p, u)))
                    draw_seconds[kind] += time.process_time() - clock
                clock = time.process_time()
            sizes = [sample.n_valid for sample in group]
            scalars += np.split(torch.cat(numbers).numpy(), np.cumsum(sizes)[:-1])
            for kind in kinds:
                rows[kind] += cut(joined(parts[kind]), sizes)
            clock = time.process_time()
        for kind, draw in kinds.items():
            for ending, of_samples in ((", without scalars", None), ("", scalars)):
                stored = [
                    (*each[:3], None if of_samples is None else of_samples[at]) for at, each in enumerate(rows[kind])
                ]
                figures[f"{text}, {kind}{ending}"] = _cache_figures(samples, stored, draw, teacher, forward) | {
                    "draw_share_of_forward": draw_seconds[kind] / forward,
                }
                print(text, kind + ending, figures[f"{text}, {kind}{ending}"], file=sys.stderr)
    return figures


def _cache_figures(
    samples: list[Sample], rows: list[tuple[Any, ...]], draw: ClassSampler, teacher: Teacher, forward: float
) -> dict[str, float | int]:
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    dataset = SampleDataset.from_samples(samples)
    shards = plan_shards(dataset)
    ids = dataset.ids
    fingerprint = {"draws": draw.draws, "count_total": draw.total, "vocabulary": teacher.head.vocab_size}
    fingerprint |= {} if rows[0][3] is None else {"scalars": rows[0][3].shape[1]}
    with tempfile.TemporaryDirectory() as folder:
        clock = time.process_time()
        writer = CacheWriter(Path(folder) / "cache", fingerprint, [[ids[i] for i in members] for members in shards])
        for number, members in enumerate(shards):
            writer.write_shard(number, [(ids[i], *rows[i]) for i in members])
        writer.finish()
        write = time.process_time() - clock
        cache = TeacherCache.open(Path(folder) / "cache")
        stats = cache.stats()
        order = np.random.default_rng(0).permutation([i for members in shards for i in members])
        clock = time.process_time()
        for i in order:
            got = cache.get(ids[i])
        read = time.process_time() - clock
        cold = order[:COLD_READS]
        clock = time.process_time()
        for i in cold:
            cache._shard.cache_clear()  # as in a cache of far more shards than stay in memory
            cache.get(ids[i])
        read_cold = time.process_time() - clock
        for i in order[:20]:
            got = cache.get(ids[i])
            assert all(np.array_equal(a, b) for a, b in zip(got[:3], rows[i][:3], strict=True))
            if rows[i][3] is not None:
                assert (np.abs(values_of(got.scalars) - rows[i][3]) <= bound_of(rows[i][3])).all()
        reader = CachedTeacher(cache)
        groups = [order[at : at + SAMPLES_AT_ONCE] for at in range(0, len(order), SAMPLES_AT_ONCE)]
        batches = [collate([samples[i] for i in group], 0) for group in groups]
        clock = time.process_time()
        for batch in batches:
            reader.targets(batch, 0)
        to_tensors = time.process_time() - clock
    torch.set_num_threads(n_threads)
    positions = int(stats["positions"])
    return {
        "positions": positions,
        "bytes_per_position": float(stats["bytes_per_position"]),
        "classes_per_position": float(stats["classes_per_position"]),
        "positions_read_per_core_second": positions / read,
        "positions_read_cold_per_core_second": sum(samples[i].n_valid for i in cold) / read_cold,
        "positions_to_tensors_per_core_second": positions / to_tensors,
        "write_share_of_forward": write / forward,
    }


@torch.inference_mode()
def measure_draws(data: Path, positions: int) -> dict[str, Any]:
    """Mean squared error of the target and bytes a position, for each sampler and number of draws."""
    teacher = Teacher(data)
    samples = teacher.samples(TEXTS["textbooks and encyclopedia"], positions)
    grid = {(name, draws): sampler(name, draws) for name in ("rs_kd", "systematic", "top_k") for draws in DRAWS}
    parts: dict[tuple[str, int], list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = {key: [] for key in grid}
    error = dict.fromkeys(grid, 0.0)
    sizes = [sample.n_valid for sample in samples]
    for _, hidden, noise in teacher.probabilities(samples):
        for at in range(0, len(hidden), ROWS_AT_ONCE):
            p = torch.softmax(wide(teacher.head.logits(hidden[at : at + ROWS_AT_ONCE])), dim=-1)
            squares = p.double().square().sum(-1)
            most_probable = p.topk(max(DRAWS), dim=-1)
            for key, draw in grid.items():
                if key[0] == "top_k":  # from one sort for all; ids ascend as the sampler's do
                    class_ids, order = most_probable.indices[:, : key[1]].sort(dim=-1)
                    class_ids, counts = in_units(class_ids, most_probable.values.gather(-1, order))
                else:
                    class_ids, counts = draw.integers(p, noise[at : at + ROWS_AT_ONCE, : draw.n_uniforms])
                target = counts.double() / draw.total
                at_classes = p.gather(-1, class_ids).double()
                error[key] += float((squares + (target.square() - 2 * target * at_classes).sum(-1)).sum())
                parts[key].append(ragged(class_ids, counts))
    figures = []
    for (name, draws), pieces in parts.items():
        rows = cut(joined(pieces), sizes)
        model = codec.fit(rows)
        size = len(model.to_bytes()) + sum(len(codec.encode(model, each)) + 44 + 24 for each in rows)
        figures.append(
            {
                "sampler": name,
                "draws": draws,
                "bytes_per_position": size / sum(sizes),
                "squared_error": error[name, draws] / sum(sizes),
            }
        )
        print(figures[-1], file=sys.stderr)
    return {"positions": sum(sizes), "points": figures, "at_equal_bytes": at_equal_bytes(figures)}


def at_equal_bytes(points: list[dict[str, Any]]) -> list[dict[str, float]]:
    """For each ``systematic`` point the error of ``rs_kd`` at the same bytes, between its points in log-log."""
    plain = sorted((p["bytes_per_position"], p["squared_error"]) for p in points if p["sampler"] == "rs_kd")
    sizes, errors = (np.log(np.array(values)) for values in zip(*plain, strict=True))
    return [
        {
            "draws": p["draws"],
            "bytes_per_position": p["bytes_per_position"],
            "times_less_error": math.exp(np.interp(math.log(p["bytes_per_position"]), sizes, errors))
            / p["squared_error"],
        }
        for p in points
        if p["sampler"] == "systematic" and sizes[0] <= math.log(p["bytes_per_position"]) <= sizes[-1]
    ]


def plot_draws(figures: dict[str, Any], path: Path) -> None:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, colour in (("rs_kd", "#b45309"), ("systematic", "#0f766e"), ("top_k", "#626c79")):
        points = [p for p in figures["points"] if p["sampler"] == name]
        sizes, errors = ([p[key] for p in points] for key in ("bytes_per_position", "squared_error"))
        axes.plot(sizes, errors, "o-", color=colour, label=name, markersize=4)
        for point in points:
            if point["draws"] in (8, 64, 256):
                at = (point["bytes_per_position"], point["squared_error"])
                axes.annotate(f"U={point['draws']}", at, textcoords="offset points", xytext=(5, 4), fontsize=8)
    axes.set(xscale="log", yscale="log", xlabel="bytes a position", ylabel="squared error of the target")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    FigureCanvasSVG(figure).print_svg(str(path), metadata={"Date": None})


READ_AT_SCALE = """
import json, sys, time
import numpy as np, psutil
from selkd_cache.reader import TeacherCache
from selkd_cache.rows import Rows
before = psutil.Process().memory_info().rss
clock = time.perf_counter()
cache = TeacherCache.open(sys.argv[1])
opened = time.perf_counter() - clock
ids = [np.random.default_rng(number).bytes(16) for number in np.random.default_rng(1).integers(0, len(cache), 20_000)]
clock = time.perf_counter()
assert all(sample_id in cache for sample_id in ids)
found = (time.perf_counter() - clock) / len(ids)
clock = time.perf_counter()
for sample_id in ids[:2000]:
    cache.get(sample_id)
got = (time.perf_counter() - clock) / 2000
after = psutil.Process().memory_info().rss
print(json.dumps({"open_seconds": opened, "look_up_microseconds": found * 1e6, "get_microseconds": got * 1e6,
                  "memory_growth_bytes": after - before}))
"""


def measure_scale(n_samples: int) -> dict[str, Any]:
    """A cache of many small synthetic samples: sample i has the id ``default_rng(i).bytes(16)``.

    All shards hold the same rows, coded once: what is measured is the files, not the coding.
    """
    per_shard = 256
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(per_shard):
        class_ids = np.sort(rng.choice(49_152, 8, replace=False)).astype(np.uint32)
        rows.append((np.array([8], np.uint16), class_ids, np.array([1] * 7 + [57], np.uint16)))
    model = codec.fit([Rows(*each) for each in rows])
    blocks = {class_ids.tobytes(): codec.encode(model, Rows(*each)) for each in rows for class_ids in each[1:2]}
    shard.codec = SimpleNamespace(  # type: ignore[assignment]
        fit=lambda _: model, encode=lambda _, each: blocks[each.class_ids.tobytes()]
    )
    sample_ids = [np.random.default_rng(number).bytes(16) for number in range(n_samples)]
    shards = [sample_ids[at : at + per_shard] for at in range(0, n_samples, per_shard)]
    with tempfile.TemporaryDirectory() as folder:
        clock = time.process_time()
        writer = CacheWriter(Path(folder) / "cache", {"draws": 64, "vocabulary": 49_152}, shards)
        before = psutil.Process().memory_info().rss
        for number, ids in enumerate(shards):
            writer.write_shard(number, ((each, *rows[at]) for at, each in enumerate(ids)))
        growth = psutil.Process().memory_info().rss - before
        writer.finish()
        written = time.process_time() - clock
        command = [sys.executable, "-c", READ_AT_SCALE, str(Path(folder) / "cache")]
        read = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return {
        "samples": n_samples,
        "shards": len(shards),
        "write_core_seconds": written,
        "writer_memory_growth_bytes": growth,
        **read,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("size", "draws", "scale"))
    parser.add_argument("--data", type=Path, help="the folder of the texts")
    parser.add_argument("--positions", type=int, help="of each text: 204800 for size, 65536 for draws")
    parser.add_argument("--text", action="append", choices=TEXTS, help="of size; all if not given")
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--plot", type=Path, help="write the figure of draws there")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.what != "scale" and options.data is None:
        parser.error("--data is needed")
    if options.what == "size":
        figures = measure_size(options.data, options.positions or 204_800, options.text or list(TEXTS))
    elif options.what == "draws":
        figures = measure_draws(options.data, options.positions or 65_536)
        if options.plot:
            plot_draws(figures, options.plot)
    else:
        figures = measure_scale(options.samples)
    print(json.dumps(figures, indent=2) if options.json else figures)


if __name__ == "__main__":
    main()

"""Writes Parquet files as DistillKit's samplers do, from a teacher's most likely classes, by the public description.

It is the other side of ``selkd.foreign.distillkit``, and shares no code with it: numpy alone packs the bits.

    python benchmarks/distillkit_file.py --out FOLDER --gigabytes 1     # random distributions, for measuring the import

Beside the file it writes ``text.jsonl``, the text with the same tokens, and ``recipe.yaml``, which imports it.

    python benchmarks/distillkit_file.py --out FOLDER --measure      # imports what is there; seconds and peak memory
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

COMPRESSION: dict[str, Any] = {
    "d": 49152,
    "k": 64,
    "exact_k": 16,
    "exact_dtype": "float32",
    "polynomial_terms": [0, 1, "sqrt"],
    "term_dtype": "float32",
    "residual_bins": [
        {"scale_dtype": "float16", "element_bits": 8, "num_elements": 32},
        {"scale_dtype": "float16", "element_bits": 1, "num_elements": 8},
    ],
    "delta_encoding": False,
    "error_diffusion": False,
    "normalize_t": False,
}


def pack(numbers: np.ndarray, bits: int) -> np.ndarray:
    """Integers [n, k] of ``bits`` bits as uint8 [n, b], the highest bit first."""
    flags = (numbers[:, :, None] >> np.arange(bits - 1, -1, -1)) & 1
    return np.packbits(flags.reshape(len(numbers), -1).astype(np.uint8), axis=1)


def compressed(logs: np.ndarray, config: dict[str, Any]) -> np.ndarray:
    """Log-probabilities [n, k], descending, as the bytes of the present codec, uint8 [n, b]."""
    if config["delta_encoding"]:
        logs = np.diff(logs, axis=1, prepend=0)
    exact, others = logs[:, : config["exact_k"]], logs[:, config["exact_k"] :]
    parts = [exact.astype(config["exact_dtype"])]
    if terms := config["polynomial_terms"]:
        count = others.shape[1]
        points = np.linspace(0, 1, count) if config["normalize_t"] else np.arange(count, dtype=float)
        curve = np.stack([{"sqrt": np.sqrt, "exp": np.exp}.get(t, lambda x, t=t: x**t)(points) for t in terms], axis=1)
        coefficients = np.linalg.lstsq(curve, others.T, rcond=None)[0].T.astype(config["term_dtype"])
        parts.append(coefficients)
        others = others - coefficients.astype(float) @ curve.T
    for part in config["residual_bins"]:
        values, others = others[:, : part["num_elements"]], others[:, part["num_elements"] :]
        bits, largest = part["element_bits"], np.abs(values).max(axis=1, keepdims=True)
        scale = (np.where(largest == 0, 1, largest) / (1 if bits == 1 else 2 ** (bits - 1))).astype(part["scale_dtype"])
        low, high = (0, 1) if bits == 1 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        numbers = np.clip(np.round(values / scale.astype(float)), low, high).astype(np.int64) - low
        parts += [scale, pack(numbers, bits)]
    return np.concatenate([np.ascontiguousarray(part).view(np.uint8).reshape(len(logs), -1) for part in parts], axis=1)


def columns(class_ids: np.ndarray, logs: np.ndarray, config: dict[str, Any]) -> dict[str, np.ndarray]:
    """A text's columns in the present codec, from classes and log-probabilities [n, k], descending."""
    bits = int(np.ceil(np.log2(config["d"])))
    return {"compressed_logprobs": compressed(logs, config), "bytepacked_indices": pack(class_ids, bits)}


def legacy_columns(class_ids: np.ndarray, values: np.ndarray, config: dict[str, Any]) -> dict[str, np.ndarray]:
    """A text's columns in the legacy codec."""
    bits = int(np.ceil(np.log2(config["vocab_size"])))
    in_word, k = 64 // bits, config["k"]
    padded = np.pad(class_ids, ((0, 0), (0, -k % in_word))).astype(np.uint64).reshape(len(class_ids), -1, in_word)
    words = np.bitwise_or.reduce(padded << (np.arange(in_word, dtype=np.uint64) * np.uint64(bits)), axis=-1)
    points = np.arange(k - config["exact_k"], dtype=float) + 1
    sign = -1 if config["invert_polynomial"] else 1
    curve = np.stack([points ** (sign * degree) for degree in range(config["polynomial_degree"] + 1)], axis=1)
    others = values[:, config["exact_k"] :]
    coefficients = np.linalg.lstsq(curve, others.T, rcond=None)[0].T.astype(np.float32)
    exact = values[:, : config["exact_k"]].astype(np.float16).astype(np.float32)
    return {"packed_indices": words, "exact_values": exact, "coeffs": coefficients}


def table(rows: list[tuple[np.ndarray, dict[str, np.ndarray]]]) -> pa.Table:
    """Rows of token ids with their columns, as DistillKit's schema has them."""
    arrays = {"input_ids": pa.array([tokens.tolist() for tokens, _ in rows], pa.list_(pa.uint64()))}
    for name in rows[0][1]:
        lists = [values[name] for _, values in rows]
        inner = pa.ListArray.from_arrays(
            np.arange(sum(map(len, lists)) + 1, dtype=np.int32) * lists[0].shape[1], np.concatenate(lists).ravel()
        )
        arrays[name] = pa.ListArray.from_arrays(np.cumsum([0, *map(len, lists)], dtype=np.int32), inner)
    return pa.table(arrays)


def write_random(out: Path, size: int, length: int = 512) -> None:
    """A file of about ``size`` bytes of random texts over the demo's tokenizer, with its text and recipe."""
    from selkd.models.sources import default_cache_dir, locate
    from selkd.models.tokenizers import load_tokenizer

    out.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(locate("demo", default_cache_dir()))
    words = [
        f" {word}" for word in ("time", "house", "water", "light", "people", "small", "night", "world", "work", "day")
    ]
    ids = np.array([tokenizer(word)["input_ids"][0] for word in words])
    assert [tokenizer.decode([i]) for i in ids] == words
    config, generator = COMPRESSION | {"d": len(tokenizer)}, np.random.default_rng(0)
    (out / "compression_config.yaml").write_text(yaml.safe_dump(config))
    path = out / "data_0.parquet"
    with (out / "text.jsonl").open("w") as text:
        rows, writer = [], None
        while not path.exists() or path.stat().st_size < size:
            tokens = generator.choice(ids, length - 1)
            text.write(json.dumps({"text": tokenizer.decode(tokens)}) + "\n")
            logs = np.sort(generator.gumbel(size=(length - 1, config["k"])) * 2, axis=1)[:, ::-1]
            logs = logs - np.logaddexp.reduce(logs, axis=1, keepdims=True) + np.log(0.95)
            classes = generator.integers(0, len(tokenizer) // 64, (length - 1, 64)) * 64 + np.arange(64)
            rows.append((np.append(tokens, tokenizer.eos_token_id), columns(classes, logs, config)))
            if len(rows) == 100:
                part = table(rows)
                writer = writer or pq.ParquetWriter(path, part.schema)
                writer.write_table(part)
                rows = []
        writer.close()
    recipe = {
        "teacher": {"model": "random", "imported": True},
        "student": {"model": "demo"},
        "data": {"path": str(out / "text.jsonl"), "max_length": length, "packing": False, "held_out_fraction": 0},
        "classes": {"sampler": "top_k", "draws": 64, "tail": True},
        "cache": {"path": None},
        "evaluation": {"suite": []},
    }
    (out / "recipe.yaml").write_text(yaml.safe_dump(recipe))


def measure(out: Path) -> dict[str, float]:
    """Import the file in ``out`` in a process of its own, into a new run beside it."""
    with tempfile.TemporaryDirectory(dir=out) as run:
        command = [
            sys.executable,
            "-m",
            "selkd",
            "cache",
            "import",
            str(out / "recipe.yaml"),
            str(out / "data_0.parquet"),
            "--out",
            run,
        ]
        start = time.perf_counter()
        answer = subprocess.run([*command, "--json"], check=True, stdout=subprocess.PIPE, text=True).stdout
        seconds = time.perf_counter() - start
    usage, stats = resource.getrusage(resource.RUSAGE_CHILDREN), json.loads(answer)
    return {
        "file_bytes": (out / "data_0.parquet").stat().st_size,
        "positions": stats["positions"],
        "bytes_per_position": stats["bytes_per_position"],
        "seconds": seconds,
        "processor_seconds": usage.ru_utime + usage.ru_stime,
        "peak_memory_bytes": usage.ru_maxrss * 1024,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--measure", action="store_true", help="import the file that is there, and write none")
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measure(given.out), indent=1))
    else:
        write_random(given.out, int(given.gigabytes * 1e9))

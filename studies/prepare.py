"""The study's texts, one passage a document, so that a held-out sample is a document that nothing was trained on.

    python studies/prepare.py --data DIR --out DIR

Of each document of a few domains the first passage is taken, and goes to one of three files by a hash of its text:
``recovery.jsonl`` (the starting students recover on it), ``tuning.jsonl`` (learning rates are chosen on it) and
``study.jsonl`` (every table's text). ``transfer.jsonl`` is a task that no student recovered on. Each file is in the
order of another hash, so each stretch of it has all domains. ``texts.json`` tells rows, characters and digests.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import xxhash

DOMAINS = ("textbooks_openstax", "encyclopedia_wikipedia", "web_c4_sample")
TASK = "gsm8k_train"
SHARES = {"recovery": 0.45, "tuning": 0.15, "study": 0.40}
LONGEST, SHORTEST = 1_100, 500  # characters of a passage: about 240 and 110 tokens of English


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data", type=Path, required=True, help="the folder with the domains' JSONL files")
    options.add_argument("--out", type=Path, required=True)
    given = options.parse_args()
    print(json.dumps(prepare(given.data, given.out), indent=1))


def prepare(data: Path, out: Path) -> dict[str, dict[str, object]]:
    """Write the files into ``out`` and return the content of ``texts.json``."""
    files: dict[str, list[tuple[int, dict[str, str]]]] = {name: [] for name in (*SHARES, "transfer")}
    for domain in DOMAINS:
        for row in _rows(data / f"{domain}.jsonl"):
            text = passage(row["text"])
            if len(text) >= SHORTEST:
                key = _hash(text)
                files[_file_of(key)].append((key, {"text": text, "domain": domain}))
    for row in _rows(data / f"{TASK}.jsonl"):
        task = {"question": row["question"], "answer": row["answer"]}
        files["transfer"].append((_hash(row["question"]), task))
    out.mkdir(parents=True, exist_ok=True)
    told: dict[str, dict[str, object]] = {}
    for name, rows in files.items():
        ordered = sorted(dict(rows).items(), key=lambda pair: _hash(str(pair)))
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for _, row in ordered)
        (out / f"{name}.jsonl").write_text(text, encoding="utf-8")
        told[name] = {
            "rows": len(ordered),
            "characters": len(text),
            "xxh3_128": xxhash.xxh3_128_hexdigest(text.encode()),
        }
    (out / "texts.json").write_text(json.dumps(told, indent=1) + "\n")
    return told


def passage(text: str) -> str:
    """The first words of ``text``, at most ``LONGEST`` characters, each white space one blank."""
    words = " ".join(text[: 4 * LONGEST].split())
    return words if len(words) <= LONGEST else words[: LONGEST + 1].rpartition(" ")[0]


def _hash(text: str) -> int:
    """With a seed of its own: selkd's hash without one decides which documents of a file are held out."""
    return xxhash.xxh3_64_intdigest(text.encode(), seed=1)


def _file_of(key: int) -> str:
    place = key / 2**64
    for name, share in SHARES.items():
        if place < share:
            return name
        place -= share
    return "study"


def _rows(path: Path) -> Iterator[dict[str, str]]:
    with path.open(encoding="utf-8") as lines:
        yield from (json.loads(line) for line in lines)


if __name__ == "__main__":
    main()

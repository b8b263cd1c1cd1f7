"""A text to try things on, and questions about it: ``python pages.py FOLDER``.

Reads the Markdown files of a folder and its folders, for example this repository's own pages, and writes beside itself:

- ``pages.jsonl``: {"text": …}, a row for each section;
- ``next_sentence/questions.jsonl``: {"context": …, "choices": […], "label": …}: which of four sentences follows? The
  three wrong ones stand elsewhere in the text. The sections asked about are kept out of ``pages.jsonl``.
"""

import json
import random
import re
import sys
from pathlib import Path

HERE = Path(__file__).parent
EVERY = 4  # of the sections with three sentences or more, each fourth is asked about
MARKUP = re.compile(r"^```.*?^```|^    .*?$|^\|.*?$|<!--.*?-->", re.DOTALL | re.MULTILINE)


def main(folder: Path) -> None:
    pages = [path.read_text(encoding="utf-8") for path in sorted(folder.rglob("*.md"))]
    sections = [section.strip() for page in pages for section in re.split(r"^(?=#+ )", page, flags=re.MULTILINE)]
    sections = [section for section in sections if section]
    told = [sentences(section) for section in sections]
    asked = [number for number, found in enumerate(told) if len(found) >= 3][::EVERY]
    draw = random.Random(0)
    others = [sentence for number, found in enumerate(told) if number not in asked for sentence in found]
    questions = [question(told[n][i - 2 : i + 1], others, draw) for n in asked for i in range(2, len(told[n]))]
    write(HERE / "pages.jsonl", [{"text": text} for number, text in enumerate(sections) if number not in asked])
    write(HERE / "next_sentence" / "questions.jsonl", questions)
    print(f"{len(sections) - len(asked)} sections to learn from, {len(questions)} questions about {len(asked)} others")


def sentences(section: str) -> list[str]:
    """The sentences of a section's prose; headings, code and tables left out."""
    prose = re.sub(r"\s+", " ", MARKUP.sub("", section.partition("\n")[2])).strip()
    return [sentence for sentence in re.split(r"(?<=[.:])\s+(?=[A-Z`])", prose) if 30 <= len(sentence) <= 300]


def question(found: list[str], others: list[str], draw: random.Random) -> dict[str, object]:
    """Two sentences with the one that follows and three others to choose from."""
    *context, following = found
    choices = [following, *draw.sample(others, 3)]
    draw.shuffle(choices)
    return {"context": " ".join(context), "choices": choices, "label": choices.index(following)}


def write(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

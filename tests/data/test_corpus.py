"""Every source of text, with real files; what is missing or malformed is named."""

import json
from pathlib import Path
from pydoc_data.topics import topics

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from selkd.data.corpus import open_corpus
from selkd.data.demo_text import demo_documents
from selkd.errors import InputError, RunError
from selkd.recipe.part import parse_part
from selkd.recipe.recipe import DataOptions


def options(path: Path | str, **changes: object) -> DataOptions:
    return parse_part(DataOptions, {"path": str(path), **changes}, "data")


def read(path: Path | str, **changes: object) -> list[str]:
    return list(open_corpus(options(path, **changes)).documents())


def jsonl(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def parquet(path: Path, columns: dict[str, list]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


@pytest.fixture(autouse=True)
def _own_dataset_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("hf")))


# The demo's text


def manual_and_modules() -> tuple[list[str], list[str]]:
    """The demo's documents up to the first module, and from there on."""
    found = list(demo_documents())
    first = next(i for i, text in enumerate(found) if text.startswith("__future__\n\nRecord of phased-in"))
    return found[:first], found[first:]


def test_the_demo_starts_with_the_manual_less_nested_topics() -> None:
    """Also one whose headings have other rules where it is nested, as ``attribute-access`` in ``specialnames``."""
    manual, _ = manual_and_modules()

    def lines(text: str) -> str:
        return "\n".join(line for line in text.splitlines() if not line or set(line) - set("*=-~^+'\""))

    whole, plain = lines("".join(manual)), {name: lines(text) for name, text in topics.items()}
    bodies = {name: text.strip().partition("\n\n")[2] for name, text in plain.items()}
    assert all(body in whole for body in bodies.values())
    nested = [name for name in bodies if any(bodies[name] in plain[other] for other in plain if other != name)]
    assert {"with", "attribute-access", "naming", "try", "async"} <= set(nested)
    assert len("".join(manual)) == sum(len(topics[name]) for name in topics if name not in nested)
    assert max(map(len, manual)) < 20_000


@pytest.mark.parametrize("rule", ["", "====\n", "~~~~\n"])
def test_a_topic_under_two_names_is_taken_once(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    body = "A body.\n\nIts part\n{}\nMore of it.\n"
    first, second = (f"Title {n}\n*******\n\n{body.format(line)}" for n, line in ((1, "====\n"), (2, rule)))
    monkeypatch.setattr("selkd.data.demo_text.topics", {"b": second, "a": first, "c": "Other\n*****\n\nOther body.\n"})
    monkeypatch.setattr("sys.stdlib_module_names", frozenset())
    assert [text.split("\n")[0] for text in demo_documents()] == ["Title 1", "Other"]


def test_the_demo_goes_on_with_one_document_a_module(monkeypatch: pytest.MonkeyPatch) -> None:
    manual, _ = manual_and_modules()
    monkeypatch.setattr("sys.stdlib_module_names", frozenset({"json", "textwrap", "sys"}))
    modules = list(demo_documents())[len(manual) :]
    assert [text.split("\n")[0] for text in modules][:2] == ["json", "json.decoder"]
    assert not any(".tests" in text.split("\n")[0] for text in modules)
    assert "\n\ntextwrap.TextWrapper.wrap\n\nwrap(text : string) -> [string]" in modules[-1]


# Local files


def test_text_is_cut_at_blank_lines_into_sections_of_about_10_000_characters(tmp_path: Path) -> None:
    paragraphs = [f"{number} " + "word " * 300 for number in range(30)]
    text = "\n\n".join(paragraphs)
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    sections = read(tmp_path / "a.txt")
    assert "".join(sections) == text
    assert len(sections) > 3
    assert all(10_000 <= len(section) <= 12_000 for section in sections[:-1])
    assert all(section.endswith("\n\n") for section in sections[:-1])


def test_text_without_blank_lines_is_cut_at_a_lines_end(tmp_path: Path) -> None:
    text = "one line of words\n" * 5000
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    sections = read(tmp_path / "a.txt")
    assert "".join(sections) == text
    assert all(20_000 <= len(section) < 20_100 for section in sections[:-1])


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    assert read(tmp_path / "a.txt") == ["hello"]


def test_jsonl_gives_the_field_and_skips_null_blank_and_empty_lines(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"body": "one\u2028still one"}, {"body": None}, {"body": " \n"}])
    path.write_text(path.read_text() + "\n" + json.dumps({"body": "two", "x": 1}), encoding="utf-8")
    assert read(path, text_field="body") == ["one\u2028still one", "two"]


def test_parquet_gives_the_column(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", {"text": ["one", None, "two"], "n": [1, 2, 3]})
    assert read(path) == ["one", "two"]


def test_a_folder_is_read_in_the_order_of_names_and_other_files_are_left_alone(tmp_path: Path) -> None:
    jsonl(tmp_path / "b.jsonl", [{"text": "second"}])
    parquet(tmp_path / "c.parquet", {"text": ["third"]})
    (tmp_path / "a.txt").write_text("first", encoding="utf-8")
    (tmp_path / "README.md").write_text("# about these files", encoding="utf-8")
    assert read(tmp_path) == ["first", "second", "third"]


def test_a_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("at home", encoding="utf-8")
    assert read("~/a.txt") == ["at home"]


def test_the_fingerprint_follows_content_and_order_not_place(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text("first", encoding="utf-8")
        (tmp_path / folder / "b.txt").write_text("second", encoding="utf-8")
    first, second = (open_corpus(options(tmp_path / folder)).fingerprint for folder in ("one", "two"))
    assert first == second
    (tmp_path / "two" / "a.txt").rename(tmp_path / "two" / "c.txt")
    assert open_corpus(options(tmp_path / "two")).fingerprint != first
    (tmp_path / "one" / "a.txt").write_text("First", encoding="utf-8")
    assert open_corpus(options(tmp_path / "one")).fingerprint != first


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"text": \n', r"a.jsonl, line 2 is not valid JSON"),
        ("[" * 100_000 + "\n", r"a.jsonl, line 1 is not valid JSON"),
        ('["text"]\n', r"a.jsonl, line 1: expected an object with the field 'text', got list"),
        ('{"body": "a", "about": 1}\n', r"data.text_field: .*a.jsonl, line 1 has no field 'text'; it has about, body"),
        ('{"text": 3}\n', r"data.text_field: 'text' of .*line 1 is int, expected text"),
        ('{"text": "a"}\n{"text": "\\ud800"}\n', r"a.jsonl, line 2 holds half of a surrogate pair"),
        ("\n", r"data.path: .*a.jsonl holds no text"),
        ('{"text": "  "}\n', r"data.path: .*a.jsonl holds no text"),
    ],
)
def test_malformed_jsonl_is_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        read(tmp_path / "a.jsonl")


def test_malformed_text_and_parquet_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match=r"data.path: .*a.txt is not UTF-8 text .*; convert it"):
        read(tmp_path / "a.txt")
    (tmp_path / "a.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(InputError, match=r"data.path: .*a.parquet can't be read as Parquet"):
        read(tmp_path / "a.parquet")
    path = parquet(tmp_path / "b.parquet", {"title": ["x"], "n": [1]})
    with pytest.raises(InputError, match=r"data.text_field: .*b.parquet has no field 'text'; it has n, title"):
        read(path)
    with pytest.raises(InputError, match=r"data.text_field: 'n' of .*b.parquet is int, expected text"):
        read(path, text_field="n")


@pytest.mark.parametrize("path", ["missing.jsonl", "./missing", "/nowhere/at/all", "no such/text", "https://x/y"])
def test_a_missing_path_is_named(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=rf"data.path: there is no file or folder '{path}'. Expected 'demo', a .txt"):
        read(path)


def test_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\nhello\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"expected a file that ends in .txt, .jsonl, .parquet, got .*a.csv"):
        read(tmp_path / "a.csv")


def test_splits_and_configurations_are_refused_where_there_are_none(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello", encoding="utf-8")
    with pytest.raises(InputError, match=r"data.split: .*a.txt has no splits, got 'test'"):
        read(tmp_path / "a.txt", split="test")
    with pytest.raises(InputError, match=r"data.name: the demo text has no configurations, got 'large'"):
        read("demo", name="large")


# Hugging Face datasets


@pytest.fixture
def dataset_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "dataset"
    parquet(folder / "data" / "train-00000-of-00001.parquet", {"body": ["one", None, "two"], "n": [1, 2, 3]})
    parquet(folder / "data" / "test-00000-of-00001.parquet", {"body": ["three"], "n": [4]})
    return folder


@pytest.mark.parametrize("changes", [{}, {"streaming": True}, {"tokens": 1000}, {"tokens": 1000, "streaming": False}])
def test_a_dataset_folder_gives_its_splits(dataset_folder: Path, changes: dict) -> None:
    assert read(dataset_folder, text_field="body", **changes) == ["one", "two"]
    assert read(dataset_folder, text_field="body", split="test", **changes) == ["three"]


@pytest.mark.parametrize(
    ("changes", "downloads"),
    [({}, True), ({"tokens": 1000}, False), ({"streaming": True}, False), ({"tokens": 1000, "streaming": False}, True)],
)
def test_a_budget_or_the_option_makes_it_a_stream(
    dataset_folder: Path, monkeypatch: pytest.MonkeyPatch, changes: dict, downloads: bool
) -> None:
    prepared = []
    prepare = datasets.DatasetBuilder.download_and_prepare

    def spy(builder: datasets.DatasetBuilder) -> None:
        prepared.append(builder)
        prepare(builder)

    monkeypatch.setattr(datasets.DatasetBuilder, "download_and_prepare", spy)
    read(dataset_folder, text_field="body", **changes)
    assert bool(prepared) == downloads


def test_a_dataset_card_chooses_configurations(tmp_path: Path) -> None:
    jsonl(tmp_path / "small.jsonl", [{"text": "small"}])
    jsonl(tmp_path / "large.jsonl", [{"text": "large"}])
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- {config_name: small, data_files: small.jsonl}\n"
        "- {config_name: large, data_files: large.jsonl}\n---\n",
        encoding="utf-8",
    )
    assert read(tmp_path, name="large", streaming=True) == ["large"]
    assert read(tmp_path, name="small") == ["small"]
    prints = {open_corpus(options(tmp_path, name=name)).fingerprint for name in ("small", "large")}
    assert len(prints) == 2
    with pytest.raises(InputError, match=r"data.path: can't load the dataset .* \(huge\).*'small', 'large'"):
        read(tmp_path, name="huge")


@pytest.mark.parametrize("streaming", [True, False])
def test_bad_splits_and_fields_of_a_dataset_are_named(dataset_folder: Path, streaming: bool) -> None:
    with pytest.raises(InputError, match=r"data.split: can't load 'dev' of .*dataset"):
        read(dataset_folder, text_field="body", split="dev", streaming=streaming)
    with pytest.raises(InputError, match=r"data.text_field: the dataset .* has no field 'text'; it has body, n"):
        read(dataset_folder, streaming=streaming)


def test_malformed_rows_of_a_dataset_break_the_reading_off_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    good = json.dumps({"text": "a"}) + "\n"
    (tmp_path / "data" / "train.jsonl").write_text(good * 5 + "{bad\n", encoding="utf-8")
    with pytest.raises(RunError, match=r"Reading the dataset .* broke off after \d+ rows \(.*JSON parse error"):
        read(tmp_path, streaming=True)
    with pytest.raises(InputError, match=r"data.split: can't load 'train' of .*JSON parse error"):
        read(tmp_path, streaming=False)


def test_a_dataset_folders_fingerprint_follows_its_content(dataset_folder: Path) -> None:
    before = open_corpus(options(dataset_folder)).fingerprint
    assert open_corpus(options(dataset_folder)).fingerprint == before
    assert open_corpus(options(dataset_folder, split="test")).fingerprint != before
    parquet(dataset_folder / "data" / "train-00000-of-00001.parquet", {"body": ["other"], "n": [1]})
    assert open_corpus(options(dataset_folder)).fingerprint != before


def test_a_folder_without_data_and_one_with_a_script_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data.path: can't load the dataset .*doesn't contain any data files"):
        read(tmp_path)
    (tmp_path / f"{tmp_path.name}.py").write_text("raise SystemExit('this must never run')", encoding="utf-8")
    with pytest.raises(InputError, match="scripts are no longer supported"):
        read(tmp_path)


def test_a_hub_that_cannot_be_reached_is_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"data.path: can't load the dataset 'nobody/nothing' \(.+\). Expected 'demo'"):
        read("nobody/nothing")

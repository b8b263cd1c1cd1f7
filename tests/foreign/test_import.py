"""Files in which others keep a teacher's distributions become the cache that the same teacher in memory gives."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from test_benchmarks import script
from test_served import dense
from tiny import V, make_model, make_tokenizer
from tiny_run import make_recipe, make_teacher

from selkd.errors import InputError
from selkd.foreign import files
from selkd.foreign.distillkit import Compression, LegacyCompression, decode, decode_legacy
from selkd.foreign.files import ReadOptions
from selkd.foreign.scored import Truncation
from selkd.recipe.part import parse_part
from selkd.recipe.recipe import Recipe
from selkd.run.import_cache import import_cache
from selkd.run.pipeline import cache_only, distill
from selkd.run.teacher_dataset import TeacherDataset
from selkd.teacher import build_cache
from selkd.teacher.collator import TeacherCollator
from selkd_cache.reader import TeacherCache

K = 12  # classes in the files; the recipe keeps 8
END = 1
distillkit_file = script("distillkit_file")


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_cache, "SHARD_TOKENS", 600)


class Toy:
    """A teacher, texts that it wrote, and its distributions at each of their tokens."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        make_teacher(folder / "teacher")
        make_teacher(folder / "student", seed=1)
        model = make_model(0, layers=4)
        generator = torch.Generator().manual_seed(0)
        self.texts: list[list[int]] = []
        for length in range(20, 50):
            ids = [2 + length]
            for _ in range(length):
                p = model(torch.tensor([ids])).logits[0, -1, 2:].softmax(-1)
                ids.append(2 + int(torch.multinomial(p, 1, generator=generator)))
            self.texts.append([*ids, END])
        words = [" ".join(f"w{i}" for i in text[:-1]) for text in self.texts]
        (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in words))
        with torch.no_grad():
            logs = [model(torch.tensor([text])).logits[0].double().log_softmax(-1) for text in self.texts]
        tops = [log[:-1].topk(K, dim=-1) for log in logs]  # row j is of token j + 1
        self.class_ids = [top.indices.numpy() for top in tops]
        self.logs = [top.values.numpy() for top in tops]

    def recipe(self, *, tail: bool = True, **changes: Any) -> Recipe:
        given: dict[str, Any] = {
            "teacher": {"model": "toy", "imported": True},
            "student": {"model": str(self.folder / "student")},
            "data": {
                "path": str(self.folder / "text.jsonl"),
                "max_length": 64,
                "packing": False,
                "held_out_fraction": 0.1,
            },
            "classes": {"sampler": "top_k", "draws": 8, "tail": tail},
            "positions": {"policy": "all"},
            "samples": None,
            "evaluation": {},
        }
        content = make_recipe(self.folder, **(given | changes))
        content["training"] |= {"learning_rate": 0.01}
        return parse_part(Recipe, content)

    def in_memory(self, out: Path, tail: bool) -> TeacherCache:
        content = self.recipe(tail=tail).resolved()
        content["teacher"] = {"model": str(self.folder / "teacher"), "dtype": "float32"}
        cache_only(parse_part(Recipe, content), out)
        return TeacherCache.open(out / "teacher_cache")


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    return Toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def in_memory(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, TeacherCache]:
    return {tail: toy.in_memory(tmp_path_factory.mktemp("memory"), tail) for tail in (True, False)}


def write_distillkit(toy: Toy, folder: Path, legacy: bool = False) -> Path:
    """All classes as they are, so that nothing is lost but what the cache itself rounds."""
    if legacy:
        config: dict[str, Any] = {
            "k": K,
            "exact_k": K,
            "polynomial_degree": 1,
            "vocab_size": V,
            "invert_polynomial": True,
        }
        encode = distillkit_file.legacy_columns
    else:
        config = {"d": V, "k": K, "exact_k": K, "exact_dtype": "float64", "polynomial_terms": None, "residual_bins": []}
        config["delta_encoding"] = False
        encode = distillkit_file.columns
    rows = []
    for text, ids, logs in zip(toy.texts, toy.class_ids, toy.logs, strict=True):
        rows.append((np.array(text), encode(ids, logs, config)))
    folder.mkdir()
    order = np.random.default_rng(0).permutation(len(rows))  # DistillKit shuffles
    pq.write_table(distillkit_file.table([rows[i] for i in order]), folder / "data_0.parquet")
    (folder / "compression_config.yaml").write_text(yaml.safe_dump(config))
    return folder


def answers(toy: Toy, shape: str) -> list[dict[str, Any]]:
    """The lines of a JSON Lines file, as a server or axolotl's pipeline would have left them."""
    lines = []
    for text, ids, logs in zip(toy.texts, toy.class_ids, toy.logs, strict=True):
        tops = [dict(zip(i.tolist(), v.tolist(), strict=True)) for i, v in zip(ids, logs, strict=True)]
        if shape == "prompt_logprobs":  # the text's own token is there, too, be it as unlikely as it may
            tops = [{token: -50.0} | top for token, top in zip(text[1:], tops, strict=True)]
            told = [None] + [
                {str(i): {"logprob": v, "rank": 1, "decoded_token": f"w{i}"} for i, v in t.items()} for t in tops
            ]
            lines.append({"choices": [{"prompt_token_ids": text, "prompt_logprobs": told}]})
        elif shape == "echo":
            names = [f"w{i}" if i > 1 else "<end>" for i in text]
            told = [None] + [{f"w{i}" if i > 1 else ["<unk>", "<end>"][i]: v for i, v in t.items()} for t in tops]
            logprobs = {"tokens": names, "token_logprobs": [], "top_logprobs": told, "text_offset": []}
            lines.append({"response": {"body": {"choices": [{"logprobs": logprobs}]}}})
        elif shape == "chat":
            content = [
                {
                    "token": f"token_id:{i}",
                    "top_logprobs": [{"token": f"token_id:{c}", "logprob": v} for c, v in t.items()],
                }
                for i, t in zip(text[1:], tops, strict=True)
            ]
            lines.append({"prompt_token_ids": text[:1], "choices": [{"logprobs": {"content": content}}]})
        elif shape == "axolotl, before its preparation":
            told = [[{"token": f"token_id:{i}", "logprob": v} for i, v in t.items()] for t in tops]
            lines.append({"input_ids": text, "logprobs": told})
        else:
            targets = {"target_token_ids": ids.tolist(), "target_logprobs": logs.tolist()}
            lines.append({"input_ids": text, **targets})
    return lines


def write_lines(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


WRITERS: dict[str, Callable[[Toy, Path], Path]] = {
    "DistillKit": lambda toy, folder: write_distillkit(toy, folder / "kit"),
    **{
        shape: lambda toy, folder, shape=shape: write_lines(folder / "answers.jsonl", answers(toy, shape))
        for shape in ("prompt_logprobs", "echo", "chat", "axolotl, before its preparation")
    },
}


@pytest.mark.parametrize("kind", WRITERS)
def test_each_kind_of_file_gives_the_cache_of_the_teacher_in_memory(
    toy: Toy, in_memory: dict[bool, TeacherCache], kind: str, tmp_path: Path
) -> None:
    """To a unit of 1/65,535 a class: the files have float64 or more digits, the model in memory float32."""
    answer = import_cache(toy.recipe(), [WRITERS[kind](toy, tmp_path)], ReadOptions(), tmp_path / "run")
    assert answer["texts"] == len(toy.texts)
    assert answer["positions_unknown"] == 0
    assert answer["fingerprint"]["truncated"].startswith("biased")
    assert answer["fingerprint"]["origin"] == "imported"
    assert 0.5 < answer["true_token_listed"] <= 1
    assert 0 < answer["mass_in_tail"] < 1
    imported, expected = TeacherCache.open(tmp_path / "run" / "teacher_cache"), in_memory[True]
    assert imported.verify() == []
    assert imported.sample_ids() == expected.sample_ids()
    for sample_id in expected.sample_ids():
        assert (dense(imported, sample_id) - dense(expected, sample_id)).abs().max() <= 1


def test_a_student_trains_from_an_imported_cache_alone(toy: Toy, tmp_path: Path) -> None:
    recipe = toy.recipe(cache={"path": str(tmp_path / "shared")})
    with pytest.raises(InputError, match="selkd cache import"):
        distill(recipe, tmp_path / "early")
    assert not (tmp_path / "shared").exists()
    import_cache(recipe, [write_distillkit(toy, tmp_path / "kit")], ReadOptions(), tmp_path / "run")
    run = distill(recipe, tmp_path / "run")
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    assert run.record["teacher"] | {} == {"model": "toy", "fingerprint": "known by its name: toy"}
    assert "truncated teacher, which is biased" in (run.student / "README.md").read_text()
    # Another recipe of the same teacher shares it; one of another does not.
    shared = {path: path.stat().st_mtime_ns for path in (tmp_path / "shared").iterdir()}
    cache_only(recipe.model_copy(update={"seed": 5}), tmp_path / "second")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "shared").iterdir()} == shared
    other = toy.recipe(cache={"path": str(tmp_path / "shared")}, teacher={"model": "other", "imported": True})
    with pytest.raises(InputError, match=r"teacher: stored .*toy.*expected .*other"):
        cache_only(other, tmp_path / "third")


@pytest.mark.parametrize("is_parquet", [True, False])
def test_axolotls_columns_are_renormalised_and_aligned_as_told(
    toy: Toy, in_memory: dict[bool, TeacherCache], is_parquet: bool, tmp_path: Path
) -> None:
    def write(own: bool) -> Path:
        lines = answers(toy, "axolotl")
        for line in lines:  # axolotl divides by the sum and fills up to the text's length
            logs = np.array(line["target_logprobs"])[:, :8]
            logs = (logs - np.logaddexp.reduce(logs, axis=1, keepdims=True)).tolist()
            ids = [row[:8] for row in line["target_token_ids"]]
            fill, zeros = [[-1e9] * 8], [[0] * 8]
            line["target_logprobs"] = fill + logs if own else logs + fill
            line["target_token_ids"] = zeros + ids if own else ids + zeros
        if not is_parquet:
            return write_lines(tmp_path / f"{own}.jsonl", lines)
        pq.write_table(pa.Table.from_pylist(lines), tmp_path / f"{own}.parquet")
        return tmp_path / f"{own}.parquet"

    with pytest.raises(InputError, match=r"divided by their sum.*classes\.tail: false"):
        import_cache(toy.recipe(), [write(False)], ReadOptions(), tmp_path / "tail")
    recipe = toy.recipe(tail=False)
    for own in (False, True):
        with pytest.raises(InputError, match=r"one token off|no text in the files"):
            import_cache(recipe, [write(own)], ReadOptions(own_rows=not own), tmp_path / f"wrong-{own}")
        import_cache(recipe, [write(own)], ReadOptions(own_rows=own), tmp_path / f"run-{own}")
        imported = TeacherCache.open(tmp_path / f"run-{own}" / "teacher_cache")
        for sample_id in in_memory[False].sample_ids():
            assert (dense(imported, sample_id) - dense(in_memory[False], sample_id)).abs().max() <= 1
        opened = TeacherDataset.open(tmp_path / f"run-{own}")
        batch = TeacherCollator(opened.cache)([opened[0]])
        assert (batch["teacher_counts"].sum(-1) == 65535 * batch["valid_mask"]).all()


def test_axolotls_lines_are_known_wherever_they_stand(toy: Toy, tmp_path: Path) -> None:
    """Their probabilities were divided by their sum, so that with a tail they would be wrong and seem right."""
    path, (answer, *_), lines = tmp_path / "lines.jsonl", answers(toy, "echo"), answers(toy, "axolotl")
    write_lines(path, lines)
    path.write_text("\n  \n" + path.read_text())
    with pytest.raises(InputError, match=r"\(axolotl\): .*divided by their sum.*classes\.tail: false"):
        import_cache(toy.recipe(), [path], ReadOptions(), tmp_path / "blank")
    write_lines(path, [answer, *lines])
    for tail in (True, False):
        with pytest.raises(InputError, match=r"lines\.jsonl, line 2: it has axolotl's columns.*files of their own"):
            import_cache(toy.recipe(tail=tail), [path], ReadOptions(), tmp_path / f"mixed-{tail}")


def test_another_temperature_is_refused_of_files_that_are_at_1(toy: Toy, tmp_path: Path) -> None:
    """axolotl divides by a temperature of its own, so its files are taken to be at the recipe's."""
    kit, legacy = write_distillkit(toy, tmp_path / "kit"), write_distillkit(toy, tmp_path / "legacy", legacy=True)
    lines = write_lines(tmp_path / "answers.jsonl", answers(toy, "echo"))
    for number, (path, tail) in enumerate(((kit, True), (kit, False), (legacy, False), (lines, True))):
        recipe = toy.recipe(tail=tail, criterion={"temperature": 2.0})
        with pytest.raises(InputError, match=r"at temperature 1, and at criterion\.temperature: 2 they need"):
            import_cache(recipe, [path], ReadOptions(logits=path == legacy), tmp_path / f"run{number}")
        assert not (tmp_path / f"run{number}" / "teacher_cache").exists()
    own = write_lines(tmp_path / "axolotl.jsonl", answers(toy, "axolotl"))
    import_cache(toy.recipe(tail=False, criterion={"temperature": 2.0}), [own], ReadOptions(), tmp_path / "run")
    assert TeacherCache.open(tmp_path / "run" / "teacher_cache").fingerprint["temperature"] == 2.0


def test_the_legacy_codecs_logits_are_told_from_log_probabilities(
    toy: Toy, in_memory: dict[bool, TeacherCache], tmp_path: Path
) -> None:
    shifted = Toy.__new__(Toy)
    shifted.__dict__ |= toy.__dict__ | {"logs": [logs + 3 for logs in toy.logs]}
    folder = write_distillkit(shifted, tmp_path / "kit", legacy=True)
    with pytest.raises(InputError, match="expected log-probabilities"):
        import_cache(toy.recipe(), [folder], ReadOptions(), tmp_path / "one")
    with pytest.raises(InputError, match=r"logits.*classes\.tail: false"):
        import_cache(toy.recipe(), [folder], ReadOptions(logits=True), tmp_path / "two")
    import_cache(toy.recipe(tail=False), [folder], ReadOptions(logits=True), tmp_path / "run")
    imported = TeacherCache.open(tmp_path / "run" / "teacher_cache")
    for sample_id in imported.sample_ids():  # the values have 11 bits
        assert (dense(imported, sample_id) - dense(in_memory[False], sample_id)).abs().max() < 65535 * 0.005


def test_a_text_that_ends_early_leaves_its_end_unknown_and_others_are_refused(toy: Toy, tmp_path: Path) -> None:
    """Files of texts without the end token, as tokenizers write them: of the end alone nothing is known."""
    lines = answers(toy, "prompt_logprobs")
    for line in lines:
        choice = line["choices"][0]
        choice["prompt_token_ids"].pop() if choice["prompt_token_ids"][-1] == END else None
        choice["prompt_logprobs"].pop()
    path = write_lines(tmp_path / "short.jsonl", lines)
    answer = import_cache(toy.recipe(), [path], ReadOptions(), tmp_path / "run")
    assert answer["positions_unknown"] == answer["samples"]
    cache = TeacherCache.open(tmp_path / "run" / "teacher_cache")
    last = dense(cache, cache.sample_ids()[0])[-1]
    assert last[V] == 65535
    with pytest.raises(InputError, match="have no text in the files"):
        import_cache(toy.recipe(tail=False), [path], ReadOptions(), tmp_path / "no-tail")
    fewer = write_lines(tmp_path / "fewer.jsonl", lines[:20])
    with pytest.raises(InputError, match=r"of the \d+ samples have no text in the files .*16 of 20") as raised:
        import_cache(toy.recipe(), [fewer], ReadOptions(), tmp_path / "fewer")
    assert "w" + str(toy.texts[25][0]) not in str(raised.value)
    other = [{"choices": [{**line["choices"][0]}]} for line in lines]
    for line in other:
        choice = line["choices"][0]
        choice["prompt_token_ids"] = [i + 1000 for i in choice["prompt_token_ids"]]
        choice["prompt_logprobs"] = [
            t and {str(int(i) + 1000): v for i, v in t.items()} for t in choice["prompt_logprobs"]
        ]
    with pytest.raises(InputError, match="another one may have written the file"):
        import_cache(toy.recipe(), [write_lines(tmp_path / "other.jsonl", other)], ReadOptions(), tmp_path / "other")


def test_files_that_are_not_what_they_seem_are_refused_by_name(toy: Toy, tmp_path: Path) -> None:
    def refused(path: Path, message: str, **options: Any) -> None:
        with pytest.raises(InputError, match=message):
            import_cache(toy.recipe(), [path], ReadOptions(**options), tmp_path / "run")

    kit = write_distillkit(toy, tmp_path / "kit")
    refused(tmp_path / "none", "expected a .parquet or .jsonl file")
    refused(write_lines(tmp_path / "a.txt", []), "ends in .parquet or .jsonl")
    refused(write_lines(tmp_path / "a.jsonl", [{"text": "w3 w4"}]), "a.jsonl, line 1: it has no log-probabilities")
    (tmp_path / "b.jsonl").write_text("{")
    refused(tmp_path / "b.jsonl", "b.jsonl, line 1: it is no JSON")
    pq.write_table(pa.table({"x": [1]}), tmp_path / "c.parquet")
    refused(tmp_path / "c.parquet", "expected a column input_ids")
    pq.write_table(pa.table({"input_ids": [[1]]}), tmp_path / "c.parquet")
    refused(tmp_path / "c.parquet", "expected the columns of DistillKit")
    legacy = tmp_path / "legacy.yaml"
    legacy.write_text("{k: 12, exact_k: 2, polynomial_degree: 1, vocab_size: 83}")
    refused(kit, "DistillKit's other codec", config=legacy)
    config = yaml.safe_load((kit / "compression_config.yaml").read_text())
    for change, message in (
        ({"k": 30}, "hold no"),
        ({"exact_k": 20}, "more than k"),
        ({"exact_dtype": "int8"}, "exact_dtype"),
    ):
        (tmp_path / "other.yaml").write_text(yaml.safe_dump(config | change))
        refused(kit, message, config=tmp_path / "other.yaml")
    (tmp_path / "code.yaml").write_text("!!python/object/apply:os.mkdir [ran]")
    refused(kit, "code.yaml|tag", config=tmp_path / "code.yaml")
    assert not Path("ran").exists()
    whole = (kit / "data_0.parquet").read_bytes()
    (kit / "data_0.parquet").write_bytes(whole[: len(whole) // 2])
    refused(kit, "can't be read as Parquet")
    live = parse_part(Recipe, toy.recipe().resolved() | {"teacher": {"model": str(toy.folder / "teacher")}})
    with pytest.raises(InputError, match=r"teacher\.imported: expected true"):
        import_cache(live, [kit], ReadOptions(), tmp_path / "run")


def test_bits_by_hand() -> None:
    """The layout written out: ids 5 and 3 of 8 classes are 101 011, highest bit first, or 3 * 8 + 5 in a word."""
    config = parse_part(Compression, {"d": 8, "k": 2, "exact_k": 1, "residual_bins": [
        {"scale_dtype": "float32", "element_bits": 3, "num_elements": 1}], "delta_encoding": True})  # fmt: skip
    values = np.frombuffer(np.float32(-0.5).tobytes() + np.float32(0.25).tobytes() + bytes([0b010_00000]), np.uint8)
    ids, logs = decode(config, values[None], np.array([[0b101_011_00]], np.uint8))
    assert ids.tolist() == [[5, 3]]
    assert logs.tolist() == [[-0.5, -0.5 + (2 - 4) * 0.25]]
    legacy = parse_part(LegacyCompression, {"k": 2, "exact_k": 1, "polynomial_degree": 1, "vocab_size": 8})
    words, exact, terms = np.array([[3 * 8 + 5]], np.uint64), np.array([[-0.5]]), np.array([[-2.0, 0.25]])
    ids, logs = decode_legacy(legacy, words, exact, terms)
    assert ids.tolist() == [[5, 3]]
    assert logs.tolist() == [[-0.5, -2.0 + 0.25 / 1]]


@pytest.mark.parametrize("bits", [2, 5, 8, 11])
@pytest.mark.parametrize(
    ("terms", "normalize"),  # exp without normalize_t grows beyond float32
    [(None, False), ([0, 1, "sqrt"], False), (None, True), ([0, 1, "sqrt"], True), ([0, 2, "exp"], True)],
)
def test_compressed_values_come_back_to_half_a_step(bits: int, terms: Any, normalize: bool) -> None:
    k, generator = 24, np.random.default_rng(bits)
    logs = np.sort(generator.gumbel(size=(50, k)), axis=1)[:, ::-1]
    logs = logs - np.logaddexp.reduce(logs, axis=1, keepdims=True)
    bins = [{"scale_dtype": "float32", "element_bits": bits, "num_elements": count} for count in (7, 13)]
    config = {
        "d": 49152,
        "k": k,
        "exact_k": 4,
        "polynomial_terms": terms,
        "residual_bins": bins,
        "normalize_t": normalize,
        "exact_dtype": "float32",
        "term_dtype": "float32",
        "delta_encoding": False,
    }
    ids = np.array([generator.permutation(49152)[:k] for _ in logs])
    columns = distillkit_file.columns(ids, logs, config)
    decoded, values = decode(
        parse_part(Compression, config), columns["compressed_logprobs"], columns["bytepacked_indices"]
    )
    assert (decoded == ids).all()
    assert np.abs(values[:, :4] - logs[:, :4]).max() < 1e-6
    largest = (
        np.abs(logs[:, 4:]).max(axis=1, keepdims=True)
        if terms is None
        else np.abs(values - logs)[:, 4:].max() * 2**bits
    )
    step = largest / 2 ** (bits - 1)
    # The largest of a bin may be one step above what the bits reach.
    assert (np.abs(values - logs)[:, 4:] <= 1.01 * step + 1e-5).all()


def test_rounding_to_counts_moves_a_class_by_less_than_a_unit() -> None:
    generator = np.random.default_rng(0)
    logs = np.sort(generator.gumbel(size=(500, 40)) * 3, axis=1)[:, ::-1]
    logs = logs - np.logaddexp.reduce(logs, axis=1, keepdims=True) + np.log(generator.uniform(0.05, 1, (500, 1)))
    ids = np.array([generator.permutation(V)[:40] for _ in logs])
    for draws, tail in ((40, True), (10, True), (40, False)):
        rows = Truncation(draws, tail, V).stored(ids, logs)
        counts = np.zeros((500, V + 1))
        counts[np.repeat(np.arange(500), rows.row_lengths), rows.class_ids] = rows.counts
        exact = np.zeros_like(counts)
        np.put_along_axis(exact, ids[:, :draws], np.exp(logs[:, :draws]), axis=1)
        if tail:
            exact[:, V] = 1 - exact.sum(axis=1)
        exact /= exact.sum(axis=1, keepdims=True)
        assert (counts.sum(axis=1) == 65535).all()
        assert np.abs(counts / 65535 - exact).max() < 1 / 65535
    with pytest.raises(InputError, match="no class is known"):
        Truncation(4, False, V).stored(np.full((1, 4), -1), np.full((1, 4), -np.inf))


def test_reading_goes_a_few_rows_at_a_time(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, most = write_distillkit(toy, tmp_path / "kit"), 0
    batches = pq.ParquetFile.iter_batches

    def counted(self: Any, **options: Any) -> Any:
        nonlocal most
        for batch in batches(self, **options):
            most = max(most, len(batch))
            yield batch

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", counted)
    monkeypatch.setattr(files, "ROWS_AT_ONCE", 4)
    import_cache(toy.recipe(), [folder], ReadOptions(), tmp_path / "run")
    assert most == 4
    assert make_tokenizer() is not None

"""One table of the study end to end, on toy models: starts, rates, runs, the record, and the page's tables."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import page
import pytest
import tasks
import yaml
from compare import WAYS, Compared
from page import compared, pictures_of, spent, tables_of, tasks_of
from plots import CURVES, file_names, pictures, place
from prepare import DOMAINS, LONGEST, SHARES, SHORTEST, TASK, prepare
from records import digest, rates_of, read_lines
from run import main
from tables import TABLES, StudyTables
from tiny_benchmarks import write_rows
from tiny_run import make_teacher, make_text

from selkd.data.splits import is_held_out
from selkd.evaluation.benchmarks import KNOWN

TOY = {
    "base": {
        "data": {"max_length": 32, "packing": False, "held_out_fraction": 0.15},
        "training": {
            "per_device_train_batch_size": 4, "max_steps": 4, "logging_steps": 1, "save_strategy": "no",
            "use_cpu": True, "bf16": False, "disable_tqdm": True, "lr_scheduler_type": "constant_with_warmup",
        },
        "evaluation": {"suite": ["fidelity"], "every_steps": 2, "generations": 0},
    },
    "recovery": {
        "data": {"path": "recovery.jsonl"}, "positions": {"policy": "all"}, "seed": 1,
        "training": {"max_steps": 4, "learning_rate": 1e-3},
    },
    "rates": [1e-6, 1e-2],
    "families": {"unbiased": "dense"},
    "arms": {
        "dense": {"family": "unbiased", "positions": {"policy": "all"}},
        "random_20": {"family": "unbiased", "positions": {"policy": "random", "fraction": 0.2}},
        "cached": {
            "family": "unbiased", "positions": {"metric": "student_entropy", "fraction": 0.2},
            "classes": {"sampler": "rs_kd", "draws": 8},
            "cache": {"path": None}, "samples": {"metric": "random", "fraction": 0.5},
        },
    },
    "tables": {"one": {"start": "made", "text": "study", "seeds": [1, 2], "arms": ["dense", "random_20", "cached"]}},
}  # fmt: skip


def lines_of_one(record: Path) -> list[dict[str, Any]]:
    return [line for line in read_lines(record) if line["table"] == "one"]


def test_a_table_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SELKD_CACHE", str(tmp_path / "selkd"))
    teacher = make_teacher(tmp_path / "teacher")
    for number, name in enumerate(("study", "tuning", "recovery")):
        make_text(tmp_path / f"{name}.jsonl", seed=number)
    content = json.loads(json.dumps(TOY))
    content["base"]["teacher"] = {"model": str(teacher), "dtype": "float32"}
    content["texts"] = {name: {"data": {"path": f"{name}.jsonl"}} for name in ("study", "tuning")}
    content["starts"] = {"made": {"made": {"student": {"prune_from_teacher": {"layers": 2}}}}}
    tables, record = tmp_path / "tables.yaml", tmp_path / "record.jsonl"
    tables.write_text(yaml.safe_dump(content))
    options = ["--data", tmp_path, "--out", tmp_path / "runs", "--tables", tables, "--record", record]

    def run(table: str, *more: str) -> int:
        return main([table, *map(str, options), *more])

    assert run("one") == 2
    assert "no learning rate yet; run rates_made first" in capsys.readouterr().err
    assert run("made") == 0
    assert (tmp_path / "runs" / "made" / "student" / "model.safetensors").exists()
    assert run("rates_made", "--share", "1/2") == 0
    assert run("one") == 2
    assert "Missing: rates_made/unbiased_0.01/seed-1" in capsys.readouterr().err
    assert run("rates_made") == 0
    assert run("one", "--seeds", "1") == 0
    by_arm = {line["arm"]: line for line in lines_of_one(record)}
    assert list(by_arm) == ["dense", "random_20", "cached"]
    assert {line["learning_rate"] for line in by_arm.values()} <= {1e-6, 1e-2}
    assert len({line["held_out"] for line in by_arm.values()}) == 1, "all are measured on the same documents"
    dense, drawn, cached = by_arm.values()
    assert list(dense["kl_nats"]) == ["0", "2", "4"]
    assert dense["kl_nats"]["0"] == drawn["kl_nats"]["0"], "all begin with the same student"
    assert sum(dense["kl_nats"]["4"]) / sum(dense["positions"]) == pytest.approx(dense["figures"]["kl_nats"], rel=1e-3)
    assert dense["cost"]["head_passes"] == 4 * dense["cost"]["positions"], "the student's three and the teacher's one"
    assert drawn["cost"]["head_passes"] < 1.2 * drawn["cost"]["positions"], "a fifth of it, and nothing is scored"
    body = 3 * 2 + 4  # layers: the student's three times, the teacher's once
    weights = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32  # of a layer
    norms = 4 * 32  # three passes of the student's last norm, one of the teacher's
    tokens, positions = dense["cost"]["teacher_queries_in_steps"], dense["cost"]["positions"]
    assert tokens == pytest.approx(positions + 4 * 4, abs=4), "a body runs over the first token, too, of each sample"
    expected = (tokens * (body * weights + norms) + positions * 4 * 83 * 32) / 1e9
    assert dense["cost"]["work_in_steps"] == pytest.approx(expected, rel=1e-4)
    assert cached["cost"]["teacher_queries_in_steps"] == 0 < cached["cost"]["teacher_queries"]
    assert not list((tmp_path / "runs" / "runs").rglob("*.safetensors"))

    # A line of another recipe is no line of this run.
    changed = json.loads(json.dumps(content))
    changed["arms"]["cached"]["positions"] = {"policy": "random", "fraction": 0.5}
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump(changed))
    assert run("one", "--seeds", "1", "--tables", str(other)) == 2
    assert "one/cached/seed-1: the record has a line of another recipe" in capsys.readouterr().err

    content["scales"] = {"other": {"training": {"max_steps": 5}}}
    other.write_text(yaml.safe_dump(content))
    assert run("one", "--tables", str(other), "--scale", "other", "--list") == 0
    assert "one/dense/seed-1: to do" in capsys.readouterr().out, "a line of this scale is none of another's"

    # What is done is not done again: the record stays as it is, and the second seed is added.
    before = record.read_bytes()
    assert run("one", "--seeds", "1") == 0
    assert record.read_bytes() == before
    assert run("one", "--keep") == 0
    assert record.read_bytes().startswith(before)
    assert len(lines_of_one(record)) == 6

    # A run that began with another student, as on another kind of processor, is no line of this table.
    elsewhere = tmp_path / "elsewhere.jsonl"
    line = lines_of_one(record)[0]
    changed = line | {"seed": 9, "kl_nats": line["kl_nats"] | {"0": [0.0] * len(line["positions"])}}
    text = "".join(f"{row}\n" for row in record.read_text().splitlines() if json.loads(row)["table"] != "one")
    elsewhere.write_text(text + json.dumps(changed) + "\n")
    before = elsewhere.read_bytes()
    assert run("one", "--arms", "random_20", "--seeds", "1", "--record", str(elsewhere)) == 2
    assert "not recorded: seed 1: random_20 began with another student than dense." in capsys.readouterr().err
    elsewhere.write_bytes(before + json.dumps(line | {"table": "other"}).encode() + b"\n")
    before = elsewhere.read_bytes()
    assert run("one", "--arms", "dense", "--seeds", "1", "--record", str(elsewhere)) == 2, "nor is a line taken over"
    assert elsewhere.read_bytes() == before
    for kept in (tmp_path / "runs").rglob("seed-1/student/*.safetensors"):
        kept.unlink()

    # Another table with one of the same runs takes its line over.
    content["tables"]["two"] = {"start": "made", "text": "study", "seeds": [2], "arms": ["dense"]}
    tables.write_text(yaml.safe_dump(content))
    assert run("two") == 0
    taken = read_lines(record)[-1]
    assert "two/dense/seed-2: the same as one/dense" in capsys.readouterr().err
    assert taken == next(line for line in lines_of_one(record) if (line["arm"], line["seed"]) == ("dense", 2)) | {
        "table": "two"
    }

    # The students that were kept, and only those, are measured by benchmarks, each beside the table's first arm.
    write_rows(tmp_path / "rows", *(KNOWN[task].file for task in tasks.TASKS))
    results = tmp_path / "tasks.json"
    given = ["one", "--out", tmp_path / "runs", "--tables", tables, "--data", tmp_path / "rows", "--results", results]
    assert tasks.main([*map(str, given), "--seed", "1"]) == 2
    assert "no weights of dense with seed 1" in capsys.readouterr().err
    assert tasks.main([*map(str, given), "--seed", "2", "--limit", "3"]) == 0
    measured = json.loads(results.read_text())["one"]
    assert list(measured["rows"]) == ["dense", "random_20", "cached", "before training", "teacher"]
    first, other = (measured["rows"][name]["piqa"] for name in ("dense", "teacher"))
    assert "difference" not in first
    assert other["difference"] == pytest.approx(other["value"] - first["value"], abs=1e-4)
    shown_tasks = tasks_of({"one": measured})
    assert shown_tasks.startswith("`one`, seed 2, at most 3 rows of each")
    assert shown_tasks.count("| `") == 5
    seconds = {"one": {"dense": 2.0, "random_20": 1.5}}
    shown = tables_of(StudyTables.read(tables, tmp_path, tmp_path), read_lines(record), seconds)
    rows = [row.split("|")[1].strip(" `") for row in shown["one"].splitlines() if row.startswith("| `")]
    assert rows == [*by_arm, *by_arm], "compared, and what each spent"
    drawn = pictures_of(StudyTables.read(tables, tmp_path, tmp_path), read_lines(record), seconds)
    assert [f"![{title}]({file})" for file, title in file_names("one").items()] == [
        line for line in shown["one"].splitlines() if line.startswith("!")
    ]
    assert list(drawn) == list(file_names("one"))
    from_cached = Compared.of(["cached", "dense"], lines_of_one(record), {})
    assert from_cached is not None
    assert spent(from_cached).count("| `") == 2, "whose first arm asks no teacher in its steps"
    for picture in drawn.values():
        assert all(f">{arm}</text>" in picture.decode() for arm in ("random_20", "cached"))
    before = "Before.\n\n<!-- study: one -->\n\nold\n\n<!-- end of study -->\n\nAfter.\n"
    after = f"Before.\n\n<!-- study: one -->\n\n{shown['one']}\n<!-- end of study -->\n\nAfter.\n"
    assert page.filled(before, shown) == after

    # What an arm ran may leave the product: it can't be run again, and its lines stay in the table.
    content["tables"]["one"] |= {"arms": ["dense", "cached"], "left": ["random_20"]}
    del content["arms"]["random_20"]
    tables.write_text(yaml.safe_dump(content))
    assert run("one") == 0
    still = tables_of(StudyTables.read(tables, tmp_path, tmp_path), read_lines(record), seconds)["one"]
    assert "Unfinished" not in still
    assert set(still.splitlines()) == set(shown["one"].splitlines())


def test_each_text_has_documents_of_all_domains_to_hold_out(tmp_path: Path) -> None:
    """The hash that chooses a document's file must not be the one by which selkd holds documents out."""
    generator = np.random.default_rng(0)
    for domain in DOMAINS:
        rows = [" ".join(f"{domain}{i}" for i in generator.integers(0, 999, 90)) for _ in range(400)]
        (tmp_path / f"{domain}.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    (tmp_path / f"{TASK}.jsonl").write_text(json.dumps({"question": "What?", "answer": "That."}) + "\n")
    told = prepare(tmp_path, tmp_path / "texts")
    assert sum(part["rows"] for part in told.values()) == 1201
    seen = set()
    for name, share in SHARES.items():
        rows = [json.loads(line) for line in (tmp_path / "texts" / f"{name}.jsonl").read_text().splitlines()]
        assert len(rows) / 1200 == pytest.approx(share, abs=0.05)
        held_out = [is_held_out(row["text"], 0.1) for row in rows]
        assert np.mean(held_out) == pytest.approx(0.1, abs=0.06)
        assert {row["domain"] for row in rows[:30]} == set(DOMAINS), "each stretch has all domains"
        assert all(SHORTEST <= len(row["text"]) <= LONGEST for row in rows)
        seen |= {row["text"] for row in rows}
    assert len(seen) == 1200, "no document is in two texts"


def made_up(arm: str, seed: int, *, slope: float, work: float, effect: float = 0.0) -> dict[str, Any]:
    """A line whose documents lose ``slope`` nats a position and step, by 24 steps; ``effect`` comes at step 16."""
    positions = np.random.default_rng(0).integers(120, 256, 34)
    noise = np.random.default_rng(seed * 1000 + len(arm)).standard_normal(34) * 0.004
    kl = {step: (2 - slope * step + (effect + noise) * (step >= 16)) * positions for step in (0, 8, 16, 24)}
    return {
        "table": "t", "arm": arm, "seed": seed, "steps": 24, "held_out": "x", "positions": positions.tolist(),
        "recipe": arm, "kl_nats": {str(step): values.tolist() for step, values in kl.items()},
        "cost": {"work_in_steps": 24 * work},
    }  # fmt: skip


def made_table(arms: list[str], lines: list[dict[str, Any]]) -> Compared:
    table = Compared.of(arms, lines, {})
    assert table is not None
    return table


def test_tables_of_made_up_records_have_the_known_answers() -> None:
    """The cheap arm is worse a step, but takes 24 steps for the work of the first arm's 18: 22.4 for 16.8."""
    lines = []
    for seed in (1, 2, 3, 4, 5):
        lines += [
            made_up("dense", seed, slope=0.02, work=4.0),
            made_up("dense_again", 100 + seed, slope=0.02, work=4.0),
            made_up("better", seed, slope=0.02, work=8.0, effect=-0.03),
            made_up("cheap", seed, slope=0.018, work=3.0),
            made_up("like", seed, slope=0.02, work=4.0),
        ]
    rows = [
        row.split(" | ")
        for row in compared(made_table(["dense", "better", "cheap", "like", "dense_again"], lines)).split("\n")
    ]
    by_arm = {row[0].strip("|` "): row for row in rows[2:-1]}

    def value(text: str) -> float:
        return float(text.split()[0])

    assert value(by_arm["better"][3]) == pytest.approx(-0.03, abs=0.003)
    assert value(by_arm["cheap"][3]) == pytest.approx(0.002 * 24, abs=0.003)
    # At the first arm's 16.8 steps, between 16 and 24; the cheap arm has taken 22.4 by then.
    assert value(by_arm["cheap"][4]) == pytest.approx(-0.018 * 22.4 + 0.02 * 16.8, abs=0.004)
    # The same with the cheap arm first: the dearer one sets the cost.
    turned = made_table(["cheap", "dense"], lines).differences[WAYS[1]]["dense"]
    assert turned.value == pytest.approx(0.018 * 22.4 - 0.02 * 16.8, abs=0.004)
    assert by_arm["better"][4] == "", "dense was not measured at 33.6 steps"
    assert [by_arm[arm][7] for arm in by_arm] == ["", "", "better", "worse", "as good", "noise: other seeds"]
    assert by_arm["better"][5] == "", "no seconds were measured"
    # Holm: the two true effects stay, and the noise floor is no hypothesis.
    assert float(by_arm["like"][6]) > 0.05
    assert float(by_arm["better"][6]) < 0.001
    assert abs(value(by_arm["dense_again"][3])) < 0.004
    other_kl = lines[2]["kl_nats"] | {"0": [1.0] * 34}
    for changed, message in (
        ({"held_out": "y"}, "seed 1: better was measured on other documents"),
        ({"kl_nats": other_kl}, "seed 1: better began with another student"),
        ({"arm": "dense", "seed": 2, "recipe": "y"}, "has another recipe than its other seeds"),
    ):
        with pytest.raises(ValueError, match=message):
            made_table(["dense", "better"], [lines[0], lines[2] | changed])


def test_an_arm_of_fewer_seeds_stands_beside_the_first_on_those_seeds() -> None:
    lines = [made_up("dense", seed, slope=0.02 * seed, work=4.0 * seed) for seed in (1, 2, 3)]
    table = made_table(["dense", "few"], [*lines, made_up("few", 2, slope=0.03, work=4.0)])
    work, kl = place(table, table.arms["few"])
    assert work == pytest.approx(0.5), "of the work of dense with seed 2"
    assert kl == pytest.approx(2 - 0.04 * 24 + 0.01 * 24, abs=0.003), "as much above dense as seed 2 was"


def test_a_frontier_of_many_arms_names_the_first_and_the_best() -> None:
    arms = ["dense", *(f"arm_{number}" for number in range(14))]
    lines = [made_up(arm, seed, slope=0.02 - 0.0005 * number, work=4.0) for seed in (1, 2)
             for number, arm in enumerate([arms[1], *arms[:1], *arms[2:]])]  # fmt: skip
    drawn = pictures("many", made_table(arms, lines))
    frontier, forest = (drawn[f"study-many-{kind}.svg"].decode() for kind in ("frontier", "differences"))
    assert [arm for arm in arms if f">{arm}</text>" in frontier] == ["dense", "arm_0"]
    assert [arm for arm in arms if f">{arm}</text>" in forest] == arms[1:]


def test_a_curve_has_the_fractions_that_are_run() -> None:
    for arms, shares in ((["entropy_5"], "5%"), (["entropy_5", "random_45", "random_1"], "1% 5% 45%")):
        lines = [made_up(arm, 1, slope=0.02, work=4.0) for arm in ("dense", *arms)]
        drawn = pictures("positions_pruned", made_table(["dense", *arms], lines))[
            "study-positions_pruned-curve.svg"
        ].decode()
        assert re.findall(r">(\d+%)</text>", drawn) == [*shares.split(), "100%"]
        assert all((f">{name}</text>" in drawn) == any(arm.startswith(name) for arm in arms) for name in CURVES)


def test_the_work_of_a_step_at_other_sizes_follows_from_the_models_shapes() -> None:
    """Of Qwen3's published sizes, in weights of matrices; norms are too small to show."""

    def matrices(layers: int, hidden: int, inner: int, heads: int) -> int:
        return layers * hidden * (2 * heads * 128 + 2 * 8 * 128 + 3 * inner)

    teacher, student = matrices(36, 4096, 12288, 32), matrices(28, 2048, 6144, 16)
    of_teacher, of_student = 151_936 * 4096, 151_936 * 2048
    whole = teacher + of_teacher + 3 * (student + of_student)
    entropy = teacher + 0.2 * of_teacher + 3 * student + (1 + 3 * 0.2) * of_student
    cached = 3 * student + 3 * 0.45 * of_student
    rows = {row.split(" | ")[0]: row.strip("| ").split(" | ")[1:] for row in page.at_other_sizes().splitlines()}
    assert rows["| all positions"][0] == "1.00"
    assert rows["| the highest 20% by the student's entropy"][0] == f"{entropy / whole:.2f}"
    assert rows["| random 45%"][1] == f"{cached / whole:.2f}"


def test_the_record_is_of_the_recipes_of_tables_yaml() -> None:
    """A change of the product that changes what an arm runs would leave its lines without a meaning."""
    tables, lines = StudyTables.read(TABLES, Path(), Path()), read_lines(page.RESULTS / "study.jsonl")
    recorded = {(line["table"], line["arm"], line["seed"]): line["recipe"] for line in lines}
    left = {(name, arm) for name, table in tables.content["tables"].items() for arm in table.get("left", [])}
    for name in tables.names:
        start = tables.content["tables"].get(name, {}).get("start")
        rates = dict.fromkeys(tables.content["families"], 1e-4) | rates_of(lines, f"rates_{start}")
        for run in tables.runs(name, rates):
            found = recorded.pop((run.table, run.arm, run.seed), None)
            assert found in (None, digest(run.recipe)), run.id
    assert {(table, arm) for table, arm, _ in recorded} == left


def test_the_page_and_its_pictures_are_what_the_record_says() -> None:
    assert page.main(["--check"]) == 0


def test_every_recipe_of_the_study_is_valid_at_both_scales(tmp_path: Path) -> None:
    for scale in (None, "paper"):
        tables = StudyTables.read(TABLES, tmp_path, tmp_path, scale)
        rates = None if scale else dict.fromkeys(tables.content["families"], 1e-4)
        for name in tables.names:
            if scale is None or (name in tables.content["tables"] and name != "transfer"):
                assert tables.runs(name, rates)
    arms = set(tables.content["arms"])
    assert {arm for table in tables.content["tables"].values() for arm in table["arms"]} == arms, "each arm is run"

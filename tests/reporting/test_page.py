import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from made_run import BENCHMARKS, OVERLAP, demo_metrics, held_out, write_run

from selkd.errors import InputError, RunError
from selkd.recipe.files import load_recipe
from selkd.reporting.chosen_keys import chosen_keys
from selkd.reporting.page import write_page

HOSTILE = "<script>alert(1)</script>\"'&</style><img src=x onerror=alert(1)>"


class Seen(HTMLParser):
    """The tags, attributes and text that a browser would find."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


def page_of(run_dir: Path) -> str:
    return write_page(run_dir).read_text(encoding="utf-8")


def test_the_page_tells_the_run(run_dir: Path) -> None:
    page = write_page(run_dir)
    assert page == run_dir / "report.html"
    seen = Seen(page.read_text(encoding="utf-8"))
    for told in (
        "SmolLM2-135M-Instruct",
        "20 of the teacher’s 30 layers",
        "36.0 from 98.9",
        "0.89 from 1.78",
        "62.4% from 48.1%",
        "5 min 17 s",
        "84 of 417",
        "64 random draws",
        "3,101×",
        "3.41 GB",
        "1.64 GB",
        "made by selkd 0.1.0",
        "max_length: 256",
    ):
        assert told.lower() in seen.text.lower(), told
    # by entropy, distances; KL, loss, entropy; positions and samples by score; bytes a position
    assert seen.tags.count("svg") == 8
    assert seen.tags.count("figcaption") == 8
    assert len(page.read_bytes()) < 600_000


def test_the_gap_closed_is_reckoned_in_nats_for_perplexity(run_dir: Path) -> None:
    # ln(98.87/35.96) / ln(98.87/17.98) = 0.593; 1 - 0.887/1.782 = 0.502; (0.624-0.481)/(1-0.481) = 0.276
    cells = re.findall(r"<td>(\d+)%<span class=\"bar\"", page_of(run_dir))
    assert cells == ["59", "50", "28"]


def test_nothing_is_fetched_and_nothing_runs(run_dir: Path) -> None:
    page = page_of(run_dir)
    seen = Seen(page)
    assert not {"script", "link", "img", "iframe", "object", "embed", "base"} & set(seen.tags)
    for name, value in seen.attributes:
        assert not name.startswith("on")
        if name in {"src", "href", "xlink:href", "action", "data"}:
            assert value is not None
            assert value.startswith("#")
    style = page[page.index("<style>") : page.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    assert "default-src 'none'" in page
    assert "prefers-color-scheme: dark" in style


def test_the_same_run_gives_the_same_page(run_dir: Path) -> None:
    assert page_of(run_dir) == page_of(run_dir)


def spoilt(run_dir: Path, record: dict[str, Any], text: str) -> str:
    """The page where every name and text from outside is ``text``."""
    record["name"] = text
    record["teacher"] = {"model": text.replace("/", ""), "parameters": 1, "layers": 30, "fingerprint": text}
    record["environment"] = dict.fromkeys(record["environment"], text)
    record["recipe"]["positions"] = {"policy": text, "metric": text, "fraction": 0.2}
    record["recipe"]["criterion"]["name"] = text
    record["recipe"]["samples"] = {"metric": text, "fraction": 0.2}
    record["recipe"]["data"]["path"] = text
    record["recipe"]["training"]["optim"] = text
    (run_dir / "record.json").write_text(json.dumps(record))
    (run_dir / "recipe.yaml").write_text(f"note: {text}</pre>\n")
    examples = json.loads((run_dir / "selection" / "examples.json").read_text())
    examples["metric"] = text
    examples["samples"][0]["tokens"][3] = text
    examples["samples"][0]["tokens"][4] = "</div>\ud800\x00{{ 7 * 7 }}"
    examples["samples"][0]["sample_id"] = text
    (run_dir / "selection" / "examples.json").write_text(json.dumps(examples))
    kept = held_out()
    kept["texts"][0]["tokens"][3] = kept["texts"][0]["teacher_first"][3] = text
    row = kept["continuations"][0]
    row["prompt"] = row["teacher"]["text"] = row["after"]["text"] = row["after"]["same_text"] = text
    kept["why_not_written"] = text
    (run_dir / "held_out.json").write_text(json.dumps(kept))
    return page_of(run_dir)


def test_hostile_text_stays_text_everywhere(run_dir: Path, record: dict[str, Any]) -> None:
    plain_tags = Seen(spoilt(run_dir, record, "plain")).tags
    page = spoilt(run_dir, record, HOSTILE)
    seen = Seen(page)
    assert seen.tags == plain_tags
    assert not [name for name, _ in seen.attributes if name.startswith("on")]
    assert HOSTILE not in page
    assert HOSTILE in html.unescape(page)
    assert "{{ 7 * 7 }}" in seen.text


def test_selected_tokens_are_marked_and_shifted_by_one(run_dir: Path) -> None:
    sample = {
        "sample_id": "00",
        "tokens": ["one", " two", " three"],
        "scores": [0.5, 3.0, None],
        "selected": [False, True, False],
        "valid": [True, True, False],
    }
    (run_dir / "selection" / "examples.json").write_text(json.dumps({"metric": "kl", "samples": [sample]}))
    page = page_of(run_dir)
    assert re.search(r'<span class="mute" data-tip="not a prediction target">one</span><span class="h\d"', page)
    marked = re.findall(r'<mark class="h\d" data-tip="([^"]*)" tabindex="0"[^>]*>([^<]*)</mark>', page)
    assert marked == [("3.00 nats, selected", " three")]


def test_a_run_that_has_only_begun_shows_dashes_and_no_invented_number(tmp_path: Path, record: dict[str, Any]) -> None:
    begun = dict.fromkeys(record) | {"name": "begun", "recipe": record["recipe"]}
    seen = Seen(page_of(write_run(tmp_path / "begun", begun)))
    assert "None" not in seen.text
    assert "before: –" in seen.text
    assert "The student has not been trained yet." in seen.text
    assert "No training step was logged." in seen.text
    assert "No cache has been built yet." in seen.text
    assert "svg" not in seen.tags
    assert "0.0" not in seen.text.replace("0.0002", "").partition("teacher: model")[0]


def test_every_null_in_every_part_still_makes_a_page(tmp_path: Path, record: dict[str, Any]) -> None:
    for part, value in record.items():
        if not isinstance(value, dict) or part == "recipe":
            continue
        changed = record | {part: dict.fromkeys(value)}
        text = Seen(page_of(write_run(tmp_path / part, changed))).text
        assert "None" not in text, part


def test_a_run_without_cache_says_that_the_teacher_ran_beside(tmp_path: Path, record: dict[str, Any]) -> None:
    record["recipe"]["cache"], record["teacher_cache"] = None, None
    assert "the teacher runs beside the student" in page_of(write_run(tmp_path / "live", record))


def test_steps_logged_again_after_a_resume_count_once(run_dir: Path) -> None:
    clean = page_of(run_dir)
    log = run_dir / "metrics.jsonl"
    lines = log.read_text().splitlines()
    stale = json.dumps(json.loads(lines[9]) | {"loss": 99.0})
    log.write_text("\n".join([*lines[:9], stale, *lines[9:]]) + "\n")
    assert page_of(run_dir) == clean


def test_agreement_of_approximate_scoring_gets_its_plot_where_it_was_logged(run_dir: Path) -> None:
    log = run_dir / "metrics.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    log.write_text("".join(json.dumps(line | {"held_out_top1_agreement": 0.5}) + "\n" for line in lines))
    assert "Approximate scoring" not in page_of(run_dir)
    log.write_text("".join(json.dumps(line | {"scoring_agreement": 0.98}) + "\n" for line in lines))
    assert "Approximate scoring" in page_of(run_dir)


def test_a_step_keeps_its_loss_beside_the_held_out_fidelity(run_dir: Path) -> None:
    clean = Seen(page_of(run_dir)).tags.count("circle") + page_of(run_dir).count("<use")
    log = run_dir / "metrics.jsonl"
    log.write_text(log.read_text() + json.dumps({"step": 10, "held_out_kl_nats": 1.2}) + "\n")
    # One more point on the held-out line, with its tip, and none less on the others.
    assert Seen(page_of(run_dir)).tags.count("circle") + page_of(run_dir).count("<use") == clean + 2


def test_the_entropy_histogram_counts_every_valid_position_and_the_selected_ones(run_dir: Path) -> None:
    samples = json.loads((run_dir / "selection" / "examples.json").read_text())["samples"]
    valid, selected = sum(sum(s["valid"]) for s in samples), sum(sum(s["selected"]) for s in samples)
    text = Seen(page_of(run_dir)).text
    assert f"{valid} positions of held-out text" in text
    assert f"The {selected} coloured ones are those that the recipe selects" in text


def test_what_was_trained_on_is_not_called_held_out(run_dir: Path, record: dict[str, Any]) -> None:
    record["data"]["held_out_samples"] = 0
    (run_dir / "record.json").write_text(json.dumps(record))
    assert "positions of training text by" in Seen(page_of(run_dir)).text


def test_only_some_examples_are_shown_as_text(run_dir: Path) -> None:
    path = run_dir / "selection" / "examples.json"
    examples = json.loads(path.read_text())
    examples["samples"] = examples["samples"] * 4
    path.write_text(json.dumps(examples))
    page = page_of(run_dir)
    assert page.count('<div class="tokens"') == 3
    assert f"{4 * sum(sum(s['valid']) for s in examples['samples'][:2])} positions" in Seen(page).text


def test_overlaps_are_drawn_if_they_were_measured(run_dir: Path) -> None:
    path = run_dir / "selection" / "overlap.json"
    path.write_text(json.dumps(OVERLAP))
    text = Seen(page_of(run_dir)).text
    for told in ("Position metrics: how far they agree", "Sample filters", "ce_ratio_plus_student_entropy  4", " 62 "):
        assert re.sub(r"\s+", " ", told) in text, told
    path.write_text(json.dumps(OVERLAP | {"samples": None}))
    assert "Sample filters" not in Seen(page_of(run_dir)).text


def test_cut_prompts_are_told(run_dir: Path, record: dict[str, Any]) -> None:
    told = "6 of 9 prompts were longer than the model's 48 tokens"
    record["benchmarks"] = BENCHMARKS | {"after": BENCHMARKS["after"] | {"cut": {"arc_easy": told}}}
    (run_dir / "record.json").write_text(json.dumps(record))
    assert f"arc_easy: {told}." in Seen(page_of(run_dir)).text


def test_benchmarks_show_with_their_standard_errors(run_dir: Path, record: dict[str, Any]) -> None:
    record["benchmarks"] = BENCHMARKS
    (run_dir / "record.json").write_text(json.dumps(record))
    text = Seen(page_of(run_dir)).text
    assert "arc_easy acc 0.330 0.455 ± 0.012" in text
    assert "lambada perplexity – 23.40 ± 1.25" in text
    assert "paper acc – 0.412 –" in text


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is not a run directory: expected record\.json"):
        write_page(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("record.json", "{", r"record\.json: expected JSON"),
        ("record.json", "[]", r"record\.json: expected a JSON object, found list"),
        ("metrics.jsonl", '{"step": 1, "loss": 2}\n{"step": 2, "lo\n', r"metrics\.jsonl, line 2: expected JSON"),
        ("metrics.jsonl", '{"loss": 2}\n', r'metrics\.jsonl, line 1: expected an object with a whole "step"'),
        ("selection/samples.parquet", "text", r"samples\.parquet: not a whole file of sample scores"),
        (
            "selection/overlap.json",
            '{"positions": {"metrics": ["a"], "overlap": [[1, 2]]}}',
            r"overlap\.json, positions",
        ),
        ("selection/examples.json", "{}", r'examples\.json: expected a list "samples"'),
        (
            "selection/examples.json",
            '{"samples": [{"tokens": ["a"], "scores": [], "selected": [true], "valid": [true]}]}',
            r"sample 0: expected lists of one length, found tokens 1, scores 0, selected 1, valid 1",
        ),
    ],
)
def test_a_damaged_file_is_named(run_dir: Path, name: str, content: str, message: str) -> None:
    (run_dir / name).write_text(content)
    with pytest.raises(InputError, match=message):
        write_page(run_dir)
    assert not (run_dir / "report.html").exists()


def test_a_page_that_can_not_be_written_leaves_nothing_behind(run_dir: Path) -> None:
    # A folder in the page's place: the rename fails after the text was written.
    (run_dir / "report.html").mkdir()
    (run_dir / "report.html" / "kept").write_text("the user's")
    with pytest.raises(RunError, match=r"report\.html in .* could not be finished"):
        write_page(run_dir)
    assert (run_dir / "report.html" / "kept").read_text() == "the user's"
    assert [path.name for path in run_dir.glob("*report*")] == ["report.html"]


@pytest.mark.parametrize(
    ("copies", "told"),
    [(0, "64; 1.5% of their tokens stand in training text"),
     (3, "64; 1.5% of their tokens stand in training text, and 3 copies of it were dropped")],
)  # fmt: skip
def test_what_of_the_held_out_text_was_trained_on_is_told(
    copies: int, told: str, run_dir: Path, record: dict[str, Any]
) -> None:
    record["data"]["held_out_overlap"] = {"kept_share": 0.015, "copies": copies}
    (run_dir / "record.json").write_text(json.dumps(record))
    assert f"<dd>{told}</dd>" in write_page(run_dir).read_text()


def test_the_kl_that_is_shown_is_true_and_the_loss_says_its_floor(run_dir: Path, record: dict[str, Any]) -> None:
    text = Seen(page_of(run_dir)).text
    assert "22 optimiser steps took KL to the teacher at the selected positions from 1.91 to 0.94 nats." in text
    # By hand: each line's kd_nats less its kl_nats is 0.45.
    assert "a student equal to its teacher would have about 0.45 nats here on average" in text
    assert "with 64 random draws from the teacher’s distribution, so it is no distance" in text
    # A run of an earlier version has no KL of drawn classes: the loss is told under its own name.
    record["train"] = {"steps": 1, "loss_first": 2.513, "loss_last": 1.305}
    (run_dir / "record.json").write_text(json.dumps(record))
    lines = [{key: value for key, value in line.items() if key != "kl_nats"} for line in demo_metrics()]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = Seen(page_of(run_dir)).text
    assert "1 optimiser step took the loss from 2.51 to 1.30. The loss is no KL" in text
    assert "a student equal to its teacher would not have a loss of zero" in text
    assert "This run logged no KL at the positions that it trained on." in text
    # The likeliest classes are no draws; beside them, all others as one class leave no floor.
    record["recipe"]["classes"] = {"sampler": "top_k", "draws": 20, "tail": True}
    record["recipe"]["criterion"] |= {"temperature": 2.0}
    (run_dir / "record.json").write_text(json.dumps(record))
    text = Seen(page_of(run_dir)).text
    assert "at the selected positions, at temperature 2. It compares" in text
    assert "with the teacher’s 20 most likely classes, so it is no distance: a student equal" in text
    assert "would have zero, but so would others." in text
    record["recipe"]["criterion"] |= {"temperature": 1.0}
    # With the whole distribution the loss is the KL, and is drawn once.
    record["recipe"]["classes"] = {"sampler": "all", "draws": None}
    (run_dir / "record.json").write_text(json.dumps(record))
    text = Seen(page_of(run_dir)).text
    assert "1 optimiser step took KL to the teacher at the selected positions from 2.51 to 1.30 nats." in text
    assert "Training loss" not in text


def test_figures_have_intervals_and_few_positions_a_warning(run_dir: Path, record: dict[str, Any]) -> None:
    text = Seen(page_of(run_dir)).text
    # By hand: 0.887 ± 1.96 * 0.017, 0.624 ± 1.96 * 0.005.
    assert "0.85 to 0.92" in text
    assert "61.4% to 63.4%" in text
    assert "Measured on" not in text
    record["fidelity"]["positions"] = 36
    (run_dir / "record.json").write_text(json.dumps(record))
    assert "Measured on 36 positions only" in Seen(page_of(run_dir)).text


def test_the_map_shows_each_token_before_and_after(run_dir: Path) -> None:
    page = page_of(run_dir)
    text = held_out()["texts"][0]
    seen = Seen(page)
    tips = [value for name, value in seen.attributes if name == "data-tip" and value and " nats. Ranked first" in value]
    positions = sum(sum(one["valid"]) for one in held_out()["texts"])
    assert len(tips) == 2 * positions
    word = text["tokens"][1].replace(" ", "␣")
    told = f"KL {text['before'][0]:.2f} → {text['after'][0]:.2f} nats"
    first = f"by the teacher “{word}”, the student before “␣the”, after “{word}”"
    assert tips[0] == f"“{word}”: {told}. Ranked first {first}"
    assert page.count(' farther"') == 2  # one token of each text
    pairs = [pair for one in held_out()["texts"] for pair in zip(one["before"], one["after"], strict=True) if pair[0]]
    nearer = sum(after < before for before, after in pairs) / len(pairs)
    assert f"nearer at {100 * nearer:.0f}% of these {positions} positions" in seen.text
    stops = [value for name, value in seen.attributes if name == "aria-label" and value in tips]
    assert len(stops) == 2 * 10


def test_what_the_models_write_stands_side_by_side(run_dir: Path) -> None:
    page = page_of(run_dir)
    text = Seen(page).text
    assert "<mark>a block with</mark> a manager." in page
    assert "The first 3 tokens are the teacher’s." in text
    assert "Another first token than the teacher’s." in text
    kept = held_out() | {"why_no_teacher": "no teacher was loaded"}
    kept["continuations"][0] |= {"teacher": None}
    kept["continuations"][0]["after"]["same"] = kept["continuations"][0]["before"]["same"] = None
    (run_dir / "held_out.json").write_text(json.dumps(kept))
    text = Seen(page_of(run_dir)).text
    assert "Something is missing here: no teacher was loaded." in text
    assert "than the teacher" not in text


def test_what_the_map_leaves_out_is_told(run_dir: Path) -> None:
    def page(**changes: Any) -> str:
        (run_dir / "held_out.json").write_text(json.dumps(held_out() | changes))
        return " ".join(write_page(run_dir).read_text().split())

    whole = page()
    assert "The same held-out text before and after" in whole
    assert "Of longer texts" not in whole
    cut = page(cut_at=512, is_held_out=False)
    assert "Of longer texts the first 512 tokens are shown." in cut
    assert "The same text, which the student was trained on, before and after" in cut
    # Where nothing was to be written, nothing is missing; where it could not be, the reason stands.
    assert "In its own words" not in page(continuations=[], why_no_teacher="no teacher was loaded")
    assert "Something is missing here: too long." in page(continuations=[], why_not_written="too long")


def test_the_chosen_keys_of_positions_are_told() -> None:
    for name, expected in {
        "full_kd": {},
        "random_pos": {"policy": "random", "metric": "random", "fraction": "0.2"},
        "se_kd": {"policy": "top_k", "metric": "student_entropy", "fraction": "0.2", "scoring": "exact"},
    }.items():
        chosen = chosen_keys(load_recipe(name).resolved())
        of_positions = {key.split(".")[1]: value for key, value in chosen.items() if key.startswith("positions.")}
        assert of_positions == expected
    recipe = load_recipe("se_kd_3x", ["samples.fraction=0.3"]).resolved()
    assert {key for key in chosen_keys(recipe) if key.startswith("samples")} == {"samples.fraction"}


def test_the_chosen_keys_come_first_and_the_whole_recipe_is_folded(run_dir: Path) -> None:
    page = page_of(run_dir)
    keys = page[page.index("<h2>Recipe</h2>") : page.index("<details>")]
    assert "<dt><code>student.prune_from_teacher.layers</code></dt><dd>20</dd>" in keys
    assert "<dt><code>training.learning_rate</code></dt><dd>0.0002</dd>" in keys
    assert "temperature" not in keys  # as by default
    assert "temperature: 1.0" in page[page.index("<details>") :]


def test_without_matplotlib_there_is_a_page_that_says_so(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("page", "figure"):
        monkeypatch.setattr(f"selkd.reporting.{place}.can_draw", lambda: False)
    seen = Seen(page_of(run_dir))
    assert "svg" not in seen.tags
    assert "No plots: drawing needs the package matplotlib: pip install 'selkd[plots]'." in seen.text
    assert "0.89 from 1.78" in seen.text

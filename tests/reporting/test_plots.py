import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
from made_run import by_entropy, demo_metrics

from selkd.reporting import plots
from selkd.reporting.run_files import Overlap, RunFiles
from selkd.reporting.training_plots import training_plots

SCORES = np.linspace(0.0, 5.0, 101)
OVERLAP = np.array([[1.0, 0.223], [np.nan, 1.0]])


def logged_plots(metrics: list[dict[str, Any]]) -> dict[str, str]:
    """The plots of a training log, by name."""
    record = {
        "recipe": {"criterion": {"name": "forward_kl"}, "classes": {"sampler": "rs_kd", "draws": 64}},
        "fidelity": {"before": {"kl_nats": 1.8}, "after": {"kl_nats": 0.9}},
        "train": {"steps": 22},
    }
    run = RunFiles(record, "", metrics, None, None, {})
    return {plot.name: plot.svg for plot in training_plots(run)}


def histogram(scores: np.ndarray, chosen: np.ndarray, label: str = "entropy", what: Any = "samples") -> str:
    return plots.score_histogram(what, "", scores, chosen, label).svg


def all_plots() -> list[str]:
    return [
        *logged_plots([line | {"scoring_agreement": 0.97} for line in demo_metrics()]).values(),
        histogram(SCORES, SCORES >= 4.0, what="positions"),
        histogram(SCORES, SCORES >= 4.0),
        plots.overlap_map("samples", "Sample filters", Overlap(["a", "b"], OVERLAP)).svg,
        plots.storage_plot([("this run’s cache", 31.7), ("full logits", 98_304.0)]).svg,
        plots.by_entropy_plot(by_entropy(1.9), by_entropy(1.0)).svg,
        plots.distances_plot(SCORES + 0.1, SCORES / 2, "KL to the teacher").svg,
    ]


def test_every_part_of_the_log_has_its_plot() -> None:
    # KL, loss, entropy, agreement (the share selected hardly varies); two histograms, overlap, storage; two of fidelity
    assert len(all_plots()) == 10


def test_a_share_that_varies_is_drawn_and_one_that_does_not_is_not() -> None:
    lines = demo_metrics()
    assert "share" not in logged_plots(lines)
    varying = [line | {"selected_share": 1 - 0.03 * line["step"]} for line in lines]
    assert "share" in logged_plots(varying)


def test_values_are_there_for_pointer_and_keyboard() -> None:
    svg = logged_plots(demo_metrics())["divergence"]
    root = ElementTree.fromstring(svg)
    tips = [element for element in root.iter() if element.get("class") == "tip"]
    told = ["".join(tip.itertext()).strip() for tip in tips]
    assert len(tips) == 22 + 2
    assert told[0] == "selected, training, step 1: 1.97"
    assert told[-1] == "all, held-out, step 22: 0.90"
    stops = [tip for tip in tips if tip.get("tabindex") == "0"]
    assert len(stops) == 5 + 2
    assert all(stop.get("aria-label") == "".join(stop.itertext()).strip() for stop in stops)
    # A tip lies where its point lies: the held-out points are drawn with markers.
    drawn = [(use.get("x"), use.get("y")) for use in root.iter() if use.tag.endswith("}use")]
    for tip in tips[-2:]:
        circle = next(element for element in tip if element.tag.endswith("}circle"))
        assert (circle.get("cx"), circle.get("cy")) in drawn
    picture = plots.step_plot("p", "P", "", "p", [plots.logged(demo_metrics(), "kl_nats")]).pictures()["p.svg"]
    assert b'class="tip"' not in picture


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter() if element.tag.endswith("}text")]


def test_the_same_data_gives_the_same_bytes_in_another_process_with_other_settings() -> None:
    script = (
        "import sys, matplotlib; matplotlib.rcParams.update({'font.size': 30, 'svg.fonttype': 'path'}); "
        "sys.path.insert(0, '.'); from test_plots import demo_metrics, logged_plots; "
        "sys.stdout.buffer.write(logged_plots(demo_metrics())['loss'].encode())"
    )
    here = Path(__file__).parent
    other = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, cwd=here).stdout
    assert other.decode() == logged_plots(demo_metrics())["loss"]


def test_plots_take_their_colours_from_the_page() -> None:
    for svg in all_plots():
        ElementTree.fromstring(svg)
        bare = re.sub(r"var\(--\w+, #[0-9a-f]{6}\)", "", svg)
        # Anything else that has a colour would not turn with dark mode; text is text, in the page's font.
        assert not re.search(r"#[0-9a-f]{6}\b(?!\))", bare), re.findall(r"#[0-9a-f]{6}", bare)
        assert "rgb(" not in bare
        assert "DejaVu" not in svg
        assert "var(--muted" in svg


def test_plots_of_one_page_share_no_identifier_and_style_nothing_else() -> None:
    svgs = all_plots()
    identifiers = [identifier for svg in svgs for identifier in re.findall(r'\bid="([^"]+)"', svg)]
    assert len(identifiers) == len(set(identifiers))
    for svg in svgs:
        assert "<style" not in svg
        assert "<metadata" not in svg
        referred = set(re.findall(r"(?:url\(#|href=\"#)([^\")]+)", svg))
        assert referred <= set(re.findall(r'\bid="([^"]+)"', svg))


def test_the_names_of_two_lines_that_meet_do_not_lie_on_each_other() -> None:
    metrics = [{"step": step, "selected_entropy_nats": 3.0, "mean_entropy_nats": 3.0, "loss": 1} for step in (1, 2)]
    root = ElementTree.fromstring(logged_plots(metrics)["entropy"])
    heights = {element.text: float(element.get("y", "nan")) for element in root.iter() if element.tag.endswith("}text")}
    assert heights["all positions"] - heights["selected"] > 12


def test_the_cut_is_drawn_only_where_scores_decided() -> None:
    assert "cut 4.00" in texts(histogram(SCORES, SCORES >= 4.0))
    mixed = np.arange(len(SCORES)) % 5 == 0
    assert not any(text.startswith("cut") for text in texts(histogram(SCORES, mixed)))


def test_an_overlap_is_told_in_percent_and_what_is_unknown_by_a_dash() -> None:
    overlap = Overlap(["kl", "student_entropy"], OVERLAP)
    told = texts(plots.overlap_map("positions", "Position metrics", overlap).svg)
    assert told[-4:] == ["100", "22", "–", "100"]
    assert [text for text in told if text.endswith(("  1", "  2"))] == ["kl  1", "student_entropy  2"]


def test_equal_scores_and_a_single_sample_are_drawn() -> None:
    assert histogram(np.full(3, 2.0), np.array([True, True, False])).startswith("<svg")
    assert histogram(np.array([1.5]), np.array([True])).startswith("<svg")


def test_every_score_lies_in_a_bin_and_none_straddles_the_cut() -> None:
    rng = np.random.default_rng(5)
    scores = rng.gamma(3.0, 1.0, 500)
    cut = float(np.sort(scores)[-100])
    edges = np.array(plots._bins(scores, cut))
    assert np.isclose(edges, cut).any()
    assert np.histogram(scores, edges)[0].sum() == 500


def test_a_long_log_is_thinned_and_an_empty_or_broken_one_still_drawn() -> None:
    long = [{"step": step, "loss": 1.0 + 1 / step} for step in range(1, 20_001)]
    assert len(logged_plots(long)["loss"]) < 60_000
    assert logged_plots([]) == {}
    empty = plots.step_plot("loss", "Loss", "", "loss", [plots.logged([], "loss")])
    assert empty.svg.startswith("<svg")
    assert logged_plots([{"step": 1, "loss": float("nan")}, {"step": 2, "loss": 1.0}])["loss"].startswith("<svg")


def test_names_in_a_plot_are_text_and_no_formula() -> None:
    svg = histogram(SCORES, SCORES >= 4.0, "$\\frac{ <script>")
    assert "<script" not in svg
    assert "$\\frac{ <script>" in texts(svg)

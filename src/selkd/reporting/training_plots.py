"""The plots of a run's training log: true KL on one scale with held-out KL, the loss under its own name, the selection.

Where classes are drawn, the loss compares the student with a few draws of the teacher's distribution. It has a floor
above zero, which a student equal to its teacher would not get below, so it is no distance to the teacher.
"""

import numpy as np

from selkd.plugins import Metric
from selkd.reporting import formats, plots, words
from selkd.reporting.figure import Plot
from selkd.reporting.formats import dig
from selkd.reporting.run_files import RunFiles
from selkd.reporting.training_figures import draws_classes, floor, loss_is_kl

_FLAT = 0.02  # what varies by less than this share of itself is told in words


def training_plots(run: RunFiles) -> list[Plot]:
    """The plots of the training log; none where nothing was logged."""
    keys = {key for line in run.metrics for key, value in line.items() if value is not None}
    if "loss" not in keys:
        return []
    drawn = [_kl_plot(run, keys), *_loss_plots(run, keys), *_entropy_plots(run, keys)]
    share = plots.logged(run.metrics, "selected_share")
    if len(share.values) and np.ptp(share.values) > _FLAT * np.max(np.abs(share.values)):
        caption = "The part of all positions that the loss looked at, step by step."
        drawn.append(plots.step_plot("share", "Share selected", caption, "selected positions", [share], "share"))
    # How approximate scoring agrees with exact scoring; on held-out text, the student's agreement with its teacher.
    for key in sorted(key for key in keys if key.endswith("agreement") and not key.startswith("held_out"))[:1]:
        caption = "How many of the positions that exact scores would select the quick, approximate scores found."
        line, measured = plots.logged(run.metrics, key), "of the exact selection"
        drawn.append(plots.step_plot("agreement", "Approximate scoring", caption, measured, [line], "agreement"))
    return [plot for plot in drawn if plot is not None]


def _kl_plot(run: RunFiles, keys: set[str]) -> Plot | None:
    held_out = held_out_kl(run)
    key = "kl_nats" if "kl_nats" in keys else "kd_nats" if loss_is_kl(run.record) and "kd_nats" in keys else None
    if key is None and not len(held_out.steps):
        return None
    lines = [] if key is None else [plots.logged(run.metrics, key, "selected, training")]
    if key is None:
        caption = "Over every position of held-out text. This run logged no KL at the positions that it trained on."
    else:
        caption = "Over the selected positions of the training text"
        if key == "kl_nats" and draws_classes(run.record):
            caption += ", estimated from the drawn classes without bias"
        caption += "; beside it over every position of held-out text." if len(held_out.steps) else "."
    title = "KL to the teacher"
    return plots.step_plot("divergence", title, caption, "nats a position", [*lines, held_out])


def _loss_plots(run: RunFiles, keys: set[str]) -> list[Plot]:
    record = run.record
    if loss_is_kl(record) and "kd_nats" in keys:
        return []  # the plot of KL is that of the loss
    lines = [plots.logged(run.metrics, "loss", "loss")]
    caption = f"What training minimises: {words.criterion(dig(record, 'recipe'))} at the selected positions"
    temperature, weight = (dig(record, "recipe", "criterion", key) for key in ("temperature", "kd_weight"))
    if temperature not in (None, 1):
        caption += f", at temperature {temperature:g}"
    is_mixed = weight is not None and weight < 1
    if is_mixed:
        caption += f", mixed with {formats.fraction(1 - weight)} cross-entropy on the true next token"
    caption += "."
    if draws_classes(record):
        at = floor(run)
        caption += f" It compares the student with {words.classes(dig(record, 'recipe'))}, so it is no distance: "
        if dig(record, "recipe", "classes", "tail"):
            caption += "a student equal to its teacher would have zero, but so would others."
        elif at is None:
            caption += "a student equal to its teacher would not have a loss of zero."
        else:
            caption += f"a student equal to its teacher would have about {formats.nats(at)} nats here on average."
            if not is_mixed:
                level = np.array([at, at])
                lines.append(plots.Line(lines[0].steps[[0, -1]], level, "its floor", is_reference=True))
    return [plots.step_plot("loss", "Training loss", caption, "loss", lines)]


def _entropy_plots(run: RunFiles, keys: set[str]) -> list[Plot]:
    if not {"selected_entropy_nats", "mean_entropy_nats"} <= keys:
        return []
    unit = Metric.known()["student_entropy"].unit
    caption = (
        "Entropy is how undecided the student is about the next token: the wider apart the lines, the more the "
        "selection seeks out hard positions."
    )
    lines = [
        plots.logged(run.metrics, "selected_entropy_nats", "selected"),
        plots.logged(run.metrics, "mean_entropy_nats", "all positions", is_reference=True),
    ]
    return [plots.step_plot("entropy", "Where the student was unsure", caption, f"student's entropy, {unit}", lines)]


def held_out_kl(run: RunFiles) -> plots.Line:
    """KL to the teacher on held-out text, in nats: before, during and after training."""
    by_step = {0: dig(run.record, "fidelity", "before", "kl_nats")}
    by_step |= {
        line["step"]: line["held_out_kl_nats"] for line in run.metrics if line.get("held_out_kl_nats") is not None
    }
    if (steps := dig(run.record, "train", "steps")) is not None:
        by_step[steps] = dig(run.record, "fidelity", "after", "kl_nats")
    points = np.array([point for point in sorted(by_step.items()) if point[1] is not None], dtype=np.float64)
    steps, values = points.reshape(-1, 2).T
    return plots.Line(steps, values, "all, held-out", is_reference=True, is_marked=True)

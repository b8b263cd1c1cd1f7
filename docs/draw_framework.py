"""Draws framework.svg: ``python docs/draw_framework.py``. The numbers are made up; the shares are those of SE-KD 3X."""

from pathlib import Path

INK, GREY, PICKED, FRAME = "#1f2430", "#c9ced8", "#3f51b5", "#8b93a3"
SAMPLE_SCORES = (1.9, 2.4, 1.2, 3.1, 2.0, 1.6, 2.9, 0.9, 2.2, 1.4)
ENTROPIES = (0.4, 1.1, 2.2, 0.2, 3.9, 1.6, 0.7, 2.9, 0.3, 1.3, 4.4, 0.8, 1.9, 0.5, 3.4, 1.0, 0.2, 2.4, 4.1, 0.6)
CLASSES = (0.34, 0.22, 0.14, 0.09, 0.06, 0.045, 0.035, 0.025, 0.02, 0.015, 0.012, 0.01, 0.009, 0.007, 0.006, 0.006)
DRAWN = {0: 5, 1: 4, 2: 2, 3: 2, 5: 1, 8: 1, 11: 1}
STAGES = (
    ("1  score", "frozen initial student", "one number a sample"),
    ("2  cache", "teacher, once", "ids and counts on disk"),
    ("3  train", "student", "picks positions each step"),
    ("4  evaluate", "student and teacher", "held-out text, report"),
)


def text(x: float, y: float, words: str, size: int = 13, weight: str = "normal", anchor: str = "start") -> str:
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" font-weight="{weight}" text-anchor="{anchor}">{words}</text>'


def box(x: float, y: float, width: float, height: float, fill: str, stroke: str = "none") -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="2" fill="{fill}" stroke="{stroke}"/>'


def highest(scores: tuple[float, ...], count: int) -> set[int]:
    return set(sorted(range(len(scores)), key=lambda index: -scores[index])[:count])


def samples() -> list[str]:
    """Rows are samples; the fifth with the highest mean entropy is kept."""
    parts = [text(30, 40, "Samples", 17, "bold"), text(30, 60, "metric, share l: which texts")]
    kept = highest(SAMPLE_SCORES, 2)
    for row, score in enumerate(SAMPLE_SCORES):
        y, fill = 76 + row * 14, PICKED if row in kept else GREY
        parts += [box(30 + cell * 12, y, 10, 10, fill) for cell in range(14)]
        parts.append(box(206, y, score * 18, 10, fill))
    return [*parts, text(206, 232, "mean H(q)", 11)]


def positions() -> list[str]:
    """The positions of one sample; the fifth with the highest entropy is picked."""
    parts = [text(340, 40, "Positions", 17, "bold"), text(340, 60, "metric, policy, share k: which tokens")]
    picked = highest(ENTROPIES, 4)
    for index, entropy in enumerate(ENTROPIES):
        x, fill = 340 + index * 13, PICKED if index in picked else GREY
        parts += [box(x, 198 - entropy * 25, 10, entropy * 25, fill), box(x, 204, 10, 10, fill)]
    return [*parts, text(340, 232, "H(q) at each token of one sample", 11)]


def classes() -> list[str]:
    """The teacher's distribution at one position, and how often each class was drawn."""
    parts = [text(660, 40, "Classes", 17, "bold"), text(660, 60, "sampler, draws U: which vocabulary ids")]
    for index, share in enumerate(CLASSES):
        x, drawn = 660 + index * 16, DRAWN.get(index, 0)
        parts.append(box(x, 198 - share * 330, 12, share * 330, PICKED if drawn else GREY))
        if drawn:
            parts.append(text(x + 6, 214, f"{drawn}", 11, anchor="middle"))
    return [*parts, text(660, 232, "p at one position; counts of 16 draws", 11)]


def criterion() -> list[str]:
    return [
        box(30, 254, 900, 66, "#eef0fa"),
        text(46, 280, "Criterion", 17, "bold"),
        text(46, 302, "how to compare"),
        text(200, 292, "loss = mean over samples of  Σ a · [ λ · D(p, q) + (1 - λ) · (-log q(y)) ]", 16),
        text(760, 292, "a: what the policy gives", 12),
    ]


def flow() -> list[str]:
    parts = [text(30, 356, "What runs when", 17, "bold")]
    for index, (name, who, what) in enumerate(STAGES):
        x = 30 + index * 232
        parts += [
            box(x, 372, 204, 84, "#ffffff", FRAME),
            text(x + 14, 396, name, 15, "bold"),
            text(x + 14, 418, who),
            text(x + 14, 438, what, 12),
        ]
        if index:
            parts.append(
                f'<path d="M{x - 26} 414 h18 m-6 -5 l6 5 l-6 5" fill="none" stroke="{INK}" stroke-width="1.5"/>'
            )
    return parts


def drawing() -> str:
    parts = [*samples(), *positions(), *classes(), *criterion(), *flow()]
    label = "Four choices: samples, positions, classes, criterion. Below, the stages: score, cache, train, evaluate."
    return "\n".join(
        [
            '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 960 476" role="img" '
            f'font-family="system-ui, sans-serif" fill="{INK}" aria-label="{label}">',
            box(0, 0, 960, 476, "#fbfbfd"),
            *parts,
            "</svg>\n",
        ]
    )


if __name__ == "__main__":
    Path(__file__).with_name("framework.svg").write_text(drawing(), encoding="utf-8")

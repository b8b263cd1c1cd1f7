"""The terminal output of ``selkd tokens``: one block a policy, coloured by the metric.

Tokens are untrusted text. They are printed without control characters (``visible``), and as ``rich.text.Text``, which
reads no markup.
"""

from rich.console import Console
from rich.text import Text

from selkd.reporting.coloured_text import HEAVY, LIGHT, PLAIN, WEIGHTS, TokenView, marked_part
from selkd.tokens.views import TextView

# From cold to hot, all of one brightness, to be readable on dark and on light backgrounds.
HEAT = ("#7d7d7d", "#6a7d9b", "#5578bd", "#6b6bd6", "#9160d2", "#b353b3", "#cf4a80", "#dd4444")
_MARKS = {LIGHT: "underline", PLAIN: "reverse", HEAVY: "bold reverse underline"}


def print_policies(console: Console, view: TextView) -> None:
    """The title, the legend, and a block for each policy."""
    coloured = has_colour(console)
    title = Text.assemble((view.model, "bold"), f", {view.size}, coloured by {view.metric}")
    if view.teacher is not None:
        title.append(f" (teacher: {view.teacher})")
    _print(console, title)
    _print(console, _legend(view, coloured, console.encoding))
    for policy in view.policies:
        _print(console, Text())
        _print(console, Text.assemble((policy.label, "bold"), f"  {policy.count}: {policy.rule}"))
        for note in policy.notes:
            _print(console, Text(note, style="dim"))
        for number, tokens in enumerate(policy.samples, start=1):
            _print(console, Text())
            if len(policy.samples) > 1:
                heading = f"sample {number}: {policy.counts[number - 1]}"
                _print(console, Text(heading, style="dim"))
            _print(console, _block(tokens, coloured, console.encoding))


def has_colour(console: Console) -> bool:
    """Whether the output has colours: not with NO_COLOR, on a dumb terminal, in a pipe or in a file."""
    return console.color_system is not None and not console.no_color


def _print(console: Console, text: Text) -> None:
    # In a pipe or a file, lines are not wrapped.
    console.print(text, soft_wrap=not console.is_terminal, highlight=False)


def _legend(view: TextView, coloured: bool, encoding: str) -> Text:
    """The scale and the marks that occur. Without colours, a low weight has the mark of a plain one."""
    legend = Text(f"{view.low} ")
    if coloured:
        for colour in HEAT:
            legend.append("██", style=colour)
    else:
        legend.append("to")
    legend.append(f" {view.high} and above    ")
    for number, weight in enumerate(weight for weight in WEIGHTS if weight in view.weights | {PLAIN}):
        comma = ", " if number else ""
        if coloured:
            legend.append(comma).append(WEIGHTS[weight], style=f"{HEAT[-1]} {_MARKS[weight]}")
        elif weight != LIGHT:
            legend.append(comma + _bracketed(WEIGHTS[weight], weight, encoding))
    return legend


def _block(tokens: list[TokenView], coloured: bool, encoding: str) -> Text:
    block = Text()
    for token in tokens:
        style = "dim" if token.heat is None else HEAT[token.heat]
        if not token.selected:
            block.append(token.text, style=style)
            continue
        before, core, after = marked_part(token.text)
        if coloured:
            block.append(before).append(core, style=f"{style} {_MARKS[token.weight]}").append(after)
        else:
            block.append(before + _bracketed(core, token.weight, encoding) + after)
    return block


def _bracketed(text: str, weight: int, encoding: str) -> str:
    """The text between «», which source code seldom has, or [] if the encoding lacks them; twice for a high weight."""
    left, right = "«»"
    try:
        "«»".encode(encoding)
    except (LookupError, UnicodeEncodeError):
        left, right = "[]"
    times = 2 if weight == HEAVY else 1
    return left * times + text + right * times

"""What policies pick of a text as one HTML file that needs nothing else, neither a script nor the network."""

from pathlib import Path

from selkd.errors import InputError
from selkd.files import write_whole
from selkd.reporting.coloured_text import HEAT_LEVELS, HEAVY, LIGHT, WEIGHTS, marked_part
from selkd.tokens.views import TextView


def check_page_path(page: Path) -> None:
    """Raises InputError where no page can be written, before anything is computed."""
    if page.is_dir():
        raise InputError(f"--html {page}: this is a folder; give a file's name, as in --html tokens.html.")
    if not page.absolute().parent.is_dir():
        raise InputError(f"--html {page}: there is no folder {page.parent}; make it, or give another file.")


def write_tokens_page(page: Path, view: TextView) -> None:
    """Write the page, every value escaped; a file of that name is replaced.

    Raises:
        RunError: it can't be written.
    """
    from selkd.reporting.page import template  # late: it brings matplotlib, and without a page nothing is drawn

    html = template("tokens.html.j2").render(
        compared=view,
        text={"levels": HEAT_LEVELS},  # what report.css reads
        classes={HEAVY: "heavy", LIGHT: "light"},
        words=WEIGHTS,
        marked_part=marked_part,
    )
    write_whole(page, html)

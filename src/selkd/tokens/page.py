"""What policies pick of a text as one HTML file that needs nothing else, neither a script nor the network."""

import os
from pathlib import Path

import jinja2

from selkd.errors import InputError, RunError
from selkd.reporting.coloured_text import HEAT_LEVELS, HEAVY, LIGHT, WEIGHTS, marked_part
from selkd.tokens.views import Comparison


def check_page_path(page: Path) -> None:
    """Raises InputError where no page can be written, before anything is computed."""
    if page.is_dir():
        raise InputError(f"--html {page}: this is a folder; give a file's name, as in --html tokens.html.")
    if not page.absolute().parent.is_dir():
        raise InputError(f"--html {page}: there is no folder {page.parent}; make it, or give another file.")


def write_tokens_page(page: Path, compared: Comparison) -> None:
    """Write the page, whole or not at all; a file of that name is replaced.

    Raises RunError where it can't be written.
    """
    text = render(compared)
    unfinished = page.with_name(f".{page.name}.{os.getpid()}.tmp")
    try:
        unfinished.write_bytes(text.encode("utf-8", errors="replace"))
        unfinished.replace(page)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise RunError(
            f"could not write {page}: {error.strerror}. Allow writing there, or give another file."
        ) from error


def render(compared: Comparison) -> str:
    """The page's HTML; every value is escaped."""
    # Not select_autoescape: it goes by the ending, and .j2 would switch escaping off.
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("selkd.reporting"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["marked_part"] = marked_part
    # ``text`` is what report.css reads.
    return environment.get_template("tokens.html.j2").render(
        compared=compared, text={"levels": HEAT_LEVELS}, classes={HEAVY: "heavy", LIGHT: "light"}, words=WEIGHTS
    )

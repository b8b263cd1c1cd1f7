"""Fills the templates of pages and cards, and writes the files."""

import re
from functools import cache
from inspect import isfunction
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from selkd.files import write_whole
from selkd.reporting import formats
from selkd.reporting.coloured_text import HEAT_LEVELS


def render(template: str, **values: Any) -> str:
    """Fill a template. In HTML every value is escaped but for what passes through the filter ``plot``."""
    return _environment().get_template(template).render(values)


def write_text(path: Path, text: str) -> Path:
    """Write a file whole or not at all, and return its path. Raise RunError where it can't be written."""
    # A lone surrogate in a name can't be UTF-8: a question mark stands for it.
    write_whole(path, text.encode("utf-8", errors="replace").decode("utf-8"))
    return path


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("selkd.reporting"),
        # Not select_autoescape: it goes by the ending, and .j2 would switch escaping off. Markdown has its own filters.
        autoescape=lambda name: name is None or not name.endswith(".md.j2"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # Every format is a filter. ``count`` replaces Jinja's own, which is also called ``length``.
    environment.filters |= {name: form for name, form in vars(formats).items() if isfunction(form)}
    # Only selkd's own plots pass unescaped.
    environment.filters |= {"plot": Markup, "markdown": markdown, "markdown_code": markdown_code}
    environment.globals |= {"dash": formats.DASH, "text": {"levels": HEAT_LEVELS}}
    return environment


def markdown(text: object) -> str:
    """Put a text on one line and escape what Markdown and HTML would interpret."""
    return re.sub(r"([\\`*_\[\]<>#|])", r"\\\1", " ".join(str(text).split()))


def markdown_code(text: str) -> str:
    """Show a text as code within a line of Markdown."""
    return "`" + re.sub(r"[`\r\n]", "'", text) + "`"

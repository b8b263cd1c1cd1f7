"""A real browser for the tests: headless Chromium, driven by Playwright."""

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytest

PHONE, DESKTOP = 390, 1280


def chromium() -> str:
    """Where the browser is; skips the test where there is none."""
    for name in ("chromium", "chromium-browser", "google-chrome", "chrome"):
        if found := shutil.which(name):
            return found
    pytest.skip("no Chromium on PATH: install one (Debian: apt-get install chromium)")


@dataclass
class View:
    """What a browser found in a page at one width and colour scheme."""

    width: int
    console: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)  # those that the page's own policy stopped
    overflow: int = 0
    smallest_text: float = 0.0
    background: str = ""
    text: str = ""
    title: str = ""
    png: bytes = b""


# The height of a letter box of each text in a plot, as the reader sees it: it shrinks with the plot.
_SMALLEST = """() => Math.min(...[...document.querySelectorAll('svg text')].map(text => {
  const scale = text.getScreenCTM();
  return parseFloat(getComputedStyle(text).fontSize) * Math.hypot(scale.a, scale.b);
}))"""


def _note_refused(request: Any, view: View) -> None:
    if request.failure in ("csp", "net::ERR_BLOCKED_BY_CSP"):
        view.refused.append(request.url)


class Look(NamedTuple):
    """A page at one width, in the colour scheme "light" or "dark", with or without scripts."""

    page: Path
    width: int
    scheme: Literal["light", "dark"]
    scripts: bool = True


def views(*looks: Look) -> list[View]:
    """What one browser found at each look."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Without its sandbox, which root in a container may not use; the page is our own.
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        try:
            return [_view(browser, look) for look in looks]
        finally:
            browser.close()


def _view(browser: Any, look: Look) -> View:
    context = browser.new_context(
        viewport={"width": look.width, "height": 900}, color_scheme=look.scheme, java_script_enabled=look.scripts
    )
    tab, view = context.new_page(), View(look.width)
    tab.on("console", lambda message: view.console.append(message.text))
    tab.on("pageerror", lambda error: view.console.append(str(error)))
    tab.on("request", lambda request: view.requests.append(request.url))
    tab.on("requestfailed", lambda request: _note_refused(request, view))
    tab.goto(look.page.as_uri())
    view.overflow = tab.evaluate("document.documentElement.scrollWidth - innerWidth")
    view.smallest_text = tab.evaluate(_SMALLEST)
    view.background = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    view.title = tab.title()
    view.text = tab.inner_text("body")
    view.png = tab.screenshot(full_page=True)
    context.close()
    return view

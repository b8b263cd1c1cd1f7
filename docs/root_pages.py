"""A hook of MkDocs: CONTRIBUTING.md and CHANGELOG.md of the repository's root as pages of the site."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages. Their links are made those of docs/; what is no page of the site is named without a link."""
    for source, page in PAGES.items():
        text = re.sub(r"\[([^\]]+)\]\(([^)]+)\)", _linked, (ROOT / source).read_text(encoding="utf-8"))
        files.append(File.generated(config, page, content=text))
    return files


def _linked(link: re.Match[str]) -> str:
    text, target = link.groups()
    if target.startswith("https://"):
        return link[0]
    if target.startswith("docs/"):
        return f"[{text}]({target.removeprefix('docs/')})"
    return f"[{text}]({PAGES[target]})" if target in PAGES else text

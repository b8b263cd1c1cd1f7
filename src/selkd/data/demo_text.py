"""The text that comes with every Python: the language's manual, then the standard library's docstrings."""

import ast
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

import xxhash

from selkd.data.text_files import sections

_TEST_FOLDERS = {"test", "tests", "idle_test"}
_HEADING_RULE = re.compile(r"^([^\w\s])\1+\n", re.MULTILINE)  # the line under a heading, which shows its level
_Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def demo_documents() -> Iterator[str]:
    """The manual's topics by name, in sections of about 10,000 characters, then one document of docstrings a module.

    A topic that another topic contains (``with`` is a section of ``compound``) is left out, so that held-out text is
    never training text: its lines stand there, under headings of another level. The text differs a little between
    Python versions. Modules are read with ``ast``, not imported.
    """
    for text in _without_nested([topics[name] for name in sorted(topics)]):
        yield from sections(text.splitlines(keepends=True))
    for module, path in _stdlib_modules():
        if text := _docstrings(module, path.read_bytes()):
            yield text


def _without_nested(texts: list[str]) -> list[str]:
    """The texts that no other contains, whatever the level of its headings; the first of those that are the same."""
    plain = [_HEADING_RULE.sub("", text) for text in texts]
    bodies = [text.strip().partition("\n\n")[2] for text in plain]  # without the title

    def is_nested(inner: int) -> bool:
        around = (outer for outer in range(len(texts)) if outer != inner and bodies[inner] in plain[outer])
        return any(outer < inner or bodies[outer] not in plain[inner] for outer in around)

    return [text for number, text in enumerate(texts) if not is_nested(number)]


def demo_digest() -> str:
    """xxh3_128 (hex) of everything that ``demo_documents`` reads."""
    digest = xxhash.xxh3_128()
    for name in sorted(topics):
        digest.update(topics[name].encode() + b"\0")
    for module, path in _stdlib_modules():
        digest.update(module.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _stdlib_modules() -> Iterator[tuple[str, Path]]:
    root = Path(sysconfig.get_path("stdlib"))
    for name in sorted(sys.stdlib_module_names):
        for path in [root / f"{name}.py", *sorted((root / name).rglob("*.py"))]:
            parts = path.relative_to(root).with_suffix("").parts
            if path.is_file() and not _TEST_FOLDERS.intersection(parts):
                yield ".".join(parts).removesuffix(".__init__"), path


def _docstrings(module: str, source: bytes) -> str:
    """The module's docstring and those of its classes and functions, each under its name, in the source's order."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some old modules contain invalid escapes
        tree = ast.parse(source)
    return "\n\n".join(f"{name}\n\n{docstring}" for name, docstring in _named_docstrings(module, tree))


def _named_docstrings(name: str, node: ast.AST) -> Iterator[tuple[str, str]]:
    if isinstance(node, ast.Module | _Definition) and (docstring := ast.get_docstring(node)):
        yield name, docstring
    for child in ast.iter_child_nodes(node):
        inner = f"{name}.{child.name}" if isinstance(child, _Definition) else name
        yield from _named_docstrings(inner, child)

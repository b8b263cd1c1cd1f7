"""Recipes in files: the named recipes of the package, YAML files, and ``--set`` overrides."""

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from selkd.errors import InputError, cut, nearest, shown
from selkd.files import possible_path
from selkd.own_code import only_read
from selkd.recipe.part import parse_part
from selkd.recipe.recipe import Recipe
from selkd.recipe.yaml_text import LARGEST_TEXT, dump_yaml, parse_yaml

_PLURAL = {"recipe": "recipes", "study": "studies"}


def named_recipes() -> dict[str, str]:
    """Name -> YAML text of every recipe that comes with selkd."""
    return named_texts("recipes")


def named_texts(folder: str) -> dict[str, str]:
    """Name -> YAML text of every file in one of the package's folders of data."""
    files = sorted((resources.files("selkd") / folder).iterdir(), key=lambda file: file.name)
    return {f.name.removesuffix(".yaml"): f.read_text(encoding="utf-8") for f in files if f.name.endswith(".yaml")}


def load_recipe(source: str | Path, overrides: list[str] | None = None) -> Recipe:
    """The checked recipe of that name or file, with ``key.path=value`` overrides.

    Raises:
        InputError: there is no such recipe, it is not readable as YAML, or ``Recipe`` refuses its content.
    """
    default, content = _named_content(source)
    for override in overrides or []:
        key, value = parse_override(override)
        put_key(content, key, value, f"--set {cut(override)}")
    recipe = parse_part(Recipe, content)
    if recipe.name is None:
        recipe._settle(name=default)  # not among the keys that were given: a run is called after its folder then
    return recipe


def stored_recipe(path: Path) -> Recipe:
    """The resolved recipe of a run that is only looked at. Its own parts are not imported: it may be anybody's.

    Raises:
        InputError: as ``load_recipe``.
    """
    with only_read():
        return load_recipe(path)


def recipe_content(source: str | Path) -> dict[str, Any]:
    """The unchecked content of the recipe of that name or file, with its ``name``.

    Raises:
        InputError: there is no such recipe, or it is not readable as YAML.
    """
    name, content = _named_content(source)
    return {"name": name, **content}


def _named_content(source: str | Path) -> tuple[str, dict[str, Any]]:
    name, text = read_text(source, named_recipes(), "recipe")
    return name, read_mapping(text, str(source), "a recipe")


def read_mapping(text: str, source: str, what: str) -> dict[str, Any]:
    """The mapping in a YAML text.

    Raises:
        InputError: the text is no mapping, or ``parse_yaml`` refuses it; the message names ``source`` and the line.
    """
    try:
        content = parse_yaml(text)
    except ValueError as error:
        raise InputError(f"{source}: not readable as YAML: {error}.") from None
    if not isinstance(content, dict):
        raise InputError(f"{source}: {what} is a mapping of keys to values, but this is {type(content).__name__}.")
    return content


def to_yaml(recipe: Recipe) -> str:
    """The resolved recipe as YAML; ``load_recipe`` reads it back to an equal one."""
    return dump_yaml(recipe.resolved())


def read_text(source: str | Path, named: Mapping[str, str], what: str) -> tuple[str, str]:
    """The name and the YAML text of one of the ``named`` or of a file; ``what`` it is, a recipe or a study.

    Raises:
        InputError: neither of both, or a file that is no text.
    """
    if str(source) in named:
        return str(source), named[str(source)]
    if "://" in str(source):
        raise InputError(
            f"{source}: a {what} is not fetched from an address, as it can name code to run. Download it, read it, and "
            "give the file."
        )
    try:
        path = Path(possible_path(str(source)))
    except ValueError as error:
        raise InputError(f"{what} {error}.") from None
    if not path.is_file():
        raise InputError(
            f"{cut(source)}: neither a named {what} nor a file. Named {_PLURAL[what]}: {', '.join(named)}."
            f"{nearest(source, named)}"
        )
    try:
        with path.open(encoding="utf-8-sig") as file:
            return path.stem, file.read(LARGEST_TEXT + 1)  # enough to be refused
    except UnicodeDecodeError:
        raise InputError(f"{source}: not a text file; a {what} is YAML in UTF-8.") from None
    except OSError as error:
        raise InputError(f"{source}: can't be read ({error.strerror}).") from None


def parse_override(override: str) -> tuple[str, Any]:
    """Key and value of ``key.path=value``. Raises InputError for another form."""
    key, equals, text = override.partition("=")
    if not equals or not all(key.strip().split(".")):
        raise InputError(f"--set {cut(override)}: expected key.path=value, as in --set positions.fraction=0.1.")
    try:
        return key.strip(), parse_yaml(text)
    except ValueError as error:
        raise InputError(f"--set {cut(override)}: the value is not readable as YAML: {error}.") from None


def put_key(content: dict[str, Any], key: str, value: Any, source: str) -> None:
    """Set ``key.path`` of a recipe's content. Raises InputError, which names ``source``, below what is no mapping."""
    *parts, last = key.split(".")
    for part in parts:
        if content.get(part) is None:
            content[part] = {}
        content = content[part]
        if not isinstance(content, dict):
            raise InputError(f"{source}: {part} is {shown(content)}, which has no keys of its own.")
    content[last] = value

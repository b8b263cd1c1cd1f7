"""YAML as recipes and studies are written in it: mappings, lists, texts and numbers; all else is refused with its line.

PyYAML alone would take much that nobody means: a date, ``1:30`` for 90, ``010`` for 8, ``no`` for false, the last of
two equal keys. It reads ``1e-5`` as a text. And it fails without a word about the place on what looks like a number and
is none.
"""

import re
from collections.abc import Iterable
from typing import Any

import yaml
from yaml.constructor import ConstructorError
from yaml.nodes import CollectionNode, MappingNode, Node, ScalarNode

LARGEST_TEXT = 256 * 1024  # characters; a longer one would take seconds to be refused
_DEEPEST = 32  # levels, with what aliases stand for
_MOST_NODES = 100_000  # with what aliases stand for
_BITS = 64  # of an integer
_PREFIX = "tag:yaml.org,2002:"
_READ = ("str", "int", "float", "bool", "null", "seq", "map")
_BOOLEAN = re.compile(r"(true|True|TRUE|false|False|FALSE)\Z")
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F_]+)\Z")
_FLOAT = re.compile(
    r"([-+]?[0-9][0-9_]*\.[0-9_]*([eE][-+]?[0-9]+)?|[-+]?\.[0-9][0-9_]*([eE][-+]?[0-9]+)?"
    r"|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))\Z"
)


def parse_yaml(text: str) -> Any:
    """The plain data in a YAML text.

    Raises:
        ValueError: the text is too long, no YAML, or holds what a recipe has no use for; the message has the line.
    """
    if len(text) > LARGEST_TEXT:
        raise ValueError(f"{len(text):,} characters, of which at most {LARGEST_TEXT:,} are read")
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
        said = ", ".join(part for part in (error.context, error.problem) if part)
        raise ValueError(f"{where}{said}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ValueError(f"line {line}: the character #x{error.character:04x} is not allowed") from None


def dump_yaml(content: Any) -> str:
    """Plain data as YAML, which ``parse_yaml`` reads back to the same."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Loader(yaml.SafeLoader):
    """Reads the tags of ``_READ`` alone; no key twice, no tree that is too deep, too large or endless."""

    _depth = 0

    def compose_node(self, parent: Node | None, index: int) -> Node | None:
        self._depth += 1
        if self._depth > _DEEPEST:
            raise _fault(f"nested deeper than {_DEEPEST} levels", self.peek_event())
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def get_single_node(self) -> Node | None:
        node = super().get_single_node()
        if node is not None:
            _require_finite(node, {})
        return node

    def construct_object(self, node: Node, deep: bool = False) -> Any:
        kind = node.tag.removeprefix(_PREFIX)
        if kind not in _READ:
            raise _fault(f"the tag {kind!r} is not read; known are {', '.join(_READ)}", node)
        try:
            value = super().construct_object(node, deep)
        except (ValueError, KeyError, IndexError):  # not of MarkedYAMLError's kind: Python refused the number
            raise _fault(f"{_shown(node)} can't be read as {kind}", node) from None
        if isinstance(value, int) and value.bit_length() > _BITS:
            raise _fault(f"{_shown(node)} has more than {_BITS} bits", node)
        return value

    def construct_mapping(self, node: MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in _pairs(node) if isinstance(node, MappingNode) else ():
            if not isinstance(key_node, ScalarNode) or key_node.tag != f"{_PREFIX}str":
                raise _fault(f"a key is a text, but this is {_shown(key_node)}", key_node)
            if key_node.value in seen:
                raise _fault(f"the key {key_node.value!r} stands twice", key_node)
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes a text that ``_Loader`` would read as a number."""


def _require_finite(node: Node, measured: dict[int, tuple[int, int] | None]) -> tuple[int, int]:
    """How many nodes, and how many levels, a tree has once its aliases are replaced by what they stand for.

    Args:
        measured: the answers for the nodes seen before, by their ids; None while a node is open.
    """
    known = measured.get(id(node), ())
    if known is None:
        raise _fault("an alias stands for what it is itself a part of", node)
    if known:
        return known
    measured[id(node)] = None
    size, height = 1, 0
    for child in _children(node):
        its_size, its_height = _require_finite(child, measured)
        size, height = size + its_size, max(height, its_height)
    if size > _MOST_NODES or height >= _DEEPEST:
        raise _fault(
            f"with its aliases this is more than {_MOST_NODES:,} values, or deeper than {_DEEPEST} levels", node
        )
    measured[id(node)] = size, height + 1
    return size, height + 1


def _children(node: Node) -> Iterable[Node]:
    if isinstance(node, MappingNode):
        return [child for pair in _pairs(node) for child in pair]
    return node.value if isinstance(node, CollectionNode) else ()


def _pairs(node: MappingNode) -> list[tuple[Node, Node]]:
    pairs: list[tuple[Node, Node]] = node.value
    return pairs


def _shown(node: Node) -> str:
    if not isinstance(node, ScalarNode):
        return "a mapping" if isinstance(node, MappingNode) else "a list"
    return repr(node.value if len(node.value) <= 40 else f"{node.value[:40]}…")


def _fault(problem: str, place: Any) -> ConstructorError:
    return ConstructorError(None, None, problem, place.start_mark)


def _set_resolvers(reader: Any, left_out: Iterable[str]) -> None:
    """Give a loader or dumper the resolvers of its own that ``_BOOLEAN``, ``_INTEGER`` and ``_FLOAT`` are."""
    tags = {_PREFIX + kind for kind in left_out}
    reader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in tags]
        for first, resolvers in reader.yaml_implicit_resolvers.items()
    }
    reader.add_implicit_resolver(f"{_PREFIX}bool", _BOOLEAN, list("tTfF"))
    reader.add_implicit_resolver(f"{_PREFIX}float", _FLOAT, list("-+.0123456789"))
    reader.add_implicit_resolver(f"{_PREFIX}int", _INTEGER, list("-+0123456789"))


_set_resolvers(_Loader, left_out=("timestamp", "merge", "value", "bool", "int", "float"))
_set_resolvers(_Dumper, left_out=())  # it goes on to quote what other readers of YAML take for a number or a date

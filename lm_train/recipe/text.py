"""YAML as a person means it: numbers are numbers, nothing is dropped in silence, and every value knows its line.

PyYAML's own loader follows YAML 1.1: ``1e-4`` is a string, ``no`` is false, ``12:30:00`` is 45000, ``0123`` is 83, and of
two equal keys the last one wins without a word. Here plain scalars follow the YAML 1.2 core schema, and duplicate keys,
tags, anchors and aliases are refused.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from lm_train.errors import UsageError

Path = tuple[str | int, ...]

_INT = re.compile(r"[-+]?(0|[1-9][0-9]*(_[0-9]+)*)")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*([eE][-+]?[0-9]+)?|[eE][-+]?[0-9]+))")
_SPECIAL = {"null": None, "~": None, "": None, "true": True, "false": False, "True": True, "False": False, "None": None}
_MAX_DIGITS = 400
_MAX_DEPTH = 12
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class WrittenInt(int):
    """An integer that remembers how it was written, for the keys that take text (`name=1_000`) and for messages."""

    text: str


class WrittenFloat(float):
    """As WrittenInt: ``name=12e4567`` is a name, and no message says inf where 1e400 was written."""

    text: str


def parse_scalar(text: str) -> Any:
    """The value of one plain scalar: ``4`` is an int, ``1e-4`` a float, ``null`` is None, anything else a string."""
    if text in _SPECIAL:
        return _SPECIAL[text]
    number: WrittenInt | WrittenFloat
    if len(text) > _MAX_DIGITS:  # Python refuses to read an integer of thousands of digits
        return text
    if _INT.fullmatch(text):
        number = WrittenInt(text)
    elif _FLOAT.fullmatch(text):
        number = WrittenFloat(text)
    else:
        return text
    number.text = text
    return number


def parse_word_value(text: str) -> Any:
    """The value of a ``key=value`` word: a list or map in YAML's flow style, a quoted string, or a plain scalar."""
    if text[:1] in "[{\"'":
        return parse_yaml(text, where="")[0]
    return parse_scalar(text)


def parse_yaml(text: str, where: str) -> tuple[Any, dict[Path, int]]:
    """Parses one YAML document.

    Args:
        text: the document.
        where: the file's name for messages; empty for text from the command line.

    Returns:
        The value, and the line (from 1) of every key in it by its path.

    Raises:
        UsageError: naming file and line of the first fault.
    """
    try:
        _refuse_what_is_not_plain(text, where)  # before composing, which recurses in C
        node = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = min(mark.line, max(0, len(text.splitlines()) - 1)) if mark else 0
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        if re.match(r" *\t", "".join(text.splitlines()[line : line + 1])):
            problem = "a tab indents this line; use spaces"
        raise UsageError(f"{_at(where, line + 1)}not YAML: {problem}") from None
    lines: dict[Path, int] = {}
    return (None if node is None else _build(node, (), lines, where)), lines


def _refuse_what_is_not_plain(text: str, where: str) -> None:
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        line = event.start_mark.line + 1 if event.start_mark else 1
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise UsageError(f"{_at(where, line)}anchors (&) and aliases (*) are not allowed; write the value out")
        tag = getattr(event, "tag", None)
        if tag:
            raise UsageError(f"{_at(where, line)}tags ({tag}) are not allowed; write a plain value")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _MAX_DEPTH:
            raise UsageError(f"{_at(where, line)}nested more than {_MAX_DEPTH} deep")


def _at(where: str, line: int) -> str:
    return f"{where}:{line}: " if where else ""


def _build(node: yaml.Node, path: Path, lines: dict[Path, int], where: str) -> Any:
    if isinstance(node, yaml.ScalarNode):
        return node.value if node.style else parse_scalar(node.value)  # plain scalars have no style
    if isinstance(node, yaml.SequenceNode):
        return [_build(child, (*path, i), lines, where) for i, child in enumerate(node.value)]
    result: dict[str, Any] = {}
    for key_node, child in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise UsageError(f"{_at(where, line)}a key must be a plain name")
        key = key_node.value
        if key in result:
            first = f", first on line {lines[(*path, key)]}" if where else ""
            raise UsageError(f"{_at(where, line)}duplicate key {key!r}{first}; keep one")
        lines[(*path, key)] = line
        result[key] = _build(child, (*path, key), lines, where)
    return result

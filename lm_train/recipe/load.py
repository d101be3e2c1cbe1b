"""From the words of a command line to a frozen Recipe, or to every problem of that command at once.

Order of precedence, lowest first: typed defaults, the recipe's `base:` chain, the recipe's file, `debug=true`, the words.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import ValidationError

from lm_train.errors import UsageError
from lm_train.recipe import checks
from lm_train.recipe.explain import kinds_of, nearest, section_class, unknown_key, wrong_value
from lm_train.recipe.sections import SECTIONS, Recipe
from lm_train.recipe.text import parse_word_value, parse_yaml

Raw = dict[str, Any]
KeyPath = tuple[str, ...]
_PACKAGE = Path(__file__).resolve().parent.parent
RUN_WORDS = ("resume", "dry_run")
"""Words about one start of a run; they are not part of what the run is."""


class _Source(NamedTuple):
    """Where each key of a raw recipe was written, as `file:line`; keys from the command line are absent."""

    lines: dict[KeyPath, str]


@cache
def shipped_recipes() -> dict[str, Path]:
    """Name and file of every shipped recipe: inside an installed package, or beside it in a checkout."""
    for folder in (_PACKAGE / "recipes", _PACKAGE.parent / "recipes"):
        files = sorted(folder.glob("*.yaml"))
        if files:
            return {file.stem: file for file in files}
    return {}


def load(words: Sequence[str]) -> Recipe:
    """The recipe that the words of a command line ask for.

    Args:
        words: `recipe=NAME|PATH`, `section.key=value`, `section=KIND`, `section={...}`, `name=...`, `seed=...`, ...

    Raises:
        UsageError: with every problem of the command, one line each.
    """
    problems: list[str] = []
    given = dict(_parse_words(words, problems))
    raw: Raw = {}
    source = _Source({})
    asked = given.pop(("recipe",), None)
    if asked is None:
        problems.append(f"which recipe? Give recipe=NAME; there are {', '.join(shipped_recipes())}")
    else:
        try:
            raw = _read_chain(str(asked), Path.cwd(), source, ())
            raw.setdefault("recipe", _title(str(asked)))
        except UsageError as error:
            problems += error.problems
    raw.setdefault("recipe", "none")
    try:
        if given.get(("debug",), raw.get("debug")) is True:
            _merge(raw, checks.debug_settings(raw))
        _apply_words(raw, given, problems)
        for path in [p for p in source.lines if any(p[: len(word)] == word for word in given)]:
            del source.lines[path]
    except UsageError as error:
        problems += error.problems
    recipe = _validate(raw, source, problems, usable=asked is not None)
    if problems or recipe is None:
        raise UsageError(problems)
    return recipe


def dump(recipe: Recipe) -> str:
    """The resolved recipe as YAML that `load` reads back to an equal recipe (but for `resume` and `dry_run`)."""
    values = recipe.model_dump(mode="json", exclude=set(RUN_WORDS))
    if values["name"] is None:
        del values["name"]
    for section in SECTIONS:
        if "kind" in values[section]:
            values[section] = {"kind": values[section].pop("kind"), **values[section]}
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120)


def _parse_words(words: Sequence[str], problems: list[str]) -> Iterator[tuple[KeyPath, Any]]:
    seen: set[KeyPath] = set()
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key.strip():
            hint = f"; did you mean {key.lstrip('-')}=VALUE?" if key.strip("-").replace(".", "").isidentifier() else ""
            problems.append(f"{word!r}: expected key=value{hint}")
            continue
        if key != key.strip() or key.startswith("-"):
            problems.append(f"{word!r}: write {key.strip().lstrip('-')}={text.strip()} without dashes or spaces")
            continue
        path = tuple(key.split("."))
        if path in seen:
            problems.append(f"{key}: given twice; keep one")
            continue
        seen.add(path)
        if text == "":
            problems.append(f"{key}: no value after =; write {key}=null to unset it")
            continue
        try:
            yield path, parse_word_value(text)
        except UsageError as error:
            problems.append(f"{key}: {error} in {text!r}")


def _title(asked: str) -> str:
    return Path(asked).stem if _is_path(asked) else asked


def _is_path(asked: str) -> bool:
    return "/" in asked or asked.endswith((".yaml", ".yml"))


def _read_chain(asked: str, folder: Path, source: _Source, seen: tuple[Path, ...]) -> Raw:
    """The recipe `asked`, laid over its base, over its base's base, and so on."""
    file = _find(asked, folder)
    if file in seen:
        raise UsageError(f"{file}: base: leads back to itself: {' -> '.join(f.name for f in (*seen, file))}")
    where = _shown(file)
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UsageError(f"{where}: cannot read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{where}: not UTF-8 at byte {error.start}") from None
    raw, lines = parse_yaml(text, where)
    if raw is None:
        raise UsageError(f"{where}: empty; a recipe has sections such as model: and data:")
    if not isinstance(raw, dict):
        raise UsageError(f"{where}: expected sections such as model: and data:, got {type(raw).__name__}")
    base = raw.pop("base", None)
    result = _read_chain(str(base), file.parent, source, (*seen, file)) if base is not None else {}
    result.pop("recipe", None)
    source.lines.update({tuple(map(str, path)): f"{where}:{line}" for path, line in lines.items()})
    _merge(result, raw)
    return result


def _find(asked: str, folder: Path) -> Path:
    if not _is_path(asked):
        if asked in shipped_recipes():
            return shipped_recipes()[asked].resolve()
        near = nearest(asked, shipped_recipes())
        did = f"did you mean {near}?" if near else f"there are {', '.join(shipped_recipes())}"
        raise UsageError(f"recipe={asked}: no such recipe; {did}")
    file = Path(os.path.expanduser(asked))
    file = file if file.is_absolute() else folder / file
    if "\0" in asked or not file.is_file():
        raise UsageError(f"recipe={asked!r}: no such file{checks.near_path(file)}")
    return file.resolve()


def _shown(file: Path) -> str:
    try:
        return str(file.relative_to(Path.cwd()))
    except ValueError:
        return str(file)


def _merge(raw: Raw, over: Mapping[str, Any]) -> None:
    """Lays `over` onto `raw`: a section's keys one by one, everything else whole."""
    for key, value in over.items():
        if key in SECTIONS and isinstance(value, Mapping):
            if "kind" in value:
                _switch_kind(raw, key, value["kind"])
            raw[key] = {**raw.get(key, {}), **value}
        else:
            raw[key] = value


def _switch_kind(raw: Raw, section: str, kind: Any) -> None:
    """Another kind of a section keeps the keys that all kinds share and drops the old kind's own."""
    values = raw.get(section)
    old = dict(values) if isinstance(values, Mapping) else {}
    default = getattr(Recipe.model_fields[section].default, "kind", None)
    if old.get("kind", default) == kind:
        raw[section] = {**old, "kind": kind}
        return
    shared = section_class(section, old).__bases__[0].model_fields
    raw[section] = {**{k: v for k, v in old.items() if k in shared}, "kind": kind}


def _apply_words(raw: Raw, given: Mapping[KeyPath, Any], problems: list[str]) -> None:
    for path, value in sorted(given.items(), key=lambda item: len(item[0])):
        section = path[0]
        if len(path) == 1 and section in SECTIONS:
            if isinstance(value, Mapping):
                raw[section] = dict(value)
            elif not kinds_of(section):
                problems.append(f"{section}={value}: {section} has no kinds; write {section}.KEY=VALUE")
            else:
                _switch_kind(raw, section, value)
        elif len(path) == 1:
            raw[section] = value
        elif len(path) == 2 and section in SECTIONS:
            if path[1] == "kind":
                _switch_kind(raw, section, value)
            elif path == ("data", "path") and ("data",) not in given and ("data", "kind") not in given:
                raw[section] = {**raw.get(section, {}), "kind": "text"}  # another corpus, the rest as it was
            raw[section] = {**raw.get(section, {}), path[1]: value}
        else:
            problems.append(unknown_key(path, raw))


def _validate(raw: Raw, source: _Source, problems: list[str], usable: bool) -> Recipe | None:
    """Checks everything; a faulty key is reported, set aside, and the rest is checked without it."""
    faulty: set[KeyPath] = set()
    for section in SECTIONS:
        if kinds_of(section) and isinstance(raw.get(section, {}), Mapping):
            raw[section] = {"kind": Recipe.model_fields[section].default.kind, **raw.get(section, {})}
    for _ in range(20):
        try:
            recipe = Recipe.model_validate(raw)
            break
        except ValidationError as error:
            for fault in error.errors(include_url=False):
                _report(fault, raw, source, problems, faulty)
    else:
        return None
    if usable:
        for keys, message in checks.conflicts(recipe):
            if not faulty.intersection(keys) and not any((k[0],) in faulty for k in keys):
                problems.append(f"{'.'.join(keys[0])}: {message}{_where(keys[0], source)}")
    return recipe


def _report(fault: Any, raw: Raw, source: _Source, problems: list[str], faulty: set[KeyPath]) -> None:
    loc, kind = fault["loc"], fault["type"]
    section = str(loc[0])
    if section not in SECTIONS:
        path: KeyPath = (section,)
    elif kind.startswith("union_tag"):
        path = (section, "kind")
    else:
        rest = loc[1:]
        if len(rest) > 1 and rest[0] in kinds_of(section) and isinstance(raw.get(section), Mapping):
            rest = rest[1:]
        path = (section, *map(str, rest[:1]))
    if path in faulty:
        return
    faulty.add(path)
    where = _where(path, source)
    key = ".".join(path)
    values = raw.get(section) if len(path) > 1 else raw
    if not isinstance(values, Mapping):
        problems.append(f"{section}: expected keys and values such as {{key: value}}; got {values!r}{where}")
        del raw[section]
        return
    if kind == "extra_forbidden":
        problems.append(unknown_key(path, raw) + where)
    elif path[-1] == "kind" and kinds_of(section):
        near = nearest(str(values.get("kind")), kinds_of(section))
        did = f"; did you mean {section}={near}?" if near else ""
        problems.append(f"{key}: expected {', '.join(kinds_of(section))}; got {values.get('kind')!r}{did}{where}")
    elif kind == "missing":
        of = f"{section}={values.get('kind')}" if section in SECTIONS else "a recipe"
        problems.append(f"{key}: {of} needs it; give {key}=VALUE{where}")
        raw[section] = {**values, path[-1]: "missing"}
        return
    else:
        cls = section_class(section, values) if len(path) > 1 else Recipe
        problems.append(wrong_value(key, cls, path[-1], values.get(path[-1]), fault["msg"]) + where)
    remaining = {k: v for k, v in values.items() if k != path[-1]}
    if len(path) > 1:
        raw[section] = remaining
    else:
        raw.pop(section, None)


def _where(path: KeyPath, source: _Source) -> str:
    line = source.lines.get(path)
    return f" ({line})" if line else ""

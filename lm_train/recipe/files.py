"""The files of a recipe: found by name or path, read, and laid over their bases, each key with the line it stands on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from lm_train.errors import UsageError
from lm_train.recipe import checks
from lm_train.recipe.explain import kinds_of, name_of, nearest, section_class, shown
from lm_train.recipe.sections import SECTIONS, Recipe
from lm_train.recipe.text import parse_yaml

Raw = dict[str, Any]
KeyPath = tuple[str, ...]
_PACKAGE = Path(__file__).resolve().parent.parent
_SUFFIXES = (".yaml", ".yml")
MAX_BYTES = 1 << 20


class Source(NamedTuple):
    """Where each key of a raw recipe was written, as `file:line`; keys from the command line are absent."""

    lines: dict[KeyPath, str]

    def where(self, path: KeyPath) -> str:
        """` (file:line)` for the end of a message; empty for what the command line says."""
        return f" ({self.lines[path]})" if path in self.lines else ""

    def forget(self, paths: Iterable[KeyPath]) -> None:
        """Drops the keys at and under `paths`, which now have a value from elsewhere."""
        gone = set(paths)
        for path in [p for p in self.lines if any(p[: n + 1] in gone for n in range(len(p)))]:
            del self.lines[path]


@cache
def shipped_recipes() -> dict[str, Path]:
    """Name and file of every shipped recipe: inside an installed package, or beside it in a checkout."""
    for folder in (_PACKAGE / "recipes", _PACKAGE.parent / "recipes"):
        files = sorted(folder.glob("*.yaml"))
        if files:
            return {file.stem: file for file in files}
    return {}


def shipped_names() -> str:
    return f"; there are {', '.join(shipped_recipes())}"


def title(asked: str) -> str:
    return Path(asked).stem if _is_path(asked) else asked


def _is_path(asked: str) -> bool:
    return "/" in asked or asked.endswith(_SUFFIXES)


def read_chain(asked: str, folder: Path, source: Source, seen: tuple[Path, ...], problems: list[str]) -> Raw:
    """The recipe `asked`, laid over its base, over its base's base, and so on; faults go to `problems`."""
    what, at = ("base", f" ({_shown(seen[-1])}:{source.lines.get(('base',), '?')})") if seen else ("recipe", "")
    file = _find(asked, folder)
    if isinstance(file, str):
        problems.append(f"{what}={file}{at}")
        return {}
    if file in seen:
        problems.append(f"base={asked}: leads back to itself: {' -> '.join(f.name for f in (*seen, file))}{at}")
        return {}
    where = _shown(file)
    try:
        raw, lines = parse_yaml(_read(file, where), where)
        if raw is None:
            raise UsageError(f"{where}:1: empty; a recipe has sections such as model: and data:")
        if not isinstance(raw, dict):
            raise UsageError(f"{where}:1: expected sections such as model: and data:; got {shown(raw)}")
    except UsageError as error:
        problems += error.problems
        return {}
    if isinstance(raw.get("cluster"), str):  # short for its name, as on the command line
        raw["cluster"] = {"name": raw["cluster"]}
        lines["cluster", "name"] = lines[("cluster",)]
    for section in SECTIONS:
        if section in raw and not isinstance(raw[section], Mapping):
            kind = raw[section] in kinds_of(section) if isinstance(raw[section], str) else False
            example = f"{{kind: {raw[section]}}}" if kind else "{key: value}"
            line = lines[(section,)]
            got = shown(raw.pop(section))
            problems.append(f"{section}: expected keys and values such as {example}; got {got} ({where}:{line})")
    result: Raw = {}
    base = raw.pop("base", None)
    if isinstance(base, str):
        source.lines[("base",)] = str(lines.pop(("base",)))
        result = read_chain(base, file.parent, source, (*seen, file), problems)
        result.pop("recipe", None)
    elif base is not None:
        problems.append(
            f"base: expected the name or the path of a recipe; got {shown(base)} ({where}:{lines[('base',)]})"
        )
    source.lines.pop(("base",), None)
    source.lines.update({tuple(map(str, path)): f"{where}:{line}" for path, line in lines.items()})
    merge(result, raw)
    return result


def _read(file: Path, where: str) -> str:
    try:
        with file.open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise UsageError(f"{where}: cannot read: {error.strerror}") from None
    if len(content) > MAX_BYTES:
        raise UsageError(f"{where}:1: larger than {MAX_BYTES:,} bytes; a recipe is a page at most")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UsageError(f"{where}:{line}: not UTF-8 (byte {error.start})") from None


def _find(asked: str, folder: Path) -> Path | str:
    """The recipe's file, or what is wrong with the name."""
    names = shipped_recipes()
    if not _is_path(asked):
        if asked in names:
            return names[asked].resolve()
        near = nearest(asked, names)
        return f"{_plainly(asked)}: no such recipe" + (f"; did you mean {near}?" if near else shipped_names())
    try:
        file = Path(asked).expanduser()
        file = file if file.is_absolute() else folder / file
        if file.is_dir():
            inside = f"; did you mean {asked.rstrip('/')}/recipe.yaml?" if (file / "recipe.yaml").exists() else ""
            return f"{_plainly(asked)}: a folder; expected a .yaml file{inside}"
        if file.is_file():
            if asked.endswith(_SUFFIXES):
                return file.resolve()
            return f"{_plainly(asked)}: expected a file that ends in .yaml or .yml"
        if file.exists():
            return f"{_plainly(asked)}: not a plain file"
    except (OSError, ValueError, RuntimeError):  # no name of a file: too long, a NUL, ~nobody
        return f"{_plainly(asked)}: no such file"
    stem = Path(asked).stem
    near = stem if stem in names else None
    return f"{_plainly(asked)}: no such file" + (
        f"; did you mean recipe={near}?" if near else checks.near_path(asked, folder)
    )


def _plainly(text: str) -> str:
    return name_of((text,))


def _shown(file: Path) -> str:
    try:
        return str(file.relative_to(Path.cwd()))
    except ValueError:
        return str(file)


def merge(raw: Raw, over: Mapping[str, Any]) -> None:
    """Lays `over` onto `raw`: a section's keys one by one, everything else whole."""
    for key, value in over.items():
        if key in SECTIONS and isinstance(value, Mapping):
            if "kind" in value:
                switch_kind(raw, key, value["kind"])
            raw[key] = {**raw.get(key, {}), **value}
        else:
            raw[key] = value


def switch_kind(raw: Raw, section: str, kind: Any) -> None:
    """Another kind of a section keeps the keys of the nearest class that both kinds come from and drops the others."""
    old = dict(raw.get(section, {}))
    default = getattr(Recipe.model_fields[section].default, "kind", None)
    if old.get("kind", default) != kind and isinstance(kind, str) and kind in kinds_of(section):
        new_ancestors = section_class(section, {"kind": kind}).__mro__
        shared = next(cls for cls in section_class(section, old).__mro__ if cls in new_ancestors)
        old = {k: v for k, v in old.items() if k in getattr(shared, "model_fields", {})}
    raw[section] = {**old, "kind": kind}

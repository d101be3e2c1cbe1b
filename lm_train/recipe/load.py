"""From the words of a command line to a frozen Recipe, or to every problem of that command at once.

Order of precedence, lowest first: typed defaults, the recipe's `base:` chain, the recipe's file, `debug=true`, the words.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from lm_train.errors import UsageError
from lm_train.recipe import checks
from lm_train.recipe.explain import (
    in_another_kind,
    kinds_of,
    name_of,
    nearest,
    section_class,
    shown,
    unknown_key,
    wrong_value,
)
from lm_train.recipe.files import KeyPath, Raw, Source, merge, read_chain, shipped_names, switch_kind, title
from lm_train.recipe.sections import SECTIONS, Recipe
from lm_train.recipe.text import parse_scalar
from lm_train.recipe.words import bare_word, parse_words, tries_to_name_a_recipe
from lm_train.redaction import redacted, secrets_in

PLUGINS_VARIABLE = "LM_TRAIN_PLUGINS"
"""Environment variable with the packages whose code may run, separated by commas: as `plugins=` on the command line."""
PLACEHOLDER = "missing:missing"
"""Stands for a needed key that is faulty or absent while the rest is checked; every kind of text takes it."""
RUN_WORDS = ("resume", "dry_run", "plan", "plugins", "allow_change")
"""Words about one start of a run; they are not part of what the run is."""


def load(words: Sequence[str]) -> Recipe:
    """The recipe that the words of a command line ask for.

    Args:
        words: `recipe=NAME|PATH`, `section.key=value`, `section=KIND`, `section={...}`, `name=...`, `seed=...`, ...

    Raises:
        UsageError: with every problem of the command, one line each.
    """
    problems: list[str] = []
    bare: list[str] = []
    given = dict(parse_words(words, problems, bare))
    raw: Raw = {}
    source = Source({})
    complete = False
    if ("recipe",) in given:
        asked = given.pop(("recipe",))
        before = len(problems)
        if isinstance(asked, str | int | float) and not isinstance(asked, bool):
            text = asked if isinstance(asked, str) else shown(asked)
            raw = read_chain(text, Path.cwd(), source, (), problems)
            raw.setdefault("recipe", title(text) or "none")
            if "plugins" in raw:
                problems.append(
                    f"plugins: a recipe cannot allow code to run; give plugins=PACKAGE on the command line, or "
                    f"{PLUGINS_VARIABLE}=PACKAGE in the environment{source.where(('plugins',))}"
                )
                del raw["plugins"]
        else:
            problems.append(f"recipe: expected the name or the path of a recipe; got {shown(asked)}{shipped_names()}")
        complete = len(problems) == before
    elif not tries_to_name_a_recipe(words):
        problems.append(f"which recipe? Give recipe=NAME{shipped_names()}")
    problems += [bare_word(redacted(word), raw) for word in bare]
    raw.setdefault("recipe", "none")
    if given.get(("debug",), raw.get("debug")) is True:
        settings = checks.debug_settings(raw)
        merge(raw, settings)
        source.forget({(section, key) for section in SECTIONS for key in settings.get(section, {})})
    unclear = _apply_words(raw, given, problems)
    source.forget(given)
    _refuse_secrets(raw, source, problems)
    recipe = _validate(raw, source, problems, set(given), unclear if complete else set(SECTIONS))
    if problems:
        raise UsageError(list(dict.fromkeys(map(redacted, problems))))
    return recipe


def _refuse_secrets(raw: Raw, source: Source, problems: list[str]) -> None:
    """A recipe is written into the run folder, into job files and to W&B.

    Raises:
        UsageError: with what was found so far, if there is a secret in it; what else is wrong might show it.
    """
    found = [
        f"{name_of(path)}: {why}, and a recipe is stored; secrets come from the environment (WANDB_API_KEY, HF_TOKEN, "
        f"~/.netrc){source.where(path[:2])}"
        for path, why in secrets_in(raw)
    ]
    if found:
        raise UsageError(list(dict.fromkeys(map(redacted, [*problems, *found]))))


def dump(recipe: Recipe) -> str:
    """The resolved recipe as YAML that `load` reads back to an equal recipe (but for `RUN_WORDS`)."""
    values = recipe.model_dump(mode="json", exclude=set(RUN_WORDS))
    if values["name"] is None:
        del values["name"]
    for section in SECTIONS:
        if "kind" in values[section]:
            values[section] = {"kind": values[section].pop("kind"), **values[section]}
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested mapping with one level of keys: `model.n_layer`."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            result |= flat(value, f"{prefix}{key}.")
        else:
            result[prefix + key] = value
    return result


class _Dumper(yaml.SafeDumper):
    """PyYAML's, but quoting every text that our own reader would take for something else (`1e-4`, `None`)."""


def _quoted_where_needed(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    style = None if isinstance(parse_scalar(text), str) else "'"
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _quoted_where_needed)


def _apply_words(raw: Raw, given: Mapping[KeyPath, Any], problems: list[str]) -> set[str]:
    """Lays the words onto `raw`; returns the sections whose kind stays unclear."""
    unclear = set()
    kind_given = ("data",) in given or ("data", "kind") in given
    # a section before its keys, and its kind before the keys that only this kind may have
    for path, value in sorted(given.items(), key=lambda item: (len(item[0]), item[0][1:] != ("kind",))):
        section = path[0]
        if len(path) == 1 and section in SECTIONS:
            if isinstance(value, Mapping):
                raw[section] = dict(value)
            elif section == "cluster":
                raw[section] = {**raw.get(section, {}), "name": value}
            elif not kinds_of(section):
                problems.append(
                    f"{section}: it has no kinds; write {section}.KEY=VALUE or {section}={{key: value}}; got {shown(value)}"
                )
            elif (section, "kind") in given:
                problems.append(f"{section} and {section}.kind: given twice; keep one")
                unclear.add(section)
            else:
                switch_kind(raw, section, value)
        elif len(path) == 1:
            raw[section] = value
        elif len(path) == 2 and section in SECTIONS:
            if path[1] == "kind":
                switch_kind(raw, section, value)
            elif path == ("data", "path") and not kind_given and "path" not in _keys_now(raw, section):
                raw[section] = {**raw.get(section, {}), "kind": "text"}  # another corpus, the rest as it was
            raw[section] = {**raw.get(section, {}), path[1]: value}
        else:
            problems.append(unknown_key(path, raw))
    return unclear


def _keys_now(raw: Raw, section: str) -> Iterable[str]:
    return section_class(section, raw.get(section, {})).model_fields


def _validate(raw: Raw, source: Source, problems: list[str], given: set[KeyPath], unclear: set[str]) -> Recipe:
    """Checks everything; a faulty key is reported, set aside, and the rest is checked without it.

    Args:
        raw: what files and words say.
        source: where the files say it.
        problems: takes one line for each fault.
        given: the keys of the words.
        unclear: sections of which a file or the kind is unknown: only what is wrong by itself is told of them.
    """
    faults = _Faults(raw, source, problems, unclear)
    for section in SECTIONS:
        if kinds_of(section):
            raw[section] = {"kind": Recipe.model_fields[section].default.kind, **raw.get(section, {})}
    recipe: Recipe | None = None
    while recipe is None:
        try:
            recipe = Recipe.model_validate(raw)
        except ValidationError as error:
            found = error.errors(include_url=False)
            if sum(faults.report(fault) for fault in found) == 0:
                raise
    faults.report_missing()
    for keys, message in checks.conflicts(recipe):
        told = any(key in faults.faulty or key[:1] in faults.faulty for key in keys)
        if not told and (not unclear.intersection(key[0] for key in keys) or given.issuperset(keys)):
            key = ".".join(keys[0])
            said = message if message.startswith(key) else f"{key}: {message}"
            problems.append(said + source.where(keys[0]))
    return recipe


class _Faults:
    """Turns pydantic's faults into problems and takes what is faulty out of `raw`."""

    def __init__(self, raw: Raw, source: Source, problems: list[str], unclear: set[str]) -> None:
        self.raw, self.source, self.problems = raw, source, problems
        self.faulty: set[KeyPath] = set()
        self._guessed = set(unclear)
        """Sections whose kind is not known: what their keys may be is judged by all kinds."""
        self._missing: dict[str, str] = {}

    def report(self, fault: Any) -> bool:
        """Whether the fault is a new one."""
        path = self._path(fault)
        if path in self.faulty:
            return False
        self.faulty.add(path)
        section, leaf, key = path[0], path[-1], name_of(path)
        values = self.raw[section] if len(path) > 1 else self.raw
        where = self.source.where(path)
        if fault["type"] == "extra_forbidden":
            if not (section in self._guessed and in_another_kind(path, self.raw)):
                self.problems.append(unknown_key(path, self.raw) + where)
            del values[leaf]
        elif leaf == "kind" and len(path) > 1:
            kinds = kinds_of(section)
            near = nearest(str(values["kind"]), kinds)
            did = f"; did you mean {section}={near}?" if near else ""
            expected = f"expected {', '.join(kinds)}; got {shown(values['kind'])}"
            self.problems.append(f"{key}: {expected}{did}{where}")
            values["kind"] = near or Recipe.model_fields[section].default.kind
            self._guessed.add(section)
        elif fault["type"] == "missing":
            if section not in self._guessed:
                self._missing[key] = (
                    f"{key}: {section}={values.get('kind')} needs it; give {key}=VALUE{self.source.where(path[:1])}"
                )
            values[leaf] = PLACEHOLDER
        else:
            cls = section_class(section, values) if len(path) > 1 else Recipe
            self.problems.append(wrong_value(key, cls, leaf, values[leaf], fault["msg"]) + where)
            del values[leaf]
            if cls.model_fields[leaf].is_required():
                values[leaf] = PLACEHOLDER
        return True

    def report_missing(self) -> None:
        """Tells of what is missing, unless it is there with a slip in its name."""
        told = " ".join(self.problems)
        self.problems += [message for key, message in self._missing.items() if f"did you mean {key}?" not in told]

    def _path(self, fault: Any) -> KeyPath:
        loc, section = fault["loc"], str(fault["loc"][0])
        if section not in SECTIONS:
            return (section,)
        if fault["type"].startswith("union_tag"):
            return (section, "kind")
        rest = loc[2:] if len(loc) > 2 and loc[1] in kinds_of(section) and len(kinds_of(section)) > 1 else loc[1:]
        return (section, *map(str, rest[:1]))

"""The words of a command line: `key=value` each, and what to say of those that are not."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from lm_train.errors import UsageError
from lm_train.recipe.explain import name_of, shown, suggest
from lm_train.recipe.files import KeyPath, Raw, shipped_recipes
from lm_train.recipe.text import parse_word_value

_SWITCHES = ("debug", "dry_run", "trainer.compile", "trainer.deterministic")


class _Nothing:
    """What stands after the = of `key=`: no type takes it."""

    def __repr__(self) -> str:
        return "nothing"


def parse_words(words: Sequence[str], problems: list[str], bare: list[str]) -> Iterator[tuple[KeyPath, Any]]:
    """The key and value of each word; `bare` takes the words that are no `key=value`."""
    seen: set[KeyPath] = set()
    for word in _joined(words, bare):
        key, equals, text = word.partition("=")
        path = tuple(key.split("."))
        if not word.isprintable() and any("\ud800" <= c <= "\udfff" for c in word):
            problems.append(f"{shown(word)}: not UTF-8")
        elif not equals or not key.strip("- "):
            bare.append(word)
        elif key != key.strip() or key.startswith("-"):
            bare.append(word)
            seen.add(path)
        elif path in seen:
            problems.append(f"{name_of(path)}: given twice; keep one")
        else:
            seen.add(path)
            try:
                yield path, parse_word_value(text) if text else _Nothing()
            except UsageError as error:
                problems.append(f"{name_of(path)}: {error} in {shown(text)}")


def _joined(words: Sequence[str], bare: list[str]) -> Iterator[str]:
    """The words; those that a space has torn apart (`a = 5`, `a= 5`, `a =5`, `--a 5`) go to `bare` as one."""
    rest = list(words)
    while rest:
        word = rest.pop(0)
        after = rest[0] if rest else "="
        if word and "=" not in word and after.startswith("=") and (after != "=" or len(rest) > 1):
            n = 2 if after == "=" else 1
        elif (word.endswith("=") or word.startswith("--")) and "=" not in word[:-1] + after and after[:1] != "-":
            n = 1
        else:
            yield word
            continue
        bare.append(" ".join([word, *rest[:n]]))
        del rest[:n]


def bare_word(word: str, raw: Raw) -> str:
    """What is to be said of a word that is no `key=value`."""
    key, text = _taken_apart(word)
    if not text and key in shipped_recipes():
        return f"{shown(word)}: expected key=value; did you mean recipe={key}?"
    meant = suggest((*key.split("."),), raw) if key else None
    if meant is None or ", " in meant:
        meant = key if text else None
    value = text or ("true" if meant in _SWITCHES else "VALUE")
    return f"{shown(word)}: expected key=value" + (f"; did you mean {meant}={value}?" if meant else "")


def tries_to_name_a_recipe(words: Sequence[str]) -> bool:
    """Whether a word that is faulty in itself was to name the recipe: then the recipe is not missing as well."""
    keys = [_taken_apart(word)[0] for word in words]
    return any(key in shipped_recipes() or suggest((key,), {}) == "recipe" for key in keys)


def _taken_apart(word: str) -> tuple[str, str]:
    """`--key=text`, `key = text`, `key: text`, `key text` and `--key` as key and text."""
    match = re.match(r"[\s-]*([\w.-]*)\s*[=:\s]?\s*(.*?)\s*$", word, re.DOTALL)
    return (match[1], match[2]) if match else ("", "")

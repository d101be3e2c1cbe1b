"""Cleaning of texts, step by step, by name: pure functions from text to text."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from html.parser import HTMLParser

from lm_train.recipe.data_sections import CleaningStep

_CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff\ufeff]")
"""Unicode's control characters (Cc) but for white space; halves of surrogate pairs; the byte-order mark."""
_WHITESPACE = re.compile(r"\s+")
_INLINE = set("a abbr b bdi bdo cite code dfn em font i kbd mark q s samp small span strong sub sup u var wbr".split())  # noqa: SIM905
_HIDDEN = frozenset(("script", "style"))


class _TextOfHTML(HTMLParser):
    """Collects what a reader would see."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._hidden = 0

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.parts.append(data)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._hidden += tag in _HIDDEN
        if tag not in _INLINE:
            self.parts.append(" ")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in _INLINE:
            self.parts.append(" ")

    def handle_endtag(self, tag: str) -> None:
        self._hidden = max(0, self._hidden - (tag in _HIDDEN))
        if tag not in _INLINE:
            self.parts.append(" ")


def remove_html(text: str) -> str:
    """Tags go (those that break a line leave a space), entities become their characters, scripts and styles go whole.

    >>> remove_html("Tom &amp; <b>Jer</b>ry<br>3 < 4")
    'Tom & Jerry 3 < 4'
    """
    if "<" not in text and "&" not in text:
        return text
    parser = _TextOfHTML()
    parser.feed(text)
    parser.close()
    return "".join(parser.parts)


def remove_control(text: str) -> str:
    r"""Control characters go; tabs and line ends stay.

    >>> remove_control("a\x00b\tc\x7f")
    'ab\tc'
    """
    return _CONTROL.sub("", text)


def to_nfc(text: str) -> str:
    r"""One code point for a letter and its accent, where there is one.

    >>> to_nfc("e\u0301") == "\u00e9"
    True
    """
    return unicodedata.normalize("NFC", text)


def to_nfkc(text: str) -> str:
    r"""NFC, and plain characters for ligatures, full-width forms, superscripts.

    >>> to_nfkc("\ufb01ne\u00b2")
    'fine2'
    """
    return unicodedata.normalize("NFKC", text)


def squeeze_whitespace(text: str) -> str:
    r"""One space for each run of white space, none at the ends.

    >>> squeeze_whitespace(" a\n\n b\u00a0c ")
    'a b c'
    """
    return _WHITESPACE.sub(" ", text).strip()


_STEPS: dict[CleaningStep, Callable[[str], str]] = {
    "html": remove_html,
    "control": remove_control,
    "unicode": to_nfc,
    "nfkc": to_nfkc,
    "whitespace": squeeze_whitespace,
    "lowercase": str.lower,
}


class Cleaner:
    """Applies steps in their order and counts how many texts each has changed.

    >>> cleaner = Cleaner(["html", "lowercase"])
    >>> cleaner("<p>One</p>"), cleaner("two")
    (' one ', 'two')
    >>> cleaner.changed, cleaner.texts
    ({'html': 1, 'lowercase': 1}, 2)
    """

    def __init__(self, steps: Sequence[CleaningStep]) -> None:
        self.steps = tuple(steps)
        self.changed: dict[CleaningStep, int] = dict.fromkeys(self.steps, 0)
        self.texts = 0

    def __call__(self, text: str) -> str:
        self.texts += 1
        for step in self.steps:
            cleaned = _STEPS[step](text)
            self.changed[step] += cleaned != text
            text = cleaned
        return text

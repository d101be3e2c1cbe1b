"""Cleaning of texts, step by step, by name: pure functions from text to text."""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Callable, Sequence

from lm_train.recipe.data_sections import CleaningStep

_CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff\ufeff]")
"""Unicode's control characters (Cc) but for white space; halves of surrogate pairs; the byte-order mark."""
_WHITESPACE = re.compile(r"\s+")
_INLINE = set("a abbr b bdi bdo cite code dfn em font i kbd mark q s samp small span strong sub sup u var wbr".split())  # noqa: SIM905
_TAG = re.compile(r"""</?([A-Za-z][A-Za-z0-9:-]*)(?:[^<>"']++|"[^"]*+"|'[^']*+')*+>""")
_TAG_NAME = re.compile(r"</?([A-Za-z][A-Za-z0-9:-]*)")
_TAG_CHARACTERS = 1024
"""Quotation marks are heeded in tags no longer than this; a longer one ends with the next `>`."""
_LONGEST = 1 << 17
"""Markup of more characters is none: so far a search goes for the `>` of each `<`."""
_HIDDEN_END = {name: re.compile(rf"</{name}\b[^>]*>", re.IGNORECASE) for name in ("script", "style")}


def remove_html(text: str, gap: str = " ") -> str:
    """Tags go (those that break a line leave `gap`), entities become their characters, scripts and styles go whole.

    One pass over the text however broken it is; Python's own parser takes quadratic time on comments that never end, and
    raises on unknown marked sections.

    >>> remove_html("Tom &amp; <b>Jer</b>ry<br>3 < 4")
    'Tom & Jerry 3 < 4'
    """
    if "<" not in text and "&" not in text:
        return text
    parts: list[str] = []
    done = 0
    while (start := text.find("<", done)) >= 0:
        end, name = _markup(text, start)
        if end < 0:  # a plain "<"
            parts.append(text[done : start + 1])
            done = start + 1
            continue
        parts.append(text[done:start])
        done = end
        if name and name not in _INLINE:
            parts.append(gap)
        if name in _HIDDEN_END and text[start + 1] != "/" and text[end - 2] != "/":
            closing = _HIDDEN_END[name].search(text, end)
            done = closing.end() if closing else len(text)
            parts.append(gap)
    parts.append(text[done:])
    return html.unescape("".join(parts))


def _markup(text: str, start: int) -> tuple[int, str]:
    """Where the markup that begins at `start` ends, or -1 if it is none; and the name of a tag."""
    if text.startswith("<!--", start):
        end = text.find("-->", start + 2)  # <!--> is a whole comment
        return (end + 3 if end >= 0 else len(text)), ""
    if text.startswith(("<!", "<?"), start):
        return text.find(">", start, start + _LONGEST) + 1 or -1, ""
    if tag := _TAG.match(text, start, start + _TAG_CHARACTERS):
        return tag.end(), tag[1].lower()
    if tag := _TAG_NAME.match(text, start):
        end = text.find(">", start, start + _LONGEST)
        if end >= 0 and "<" not in text[start + 1 : min(end, start + _TAG_CHARACTERS)]:
            return end + 1, tag[1].lower()
    return -1, ""


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

"""Cleaning by name: rules in their order over one document, and a tally of what each has removed, with examples."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from lm_train.data.cleaning import remove_control, remove_html, squeeze_whitespace, to_nfc, to_nfkc
from lm_train.prepare.quality import c4_document, c4_lines, gopher_quality, gopher_repetition, remove_notices
from lm_train.prepare.scrub import SCRUBBERS, scrub_all
from lm_train.recipe import CleaningRule

EXAMPLES = 3
"""Kept of each rule, the first in order."""
_EXAMPLE_CHARACTERS = 80
_LINE_CHARACTERS = 10
"""Shorter lines, such as brackets in programs, may stand in any number of documents."""
_SPACES = re.compile(r"[ \t]*\n[ \t]*")
_EMPTY_LINES = re.compile(r"\n{3,}")

LineHashes = npt.NDArray[np.uint64]


@dataclass
class Removed:
    """What one rule has done."""

    documents: int = 0
    """Documents that it changed or dropped."""
    dropped: int = 0
    characters: int = 0
    """Removed, dropped documents whole; a placeholder's own do not count."""
    reasons: dict[str, int] = field(default_factory=dict)
    """Dropped documents by reason."""
    examples: list[dict[str, str]] = field(default_factory=list)

    def add(self, other: Removed) -> None:
        """Takes in what the rule has done to later documents."""
        self.documents += other.documents
        self.dropped += other.dropped
        self.characters += other.characters
        for reason, count in other.reasons.items():
            self.reasons[reason] = self.reasons.get(reason, 0) + count
        self.examples += other.examples[: EXAMPLES - len(self.examples)]

    def example(self, where: str, **said: str) -> None:
        if len(self.examples) < EXAMPLES:
            self.examples.append({"where": where, **said})

    def as_json(self) -> dict[str, Any]:
        content: dict[str, Any] = {
            "documents": self.documents,
            "dropped": self.dropped,
            "characters": self.characters,
            "reasons": dict(sorted(self.reasons.items())),
            "examples": self.examples,
        }
        return content if self.reasons else {key: value for key, value in content.items() if key != "reasons"}


class Cleaning:
    """Applies rules to documents and counts.

    An example of a scrubber says only where and how much; the others' are scrubbed where any scrubber is among the rules.

    Args:
        rules: in their order.
        repeated: sorted hashes of the lines that stand in many documents; of use to repeated_lines.

    >>> cleaning = Cleaning(["html", "emails"])
    >>> cleaning("<p>Ask a@example.org</p>", "page.html")
    'Ask <EMAIL>'
    >>> cleaning.removed["emails"].as_json()
    {'documents': 1, 'dropped': 0, 'characters': 13, 'examples': [{'where': 'page.html', 'text': '13 characters'}]}
    """

    def __init__(self, rules: Iterable[CleaningRule], repeated: LineHashes | None = None) -> None:
        self.rules = tuple(rules)
        self.repeated = repeated if repeated is not None else np.array([], dtype=np.uint64)
        self.removed: dict[str, Removed] = {rule: Removed() for rule in (*self.rules, "empty")}
        self._shown = _harmless if any(rule in SCRUBBERS for rule in self.rules) else str

    def __call__(self, text: str, where: str) -> str | None:
        """The cleaned text, or None if the document goes."""
        for rule in self.rules:
            before = text
            reason: str | None = None
            match rule:
                case "boilerplate":
                    text, gone = remove_notices(text)
                    self._lines(rule, where, gone)
                case "repeated_lines":
                    text, gone = without_lines(text, self.repeated)
                    self._lines(rule, where, gone)
                case "emails" | "phones" | "cards" | "ips":
                    text, characters = SCRUBBERS[rule](text)
                    self._scrubbed(rule, where, characters)
                case "gopher_quality":
                    reason = gopher_quality(text)
                case "gopher_repetition":
                    reason = gopher_repetition(text)
                case "c4":
                    reason = c4_document(text)
                    if reason is None:
                        text, gone = c4_lines(text)
                        reason = c4_document(text)
                        if reason is None:  # a document that goes is counted whole
                            self._lines(rule, where, gone)
                case _:
                    text = _EDITS[rule](text)
                    if text != before:
                        self._edited(rule, where, before, text)
            if reason is not None:
                self._dropped(rule, where, before, reason)
                return None
        if not text or text.isspace():
            self._dropped("empty", where, text, "nothing left")
            return None
        return text

    def _edited(self, rule: str, where: str, before: str, after: str) -> None:
        removed = self.removed[rule]
        removed.documents += 1
        removed.characters += max(0, len(before) - len(after))
        if len(removed.examples) < EXAMPLES:
            at = before.rfind("\n", 0, _first_difference(before, after)) + 1
            said = {"text": self._excerpt(before[at:]), "became": self._excerpt(after[at:])}
            removed.example(f"{where} at character {at}", **said)

    def _lines(self, rule: str, where: str, gone: list[str]) -> None:
        if gone:
            removed = self.removed[rule]
            removed.documents += 1
            removed.characters += sum(map(len, gone)) + len(gone)
            if len(removed.examples) < EXAMPLES:
                removed.example(where, text=self._excerpt(gone[0]))

    def _scrubbed(self, rule: str, where: str, characters: int) -> None:
        if characters:
            removed = self.removed[rule]
            removed.documents += 1
            removed.characters += characters
            removed.example(where, text=f"{characters} characters")

    def _dropped(self, rule: str, where: str, text: str, reason: str) -> None:
        removed = self.removed[rule]
        removed.documents += 1
        removed.dropped += 1
        removed.characters += len(text)
        removed.reasons[reason] = removed.reasons.get(reason, 0) + 1
        if len(removed.examples) < EXAMPLES:
            removed.example(where, text=self._excerpt(text), reason=reason)

    def _excerpt(self, text: str) -> str:
        shown = " ".join(self._shown(text[: 1 << 12]).split())
        return shown if len(shown) <= _EXAMPLE_CHARACTERS else shown[:_EXAMPLE_CHARACTERS] + "\u2026"


def _first_difference(one: str, other: str) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _harmless(text: str) -> str:
    """As it may be shown where the recipe scrubs; an address may be written in entities or wide letters at this place."""
    return scrub_all(to_nfkc(remove_control(remove_html(text))))


def line_hash(line: str) -> int:
    """Hash of a line without the white space around it; 0 for one too short to be boilerplate."""
    line = line.strip()
    if len(line) < _LINE_CHARACTERS:
        return 0
    digest = hashlib.blake2b(line.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") or 1


def line_hashes(text: str) -> set[int]:
    """Hashes of the lines of a document that may be boilerplate, each once."""
    return {line_hash(line) for line in text.split("\n")} - {0}


def without_lines(text: str, repeated: LineHashes) -> tuple[str, list[str]]:
    """The text without the lines whose hash is in `repeated` (sorted), and these lines."""
    if not len(repeated):
        return text, []
    lines = text.split("\n")
    hashes = np.array([line_hash(line) for line in lines], dtype=np.uint64)
    at = np.minimum(np.searchsorted(repeated, hashes), len(repeated) - 1)
    goes = (repeated[at] == hashes).tolist()
    if True not in goes:
        return text, []
    kept = [line for line, gone in zip(lines, goes, strict=True) if not gone]
    return "\n".join(kept), [line for line, gone in zip(lines, goes, strict=True) if gone]


def frequent(parts: Callable[[], Iterable[LineHashes]], times: int, buckets: int = 1 << 24) -> LineHashes:
    """The hashes that stand in at least so many documents, sorted.

    Two passes in bounded memory: hashes are counted in `buckets` counters of four bytes, and then exactly where a
    counter has reached `times`.

    Args:
        parts: each call yields the hashes of all documents anew, of each document each hash once.
        times: documents.
        buckets: a power of two.
    """
    counters = np.zeros(buckets, dtype=np.uint32)
    mask = np.uint64(buckets - 1)
    for part in parts():
        places, counts = np.unique((part & mask).astype(np.int64), return_counts=True)
        counters[places] += counts.astype(np.uint32)
    values, counts = np.array([], dtype=np.uint64), np.array([], dtype=np.int64)
    for part in parts():
        hot = part[counters[(part & mask).astype(np.int64)] >= times]
        values, inverse = np.unique(np.concatenate([values, hot]), return_inverse=True)
        summed = np.zeros(len(values), dtype=np.int64)
        np.add.at(summed, inverse, np.concatenate([counts, np.ones(len(hot), dtype=np.int64)]))
        counts = summed
    return values[counts >= times]


def _html_lines(text: str) -> str:
    """Without markup; what broke a line breaks one still."""
    if "<" not in text and "&" not in text:
        return text
    return _EMPTY_LINES.sub("\n\n", _SPACES.sub("\n", remove_html(text, gap="\n"))).strip()


_EDITS: dict[str, Callable[[str], str]] = {
    "html": _html_lines,
    "control": remove_control,
    "unicode": to_nfc,
    "nfkc": to_nfkc,
    "whitespace": squeeze_whitespace,
    "lowercase": str.lower,
}

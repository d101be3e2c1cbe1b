"""Which documents and lines are worth learning from, by the published rules of two large corpora; all for English."""

from __future__ import annotations

import re

import numpy as np
import numpy.typing as npt

STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))
POLICY_NOTICES = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
"""A line with one of these is a notice and no text (Raffel et al. 2020, section 2.2)."""
_BULLETS = ("\u2022", "\u2023", "\u25e6", "\u2043", "\u25aa", "\u25cf", "*", "-")
_ELLIPSES = ("...", "\u2026")
_TERMINAL = (".", "!", "?", '"', "\u201d")
_CITATION = re.compile(r"\[(?:\d{1,4}|edit|citation needed)\]")
_SENTENCE_END = re.compile(r"[.!?][\"\u201d')\]]*(?=\s|$)")
_PARAGRAPH_END = re.compile(r"\n\s*\n")
_TOP_NGRAMS = {2: 0.20, 3: 0.18, 4: 0.16}
_DUPLICATE_NGRAMS = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}


def gopher_quality(text: str) -> str | None:
    """Why the document falls to the quality rules of Rae et al. 2021 (arXiv:2112.11446, appendix A.1.1), or None.

    A document has 50 to 100,000 words of 3 to 10 characters on average, hash signs and ellipses for at most a tenth of its
    words each, at most 90% of its lines begin with a bullet and at most 30% end with an ellipsis, a letter in 80% of its
    words, and two of eight frequent English words.

    >>> gopher_quality("one two three")
    'fewer than 50 words'
    """
    words = text.split()
    if len(words) < 50:
        return "fewer than 50 words"
    if len(words) > 100_000:
        return "more than 100,000 words"
    if not 3 <= sum(map(len, words)) / len(words) <= 10:
        return "mean length of words not from 3 to 10"
    if text.count("#") > 0.1 * len(words) or sum(map(text.count, _ELLIPSES)) > 0.1 * len(words):
        return "a symbol for each ten words"
    lines = [line for line in map(str.strip, text.split("\n")) if line]
    if sum(line.startswith(_BULLETS) for line in lines) > 0.9 * len(lines):
        return "bullets before more than 90% of the lines"
    if sum(line.endswith(_ELLIPSES) for line in lines) > 0.3 * len(lines):
        return "ellipses after more than 30% of the lines"
    if sum(any(map(str.isalpha, word)) for word in words) < 0.8 * len(words):
        return "no letter in more than 20% of the words"
    if len(STOP_WORDS.intersection(word.strip(".,;:!?\"'()").lower() for word in words)) < 2:
        return "fewer than two of eight frequent words"
    return None


def gopher_repetition(text: str) -> str | None:
    """Why the document falls to the repetition rules of Rae et al. 2021 (table A1), or None.

    Shares of characters are of those in words. A line or paragraph is a duplicate from its second time on; a duplicate
    n-gram counts wherever it stands, each character once.

    >>> gopher_repetition("buy now and save\\n" * 9)
    'duplicate lines over 30%'
    """
    lines = [line for line in map(str.strip, text.split("\n")) if line]
    paragraphs = [part for part in map(str.strip, _PARAGRAPH_END.split(text)) if part]
    for name, parts in (("lines", lines), ("paragraphs", paragraphs)):
        repeated = _second_times(parts)
        if len(repeated) > 0.30 * len(parts):
            return f"duplicate {name} over 30%"
        if sum(map(len, repeated)) > 0.20 * sum(map(len, parts)):
            return f"duplicate {name} over 20% of the characters"
    words = text.split()
    numbers: dict[str, int] = {}
    ids = np.array([numbers.setdefault(word, len(numbers)) for word in words], dtype=np.uint64)
    lengths = np.array([len(word) for word in words], dtype=np.int64)
    ends = np.concatenate([[0], np.cumsum(lengths)])
    keys = ids
    for n in range(2, 11):
        if len(words) < n:
            return None
        keys = keys[: len(words) - n + 1] * np.uint64(0x9E3779B97F4A7C15) + ids[n - 1 :]
        keys ^= keys >> np.uint64(29)
        _, inverse, counts = np.unique(keys, return_inverse=True, return_counts=True)
        if counts.max() < 2:  # no longer one repeats either
            return None
        times = counts[inverse]
        if n in _TOP_NGRAMS:
            characters = (ends[n:] - ends[:-n])[times == times.max()].max() * times.max()
            if characters > _TOP_NGRAMS[n] * ends[-1]:
                return f"one {n}-gram over {_TOP_NGRAMS[n]:.0%} of the characters"
        elif _covered(times > 1, n, lengths) > _DUPLICATE_NGRAMS[n] * ends[-1]:
            return f"duplicate {n}-grams over {_DUPLICATE_NGRAMS[n]:.0%} of the characters"
    return None


def c4_lines(text: str) -> tuple[str, list[str]]:
    """The lines that C4 keeps, and those it does not (Raffel et al. 2020, arXiv:1910.10683, section 2.2).

    A line ends with a full stop, an exclamation or question mark or a closing quotation mark, has five words, says nothing
    of Javascript and is no policy notice; marks of citations go.

    >>> c4_lines("Home\\nThis is a whole sentence.[3]\\nPlease enable Javascript to see this page.")
    ('This is a whole sentence.', ['Home', 'Please enable Javascript to see this page.'])
    """
    kept, gone = [], []
    for line in text.split("\n"):
        cleaned = _CITATION.sub("", line).strip()
        lower = cleaned.lower()
        fits = cleaned.endswith(_TERMINAL) and len(cleaned.split()) >= 5 and "javascript" not in lower
        if fits and not any(notice in lower for notice in POLICY_NOTICES):
            kept.append(cleaned)
        elif cleaned:
            gone.append(line)
    return "\n".join(kept), gone


def c4_document(text: str) -> str | None:
    """Why C4 would not keep the document, or None; asked before its lines are looked at, and after.

    >>> c4_document("One sentence. And another.")
    'fewer than three sentences'
    """
    if "{" in text:
        return "a curly bracket"
    if "lorem ipsum" in text.lower():
        return "lorem ipsum"
    if sum(1 for _ in _SENTENCE_END.finditer(text)) < 3:
        return "fewer than three sentences"
    return None


def remove_notices(text: str) -> tuple[str, list[str]]:
    """The text without the lines that speak of cookies and policies, and these lines.

    >>> remove_notices("A page.\\nThis site uses cookies.\\n")
    ('A page.\\n', ['This site uses cookies.'])
    """
    lower = text.lower()
    if not any(notice in lower for notice in POLICY_NOTICES):
        return text, []
    kept: list[str] = []
    gone: list[str] = []
    for line in text.split("\n"):
        (gone if any(notice in line.lower() for notice in POLICY_NOTICES) else kept).append(line)
    return "\n".join(kept), gone


def _second_times(parts: list[str]) -> list[str]:
    seen: set[str] = set()
    return [part for part in parts if part in seen or seen.add(part)]  # type: ignore[func-returns-value]


def _covered(starts: npt.NDArray[np.bool_], n: int, lengths: npt.NDArray[np.int64]) -> int:
    """Characters of the words that lie in one of the n-grams that begin where `starts` is true."""
    steps = np.zeros(len(lengths) + 1, dtype=np.int64)
    begin = np.flatnonzero(starts)
    steps[begin] += 1
    np.subtract.at(steps, begin + n, 1)
    return int(lengths[np.cumsum(steps[:-1]) > 0].sum())

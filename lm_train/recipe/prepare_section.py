"""The `prepare` section: what `lm-train prepare` makes of text. Training on unprepared text reads it as it is."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field

from lm_train.recipe.base import PositiveInt, PositiveIntOrAuto, Section

CleaningRule = Literal[
    "html",
    "control",
    "unicode",
    "nfkc",
    "whitespace",
    "lowercase",
    "boilerplate",
    "repeated_lines",
    "c4",
    "gopher_quality",
    "gopher_repetition",
    "emails",
    "phones",
    "cards",
    "ips",
]
NEEDS_LINES = ("boilerplate", "repeated_lines", "c4", "gopher_quality", "gopher_repetition")
"""Rules that look at lines."""


def _rules(value: Any) -> Any:
    rules = get_args(CleaningRule)
    given = [value] if isinstance(value, str) else value
    for rule in given if isinstance(given, list | tuple) else [given]:
        if rule not in rules:
            raise ValueError(f"expected a list of {', '.join(rules)}; got {rule!r:.80}")
    return tuple(given)


class PrepareSection(Section):
    cleaning: Annotated[tuple[CleaningRule, ...], BeforeValidator(_rules), Field(strict=False)] = ("control", "unicode")
    """Rules in their order. Of the text: html (tags go, blocks become lines), control (control characters go), unicode (NFC),
    nfkc, whitespace (all on one line), lowercase; of lines: boilerplate (notices of cookies and policies go), repeated_lines
    (lines that stand in many documents go), c4 (Raffel et al. 2020: lines and documents); of documents: gopher_quality,
    gopher_repetition (Rae et al. 2021); scrubbed, a placeholder in their place: emails, phones, cards, ips."""
    repeated_in: Annotated[int, Field(ge=2, lt=2**31)] = 10
    """A line that stands in so many documents is a repeated line."""
    dedup: Literal["none", "exact", "near"] = "exact"
    """Of equal documents (but for white space and case), or also of those that nearly are, the first stays."""
    near_threshold: Annotated[float, Field(ge=0.5, le=1)] = 0.8
    """Jaccard similarity of their sets of five consecutive words from which on two documents are nearly equal."""
    shard_tokens: PositiveInt = 1 << 25
    """A shard ends with the document that brings it to so many tokens."""
    workers: PositiveIntOrAuto = "auto"
    """Processes; auto: one for each core. The result does not depend on it."""

    def conflicts(self) -> list[tuple[tuple[str, ...], str]]:
        found: list[tuple[tuple[str, ...], str]] = []
        rules = self.cleaning
        twice = next((rule for i, rule in enumerate(rules) if rule in rules[:i]), None)
        if twice is not None:
            found.append((("cleaning",), f"prepare.cleaning names {twice} twice; keep one"))
        after = rules[rules.index("whitespace") + 1 :] if "whitespace" in rules else ()
        needs = next((rule for rule in after if rule in NEEDS_LINES), None)
        if needs is not None:
            message = (
                f"prepare.cleaning: whitespace leaves one line, and {needs} looks at lines; put whitespace after it"
            )
            found.append((("cleaning",), message))
        return found

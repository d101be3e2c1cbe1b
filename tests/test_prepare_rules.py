"""Cleaning rules: what each removes, what it leaves alone, what it says of it; and that hostile text does not hold it up."""

from __future__ import annotations

import doctest
import json
import time

import numpy as np
import pytest

from lm_train.data.cleaning import remove_html
from lm_train.prepare import duplicates, quality, rules, scrub, units
from lm_train.prepare.quality import c4_document, c4_lines, gopher_quality, gopher_repetition
from lm_train.prepare.rules import Cleaning, frequent, line_hashes, without_lines
from lm_train.prepare.scrub import SCRUBBERS
from lm_train.recipe import CleaningRule

WORDS = "the of and to in that with have be people water house every little number great small large place year".split()  # noqa: SIM905
SENTENCES = " ".join(WORDS[i] + WORDS[k] for i, k in np.random.default_rng(0).integers(0, 20, (120, 2))) + " the and of"


@pytest.mark.parametrize("module", [duplicates, quality, rules, scrub])
def test_examples_in_the_documentation(module: object) -> None:
    failed, tried = doctest.testmod(module)  # type: ignore[arg-type]
    assert (failed, tried > 0) == (0, True)


def test_good_prose_passes_every_rule() -> None:
    assert gopher_quality(SENTENCES) is None
    assert gopher_repetition(SENTENCES) is None
    assert c4_document("This is one. This is two. This is three.") is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("the and " * 24, "fewer than 50 words"),
        ("the and " * 50_001, "more than 100,000 words"),
        ("a i " * 40 + "the and", "mean length of words not from 3 to 10"),
        ("incomprehensibilities " * 60 + "the and", "mean length of words not from 3 to 10"),
        (SENTENCES + " #tag" * 20, "a symbol for each ten words"),
        (SENTENCES + " wait..." * 20, "a symbol for each ten words"),
        ("\n".join(f"- the {w} and that" for w in WORDS), "bullets before more than 90% of the lines"),
        ("\n".join(f"the {w} and with that have people of water {w} {w}..." for w in WORDS), None),
        (SENTENCES + " 12345" * 60, "no letter in more than 20% of the words"),
        ("lorem ipsum dolor " * 20, "fewer than two of eight frequent words"),
    ],
)
def test_gopher_quality(text: str, reason: str | None) -> None:
    found = gopher_quality(text)
    assert found == (reason or "ellipses after more than 30% of the lines")


def test_gopher_quality_at_its_limits() -> None:
    fifty = " ".join(["the", "and", *["word"] * 48])
    assert gopher_quality(fifty) is None
    assert gopher_quality(fifty.replace("word", "12", 10).replace("12", "1234")) is None, (
        "80% of the words have letters"
    )
    assert gopher_quality(fifty.replace("word", "1234", 11)) == "no letter in more than 20% of the words"


def test_gopher_repetition() -> None:
    unique = [f"line {i} {SENTENCES[i * 9 : i * 9 + 40]}" for i in range(20)]
    assert gopher_repetition("\n".join(unique + unique[:8])) is not None
    assert gopher_repetition("\n".join(unique * 2)) == "duplicate lines over 30%"
    assert gopher_repetition("\n\n".join(unique * 2)) == "duplicate lines over 30%"
    assert gopher_repetition("one two " * 60) == "one 2-gram over 20% of the characters"
    draw = np.random.default_rng(1)
    words = [f"word{i}" for i in draw.permutation(1000)]
    assert gopher_repetition(" ".join(words)) is None
    found = gopher_repetition(" ".join(words[:200] + words[:60]))
    assert found == "duplicate 5-grams over 15% of the characters"
    assert gopher_repetition("") is None


def test_duplicate_ngrams_count_each_character_once() -> None:
    """Against the plain definition, over texts with repeated stretches."""
    draw = np.random.default_rng(3)
    for _ in range(30):
        words = [f"w{i}" for i in draw.integers(0, 40, 120)]
        at = int(draw.integers(60))
        words += words[at : at + int(draw.integers(40))]
        for n in (5, 7):
            grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
            inside = {i + k for i, gram in enumerate(grams) if grams.count(gram) > 1 for k in range(n)}
            starts = np.array([grams.count(gram) > 1 for gram in grams])
            lengths = np.array([len(word) for word in words])
            assert quality._covered(starts, n, lengths) == sum(len(words[i]) for i in inside)


def test_c4() -> None:
    page = "Menu\nThis line ends as a sentence does.\nToo short.\nWe use cookies on this fine site.\nHe said \u201cit is\u201d"
    kept, gone = c4_lines(page)
    assert kept == "This line ends as a sentence does."
    assert len(gone) == 4, "five words are needed, four in the last line"
    assert c4_document("int main() { return 0; } a. b. c.") == "a curly bracket"
    assert c4_document("Lorem ipsum dolor. Sit. Amet.") == "lorem ipsum"


NO_PHONES = "2024-05-06 12:30:45 3.14159 1,000,000 978-3-16-148410-0"
NO_ADDRESSES = "127.0.0.1 ::1 std::vector a::b 12:30:45 300.1.1.1 1.2.3"
NO_CARDS = "4111111111111112 1234567890123 ids 0000000000000000"


@pytest.mark.parametrize(
    ("rule", "text", "expected"),
    [
        ("emails", "a@b.co, first.last+tag@sub.example.com!", "<EMAIL>, <EMAIL>!"),
        ("emails", "user@localhost @decorator a @ b x@y", "user@localhost @decorator a @ b x@y"),
        ("cards", "4111111111111111 378282246310005 3782 822463 10005", "<CARD> <CARD> <CARD>"),
        ("cards", NO_CARDS, NO_CARDS),
        ("phones", "+1 415 555 2671, 0049 30 901820, (212) 555-0100", "<PHONE>, <PHONE>, <PHONE>"),
        ("phones", "030 901820-12 and 415-555-2671", "<PHONE> and <PHONE>"),
        ("phones", NO_PHONES, NO_PHONES),
        ("ips", "8.8.8.8 [2001:db8::ff00:42:8329] fe80::1", "<IP> [<IP>] <IP>"),
        ("ips", NO_ADDRESSES, NO_ADDRESSES),
    ],
)
def test_scrubbing(rule: str, text: str, expected: str) -> None:
    found, characters = SCRUBBERS[rule](text)
    assert found == expected
    placeholders = expected.count("<")
    assert characters == len(text) - (len(found) - placeholders * (len(rule) + 1))


SECRETS = "jane.roe@example.org", "4111 1111 1111 1111", "(415) 555-2671", "203.0.113.77", "2001:db8::cafe:1"


def test_examples_hold_nothing_that_is_scrubbed() -> None:
    """Whatever rule an example is of: scrubbers may come after it, and an address may be spelled in entities."""
    secret = " ".join(SECRETS)
    entities = secret.replace("@", "&#64;").replace(" ", "&#32;")
    texts = [
        f"<p>{secret}</p>",
        f"<p>{entities}</p>",
        f"privacy policy {secret}\nmore",
        f"bo\x00b {secret} \x07 cafe\u0301",
        secret,
        f"{secret}\n" * 30,
        f"Javascript {secret}.\nThis is one line. It is. So.",
    ]
    every: tuple[CleaningRule, ...]
    for every in (
        ("html", "control", "unicode", "boilerplate", "emails", "cards", "phones", "ips"),
        ("boilerplate", "c4", "control", "html", "emails", "cards", "phones", "ips"),
        ("gopher_repetition", "gopher_quality", "unicode", "emails", "cards", "phones", "ips"),
    ):
        cleaning = Cleaning(every)
        for text in texts:
            cleaned = cleaning(text, "file at 1")
            assert cleaned is None or not any(part in cleaned for part in SECRETS)
        told = json.dumps({rule: removed.as_json() for rule, removed in cleaning.removed.items()})
        assert "file at 1" in told
        for part in ("jane", "example.org", "1111", "555-2671", "203.0", "cafe:1"):
            assert part not in told, (every, told)


def test_a_tally_in_parts_is_the_tally_of_the_whole() -> None:
    texts = ["a@b.org and more", "<b>x</b>", "", "c@d.org", "<i>e@f.org</i>", "g@h.org"]
    whole, first, second = (Cleaning(["html", "emails"]) for _ in range(3))
    for i, text in enumerate(texts):
        whole(text, f"row {i}")
        (first if i < 2 else second)(text, f"row {i}")
    for rule, removed in first.removed.items():
        removed.add(second.removed[rule])
        assert removed == whole.removed[rule]
    assert whole.removed["emails"].documents == 4
    assert [example["where"] for example in whole.removed["emails"].examples] == ["row 0", "row 3", "row 4"]


def test_a_document_counts_once_for_a_rule() -> None:
    cleaning = Cleaning(["c4"])
    three = "This line has five words.\n" * 3
    assert cleaning(f"Menu\n{three}", "a") == three.strip()
    assert cleaning("One. Two. Three.\nThis line has five words.", "b") is None
    removed = cleaning.removed["c4"]
    assert (removed.documents, removed.dropped) == (2, 1)
    assert removed.characters == len("Menu\n") + len("One. Two. Three.\nThis line has five words.")
    assert removed.reasons == {"fewer than three sentences": 1}


def test_repeated_lines() -> None:
    documents = [f"Subscribe to our newsletter\nbody number {i} is unlike\n  }}\n" for i in range(12)]
    documents += ["body of another sort\nSubscribe to our newsletter\nSubscribe to our newsletter"]
    hashes = [np.sort(np.array(list(line_hashes(text)), dtype=np.uint64)) for text in documents]
    for buckets in (1 << 24, 2):  # with two counters every line is looked at exactly
        found = frequent(lambda: hashes, 13, buckets)
        assert len(found) == 1, "brackets are too short, and a line counts once a document"
    assert len(frequent(lambda: hashes, 14)) == 0
    text, gone = without_lines(documents[-1], found)
    assert text == "body of another sort"
    assert gone == ["Subscribe to our newsletter"] * 2


@pytest.mark.parametrize(
    "bad", ["<", "<!--", "<a ", '<a "', "<!", "<script>", "</", "&#", "a@", "1-", "+1 ", "0" * 7, "::1", "[1"]
)
def test_hostile_text_takes_linear_time(bad: str) -> None:
    text = bad * (100_000 // len(bad)) + "x"
    started = time.process_time()
    remove_html(text)
    for scrubber in SCRUBBERS.values():
        scrubber(text)
    c4_lines(text)
    assert time.process_time() - started < 2.0


def test_documents_longer_than_memory_are_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "DOCUMENT_CHARACTERS", 100)
    piece = units.Piece
    pieces = [piece("x" * 60, f"file at byte {60 * i}", i == 4) for i in range(5)] + [piece("y", "file row 7", True)]
    found = list(units.documents_of(pieces))
    assert [(len(d.text), d.source, d.row) for d in found] == [
        (120, "file", 0),
        (120, "file", 120),
        (60, "file", 240),
        (1, "file", 7),
    ]

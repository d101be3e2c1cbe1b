"""Cleaning steps: what each changes and what it leaves alone."""

from __future__ import annotations

import doctest

import pytest

from lm_train.data import classes, cleaning
from lm_train.data.cleaning import Cleaner, remove_control, remove_html, squeeze_whitespace, to_nfc, to_nfkc


@pytest.mark.parametrize("module", [cleaning, classes])
def test_examples_in_the_documentation(module: object) -> None:
    failed, tried = doctest.testmod(module)  # type: ignore[arg-type]
    assert (failed, tried > 0) == (0, True)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("no markup", "no markup"),
        ("one<br/>two<br>three", "one two three"),
        ("<p>a</p><p>b</p>", " a  b "),
        ("un<b>believ</b>able", "unbelievable"),
        ("&lt;b&gt; &eacute; &#233; &#x1F600;", "<b> é é \U0001f600"),
        ("R&D at 3 < 4 > 2", "R&D at 3 < 4 > 2"),
        ("a<script>if (x < 1) {}</script>b<style>p {}</style>c", "a  b  c"),
        ("a<!-- hidden -->b", "ab"),
        ('<a href="x>y">link</a>', "link"),
    ],
)
def test_html(text: str, expected: str) -> None:
    assert remove_html(text) == expected


def test_control_characters_but_not_white_space() -> None:
    assert remove_control("\ufeffa\x00b\x85\tc\r\n\x1b[0m\x9f") == "ab\x85\tc\r\n[0m"
    assert remove_control("half \ud83d pair") == "half  pair"
    assert remove_control("\u200d family") == "\u200d family", "joiners are part of emoji and of many scripts"


def test_unicode_forms() -> None:
    assert to_nfc("Å\u0301") == to_nfc("A\u030a\u0301")
    assert to_nfc("\ufb01 \u00b2 \uff21") == "\ufb01 \u00b2 \uff21"
    assert to_nfkc("\ufb01 \u00b2 \uff21") == "fi 2 A"


def test_white_space() -> None:
    assert squeeze_whitespace("\n a \t b\u00a0\u2003c\n") == "a b c"


def test_steps_act_in_their_order_and_are_counted() -> None:
    cleaner = Cleaner(["html", "whitespace", "lowercase"])
    assert [cleaner(text) for text in ("<i>Up</i>", "down", " x ")] == ["up", "down", "x"]
    assert cleaner.changed == {"html": 1, "whitespace": 1, "lowercase": 1}
    assert Cleaner(["html", "html"])("&amp;lt;") == "<"

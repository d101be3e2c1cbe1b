"""Equal and nearly equal documents, against sets compared element by element."""

from __future__ import annotations

import numpy as np

from lm_train.prepare.duplicates import (
    SIGNATURE,
    bands_of,
    elements,
    equal,
    key_of_text,
    nearly_equal,
    signature,
    similarity,
)


def jaccard(one: str, other: str) -> float:
    """Exact, over the plain sets of five words."""
    first, second = ({tuple(words[i : i + 5]) for i in range(len(words) - 4)} for words in (one.split(), other.split()))
    return len(first & second) / len(first | second)


def near_pairs(n: int, most_changed: float, seed: int) -> list[tuple[str, str]]:
    """Documents of random words, each with a copy in which up to a share of the words is another."""
    draw = np.random.default_rng(seed)
    pairs = []
    for _ in range(n):
        words = draw.integers(0, 20_000, int(draw.integers(80, 400)))
        changed = draw.random(len(words)) < draw.uniform(0, most_changed)
        copy = np.where(changed, draw.integers(0, 20_000, len(words)), words)
        pairs.append((" ".join(f"w{i}" for i in words), " ".join(f"w{i}" for i in copy)))
    return pairs


def found_pairs(pairs: list[tuple[str, str]], threshold: float) -> set[int]:
    """Numbers of the pairs whose second text is dropped for the first; every other drop would be an error."""
    texts = [text for pair in pairs for text in pair]
    signatures = np.stack([signature(text) for text in texts])
    bands = bands_of(signatures)
    found = nearly_equal(lambda i: bands[:, i], lambda i: signatures[i], np.ones(len(texts), dtype=bool), threshold)
    assert all(number % 2 == 1 and first == number - 1 for number, first in found)
    return {number // 2 for number, _ in found}


def test_recall_and_precision_against_exact_similarity() -> None:
    """Estimates of 128 hashes lie within 0.11 (three deviations) of the truth; beyond that, nothing may be wrong."""
    pairs = near_pairs(400, 0.06, seed=5)
    exact = np.array([jaccard(*pair) for pair in pairs])
    dropped = found_pairs(pairs, 0.8)
    is_dropped = np.array([i in dropped for i in range(len(pairs))])
    recall = (is_dropped & (exact >= 0.8)).sum() / (exact >= 0.8).sum()
    precision = (is_dropped & (exact >= 0.8)).sum() / is_dropped.sum()
    assert recall > 0.85
    assert precision > 0.85
    assert is_dropped[exact >= 0.9].all()
    assert not is_dropped[exact < 0.69].any()
    assert ((exact >= 0.9).sum(), (exact < 0.69).sum()) > (50, 50)


def test_the_estimate_is_without_bias() -> None:
    pairs = near_pairs(200, 0.1, seed=9)
    estimates = [float(similarity(signature(a), signature(b)[None])[0]) for a, b in pairs]
    errors = np.array(estimates) - [jaccard(*pair) for pair in pairs]
    assert abs(errors.mean()) < 4 * 0.045 / len(pairs) ** 0.5
    assert errors.std() < 0.05


def test_the_first_stays() -> None:
    base = [f"w{i}" for i in range(200)]
    changed = [word if i != 100 else "other" for i, word in enumerate(base)]
    texts = [" ".join(changed), "quite another text", " ".join(base), "", "", "short", "short"]
    signatures = np.stack([signature(text) for text in texts])
    bands = bands_of(signatures)
    live = np.array([bool(text) for text in texts])
    found = nearly_equal(lambda i: bands[:, i], lambda i: signatures[i], live, 0.8)
    assert found == [(2, 0), (6, 5)]
    keys = np.frombuffer(b"".join(map(key_of_text, ["a b", "c", "A  b", "a\nb", "c"])), dtype=np.uint8).reshape(-1, 16)
    assert equal(keys, np.ones(5, dtype=bool)) == [(2, 0), (3, 0), (4, 1)]
    assert equal(keys, np.array([False, True, True, True, False])) == [(3, 2)], "what was dropped is not a first one"
    assert equal(keys[:0], np.ones(0, dtype=bool)) == []


def test_elements() -> None:
    assert len(elements("one two three")) == 1
    assert len(elements("")) == 0
    assert len(elements(" ".join("abcdefgh"))) == 4
    assert len(elements("\u6771\u4eac\u90fd\u306f\u65e5\u672c")) == 2, "each ideograph is a word"
    assert signature("").tolist() == [2**32 - 1] * SIGNATURE
    assert (elements("A b, c d e") == elements("a B c -- d e")).all()

"""Equal and nearly equal documents: what is kept of each document to find them, and which of them stay.

Equal means equal but for white space and case. Nearly equal is by MinHash (Broder 1997, "On the resemblance and containment
of documents"): SIGNATURE minima of hashed sets of five consecutive words estimate the Jaccard similarity of two documents;
pairs that may reach the threshold are found by BANDS bands of the signature (Indyk & Motwani 1998; Leskovec, Rajaraman &
Ullman, "Mining of Massive Datasets", section 3.4). The first document in order stays, whoever has worked on it.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lm_train.data.order import mix64

SIGNATURE, BANDS = 128, 16
"""Hashes of a signature; its bands, of 8 hashes each. A pair of similarity s meets in some band with probability
1 - (1 - s^8)^16: 0.06 at 0.5, 0.95 at 0.8, 0.9999 at 0.9."""
WORDS = 5
"""Consecutive words of an element of the set; a shorter text is one element."""
KEY_BYTES = 16
_ROWS = SIGNATURE // BANDS
_CHUNK = 1 << 10
"""Elements that are hashed together: the table stays in the processor's cache."""
_IDEOGRAPHS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(rf"[{_IDEOGRAPHS}]|[^\W{_IDEOGRAPHS}]+")
"""Where words are not separated, each character counts as one."""

Keys = npt.NDArray[np.uint64]
Signatures = npt.NDArray[np.uint32]


def key_of_text(text: str) -> bytes:
    """16-byte BLAKE2b of the text in Unicode's NFC and lower case, each run of white space as one space.

    >>> key_of_text("One  line\\n") == key_of_text("one line")
    True
    """
    normal = " ".join(unicodedata.normalize("NFC", text).lower().split())
    return hashlib.blake2b(normal.encode("utf-8", "surrogatepass"), digest_size=KEY_BYTES).digest()


def elements(text: str) -> Keys:
    """Hashes of each WORDS consecutive words of the text, (n,), with repetitions; none for a text without words."""
    words = _WORD.findall(text.lower())
    hashes = np.array([_word_hash(word) for word in words], dtype=np.uint64)
    if len(words) <= WORDS:
        return mix64(np.array([_combined(hashes)], dtype=np.uint64)) if words else hashes
    result = hashes[: len(words) - WORDS + 1].copy()
    for k in range(1, WORDS):
        result = mix64(result) + hashes[k : len(words) - WORDS + 1 + k]
    return mix64(result)


def signature(text: str) -> Signatures:
    """The minimum of each of SIGNATURE hash functions over the text's elements: (SIGNATURE,); all ones without elements."""
    return signature_of(elements(text))


def signature_of(hashed: Keys) -> Signatures:
    """The signature of hashed elements; h_i(x) = a_i x + b_i modulo 2^32 with odd a_i, a permutation of 32-bit numbers: linear
    ones do for min-wise hashing (Broder, Charikar, Frieze & Mitzenmacher 2000, section 5)."""
    factors, offsets = _functions()
    result = np.full(SIGNATURE, 2**32 - 1, dtype=np.uint32)
    halves = (hashed >> np.uint64(32)).astype(np.uint32)
    for start in range(0, len(halves), _CHUNK):
        values = np.multiply.outer(factors, halves[start : start + _CHUNK])
        values += offsets[:, None]
        np.minimum(result, values.min(axis=1), out=result)
    return result


def bands_of(signatures: Signatures) -> Keys:
    """One key for each band of each signature: (n, BANDS) of (n, SIGNATURE)."""
    parts = signatures.reshape(len(signatures), BANDS, _ROWS).astype(np.uint64)
    keys = np.broadcast_to(np.arange(BANDS, dtype=np.uint64), parts.shape[:2])
    for row in range(_ROWS):
        keys = mix64(keys ^ parts[:, :, row])
    return keys


def similarity(one: Signatures, others: Signatures) -> npt.NDArray[np.float64]:
    """Estimated Jaccard similarity of one document, (SIGNATURE,), with others, (n, SIGNATURE): (n,)."""
    return (one == others).mean(axis=-1)


class Duplicate(NamedTuple):
    """A document that goes, and the earlier one that stays; by their numbers."""

    number: int
    first: int


def equal(keys: npt.NDArray[np.uint8], live: npt.NDArray[np.bool_]) -> list[Duplicate]:
    """Which of the live documents equal an earlier live one.

    Args:
        keys: of all documents, (n, 16); 16 bytes a document, and as many again while they are sorted.
        live: the documents that are still there, (n,).
    """
    numbers = np.flatnonzero(live)
    pairs = np.ascontiguousarray(keys[numbers]).view("<u8")
    order = np.lexsort((pairs[:, 1], pairs[:, 0]))  # stable: equal ones stay in their order
    same = (pairs[order[1:]] == pairs[order[:-1]]).all(axis=1)
    heads = np.concatenate([[0], np.flatnonzero(~same) + 1]) if len(order) else np.array([], dtype=np.int64)
    first = np.repeat(heads, np.diff(np.append(heads, len(order))))
    going = np.flatnonzero(np.arange(len(order)) != first)
    found = zip(numbers[order[going]].tolist(), numbers[order[first[going]]].tolist(), strict=True)
    return [Duplicate(*pair) for pair in sorted(found)]


def nearly_equal(
    band: Callable[[int], Keys],
    signature_at: Callable[[int], Signatures],
    live: npt.NDArray[np.bool_],
    threshold: float,
) -> list[Duplicate]:
    """Which of the live documents are nearly equal to an earlier one that stays, taken in order.

    Only documents that share a band with another are looked at one by one. Memory: 24 bytes for each document while one
    band is sorted, and about 3 kB for each that shares a band and stays.

    Args:
        band: the keys of a band, (n,).
        signature_at: the signature of a document, asked in ascending order.
        live: the documents that are still there, (n,).
        threshold: estimated Jaccard similarity from which on a document goes.
    """
    sharing = np.zeros(len(live), dtype=bool)
    numbers = np.flatnonzero(live)
    for i in range(BANDS):
        keys = band(i)[numbers]
        order = np.argsort(keys, kind="stable")
        same = keys[order[1:]] == keys[order[:-1]]
        sharing[numbers[order[1:][same]]] = True
        sharing[numbers[order[:-1][same]]] = True
    found: list[Duplicate] = []
    staying: list[Signatures] = []
    names: list[int] = []
    buckets: list[dict[int, list[int]]] = [{} for _ in range(BANDS)]
    for number in np.flatnonzero(sharing).tolist():
        own = signature_at(number)
        keys = bands_of(own[None])[0].tolist()
        met = sorted({place for bucket, key in zip(buckets, keys, strict=True) for place in bucket.get(key, ())})
        if met:
            close = similarity(own, np.stack([staying[place] for place in met])) >= threshold
            if close.any():
                found.append(Duplicate(number, names[met[int(close.argmax())]]))
                continue
        for bucket, key in zip(buckets, keys, strict=True):
            bucket.setdefault(key, []).append(len(names))
        names.append(number)
        staying.append(own.copy())
    return found


def _combined(hashes: Keys) -> int:
    result = np.zeros(1, dtype=np.uint64)
    for value in hashes:
        result = mix64(result) + value
    return int(result[0])


@lru_cache(maxsize=1 << 18)
def _word_hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


@lru_cache(maxsize=1)
def _functions() -> tuple[Signatures, Signatures]:
    """Odd factors and offsets, by SplitMix64 of their number."""
    numbers = (mix64(np.arange(2 * SIGNATURE, dtype=np.uint64)) >> np.uint64(32)).astype(np.uint32)
    return numbers[:SIGNATURE] | np.uint32(1), numbers[SIGNATURE:]

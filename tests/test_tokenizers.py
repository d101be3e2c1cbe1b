"""Tokenizers: the same ids as the reference, nothing lost on the way back, and one line where files are wrong."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from lm_train.data.tokenizer import (
    END_OF_TEXT,
    end_of_text_id,
    load_tokenizer,
    make_char_tokenizer,
    train_bpe,
    vocabulary_size,
)
from lm_train.errors import DataError
from tests.text_data import SHARED, corpus_of, ids_of

GPT2 = SHARED / "data" / "gpt2-bpe"
SAMPLES = [
    "Hello world, it's 2024!  Two  spaces\n\n\nthree lines\t\ttabs\r\n",
    "déjà vu — naïve café; 世界 こんにちは мир שלום",
    "emoji 👩‍👩‍👧‍👦🏽 and \x00\x01\x7f control, \u00a0 nbsp \u200b zero width",
    "def f(x):\n    return x**2  # comment\n\n\nclass A:\n\tpass",
    "#version 12 # # ## '' ' 's 'll 'LL  ",
    "a" * 300 + "\n" * 70 + " " * 50,
    "",
]


def loaded(name: str | Path) -> Tokenizer:
    tokenizer = load_tokenizer(str(name))
    assert tokenizer is not None
    return tokenizer


def random_text(n: int, seed: int) -> str:
    draw = random.Random(seed)
    ranges = [(0x20, 0x7F), (0x09, 0x0E), (0xA0, 0x250), (0x4E00, 0x4F00), (0x1F600, 0x1F640), (0, 0x20)]
    return "".join(chr(draw.randrange(*draw.choice(ranges))) for _ in range(n))


def round_trip(tokenizer: Tokenizer, text: str) -> str:
    return tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids, skip_special_tokens=False)


def test_gpt2_files_give_transformers_ids(tmp_path: Path) -> None:
    if not GPT2.is_dir():
        pytest.skip(f"no GPT-2 vocabulary at {GPT2}")
    from transformers import GPT2Tokenizer

    (tmp_path / "vocab.json").symlink_to(GPT2 / "encoder.json")
    (tmp_path / "merges.txt").symlink_to(GPT2 / "vocab.bpe")
    reference = GPT2Tokenizer.from_pretrained(str(tmp_path))
    for tokenizer in (loaded(GPT2), loaded(tmp_path)):
        assert vocabulary_size(tokenizer) == 50257
        assert end_of_text_id(tokenizer) == 50256
        for text in [*SAMPLES, random_text(3000, 1)]:
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            assert ids == reference.encode(text, add_special_tokens=False)
            assert round_trip(tokenizer, text) == text
    assert loaded(GPT2).encode("Hello world").ids == [15496, 995], "the published ids"


@pytest.mark.parametrize("text", [*SAMPLES, random_text(2000, 2)])
def test_bytes_lose_nothing(text: str) -> None:
    tokenizer = loaded("bytes")
    assert vocabulary_size(tokenizer) == 257
    assert round_trip(tokenizer, text) == text
    assert len(tokenizer.encode(text).ids) == len(text.encode())


@pytest.mark.parametrize("text", [*SAMPLES[:-1], "\n\n", "a\n\n\nb\r\n\r\n", random_text(2000, 3)])
def test_chars_lose_nothing_and_are_one_id_each(text: str) -> None:
    tokenizer = make_char_tokenizer([text[: len(text) // 2], text[len(text) // 2 :]])
    assert vocabulary_size(tokenizer) == len(set(text))
    ids = tokenizer.encode(text).ids
    assert ids == [sorted(set(text)).index(c) for c in text]
    assert round_trip(tokenizer, text) == text
    assert end_of_text_id(tokenizer) is None


def test_chars_of_nothing() -> None:
    with pytest.raises(DataError, match="no text"):
        make_char_tokenizer([])


@pytest.mark.parametrize("text", [*SAMPLES, random_text(2000, 4)])
def test_a_trained_bpe_repeats_and_loses_nothing_even_of_other_text(text: str) -> None:
    draw = random.Random(0)
    corpus = [" ".join(draw.choice(["über", "model", "reads", "loss", "an", "x"]) + "s" for _ in range(300))]
    corpus += ["".join(draw.choices("etaoin shrdlu", k=3000))]
    first, second = train_bpe(corpus, 320), train_bpe(iter(corpus), 320)
    assert first.to_str() == second.to_str()
    assert vocabulary_size(first) == 320
    assert end_of_text_id(first) == 0
    assert round_trip(first, text) == text
    assert len(first.encode(corpus[0]).ids) < len(corpus[0]) / 2, "it learnt nothing"


def test_an_error_in_the_corpus_ends_the_training_as_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "a.txt").write_bytes(b"good " * 50_000 + b"\xff" + b"good " * 50_000)
    for tokenizer in ("bpe:300", "chars"):
        with pytest.raises(DataError, match="not UTF-8 text at byte 250000"):
            corpus_of(tmp_path / "a.txt", tokenizer=tokenizer)


def test_a_tokenizer_file_of_another_family(tmp_path: Path) -> None:
    vocab = {"[UNK]": 0, "a": 1, "b": 2, "</s>": 3}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=16)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    for name in (tmp_path / "tokenizer.json", tmp_path):
        found = loaded(name)
        assert end_of_text_id(found) == 3
        assert found.encode("a b a b a b").ids == [1, 2] * 3, "meant for a network's input, it would cut a corpus"


def test_a_vocabulary_with_gaps_is_as_large_as_its_largest_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 70_000}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "t.json"))
    (tmp_path / "a.txt").write_text("a b " * 10)
    corpus = corpus_of(tmp_path / "a.txt", tokenizer=str(tmp_path / "t.json"))
    assert vocabulary_size(corpus.tokenizer) == 70_001
    assert set(ids_of(corpus, "train")) == {0, 70_000}


def test_the_word_end_of_text_is_its_own_id_in_every_byte_vocabulary() -> None:
    for tokenizer in (loaded("bytes"), train_bpe(["abc"], 300)):
        assert tokenizer.encode(END_OF_TEXT).ids == [end_of_text_id(tokenizer)]


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "has neither tokenizer.json, nor encoder.json and vocab.bpe"),
        ({"tokenizer.json": "{}"}, "tokenizer.json is not a tokenizer.json"),
        ({"encoder.json": "{broken", "vocab.bpe": ""}, "Expecting property name"),
        ({"encoder.json": '{"a": 0}'}, "vocab.bpe"),
        ({"encoder.json": '{"a": 0}', "vocab.bpe": "#version: 0.2\nx y\n"}, "do not fit each other"),
        ({"encoder.json": json.dumps([1, 2]), "vocab.bpe": ""}, "do not fit each other"),
    ],
)
def test_wrong_files_are_told_in_one_line(files: dict[str, str], said: str, tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError) as caught:
        load_tokenizer(str(tmp_path))
    assert said in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)

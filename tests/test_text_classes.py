"""Labelled texts: what becomes of rows, which batches come, and one line for everything that is wrong with them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from lm_train.data import TextClassDataModule, build, documentation
from lm_train.data.classes import class_names
from lm_train.data.labelled_texts import LabelledTexts, prepare_texts
from lm_train.data.text_classes import WINDOW, BucketBatches, TextSamples
from lm_train.errors import CheckpointError, DataError, UsageError
from lm_train.plan import known_facts
from lm_train.recipe import Recurrent, TextClassData, load
from lm_train.runs import RunFolder
from tests.small_runs import save_something
from tests.text_data import corpus_of, ids_of, plan_of

Row = dict[str, Any]


def rows_of(n: int, seed: int = 0) -> list[Row]:
    """Texts of 1 to 30 of thirty words in the classes a (2/3) and b (1/3), all different."""
    draw = random.Random(seed)
    return [
        {
            "text": " ".join((f"n{i}", *(f"w{draw.randint(0, 30)}" for _ in range(draw.randint(0, 29))))),
            "label": "aab"[i % 3],
        }
        for i in range(n)
    ]


def write(file: Path, rows: list[Row]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def texts_of(file: Path, **section: Any) -> LabelledTexts:
    return prepare_texts(TextClassData(path=str(file), **({"min_frequency": 1} | section)))


def words_in(texts: LabelledTexts, split: str) -> list[str]:
    part = texts.splits[split]  # type: ignore[index]
    return [
        " ".join(texts.tokenizer.id_to_token(i) for i in part.ids[start:end])
        for start, end in zip(part.starts, part.starts[1:], strict=False)
    ]


@pytest.fixture
def two_splits(tmp_path: Path, cache: Path) -> Path:
    write(tmp_path / "set" / "train.jsonl", rows_of(200))
    write(tmp_path / "set" / "test.jsonl", rows_of(20, seed=1))
    return tmp_path / "set"


def module_of(path: Path, **section: Any) -> TextClassDataModule:
    options: dict[str, Any] = {"min_frequency": 1} | section
    module = build(
        TextClassData(path=str(path), **options), plan_of(micro=8, steps=100), 1, RunFolder(path.with_name("run"))
    )
    assert isinstance(module, TextClassDataModule)
    module.prepare(Recurrent())
    return module


def test_texts_come_whole_with_their_labels(two_splits: Path) -> None:
    texts = texts_of(two_splits)
    assert texts.class_names == ("a", "b")
    train, val, test = (words_in(texts, split) for split in ("train", "val", "test"))
    assert (len(train), len(val), len(test)) == (180, 20, 20)
    expected = {row["text"]: row["label"] for row in rows_of(200)}
    for split, found in (("train", train), ("val", [])):
        labels = texts.splits[split].labels  # type: ignore[index]
        for text, label in zip(found, labels, strict=False):
            assert expected[text] == "ab"[label]
    assert np.bincount(texts.splits["val"].labels).tolist() == [13, 7], "of each class the same share"


def test_a_part_of_an_evaluation_shows_all_classes(tmp_path: Path, cache: Path) -> None:
    rows = sorted(rows_of(300), key=lambda row: row["label"])
    module = module_of(write(tmp_path / "rows.jsonl", rows))
    assert set(module.evaluation_batches("val", 0)[0]["labels"].tolist()) == {0, 1}


def test_the_vocabulary_knows_the_training_texts_only(tmp_path: Path, cache: Path) -> None:
    rows = [{"text": "common rare", "label": "x"}, {"text": "common, common!", "label": "y"}] * 3
    rows[0] = {"text": "once common", "label": "x"}
    write(tmp_path / "set" / "train.jsonl", rows)
    write(tmp_path / "set" / "val.jsonl", [{"text": "common unseen", "label": "x"}])
    texts = texts_of(tmp_path / "set", min_frequency=2)
    assert sorted(texts.tokenizer.get_vocab()) == ["!", ",", "<pad>", "<unk>", "<|endoftext|>", "common", "rare"]
    assert words_in(texts, "val") == ["common <unk>"]
    two = texts_of(tmp_path / "set", tokenizer="words:2")
    assert words_in(two, "train")[3] == "common <unk> common !"


@pytest.mark.parametrize("tokenizer", ["chars", "bytes", "bpe:300"])
def test_any_tokenizer_has_a_padding(two_splits: Path, tokenizer: str) -> None:
    module = module_of(two_splits, tokenizer=tokenizer, max_length=12)
    batch = module.evaluation_batches("test", 0)[0]
    assert batch["tokens"].shape[1] <= 12
    short = batch["lengths"] < batch["tokens"].shape[1]
    assert module.facts.pad_id is not None
    assert module.facts.vocab_size is not None
    assert 0 <= module.facts.pad_id < module.facts.vocab_size
    assert (batch["tokens"][short][:, -1] == module.facts.pad_id).all()


def test_cleaning_and_missing_texts(tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [*rows_of(30), {"text": None, "label": "a"}, {"text": "<br>", "label": "b"}, {"text": "x", "label": None}]
    rows[1]["text"] = "<b>Bold</b>  text"
    file = write(tmp_path / "rows.jsonl", rows)
    cleaning = ("html", "whitespace", "lowercase")
    dropped = texts_of(file, missing="drop", cleaning=cleaning)
    assert sum(map(len, dropped.splits.values())) == 30
    assert "missing values: 3 of 33 rows, dropped" in dropped.remarks
    assert "cleaning, html: changed 2 of 33 texts" in dropped.remarks
    assert "bold text" in [text for split in ("train", "val") for text in words_in(dropped, split)]
    kept = texts_of(write(tmp_path / "rows.jsonl", rows[:-1]), missing="empty", cleaning=cleaning)
    assert sum(map(len, kept.splits.values())) == 32
    assert min(part.lengths.min() for part in kept.splits.values()) == 1
    module_of(file, missing="drop")
    assert capsys.readouterr().err.count("missing values: 1 of 32 rows, dropped") == 1


def test_pairs_are_joined_by_a_separator(tmp_path: Path, cache: Path) -> None:
    rows = [{"premise": f"p{i} p", "hypothesis": f"h{i}", "label": i % 2} for i in range(20)]
    file = write(tmp_path / "rows.jsonl", rows)
    texts = texts_of(file, text_column="premise", pair_column="hypothesis")
    assert texts.class_names == ("0", "1")
    assert words_in(texts, "train")[0] in {f"p{i} p <|endoftext|> h{i}" for i in range(20)}
    short = texts_of(file, text_column="premise", pair_column="hypothesis", max_length=3)
    assert {len(text.split()) for text in words_in(short, "train")} == {3}
    with pytest.raises(DataError, match="no end-of-text symbol"):
        texts_of(file, text_column="premise", pair_column="hypothesis", tokenizer="chars")


def test_folds_validate_every_text_once(two_splits: Path) -> None:
    folds = [texts_of(two_splits, folds=3, fold=fold) for fold in (1, 2, 3)]
    assert sum(len(texts.splits["val"]) for texts in folds) == 200
    assert all(len(texts.splits["train"]) + len(texts.splits["val"]) == 200 for texts in folds)


def test_the_same_texts_are_tokenised_once(two_splits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = texts_of(two_splits)
    monkeypatch.setattr("lm_train.data.labelled_texts._make", None)
    again = texts_of(two_splits)
    assert again.fingerprint == first.fingerprint
    assert words_in(again, "test") == words_in(first, "test")
    monkeypatch.undo()
    assert texts_of(two_splits, cleaning=("lowercase",)).fingerprint != first.fingerprint


def test_duplicates_across_splits_are_told_once(two_splits: Path) -> None:
    rows = rows_of(200)
    write(two_splits / "test.jsonl", [*rows_of(5, seed=2)[1:], {"text": rows[7]["text"] + " ", "label": "b"}])
    told = [remark for remark in texts_of(two_splits).remarks if "stand" in remark]
    (line,) = [remark for remark in told if "test texts stand in the" in remark]
    assert line.startswith("1 of 5 test texts")
    assert "test.jsonl line 5, as" in line
    assert "train.jsonl line 8" in line


GOOD = [{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(20)]


@pytest.mark.parametrize(
    ("row", "section", "message"),
    [
        ({"txt": "x", "label": "a"}, {}, "line 21: no column 'text'; it has txt, label; did you mean data.text_column=txt?"),
        ({"text": "x", "labl": "a"}, {"label_column": "label"}, "line 21: no column 'label'"),
        ({"text": "x", "kind": "a"}, {}, "line 21: no column label, labels, class, target"),
        ({"text": "x", "label": None}, {}, "line 21: label is missing; data.missing=drop"),
        ({"text": "x", "label": [1]}, {}, r"line 21: label is \[1\], expected a class"),
        ({"text": None, "label": "a"}, {}, "line 21: text is missing"),
        ({"text": " \x00 ", "label": "a"}, {}, r"line 21: no text is left after cleaning \(control, unicode, whitespace\)"),
        ({"text": 5, "label": "a"}, {}, "line 21: text is 5, expected text"),
        ({"text": "\ud83d", "label": "a"}, {"cleaning": ()}, "line 21: text has half a character"),
    ],
)  # fmt: skip
def test_a_bad_row_is_named(tmp_path: Path, cache: Path, row: Row, section: dict[str, Any], message: str) -> None:
    file = write(tmp_path / "rows.jsonl", [*GOOD, row])
    with pytest.raises(DataError, match=message) as raised:
        texts_of(file, **section)
    assert str(raised.value).startswith(str(file))
    assert "\n" not in str(raised.value)


def test_bad_classes_are_named(tmp_path: Path, cache: Path) -> None:
    one = write(tmp_path / "one.jsonl", [row | {"label": "a"} for row in GOOD])
    with pytest.raises(DataError, match="only one class, 'a'"):
        texts_of(one)
    file, test = write(tmp_path / "rows.jsonl", GOOD), write(tmp_path / "further.jsonl", [{"text": "x", "label": "B"}])
    with pytest.raises(
        DataError, match=r"further.jsonl line 1: label 'B' of the test split is not among .* did you mean 'b'"
    ):
        texts_of(file, test_path=str(test))
    for place in ("full/1.txt", "also/1.txt"):
        (tmp_path / "folders" / place).parent.mkdir(parents=True)
        (tmp_path / "folders" / place).write_text("some words")
    (tmp_path / "folders" / "empty").mkdir()
    for beside in ("empty/readme.md", "__MACOSX/._full"):
        with pytest.raises(DataError, match="folders/empty: a class without a text"):
            texts_of(tmp_path / "folders")
        (tmp_path / "folders" / beside).parent.mkdir(exist_ok=True)
        (tmp_path / "folders" / beside).write_text("no text of a class")


def test_a_batch_larger_than_the_set(two_splits: Path) -> None:
    module = build(TextClassData(path=str(two_splits)), plan_of(micro=512), 1, RunFolder(two_splits.with_name("run")))
    with pytest.raises(DataError, match="180 training texts are fewer than one batch of"):
        module.prepare(Recurrent())


def test_each_text_comes_once_in_an_epoch_whatever_the_ranks(two_splits: Path) -> None:
    module = module_of(two_splits, token_dropout=0.2)
    samples = TextSamples(module.texts.splits["train"], module.pad_id, dropped=0.2, seed=1, unknown=1)

    def step(world: int, micro: int, accumulate: int, number: int) -> tuple[list[list[int]], float]:
        plan = plan_of(world=world, micro=micro, accumulate=accumulate, steps=60)
        rows, total = [], 0.0
        for part in range(accumulate):
            for rank in range(world):
                batch = BucketBatches(samples, plan, rank, seed=1, start_step=0)[number * accumulate + part]
                total = batch["total"]
                rows += [row[:n].tolist() for row, n in zip(batch["tokens"], batch["lengths"].tolist(), strict=True)]
        return rows, total

    # 240 = 15 x 16 texts a window; 3 windows hold 4 epochs of 180
    for number in (0, 7, 31):
        assert step(1, 15, 1, number) == step(3, 5, 1, number) == step(1, 5, 3, number)
    batches = BucketBatches(samples, plan_of(micro=15, steps=60), 0, seed=1, start_step=0)
    orders = [batches._sorted(window)[1] for window in range(3)]
    assert np.bincount(np.concatenate(orders)).tolist() == [4] * 180
    assert len(orders[0]) == 15 * WINDOW
    later = BucketBatches(samples, plan_of(micro=15, steps=60), 0, seed=1, start_step=31)
    assert torch.equal(later[0]["tokens"], batches[31]["tokens"])


def test_batches_hold_texts_of_about_one_length(two_splits: Path) -> None:
    module = module_of(two_splits)
    train = module.train_batches(0)
    filled = sum(int(train[i]["lengths"].sum()) for i in range(40))
    places = sum(train[i]["tokens"].numel() for i in range(40))
    assert filled / places > 0.9
    longest = [int(train[i]["lengths"].max()) for i in range(WINDOW)]
    assert longest not in (sorted(longest), sorted(longest, reverse=True)), "not from short to long"


def test_dropped_tokens_are_keyed_by_epoch_and_text(two_splits: Path) -> None:
    module = module_of(two_splits)
    samples = TextSamples(module.texts.splits["train"], module.pad_id, dropped=0.3, seed=1, unknown=1)
    chosen, epochs = np.arange(100), np.zeros(100, dtype=np.int64)
    first = samples.batch(chosen, epochs)["tokens"]
    alone = samples.batch(chosen[40:41], epochs[:1])["tokens"][0]
    assert torch.equal(alone, first[40, : len(alone)])
    assert not torch.equal(first, samples.batch(chosen, epochs + 1)["tokens"])
    whole = samples.batch(chosen, None)
    kept = whole["tokens"] != module.pad_id
    assert float((first[kept] == 1).double().mean()) == pytest.approx(0.3, abs=0.05)
    assert (first[~kept] == module.pad_id).all()
    assert not (whole["tokens"] == 1).any(), "an evaluation drops nothing"


def test_balanced_classes_weigh_the_same(two_splits: Path) -> None:
    module = module_of(two_splits, class_weights="balanced")
    labels = module.texts.splits["train"].labels
    batch = module.train_batches(0)[0]
    counts = np.bincount(labels)
    expected = (180 / (2 * counts))[batch["labels"].numpy()]
    np.testing.assert_allclose(batch["weights"].numpy(), expected, rtol=1e-6)
    assert batch["total"] == pytest.approx(expected.sum())
    assert "weights" not in module.evaluation_batches("val", 0)[0]


def test_what_later_use_of_the_model_needs_is_left(two_splits: Path) -> None:
    run = RunFolder(two_splits.with_name("run"))
    module_of(two_splits, max_length=9).leave(run)
    left = json.loads(run.preprocessing.read_text())
    assert left["class_names"] == ["a", "b"]
    assert left["max_length"] == 9
    assert left["cleaning"] == ["control", "unicode", "whitespace"]
    assert json.loads(run.tokenizer.read_text())["truncation"] is None


def test_what_a_start_without_a_checkpoint_left_is_written_anew(two_splits: Path) -> None:
    run = RunFolder(two_splits.with_name("run"))
    module_of(two_splits, tokenizer="bytes", cleaning=["lowercase"]).leave(run)
    now = module_of(two_splits, tokenizer="chars")
    now.leave(run)
    assert Tokenizer.from_file(str(run.tokenizer)).get_vocab() == now.texts.tokenizer.get_vocab()
    assert json.loads(run.preprocessing.read_text())["cleaning"] == ["control", "unicode", "whitespace"]
    save_something(run)
    run.preprocessing.write_text(json.dumps(json.loads(run.preprocessing.read_text())))
    now.leave(run)
    with pytest.raises(CheckpointError, match=r"tokenizer.json: the run began with other data"):
        module_of(two_splits, tokenizer="bytes").leave(run)


@pytest.mark.parametrize("damage", [lambda file: file.unlink(), lambda file: file.write_bytes(b"PK\x03\x04torn")])
@pytest.mark.parametrize("name", ["train.npz", "tokenizer.json", "meta.json"])
def test_a_damaged_cache_is_made_again(two_splits: Path, cache: Path, name: str, damage: Any) -> None:
    first = texts_of(two_splits)
    damage(cache / "lm_train" / "texts" / first.fingerprint / name)
    again = texts_of(two_splits)
    np.testing.assert_array_equal(again.splits["train"].ids, first.splits["train"].ids)
    assert again.tokenizer.to_str() == first.tokenizer.to_str()


def test_folds_say_that_the_own_validation_split_is_not_used(two_splits: Path) -> None:
    write(two_splits / "val.jsonl", rows_of(20, seed=2))
    texts = texts_of(two_splits, folds=4, fold=1)
    assert "data.folds: the source's own 20 validation texts are not used" in texts.remarks


@pytest.mark.parametrize("word", ["min_frequency=3", "token_dropout=0.2"])
def test_what_a_tokenizer_without_unknown_words_would_not_heed(word: str) -> None:
    with pytest.raises(UsageError, match=f"{word.split('=')[0]}.*; set data.tokenizer=words:20000, or drop"):
        load(["recipe=lstm_news", f"data.{word}", "data.tokenizer=bytes"])


def test_a_class_of_two_dashes_is_a_name() -> None:
    assert class_names(["--1", "-1", "2"]) == ("--1", "-1", "2")


def test_the_embedded_set(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    facts = known_facts(load(["recipe=lstm_news", "data.path=null"]))
    assert facts.n_outputs == len(documentation.AREAS)
    monkeypatch.setattr(documentation, "AREAS", {"text": "textwrap difflib string", "files": "shutil tempfile zipfile"})
    texts = prepare_texts(TextClassData())
    assert texts.class_names == ("files", "text")
    again = documentation.documentation()
    train, test = ([row["text"] for row, _ in again.splits[split]()] for split in ("train", "test"))
    assert not set(train) & set(test)
    assert 0.1 < len(test) / len(train) < 0.5
    assert any("Wrap a single paragraph of text" in text for text in train + test)


def test_words_are_a_vocabulary_for_running_text_too(text_file: Path) -> None:
    corpus = corpus_of(text_file, tokenizer="words:5")
    ids = ids_of(corpus, "train")
    assert max(ids) == 7
    assert corpus.tokenizer.id_to_token(3) == "."

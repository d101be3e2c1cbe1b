"""Images: the same samples from every layout, decoded once, normalised by the training set; bad data named with its place."""

from __future__ import annotations

import gzip
import json
import re
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

from lm_train.data import Batch, image_cache
from lm_train.data.image_files import read_idx, table_rows
from lm_train.data.image_source import ImageSource, open_images
from lm_train.data.images import balanced_weights
from lm_train.data.loading import TimedLoader, make_loader
from lm_train.errors import CheckpointError, DataError, UsageError
from lm_train.recipe import ImageData, load
from lm_train.runs import RunFolder
from tests.image_data import (
    image_plan,
    png,
    prepared_images,
    random_images,
    write_folders,
    write_idx,
    write_idx_set,
    write_parquet,
)
from tests.small_runs import save_something
from tests.text_data import SHARED

pytestmark = pytest.mark.usefixtures("cache")
NAMES = ("ant", "bee", "cat")


def labels_of(n: int) -> list[int]:
    return [i % 3 for i in range(n)]


# every layout


@pytest.mark.parametrize("end", ["", ".gz"])
def test_idx(tmp_path: Path, end: str) -> None:
    images, labels = random_images(30), labels_of(30)
    write_idx_set(tmp_path / "set", images, labels, end=end)
    write_idx_set(tmp_path / "set", images[:6] ^ 255, labels[:6], "t10k", end)
    module = prepared_images(tmp_path / "set", tmp_path / "run", val_fraction=0.2)
    assert module.facts.input_shape == (1, 6, 5)
    assert module.class_names == ("0", "1", "2")
    assert [len(module.samples[s]) for s in ("train", "val", "test")] == [24, 6, 6]
    stored = module.samples["train"]
    assert np.array_equal(stored.pixels[:, 0], images)
    assert module.samples["test"].labels.tolist() == labels[:6]
    assert module.size_in_words() == "24 training images"
    assert module.epoch(12) == 1.0  # 12 steps of 2 samples


def test_the_same_images_in_every_layout(tmp_path: Path) -> None:
    images, labels = random_images(18, channels=3), labels_of(18)
    encoded = [png(image) for image in images]
    write_parquet(tmp_path / "hub/data/train-00000-of-00002.parquet", encoded[:10], labels[:10], NAMES)
    write_parquet(tmp_path / "hub/data/train-00001-of-00002.parquet", encoded[10:], labels[10:], NAMES)
    write_parquet(tmp_path / "hub/data/test-00000-of-00001.parquet", encoded[:3], labels[:3], NAMES)
    names = [NAMES[label] for label in labels]
    write_folders(tmp_path / "folders", images, names)
    write_folders(tmp_path / "split/train", images, names)
    write_folders(tmp_path / "split/validation", images[:4], names[:4])
    (tmp_path / "split/README.md").write_text("about")
    found = {}
    for layout in ("hub", "folders", "split"):
        module = prepared_images(tmp_path / layout, tmp_path / f"run-{layout}")
        assert module.class_names == NAMES
        assert module.facts.n_outputs == 3
        assert len(module.samples["train"]) == (18 if layout == "split" else 15)
        found[layout] = sorted(image.tobytes() for image in module.samples["train"].pixels)
    expected = sorted(np.ascontiguousarray(image.transpose(2, 0, 1)).tobytes() for image in images)
    assert found == dict.fromkeys(found, expected)


def test_folder_labels_follow_the_folders(tmp_path: Path) -> None:
    images = random_images(9)
    classes = ["bee", "ant", "bee", "cat", "ant", "cat", "ant", "bee", "cat"]
    module = prepared_images(write_folders(tmp_path / "set", images, classes), tmp_path / "run")
    by_pixels = {image.tobytes(): name for image, name in zip(images, classes, strict=True)}
    for split in ("train", "val"):
        samples = module.samples[split]
        for number, label in zip(samples.numbers, samples.labels, strict=True):
            assert by_pixels[samples.pixels[number].tobytes()] == NAMES[label]


def test_a_class_named_like_a_split(tmp_path: Path) -> None:
    write_folders(tmp_path / "set", random_images(6), ["car", "train"] * 3)
    assert prepared_images(tmp_path / "set", tmp_path / "run").class_names == ("car", "train")


def test_digits_need_no_file(tmp_path: Path) -> None:
    module = prepared_images(None, tmp_path / "run")
    assert module.facts.input_shape == (1, 8, 8)
    assert module.class_names == tuple("0123456789")
    table, labels = load_digits(return_X_y=True)
    seen = [image for split in ("train", "test") for image in module.samples[split].pixels.reshape(-1, 64)]
    assert sorted(map(bytes, seen)) == sorted(row.astype(np.uint8).tobytes() for row in table)
    shares = np.bincount(module.samples["test"].labels) / np.bincount(labels)
    assert (abs(shares - 0.2) < 0.01).all()


def test_table_of_datasets(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "a.parquet", [png(i) for i in random_images(5)], [0, 1, 2, 0, 1], NAMES, "image")
    table = datasets.Dataset.from_parquet(str(file), cache_dir=str(tmp_path / "cache"))
    rows, names = table_rows(table, ImageData(), "own/set train")
    assert names == NAMES
    assert [row.label for row in rows()] == [0, 1, 2, 0, 1]
    assert next(rows()).where == "own/set train row 1"


def test_named_validation_and_test(tmp_path: Path) -> None:
    images = random_images(12)
    write_idx_set(tmp_path / "a", images, labels_of(12))
    write_idx_set(tmp_path / "b", images[:6] ^ 255, labels_of(6), "other")
    write_parquet(tmp_path / "c.parquet", [png(i) for i in images[:2] ^ 127], [0, 1], ["2", "0", "1"])
    module = prepared_images(
        tmp_path / "a", tmp_path / "run", val_path=str(tmp_path / "b"), test_path=str(tmp_path / "c.parquet")
    )
    assert [len(module.samples[s]) for s in ("train", "val", "test")] == [12, 6, 2]
    assert module.samples["test"].labels.tolist() == [2, 0], "classes go by their names"


def test_folds_divide_the_training_images(tmp_path: Path) -> None:
    write_idx_set(tmp_path / "set", random_images(30), labels_of(30))
    parts = [prepared_images(tmp_path / "set", tmp_path / f"run{i}", folds=3, fold=i) for i in (1, 2, 3)]
    held_out = [number for module in parts for number in module.samples["val"].numbers.tolist()]
    assert sorted(held_out) == list(range(30))
    assert len({module.fingerprint for module in parts}) == 3


def test_sizes_and_channels(tmp_path: Path) -> None:
    write_folders(tmp_path / "set", random_images(4, channels=3), ["ant", "bee"] * 2)
    (tmp_path / "set/ant/large.png").write_bytes(png(random_images(1, 9, 9)[0]))
    with pytest.raises(DataError, match=r"large.png: 9 x 9 pixels .* has 6 x 5; .* data.image_size=N"):
        prepared_images(tmp_path / "set", tmp_path / "run")
    with pytest.raises(DataError, match=r"large.png: grey, but .*0000.png is coloured; say data.channels=1"):
        prepared_images(tmp_path / "set", tmp_path / "run", image_size=8)
    for channels in (1, 3):
        module = prepared_images(tmp_path / "set", tmp_path / f"run{channels}", image_size=8, channels=channels)
        assert module.facts.input_shape == (channels, 8, 8)


# what a batch holds


def test_normalised_by_the_training_images(tmp_path: Path) -> None:
    write_folders(tmp_path / "set", random_images(40, channels=3) // 2, ["ant", "bee"] * 20)
    module = prepared_images(tmp_path / "set", tmp_path / "run", val_fraction=0.25)
    train = module.samples["train"]
    inputs = train.batch(np.arange(len(train)), np.zeros(len(train), dtype=np.int64))["inputs"].double()
    torch.testing.assert_close(inputs.mean((0, 2, 3)), torch.zeros(3).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(inputs.std((0, 2, 3), correction=0), torch.ones(3).double(), atol=1e-6, rtol=0)
    own = train.pixels[train.numbers].astype(np.float64)
    mean, deviation = own.mean((0, 2, 3), keepdims=True), own.std((0, 2, 3), keepdims=True)
    val = module.samples["val"]
    expected = (val.pixels[val.numbers] - mean) / deviation
    batch = val.batch(np.arange(len(val)), None)
    np.testing.assert_allclose(batch["inputs"].numpy(), expected, atol=1e-5)
    written = json.loads((tmp_path / "run/preprocessing.json").read_text())
    np.testing.assert_allclose(written["mean"], mean.ravel())
    np.testing.assert_allclose(written["deviation"], deviation.ravel())
    assert written["class_names"] == ["ant", "bee"]


def test_a_channel_without_variation(tmp_path: Path) -> None:
    write_idx_set(tmp_path / "set", np.stack([np.full((4, 4), 7, np.uint8)] * 8), labels_of(8))
    module = prepared_images(tmp_path / "set", tmp_path / "run")
    assert (module.samples["train"].batch(np.arange(2), np.zeros(2, np.int64))["inputs"] == 0).all()


def test_a_resumed_run_must_find_what_it_began_with(tmp_path: Path) -> None:
    write_idx_set(tmp_path / "a", random_images(12), labels_of(12))
    write_idx_set(tmp_path / "b", random_images(12, seed=1), labels_of(12))
    first = prepared_images(tmp_path / "a", tmp_path / "run")
    again = prepared_images(tmp_path / "a", tmp_path / "run")
    assert first.fingerprint == again.fingerprint
    assert prepared_images(tmp_path / "b", tmp_path / "run").fingerprint != first.fingerprint, "nothing trained yet"
    save_something(RunFolder(tmp_path / "run"))
    with pytest.raises(CheckpointError, match=r"preprocessing.json: the run began with other data"):
        prepared_images(tmp_path / "a", tmp_path / "run")


def test_a_set_means_the_same_wherever_it_lies(tmp_path: Path) -> None:
    for place in ("here", "there"):
        write_idx_set(tmp_path / place, random_images(12), labels_of(12))
    one, two = (open_images(ImageData(path=str(tmp_path / place))).fingerprint for place in ("here", "there"))
    assert one == two


@pytest.mark.parametrize("world", [2, 4])
def test_any_number_of_ranks_sees_the_same_samples(tmp_path: Path, world: int) -> None:
    write_idx_set(tmp_path / "set", random_images(30), labels_of(30))
    options = {"crop": 2, "flip": True, "rotation": 10.0, "erasing": 2, "mixup": 0.4, "class_weights": "balanced"}
    whole = prepared_images(tmp_path / "set", tmp_path / "run", image_plan(micro=8, steps=8), **options)
    parts = [
        prepared_images(
            tmp_path / "set", tmp_path / "run", image_plan(world=world, micro=4 // world, accumulate=2), **options
        )
        for _ in range(world)
    ]
    for step in range(8):
        expected = whole.train_batches(0)[step]
        split = [parts[rank].train_batches(rank)[2 * step + micro] for micro in range(2) for rank in range(world)]
        for name in ("inputs", "labels", "weights"):
            torch.testing.assert_close(torch.cat([part[name] for part in split]), expected[name], atol=1e-6, rtol=0)
        assert {part["total"] for part in split} == {expected["total"]}


def test_any_number_of_workers_and_any_start(tmp_path: Path) -> None:
    write_idx_set(tmp_path / "set", random_images(30), labels_of(30))
    plan = image_plan(micro=8, steps=10)
    module = prepared_images(tmp_path / "set", tmp_path / "run", plan, crop=1, mixup=0.3)
    alone = list(make_loader(module.train_batches(0), plan, 0))
    workers = list(make_loader(module.train_batches(0), plan, 2))
    module.start_step = 6
    resumed = list(make_loader(module.train_batches(0), plan, 0))
    for one, other in [*zip(alone, workers, strict=True), *zip(alone[6:], resumed, strict=True)]:
        assert all(torch.equal(one[name], other[name]) for name in ("inputs", "labels"))


def test_evaluation_covers_the_split_once(tmp_path: Path) -> None:
    write_idx_set(tmp_path / "set", random_images(33), labels_of(33))
    plan = image_plan(world=2, micro=2)
    module = prepared_images(tmp_path / "set", tmp_path / "run", plan, crop=2, flip=True, mixup=0.5, val_fraction=0.34)
    val = module.samples["val"]
    ranks = [list(make_loader(module.evaluation_batches("val", rank), plan, 0)) for rank in (0, 1)]
    assert len(ranks[0]) == len(ranks[1])
    seen = torch.cat([batch["inputs"][batch["valid"]] for batches in ranks for batch in batches])
    expected = val.normalise(val.pixels[val.numbers])
    assert sorted(map(bytes, seen.numpy())) == sorted(map(bytes, expected.numpy())), "unchanged, each once"


# weights of classes


def test_weighted_loss_is_torchs_weighted_mean(tmp_path: Path) -> None:
    labels = [0] * 20 + [1] * 7 + [2] * 3
    write_idx_set(tmp_path / "set", random_images(30), labels)
    module = prepared_images(tmp_path / "set", tmp_path / "run", image_plan(micro=16), class_weights="balanced")
    train = module.samples["train"]
    counts = np.bincount(train.labels)
    weight = torch.tensor(len(train) / (3 * counts), dtype=torch.float32)
    batch = module.train_batches(0)[0]
    logits = torch.randn(16, 3, generator=torch.Generator().manual_seed(0))
    ours = (F.cross_entropy(logits, batch["labels"], reduction="none") * batch["weights"]).sum() / batch["total"]
    torch.testing.assert_close(ours, F.cross_entropy(logits, batch["labels"], weight=weight))
    assert "weights" not in module.evaluation_batches("val", 0)[0]


@pytest.mark.parametrize("mixup", [0.0, 0.4])
def test_the_total_is_the_sum_of_the_weights(tmp_path: Path, mixup: float) -> None:
    write_idx_set(tmp_path / "set", random_images(30), [0] * 20 + [1] * 7 + [2] * 3)
    module = prepared_images(
        tmp_path / "set", tmp_path / "run", image_plan(micro=16), mixup=mixup, class_weights="balanced"
    )
    batch = module.train_batches(0)[0]
    assert batch["total"] == batch["weights"].double().sum().item(), "to the last bit"


def test_balanced_weights() -> None:
    weights = balanced_weights(np.array([0, 0, 0, 1]), 3)
    assert weights[:2].tolist() == pytest.approx([4 / 9, 4 / 3])
    assert np.isfinite(weights).all(), "a class without samples"


# bad data: one line that names file and row


BAD_IDX: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "labels for images": (
        lambda images, labels: images.write_bytes(labels.read_bytes()),
        r"images-idx3-ubyte: magic number 0x00000801 \(labels\) at offset 0, expected 0x00000803 or 0x00000804",
    ),
    "another type": (
        lambda images, labels: labels.write_bytes(b"\0\0\x0d\1" + bytes(8)),
        r"labels-idx1-ubyte: magic number 0x00000d01 at offset 0, expected 0x00000801",
    ),
    "truncated": (
        lambda images, labels: images.write_bytes(images.read_bytes()[:-7]),
        r"images-idx3-ubyte: truncated: ends at offset 369, but its header promises 12 x 6 x 5 bytes up to offset 376",
    ),
    "no header": (
        lambda images, labels: labels.write_bytes(b"\0\0\x08\1\0"),
        r"labels-idx1-ubyte: truncated: ends at offset 5",
    ),
    "too long": (
        lambda images, labels: labels.write_bytes(labels.read_bytes() + b"0"),
        r"labels-idx1-ubyte: too long: ends at offset 21",
    ),
    "empty": (lambda images, labels: images.write_bytes(b""), r"images-idx3-ubyte: magic number 0x at offset 0"),
    "half a gzip": (
        lambda images, labels: images.write_bytes(gzip.compress(images.read_bytes())[:-20]),
        r"images-idx3-ubyte: truncated: the gzip stream does not end before offset",
    ),
    "damaged gzip": (
        lambda images, labels: images.write_bytes(b"\x1f\x8b" + bytes(50)),
        r"images-idx3-ubyte: damaged gzip stream",
    ),
    "other count": (
        lambda images, labels: write_idx(labels, np.zeros(11)),
        r"images-idx3-ubyte: 12 images, but train-labels-idx1-ubyte has 11 labels",
    ),
    "no labels": (
        lambda images, labels: labels.unlink(),
        r"images-idx3-ubyte: no labels beside it; expected train-labels-idx1-ubyte",
    ),
}


@pytest.mark.parametrize("fault", BAD_IDX)
def test_bad_idx_files(tmp_path: Path, fault: str) -> None:
    write_idx_set(tmp_path, random_images(12), labels_of(12))
    spoil, message = BAD_IDX[fault]
    spoil(tmp_path / "train-images-idx3-ubyte", tmp_path / "train-labels-idx1-ubyte")
    with pytest.raises(DataError, match=message) as caught:
        prepared_images(tmp_path, tmp_path / "run")
    assert "\n" not in str(caught.value)


def test_a_label_that_no_training_image_has(tmp_path: Path) -> None:
    write_idx_set(tmp_path, random_images(12), labels_of(12))
    write_idx_set(tmp_path, random_images(4), [0, 1, 3, 2], "t10k")
    with pytest.raises(
        DataError, match=r"t10k-images-idx3-ubyte image 3: class 3 is none of those of the training images \(0, 1, 2\)"
    ):
        prepared_images(tmp_path, tmp_path / "run")


@pytest.mark.parametrize("label", [-1, 3])
def test_a_label_outside_of_the_declared_classes(tmp_path: Path, label: int) -> None:
    file = write_parquet(tmp_path / "a.parquet", [png(i) for i in random_images(4)], [0, 1, 2, 0], NAMES)
    table = pq.read_table(file)
    pq.write_table(table.set_column(1, table.schema.field("label"), pa.array([0, label, 2, 0])), file)
    with pytest.raises(DataError, match=rf"a.parquet row 2: label {label} is outside of the 3 classes \(0 to 2\)"):
        prepared_images(file, tmp_path / "run")


def test_unreadable_images(tmp_path: Path) -> None:
    encoded = [png(i) for i in random_images(4)]
    file = write_parquet(tmp_path / "a.parquet", [*encoded[:2], encoded[2][:-30], encoded[3]], [0, 1, 2, 0], NAMES)
    with pytest.raises(DataError, match=r"a.parquet row 3: not a readable image"):
        prepared_images(file, tmp_path / "run")
    file = write_parquet(tmp_path / "b.parquet", [*encoded[:3], b""], [0, 1, 2, 0], NAMES)
    with pytest.raises(DataError, match=r"b.parquet row 4: img holds no encoded image"):
        prepared_images(file, tmp_path / "run")
    write_folders(tmp_path / "set", random_images(4), ["ant", "bee"] * 2)
    (tmp_path / "set/bee/9.png").write_text("not an image")
    with pytest.raises(DataError, match=r"set/bee/9.png: not a readable image"):
        prepared_images(tmp_path / "set", tmp_path / "run")


def test_missing_columns(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "a.parquet", [png(i) for i in random_images(4)], [0, 1, 2, 0], NAMES, "imgs")
    with pytest.raises(
        DataError, match=r"a.parquet: no column image or img; it has imgs, label; .* data.image_column=imgs"
    ):
        prepared_images(file, tmp_path / "run")
    with pytest.raises(DataError, match=r"no column labell; .* did you mean data.label_column=label\?"):
        prepared_images(file, tmp_path / "run", image_column="imgs", label_column="labell")
    (tmp_path / "b.parquet").write_text("not parquet")
    with pytest.raises(DataError, match=r"b.parquet: not readable as parquet"):
        prepared_images(tmp_path / "b.parquet", tmp_path / "run")


def test_folders_without_what_they_should_have(tmp_path: Path) -> None:
    write_folders(tmp_path / "set", random_images(4), ["ant", "bee"] * 2)
    (tmp_path / "set/cat").mkdir()
    with pytest.raises(DataError, match=r"set/cat: empty class folder; put images into it, or remove it"):
        prepared_images(tmp_path / "set", tmp_path / "run")
    (tmp_path / "set/cat/notes.txt").write_text("later")
    with pytest.raises(DataError, match=r"set/cat: empty class folder; its 1 files such as notes.txt are no images"):
        prepared_images(tmp_path / "set", tmp_path / "run")
    (tmp_path / "set/cat").rename(tmp_path / "cat")
    (tmp_path / "set/loose.png").write_bytes(png(random_images(1)[0]))
    with pytest.raises(DataError, match=r"set/loose.png: an image outside of the class folders"):
        prepared_images(tmp_path / "set", tmp_path / "run")
    with pytest.raises(DataError, match=r"cat: no images; .* it holds 1 files such as notes.txt"):
        prepared_images(tmp_path / "cat", tmp_path / "run")
    write_folders(tmp_path / "only/test", random_images(2), ["ant", "bee"])
    with pytest.raises(DataError, match=r"only: only test images; those to train on are named train\*"):
        prepared_images(tmp_path / "only", tmp_path / "run")
    write_folders(tmp_path / "more/train", random_images(4), ["ant", "bee"] * 2)
    write_folders(tmp_path / "more/test", random_images(2), ["ant", "cow"])
    with pytest.raises(
        DataError, match=r"test/cow/0001.png: class 'cow' is none of those of the training images \(ant, bee\)"
    ):
        prepared_images(tmp_path / "more", tmp_path / "run")


def test_what_does_not_fit_the_recipe(tmp_path: Path) -> None:
    write_idx_set(tmp_path, random_images(12), labels_of(12))
    with pytest.raises(DataError, match=r"data.crop=5 mirrors more than images of 6 x 5 pixels have; at most 4"):
        prepared_images(tmp_path, tmp_path / "run", crop=5)
    with pytest.raises(DataError, match=r"9 training images are fewer than data.global_batch_size=64"):
        prepared_images(tmp_path, tmp_path / "run", image_plan(micro=64))
    with pytest.raises(UsageError, match=r"data.val_path without data.path"):
        load(["recipe=mlp_digits", f"data.val_path={tmp_path}"])
    with pytest.raises(UsageError, match=r"data.crop=8 mirrors more than data.image_size=8 pixels; try data.crop=1"):
        load(["recipe=mlp_digits", f"data.path={tmp_path}", "data.crop=8", "data.image_size=8"])


def test_duplicates_are_reported_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    images = random_images(12)
    write_idx_set(tmp_path, images, labels_of(12))
    write_idx_set(tmp_path, np.concatenate((images[4:6], images[:3] ^ 255)), labels_of(5), "t10k")
    prepared_images(tmp_path, tmp_path / "run", val_path=str(tmp_path / "t10k-images-idx3-ubyte"))
    said = capsys.readouterr().err
    assert "2 of 5 test images stand in the train split too, such as" in said
    assert re.search(r"t10k-images-idx3-ubyte image 1 = .*train-images-idx3-ubyte image 5", said)
    monkeypatch.setenv("RANK", "1")
    prepared_images(tmp_path, tmp_path / "run")
    assert not capsys.readouterr().err


# the cache


def test_decoded_once_and_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_folders(tmp_path / "set", random_images(8), ["ant", "bee"] * 4)
    section = ImageData(path=str(tmp_path / "set"))
    source = open_images(section)
    rows, decoded = source.splits["train"], []

    def counted(fail: bool) -> ImageSource:
        def read():
            for number, row in enumerate(rows()):
                decoded.append(row.where)
                if fail and number == 5:
                    raise DataError("broken")
                yield row

        return ImageSource(source.label, source.fingerprint, {"train": read}, source.class_names)

    with pytest.raises(DataError, match="broken"):
        image_cache.stored_images(counted(True), section)
    kept = [path.suffix for path in (tmp_path / "cache/lm_train/images").iterdir()]
    assert kept == [".lock"]
    decoded.clear()
    together = [threading.Thread(target=image_cache.stored_images, args=(counted(False), section)) for _ in range(4)]
    for thread in together:
        thread.start()
    for thread in together:
        thread.join()
    assert len(decoded) == 8
    (pixels,) = (tmp_path / "cache/lm_train/images").glob("*/train.pixels")
    pixels.write_bytes(pixels.read_bytes()[:-1])
    stored = image_cache.stored_images(counted(False), section)
    assert len(decoded) == 16, "a file that is not whole is written anew"
    assert stored.splits["train"].pixels.shape == (8, 1, 6, 5)


def test_mnist_as_it_is(tmp_path: Path) -> None:
    folder = SHARED / "data/mnist"
    if not folder.is_dir():
        pytest.skip("no MNIST here")
    labels = read_idx(folder / "t10k-labels-idx1-ubyte.gz", (1,))
    assert np.bincount(labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


# speed


def test_the_input_does_not_limit_a_step(tmp_path: Path) -> None:
    """128 images of 28 x 28 cost under 0.2 ms of a processor's time (0.08 ms seen), and the training does not wait for them."""
    write_idx_set(tmp_path, random_images(2000, 28, 28), labels_of(2000))
    plan = image_plan(micro=128, steps=300)
    batches = prepared_images(tmp_path, tmp_path / "run", plan).train_batches(0)
    alone = iter(TimedLoader(make_loader(batches, plan, 0)))
    ahead = iter(TimedLoader(make_loader(batches, plan, 0), ahead=True))
    in_the_loop, waited = [], []
    for _ in range(4):  # the best of four, on a machine that does other things as well
        in_the_loop.append(statistics.median(_seconds(alone, time.thread_time) for _ in range(60)))
        waited.append(statistics.median(_seconds(ahead, time.perf_counter, pause=0.002) for _ in range(60)))
    assert min(in_the_loop) < 0.2e-3
    assert min(waited) < 0.2e-3


def _seconds(batches: Iterator[Batch], clock: Callable[[], float], pause: float = 0.0) -> float:
    time.sleep(pause)  # the step
    before = clock()
    next(batches)
    return clock() - before

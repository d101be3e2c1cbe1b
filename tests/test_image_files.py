"""Which classes a set of images has, what lies beside them, and what an encoded image may be."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from lm_train.data.image_files import Row, decode
from lm_train.errors import DataError
from tests.image_data import png, prepared_images, random_images, write_folders, write_parquet

pytestmark = pytest.mark.usefixtures("cache")
NAMES = ("ant", "bee", "cat")


# classes that something is to be learnt of


def without_names(file: Path, labels: list[int]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": [png(i) for i in random_images(len(labels))], "label": labels}), file)
    return file


def test_labels_without_names_are_the_classes(tmp_path: Path) -> None:
    without_names(tmp_path / "train.parquet", [5, 10, 2, 5, 10, 2, 5, 10, 2])
    without_names(tmp_path / "test.parquet", [10, 2])
    module = prepared_images(tmp_path, tmp_path / "run")
    assert module.class_names == ("2", "5", "10")
    assert np.bincount(module.samples["train"].labels).tolist() == [2, 2, 2]
    assert module.samples["test"].labels.tolist() == [2, 0]
    with pytest.raises(DataError, match=r"row 2: label -1 is no class"):
        prepared_images(without_names(tmp_path / "b.parquet", [5, -1, 2]), tmp_path / "run")


def test_a_class_without_a_training_image(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "a.parquet", [png(i) for i in random_images(6)], [0, 2] * 3, NAMES)
    with pytest.raises(DataError, match=r"a.parquet: empty class: none of the training images is of 'bee'"):
        prepared_images(file, tmp_path / "run")


def test_one_class_is_no_classification(tmp_path: Path) -> None:
    write_folders(tmp_path / "set", random_images(4), ["ant"] * 4)
    with pytest.raises(DataError, match=r"only one class, 'ant'; a classification needs two"):
        prepared_images(tmp_path / "set", tmp_path / "run")


def test_classes_named_by_numbers_go_by_size(tmp_path: Path) -> None:
    write_folders(tmp_path / "set", random_images(6), ["10", "1", "2"] * 2)
    assert prepared_images(tmp_path / "set", tmp_path / "run").class_names == ("1", "2", "10")


def test_a_class_of_one_image_trains_in_every_fold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_folders(tmp_path / "set/train", random_images(9), ["ant", "bee"] * 4 + ["cat"])
    write_folders(tmp_path / "set/val", random_images(2, seed=1), ["ant", "bee"])
    for fold in (1, 2):
        module = prepared_images(tmp_path / "set", tmp_path / "run", folds=2, fold=fold)
        assert np.bincount(module.samples["train"].labels).tolist() == [2, 2, 1]
        assert len(module.samples["val"]) == 4
        said = capsys.readouterr().err
        assert said.count("its own validation split (2 images) is not used, since data.folds=2") == 1


def test_what_macos_leaves_in_a_zip(tmp_path: Path) -> None:
    write_folders(tmp_path / "set", random_images(6), ["ant", "bee"] * 3)
    for left in ("__MACOSX/._ant", ".DS_Store", "._loose.png", "ant/.DS_Store", "ant/__MACOSX/x.png", "ant/._0000.png"):
        (tmp_path / "set" / left).parent.mkdir(exist_ok=True)
        (tmp_path / "set" / left).write_bytes(b"left behind")
    module = prepared_images(tmp_path / "set", tmp_path / "run")
    assert module.class_names == ("ant", "bee")
    assert sum(len(samples) for samples in module.samples.values()) == 6


# what an encoded image may be


def encoded(image: Image.Image, **options: object) -> Row:
    stream = io.BytesIO()
    image.save(stream, **{"format": "png"} | options)
    return Row(stream.getvalue(), 0, "here")


def test_what_is_transparent_is_white() -> None:
    drawing = np.arange(0, 256, 17, dtype=np.uint8).reshape(4, 4)
    alpha = Image.fromarray(drawing)
    black = Image.merge("LA", (Image.new("L", (4, 4)), alpha))
    assert np.array_equal(decode(encoded(black)), 255 - drawing)
    for channels in (1, "auto"):
        red = decode(encoded(Image.merge("RGBA", (*Image.new("RGB", (4, 4), "red").split(), alpha))), channels)
        assert red[0, 0].tolist() == (255 if channels == 1 else [255] * 3)
    palette = Image.new("P", (2, 1))
    palette.putpalette([0, 0, 0, 200, 200, 200])
    palette.putpixel((1, 0), 1)
    assert decode(encoded(palette, transparency=0)).tolist() == [[255, 200]]


def test_a_palette_of_greys_is_grey() -> None:
    palette = Image.new("P", (2, 1), 1)
    for second, shape in ((7, (1, 2)), (8, (1, 2, 3))):
        palette.putpalette([0, 0, 0, 7, 7, second])
        assert decode(encoded(palette)).shape == shape


def test_a_photograph_is_turned_upright() -> None:
    wide, exif = Image.new("L", (16, 8)), Image.Exif()
    exif[0x0112] = 6
    wide.paste(255, (0, 0, 8, 8))
    upright = decode(encoded(wide, format="jpeg", exif=exif, quality=95))
    assert upright.shape == (16, 8)
    assert upright[:8].min() > 240 > 15 > upright[8:].max()


def test_grey_of_16_bits_is_scaled_to_8() -> None:
    values = np.array([[0, 128, 129, 257, 32768, 65535]], dtype=np.uint16)
    assert decode(encoded(Image.fromarray(values))).tolist() == [[0, 0, 1, 1, 128, 255]]
    assert decode(encoded(Image.fromarray(values), format="tiff")).tolist() == [[0, 0, 1, 1, 128, 255]]
    with pytest.raises(DataError, match=r"here: has 32 bits a pixel \(mode F\)"):
        decode(encoded(Image.fromarray(values.astype(np.float32)), format="tiff"))

"""What files of images hold: idx, parquet in the hub's layout, tables of `datasets`, encoded images; with file and row."""

from __future__ import annotations

import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from lm_train.data.hub import quiet_datasets
from lm_train.errors import DataError
from lm_train.recipe import ImageData
from lm_train.recipe.explain import nearest

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm")
_IDX_NAME = re.compile(r"[-.]idx\d?")
_IMAGE_COLUMNS = ("image", "img")
_LABEL_COLUMNS = ("label", "labels", "class", "target")
_UBYTE = 0x08
Names = tuple[str, ...] | None


class Row(NamedTuple):
    """One image as its source holds it."""

    image: bytes | Path | npt.NDArray[np.uint8]
    """An encoded image, its file, or pixels: (H, W) or (H, W, C)."""
    label: int | str
    where: str
    """File and row, counted from 1, for messages."""


Rows = Callable[[], Iterator[Row]]


def file_kind(file: Path) -> str | None:
    """idx or parquet, by the name; None for anything else."""
    if file.suffix.lower() == ".parquet":
        return "parquet"
    return "idx" if _IDX_NAME.search(file.name.lower()) else None


@contextmanager
def opened(file: Path) -> Iterator[BinaryIO]:
    """The file for reading; what goes wrong with it is a DataError."""
    try:
        with file.open("rb") as content:
            yield content
    except FileNotFoundError:
        raise DataError(f"{file}: no longer there") from None
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror or error}") from None


# idx files (LeCun, Cortes & Burges, "The MNIST database"): two zero bytes, type, number of dimensions, big-endian lengths


def idx_pair(files: Sequence[Path], split: str) -> tuple[Path, Path]:
    """Images and labels of a split; the labels beside a single file of images are found by its name."""
    images = [file for file in files if "images" in file.name]
    labels = [file for file in files if "labels" in file.name]
    if len(images) == 1 and not labels:
        beside = images[0].with_name(images[0].name.replace("images", "labels").replace("idx3", "idx1"))
        zipped = beside.suffix == ".gz"
        for file in (beside, beside.with_suffix("") if zipped else beside.with_name(f"{beside.name}.gz")):
            if file.exists():
                return images[0], file
        raise DataError(f"{images[0]}: no labels beside it; expected {beside.name}")
    if len(images) != 1 or len(labels) != 1:
        raise DataError(
            f"{files[0].parent}: the {split} split needs one idx file of images and one of labels (such as "
            f"{split}-images-idx3-ubyte and {split}-labels-idx1-ubyte); it has {', '.join(file.name for file in files)}"
        )
    return images[0], labels[0]


def idx_rows(images: Path, labels: Path) -> Rows:
    """Reads a file of images and its file of labels."""

    def read() -> Iterator[Row]:
        pixels, classes = read_idx(images, (3, 4)), read_idx(labels, (1,))
        if len(pixels) != len(classes):
            raise DataError(
                f"{images}: {len(pixels):,} images, but {labels.name} has {len(classes):,} labels (both counts stand at "
                "offset 4); the files do not belong together"
            )
        for number, (image, label) in enumerate(zip(pixels, classes.tolist(), strict=True), 1):
            yield Row(image, label, f"{images} image {number}")

    return read


def read_idx(file: Path, dimensions: Sequence[int]) -> npt.NDArray[np.uint8]:
    """The array of an idx file of unsigned bytes, gzipped or not (its first bytes say so).

    Args:
        file: the file.
        dimensions: how many it may have.

    Raises:
        DataError: wrong magic number or length, with the offset.
    """
    with opened(file) as content:
        raw = content.read()
    if raw[:2] == b"\x1f\x8b":
        try:
            raw = gzip.decompress(raw)
        except EOFError:
            raise DataError(f"{file}: truncated: the gzip stream does not end before offset {len(raw):,}") from None
        except (OSError, zlib.error) as error:
            raise DataError(f"{file}: damaged gzip stream: {error}") from None
    if len(raw) < 4 or raw[:2] != b"\0\0" or raw[2] != _UBYTE or raw[3] not in dimensions:
        expected = " or ".join(f"0x{_UBYTE << 8 | n:08x}" for n in dimensions)
        holds = {1: " (labels)", 3: " (images)"}.get(raw[3] if len(raw) >= 4 and raw[2] == _UBYTE else 0, "")
        raise DataError(f"{file}: magic number 0x{raw[:4].hex()}{holds} at offset 0, expected {expected}")
    start = 4 + 4 * raw[3]
    if len(raw) < start:
        raise DataError(f"{file}: truncated: ends at offset {len(raw)}, inside the header of {start} bytes")
    shape = tuple(int.from_bytes(raw[at : at + 4], "big") for at in range(4, start, 4))
    end = start + int(np.prod(shape, dtype=object))
    if len(raw) != end:
        what = "truncated" if len(raw) < end else "too long"
        raise DataError(
            f"{file}: {what}: ends at offset {len(raw):,}, but its header promises {' x '.join(map(str, shape))} bytes up to "
            f"offset {end:,}"
        )
    return np.frombuffer(raw, dtype=np.uint8, offset=start).reshape(shape)


# parquet in the hub's layout: `image` is a struct of bytes and path, `label` a ClassLabel whose names the metadata hold


def class_names_of_parquet(file: Path, section: ImageData) -> Names:
    """The names of the ClassLabel feature, where the file's metadata have one."""
    schema = _parquet_file(file).schema_arrow
    label = find_column(schema.names, section.label_column, _LABEL_COLUMNS, "data.label_column", str(file))
    with suppress(KeyError, ValueError, TypeError):
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return tuple(map(str, features[label]["names"]))
    return None


def parquet_rows(files: Sequence[Path], section: ImageData, names: Names) -> Rows:
    """Reads parquet files one after another.

    Args:
        files: of one split.
        section: may name the columns.
        names: of the classes, where they are known; a label must be one of them.
    """

    def read() -> Iterator[Row]:
        for file in files:
            table, row = _parquet_file(file), 0
            image, label = _columns(table.schema_arrow.names, section, str(file))
            try:
                for batch in table.iter_batches(batch_size=256, columns=[image, label]):
                    for encoded, given in zip(batch[image].to_pylist(), batch[label].to_pylist(), strict=True):
                        row += 1
                        yield _row(encoded, given, f"{file} row {row}", (image, label), names)
            except DataError:
                raise
            except (OSError, ValueError) as error:  # what pyarrow raises
                raise DataError(f"{file}: not readable as parquet after row {row}: {_short(error)}") from None

    return read


def _parquet_file(file: Path) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{file}: not readable as parquet: {_short(error)}") from None


def table_rows(table: Any, section: ImageData, label: str) -> tuple[Rows, Names]:
    """Reads a `datasets.Dataset` with an Image column; and the names of its classes.

    Args:
        table: one split.
        section: may name the columns.
        label: what to call the table in messages.
    """
    datasets = quiet_datasets()
    columns = _columns(table.column_names, section, label)
    declared = getattr(table.features[columns[1]], "names", None)
    names = None if declared is None else tuple(map(str, declared))

    def read() -> Iterator[Row]:
        row = 0
        try:
            for batch in table.cast_column(columns[0], datasets.Image(decode=False)).iter(256):
                for encoded, given in zip(batch[columns[0]], batch[columns[1]], strict=True):
                    row += 1
                    yield _row(encoded, given, f"{label} row {row}", columns, names)
        except DataError:
            raise
        except (OSError, ValueError) as error:
            raise DataError(f"{label}: not readable after row {row}: {_short(error)}") from None

    return read, names


def _columns(there: Sequence[str], section: ImageData, where: str) -> tuple[str, str]:
    """The columns of images and of labels."""
    return (
        find_column(there, section.image_column, _IMAGE_COLUMNS, "data.image_column", where),
        find_column(there, section.label_column, _LABEL_COLUMNS, "data.label_column", where),
    )


def find_column(there: Sequence[str], asked: str | None, usual: Sequence[str], key: str, where: str) -> str:
    """The asked column, or the first of the usual names that is there.

    Raises:
        DataError: if there is none, with the nearest name.
    """
    wanted = usual if asked is None else (asked,)
    found = next((name for name in wanted if name in there), None)
    if found is None:
        near = next((n for n in (nearest(name, there) for name in wanted) if n), None)
        hint = f"; did you mean {key}={near}?" if near else f"; name one with {key}="
        raise DataError(f"{where}: no column {' or '.join(wanted)}; it has {', '.join(there) or 'none'}{hint}")
    return found


def _row(image: Any, label: Any, where: str, columns: tuple[str, str], names: Names) -> Row:
    encoded = image.get("bytes") if isinstance(image, dict) else image
    if not isinstance(encoded, bytes) or not encoded:
        raise DataError(f"{where}: {columns[0]} holds no encoded image (bytes), but {str(image)[:60]!r}")
    if isinstance(label, bool) or not isinstance(label, int | str):
        raise DataError(f"{where}: {columns[1]} is {label!r:.80}, expected a class")
    if names is not None and isinstance(label, int) and not 0 <= label < len(names):
        raise DataError(f"{where}: {columns[1]} {label} is outside of the {len(names)} classes (0 to {len(names) - 1})")
    return Row(encoded, label, where)


def decode(row: Row, channels: int | str = "auto", size: int | None = None) -> npt.NDArray[np.uint8]:
    """The pixels of an image: (H, W), or (H, W, channels).

    Args:
        row: the image.
        channels: 1 or 3; auto: 1 for what is grey or black and white, a palette of greys included, 3 for all else.
        size: its new height and width; None: as it is.

    Where an encoded image is transparent, white shows through; one that a camera took on its side (EXIF's orientation) is
    turned upright; grey of 16 bits is scaled to 8, 65535 to 255.

    Raises:
        DataError: if it cannot be read as an image, or has more than 16 bits a pixel and channel.
    """
    pixels = row.image
    if isinstance(pixels, np.ndarray):
        present = pixels.shape[2] if pixels.ndim == 3 else 1
        pixels = pixels[:, :, 0] if pixels.ndim == 3 and present == 1 else pixels
        if size is None and channels in ("auto", present):
            return pixels
    from PIL import Image, ImageOps

    try:
        with _image(pixels) as opened_image:
            image = ImageOps.exif_transpose(opened_image)
            if image.mode.startswith("I;16"):
                image = Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8))
            if image.mode in ("I", "F"):
                raise DataError(f"{row.where}: has 32 bits a pixel (mode {image.mode}); convert it to 8 bits")
            grey = channels == 1 or (channels == "auto" and _is_grey(image))
            if image.has_transparency_data:
                drawn = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", drawn.size, "white"), drawn)
            converted = image.convert("L" if grey else "RGB")
            if size is not None:
                converted = converted.resize((size, size), Image.Resampling.BILINEAR)
            return np.asarray(converted)
    except DataError:
        raise
    except Exception as error:  # Pillow's readers raise of every family on damaged files
        raise DataError(f"{row.where}: not a readable image: {_short(error)}") from None


def _is_grey(image: Any) -> bool:
    if image.mode in ("P", "PA"):
        colours = np.array(image.getpalette("RGB")).reshape(-1, 3)
        return bool((colours == colours[:, :1]).all())
    return image.mode in ("1", "L", "LA", "La")


def _image(content: bytes | Path | npt.NDArray[np.uint8]) -> Any:
    from PIL import Image

    if isinstance(content, np.ndarray):
        return Image.fromarray(content)
    return Image.open(content if isinstance(content, Path) else io.BytesIO(content))


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:150]

"""What the tests of images share: sets written to disk in every layout, and a data module over a section."""

from __future__ import annotations

import gzip
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image

from lm_train.data import ImageDataModule, build
from lm_train.plan import Plan
from lm_train.recipe import MLP, ImageData
from lm_train.runs import RunFolder
from tests.text_data import plan_of

Pixels = np.ndarray


def random_images(n: int, height: int = 6, width: int = 5, channels: int = 1, seed: int = 0) -> Pixels:
    """(n, H, W) or (n, H, W, 3) bytes."""
    shape = (n, height, width) if channels == 1 else (n, height, width, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_idx(file: Path, array: np.ndarray) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    raw = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    raw += array.astype(np.uint8).tobytes()
    file.write_bytes(gzip.compress(raw) if file.suffix == ".gz" else raw)
    return file


def write_idx_set(folder: Path, images: Pixels, labels: Sequence[int], name: str = "train", end: str = "") -> Path:
    write_idx(folder / f"{name}-images-idx3-ubyte{end}", images)
    write_idx(folder / f"{name}-labels-idx1-ubyte{end}", np.asarray(labels))
    return folder


def png(image: Pixels) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "png")
    return stream.getvalue()


def write_parquet(
    file: Path, images: list[bytes], labels: list[int], names: Sequence[str], column: str = "img"
) -> Path:
    """As `datasets` writes a data set of the hub."""
    file.parent.mkdir(parents=True, exist_ok=True)
    features = datasets.Features({column: datasets.Image(), "label": datasets.ClassLabel(names=list(names))})
    rows = {column: [{"bytes": image, "path": None} for image in images], "label": labels}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(file))
    return file


def write_folders(folder: Path, images: Pixels, classes: Sequence[str]) -> Path:
    for number, (image, name) in enumerate(zip(images, classes, strict=True)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / f"{number:04}.png").write_bytes(png(image))
    return folder


def image_plan(**sizes: int) -> Plan:
    return plan_of(**sizes).model_copy(update={"task": "classification", "block_size": None})


def prepared_images(
    path: Path | None, run: Path, plan: Plan | None = None, seed: int = 1, **section: Any
) -> ImageDataModule:
    data = ImageData(path=None if path is None else str(path), **section)
    module = build(data, plan or image_plan(), seed, RunFolder(run))
    assert isinstance(module, ImageDataModule)
    module.prepare(MLP())
    module.leave(module.folder)
    return module

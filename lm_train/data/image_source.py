"""Where labelled images come from: idx or parquet files, a folder for each class, the hub, scikit-learn's digits; by split."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np

from lm_train import signals
from lm_train.data.batches import Split
from lm_train.data.cache import cache_folder, write_text
from lm_train.data.classes import class_names
from lm_train.data.hub import find_dataset, out_of_reach, quiet_datasets
from lm_train.data.image_files import (
    SUFFIXES,
    Names,
    Row,
    Rows,
    class_names_of_parquet,
    file_kind,
    idx_pair,
    idx_rows,
    opened,
    parquet_rows,
    table_rows,
)
from lm_train.data.source import digest_of_parts, files_inside, is_hidden, split_of
from lm_train.data.splits import digest_of, divide
from lm_train.errors import DataError, OutputError
from lm_train.recipe import ImageData
from lm_train.recipe.hub_names import is_hub_name

_CHUNK = 1 << 22


@dataclass(frozen=True)
class ImageSource:
    """Labelled images by split; nothing is decoded yet."""

    label: str
    fingerprint: str
    """Of the contents, wherever they lie."""
    splits: dict[Split, Rows]
    class_names: Names = None
    """As the source itself declares them."""
    note: str = ""
    """What the user should know."""


def open_images(section: ImageData) -> ImageSource:
    """The images that a data section names; nothing is read yet but what the fingerprint needs.

    Raises:
        DataError: if they are missing, empty, of no known kind, or out of reach.
    """
    if section.path is None:
        return _digits()
    named: dict[Split, str | None] = {"val": section.val_path, "test": section.test_path}
    try:
        whole = _hub(section) if is_hub_name(section.path) else _local(Path(section.path).expanduser(), section)
        splits, parts = dict(whole.splits), [whole.fingerprint]
        for split, path in named.items():
            if path is not None:
                other = _local(Path(path).expanduser(), section)
                splits[split] = _by_name(_only(other, split, path), other.class_names, whole.class_names)
                parts.append(f"{split}:{other.fingerprint}")
    except OSError as error:
        raise DataError(f"{error.filename or section.path}: {error.strerror or error}") from None
    if "train" not in splits:
        raise DataError(f"{section.path}: only {' and '.join(splits)} images; those to train on are named train*")
    return ImageSource(section.path, digest_of_parts(*parts), splits, whole.class_names, whole.note)


def _only(source: ImageSource, split: Split, path: str) -> Rows:
    """What a path given for one split holds of it: its part of that name, or everything where it has one part only."""
    if len(source.splits) == 1:
        return next(iter(source.splits.values()))
    if split not in source.splits:
        raise DataError(f"{path}: given as data.{split}_path, holds {' and '.join(source.splits)}; name one of them")
    return source.splits[split]


def _by_name(rows: Rows, names: Names, others: Names) -> Rows:
    """Rows whose labels are names where their numbers mean other classes than the training images' numbers do."""
    if names is None or names == others:
        return rows
    return lambda: (row._replace(label=names[row.label]) if isinstance(row.label, int) else row for row in rows())


def _local(path: Path, section: ImageData) -> ImageSource:
    if not path.is_dir():
        return _files([path], path, section)
    loose = [p for p in sorted(path.iterdir()) if p.is_file() and not is_hidden(p.name)]
    if any(file_kind(file) for file in loose):
        return _files(loose, path, section)
    files = files_inside(path)
    if any(file_kind(file) == "parquet" for file in files):  # data/train-00000-of-00001.parquet
        return _files(files, path, section)
    if any(file.suffix.lower() in SUFFIXES for file in files):
        return _class_folders(path)
    found = f"{len(files)} files such as {files[0].name}" if files else "nothing"
    raise DataError(f"{path}: no images; expected idx files, parquet, or a folder for each class; it holds {found}")


def _files(files: Sequence[Path], path: Path, section: ImageData) -> ImageSource:
    """idx or parquet files, by the splits that their names say; without any train*, those of no split train."""
    known = [file for file in files if file_kind(file)]
    if not known:
        raise DataError(f"{path}: expected an idx or a parquet file, or a folder; images need a folder for each class")
    kinds = {file_kind(file) for file in known}
    if len(kinds) > 1:
        raise DataError(f"{path}: holds both idx and parquet files; name one of them with data.path=")
    root = path if path.is_dir() else path.parent
    by_split: dict[Split, list[Path]] = {}
    others: list[Path] = []
    for file in known:
        split = next((s for s in map(split_of, file.relative_to(root).parts) if s is not None), None)
        (others if split is None else by_split.setdefault(split, [])).append(file)
    if others and "train" not in by_split:
        by_split["train"], others = others, []
    note = f"{path}: beside files named train*, {len(others)} such as {others[0].name} are not used" if others else ""
    names: Names = None
    splits: dict[Split, Rows]
    if kinds == {"parquet"}:
        names = class_names_of_parquet((by_split.get("train") or known)[0], section)
        splits = {split: parquet_rows(parts, section, names) for split, parts in by_split.items()}
    else:
        by_split = {split: list(idx_pair(parts, split)) for split, parts in by_split.items()}
        splits = {split: idx_rows(images, labels) for split, (images, labels) in by_split.items()}
    counts = [f"{split}:{len(parts)}" for split, parts in sorted(by_split.items())]
    contents = _contents([file for _, parts in sorted(by_split.items()) for file in parts])
    return ImageSource(str(path), digest_of_parts(*counts, contents), splits, names, note)


def _class_folders(path: Path) -> ImageSource:
    """`train/cat/1.png` where folders of splits hold folders of classes, else `cat/1.png`."""
    folders = _folders(path)
    splits: dict[Split, list[Path]] = {}
    for folder in folders:
        split = split_of(folder.name)
        if split is not None and _folders(folder):
            splits.setdefault(split, []).append(folder)
    used = {folder for roots in splits.values() for folder in roots}
    left = [folder.name for folder in folders if folder not in used]
    note = f"{path}: beside the folders of splits, {', '.join(left[:5])} are not used" if used and left else ""
    splits = splits or {"train": [path]}
    files = {split: [item for root in roots for item in _of_classes(root)] for split, roots in sorted(splits.items())}
    every = [file for items in files.values() for _, file in items]
    places = [f"{split}/{file.relative_to(path)}" for split, items in files.items() for _, file in items]
    classes = class_names(name for name, _ in files.get("train", next(iter(files.values()))))
    rows: dict[Split, Rows] = {split: _folder_rows(items) for split, items in files.items()}
    return ImageSource(str(path), digest_of_parts(*places, _contents(every)), rows, classes, note)


def _folders(path: Path) -> list[Path]:
    return sorted(p for p in path.iterdir() if p.is_dir() and not is_hidden(p.name))


def _of_classes(root: Path) -> Iterator[tuple[str, Path]]:
    """Class and file of each image under a folder of class folders."""
    for loose in sorted(root.iterdir()):
        if loose.is_file() and loose.suffix.lower() in SUFFIXES and not is_hidden(loose.name):
            raise DataError(f"{loose}: an image outside of the class folders; move it into its class")
    for folder in _folders(root):
        inside = files_inside(folder)
        images = [file for file in inside if file.suffix.lower() in SUFFIXES]
        if not images:
            held = f"; its {len(inside)} files such as {inside[0].name} are no images" if inside else ""
            raise DataError(f"{folder}: empty class folder{held}; put images into it, or remove it")
        for file in images:
            yield folder.name, file


def _folder_rows(items: list[tuple[str, Path]]) -> Rows:
    return lambda: (Row(file, name, str(file)) for name, file in items)


def _hub(section: ImageData) -> ImageSource:
    assert section.path is not None
    found = find_dataset(section.path, section.subset)
    by_split: dict[Split, str] = {}
    for name in found.splits:
        split = split_of(name)
        if split is not None:
            by_split.setdefault(split, name)
    if "train" not in by_split:
        raise DataError(f"{section.path}: no train split; it has {', '.join(found.splits)}")
    datasets = quiet_datasets()
    try:
        tables = {s: datasets.load_dataset(section.path, section.subset, split=n) for s, n in by_split.items()}
    except Exception as error:  # the hub's clients raise of many families
        raise DataError(out_of_reach(section.path, error)) from None
    read = {split: table_rows(table, section, f"{section.path} {split}") for split, table in tables.items()}
    fingerprint = digest_of_parts(section.path, str(section.subset), found.revision, *sorted(by_split.values()))
    return ImageSource(section.path, fingerprint, {split: rows for split, (rows, _) in read.items()}, read["train"][1])


def _digits() -> ImageSource:
    """1,797 handwritten digits of 8 x 8 pixels, 0 to 16 each (E. Alpaydin & C. Kaynak 1998, UCI); a fifth of them tests."""

    def read(testing: bool) -> Iterator[Row]:
        from sklearn.datasets import load_digits

        table, labels = load_digits(return_X_y=True)
        images = table.astype(np.uint8).reshape(-1, 8, 8)
        digests = np.array([digest_of(image.tobytes()) for image in images], dtype=np.uint64)
        of_class = [np.flatnonzero(labels == label) for label in range(10)]
        fifths = [numbers[divide(digests[numbers], None, ImageData(folds=5, fold=1))[1]] for numbers in of_class]
        tests = np.isin(np.arange(len(labels)), np.concatenate(fifths))
        for number in np.flatnonzero(tests == testing).tolist():
            yield Row(images[number], int(labels[number]), f"digits image {number + 1}")

    return ImageSource(
        "scikit-learn's digits",
        digest_of_parts("digits", version("scikit-learn")),
        {"train": lambda: read(False), "test": lambda: read(True)},
        tuple("0123456789"),
    )


def _contents(files: Sequence[Path]) -> str:
    """Hash of the files' bytes in their order; remembered by path, size and time of each."""
    identity = hashlib.blake2b(digest_size=16)
    for file in files:
        stat = file.stat()
        identity.update(f"{file.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}\0{stat.st_ino}\0".encode())
    memo = cache_folder() / "hashes" / identity.hexdigest()
    with suppress(OSError, UnicodeDecodeError):
        known = memo.read_text(encoding="utf-8")
        if len(known) == 32 and known.isalnum():
            return known
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        digest.update(file.stat().st_size.to_bytes(8, "little"))
        with opened(file) as content:
            while chunk := content.read(_CHUNK):
                signals.check()
                digest.update(chunk)
    with suppress(OutputError):  # whoever writes the pixels reports it
        write_text(memo, digest.hexdigest())
    return digest.hexdigest()

"""LightningDataModules and what they stream. `build` makes the one that a section describes.

The names are looked up when they are first used (PEP 562), so that what only reads text need not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lm_train.data.batches import IGNORED, Batch
    from lm_train.data.choice import build
    from lm_train.data.images import ImageDataModule
    from lm_train.data.masking import MaskedTextDataModule
    from lm_train.data.module import DataModule
    from lm_train.data.pairs import PairDataModule
    from lm_train.data.table import TableDataModule
    from lm_train.data.text import TextDataModule
    from lm_train.data.text_classes import TextClassDataModule

_FILES = {
    "IGNORED": "batches",
    "Batch": "batches",
    "DataModule": "module",
    "ImageDataModule": "images",
    "MaskedTextDataModule": "masking",
    "PairDataModule": "pairs",
    "TableDataModule": "table",
    "TextClassDataModule": "text_classes",
    "TextDataModule": "text",
    "build": "choice",
}
"""Where each name stands."""


def __getattr__(name: str) -> Any:
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_FILES[name]}"), name)


__all__ = [
    "IGNORED",
    "Batch",
    "DataModule",
    "ImageDataModule",
    "MaskedTextDataModule",
    "PairDataModule",
    "TableDataModule",
    "TextClassDataModule",
    "TextDataModule",
    "build",
]

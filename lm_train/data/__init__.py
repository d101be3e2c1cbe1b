"""LightningDataModules and what they stream. `build` makes the one that a section describes."""

from __future__ import annotations

from pathlib import Path

from lm_train.data.text import TextDataModule
from lm_train.plan import Plan
from lm_train.recipe import AnyData


def build(section: AnyData, plan: Plan, block_size: int, seed: int, tokenizer_file: Path) -> TextDataModule:
    """The data module of a section. It reads nothing before `prepare`."""
    return TextDataModule(section, plan, block_size, seed, tokenizer_file)


__all__ = ["TextDataModule", "build"]

"""Which data module serves which kind of data."""

from __future__ import annotations

from lm_train.data.custom import CustomDataModule
from lm_train.data.images import ImageDataModule
from lm_train.data.masking import MaskedTextDataModule
from lm_train.data.module import DataModule
from lm_train.data.pairs import PairDataModule
from lm_train.data.table import TableDataModule
from lm_train.data.text import TextDataModule
from lm_train.data.text_classes import TextClassDataModule
from lm_train.plan import Plan
from lm_train.recipe import AnyData
from lm_train.runs import RunFolder


def build(section: AnyData, plan: Plan, seed: int, folder: RunFolder) -> DataModule:
    """The data module of a section. It reads nothing before `prepare`.

    Args:
        section: the recipe's data section.
        plan: batch sizes, ranks, workers, steps, the task.
        seed: decides the order of samples and every random choice.
        folder: the run's, where what the model needs for later use is left (tokenizer, names of classes).
    """
    match section.kind:
        case "embedded" | "text" | "shards" if plan.task == "masked_lm":
            return MaskedTextDataModule(section, plan, seed, folder)
        case "embedded" | "text" | "shards":
            return TextDataModule(section, plan, seed, folder)
        case "images":
            return ImageDataModule(section, plan, seed, folder)
        case "table":
            return TableDataModule(section, plan, seed, folder)
        case "text_classes":
            return TextClassDataModule(section, plan, seed, folder)
        case "pairs":
            return PairDataModule(section, plan, seed, folder)
        case "custom":
            return CustomDataModule(section, plan, seed)
    raise AssertionError(section.kind)

"""Which paths mean something of the Hugging Face hub."""

from __future__ import annotations

import re

from lm_train.recipe.tokenizer_names import exists

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_DATA_SUFFIXES = (".txt", ".jsonl", ".json", ".csv", ".parquet", ".gz", ".md", ".py")


def is_hub_name(path: str) -> bool:
    """Whether a path means a data set or a model of the hub: owner/name, and not a local path or the look of one."""
    return (
        _HUB_NAME.fullmatch(path) is not None
        and not exists(path)
        and not exists(path.split("/")[0])
        and not path.endswith(_DATA_SUFFIXES)
    )

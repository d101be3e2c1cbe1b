"""Tokenised samples in the cache: read as a whole, or not at all where something is missing or damaged."""

from __future__ import annotations

import json
import zipfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from lm_train.data.batches import Split
from lm_train.data.tokenizer import load_tokenizer
from lm_train.errors import DataError


class Stored(NamedTuple):
    """What a folder of the cache holds."""

    facts: dict[str, Any]
    """Of `meta.json`."""
    tokenizer: Tokenizer
    arrays: dict[Split, dict[str, Any]]
    """Of each split, by name."""


def read_stored(folder: Path) -> Stored | None:
    """What `folder` holds; None if it was never written, or has been tidied away or damaged in part, and must be made anew."""
    try:
        facts = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        arrays: dict[Split, dict[str, Any]] = {}
        for split in facts["splits"]:
            # opened here, since np.load leaves a damaged file open
            with (folder / f"{split}.npz").open("rb") as file, np.load(file) as loaded:
                arrays[split] = dict(loaded)
        tokenizer = load_tokenizer(str(folder / "tokenizer.json"))
    except (FileNotFoundError, NotADirectoryError, EOFError, ValueError, KeyError, TypeError, DataError):
        return None
    except (zipfile.BadZipFile, zlib.error):
        return None
    assert tokenizer is not None
    return Stored(facts, tokenizer, arrays)

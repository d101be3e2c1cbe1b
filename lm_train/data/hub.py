"""The Hugging Face hub: asked once and briefly, remembered for machines that cannot reach it, named when it is missing."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any, NamedTuple

from lm_train.data.cache import cache_folder, write_text
from lm_train.errors import DataError

_REACH_TIMEOUT_S = 10
"""The hub's clients try six times with growing pauses; one request of this length says whether that is worth it."""


class HubDataset(NamedTuple):
    """What the hub says of a data set."""

    revision: str
    splits: list[str]


def quiet_datasets() -> Any:
    """The `datasets` package without its bars and without its own lines about errors that we report."""
    import datasets

    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity(logging.CRITICAL)
    return datasets


def find_dataset(path: str, subset: str | None) -> HubDataset:
    """Revision and splits of a data set; as last seen, where the hub is out of reach now.

    Raises:
        DataError: if the hub has no such data set, or is out of reach and was never asked.
    """
    identity = hashlib.blake2b(f"{path}\0{subset}".encode(), digest_size=16).hexdigest()
    memo = cache_folder() / "hub" / f"{identity}.json"
    datasets = quiet_datasets()
    try:
        _reach()
        builder = datasets.load_dataset_builder(path, subset)
        splits = list(builder.info.splits or datasets.get_dataset_split_names(path, subset))
        found = HubDataset(builder.hash or "", splits)
    except Exception as error:
        if isinstance(error, OSError) and memo.exists():
            return HubDataset(**json.loads(memo.read_text(encoding="utf-8")))
        raise DataError(out_of_reach(path, error)) from None
    write_text(memo, json.dumps(found._asdict()))
    return found


def download(repository: str, file: str) -> Path:
    """A file of a model repository, from the hub's own cache if it is there.

    Raises:
        DataError: if it is neither there nor to be had.
    """
    import huggingface_hub

    try:
        return Path(huggingface_hub.hf_hub_download(repository, file, local_files_only=True))
    except Exception as error:  # not there, or not usable: the hub decides
        logging.getLogger(__name__).debug("%s of %s is not in the hub's cache: %s", file, repository, error)
    try:
        _reach()
        return Path(huggingface_hub.hf_hub_download(repository, file))
    except Exception as error:
        raise DataError(out_of_reach(f"{file} of {repository}", error)) from None


def out_of_reach(what: str, error: Exception) -> str:
    reason = " ".join(str(error).split())[:200]
    return (
        f"{what}: not to be had from the Hugging Face hub ({type(error).__name__}: {reason}); give files of your own with "
        "data.path=FILES data.tokenizer=DIR, or train on the embedded corpus with data=embedded"
    )


def _reach() -> None:
    """One short request to the hub.

    Raises:
        ConnectionError: if there is no answer.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=_REACH_TIMEOUT_S)
    except Exception as error:  # requests' or httpx' own family, by version
        raise ConnectionError(f"{constants.ENDPOINT} does not answer: {error}") from None

"""The states of the process' random-number generators as JSON values: no pickle in a checkpoint."""

from __future__ import annotations

import base64
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor


class RandomState:
    """The states of Python's, NumPy's and torch's generators, as they are now: taken at once, written down later."""

    def __init__(self) -> None:
        self._python = random.getstate()
        self._numpy = np.random.get_state(legacy=True)
        self._torch = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None

    def values(self) -> dict[str, Any]:
        """As JSON values."""
        version, words, gauss = self._python
        _, keys, position, has_gauss, cached = self._numpy
        state: dict[str, Any] = {
            "python": [version, list(words), gauss],
            "numpy": [np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)],
            "torch": _text_of(self._torch),
        }
        return state if self._cuda is None else state | {"cuda": _text_of(self._cuda)}


def _text_of(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def seed_random(*key: int) -> None:
    """Seeds Python's and NumPy's generators, which the code of others may use; torch's is seeded in every micro batch.

    Args:
        key: numbers that tell this process and this place in the run from all others.
    """
    entropy = np.random.SeedSequence(key).generate_state(4)
    np.random.seed(entropy)
    random.seed(entropy.tobytes())


def set_random_state(state: dict[str, Any]) -> None:
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(_bytes_tensor(state["torch"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(_bytes_tensor(state["cuda"]))


def _bytes_tensor(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)

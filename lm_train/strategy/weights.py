"""Where a network that is cut up as it is built gets its values from, one full parameter at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

Fill = Callable[[str, Tensor], None]
"""Puts the value of the parameter of that name into a tensor of its full shape; called in the order of named_parameters."""
Weights = Callable[[nn.Module], AbstractContextManager[Fill]]


def drawn(seed: int) -> Weights:
    """The initial weights of the network's own initialisation; the process' generator is left as it was."""

    @contextmanager
    def weights(net: nn.Module) -> Iterator[Fill]:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            yield net.fill  # type: ignore[misc]

    return weights


def built_anew(seed: int, build: Callable[[], nn.Module]) -> Weights:
    """The initial weights of a network that has no `fill`, from another one built whole with the same seed."""

    @contextmanager
    def weights(net: nn.Module) -> Iterator[Fill]:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            whole = dict(build().named_parameters())

            def fill(name: str, tensor: Tensor) -> None:
                tensor.copy_(whole[name])

            yield fill

    return weights


def read_by(read: Fill) -> Weights:
    """Values from elsewhere, such as a checkpoint."""

    @contextmanager
    def weights(net: nn.Module) -> Iterator[Fill]:
        with torch.no_grad():
            yield read

    return weights

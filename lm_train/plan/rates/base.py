"""What a rank's work costs, asked of whatever knows: data sheets, or a calibration. Free of torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from lm_train.plan.work import Op
from lm_train.recipe import AnyOptim

Collective = Literal["all_reduce", "all_gather", "reduce_scatter"]
"""Of `size` bytes: what is reduced; for all_gather and reduce_scatter the whole, of which each rank has its part before or
after."""


@dataclass(frozen=True)
class Loop:
    """Seconds of the host around the network's own work."""

    step: float
    """Of one optimizer step: the trainer's loop, callbacks, the schedule."""
    micro_batch: float
    """Of each micro batch: the loop, the loader's hand-over, the loss."""
    row: float
    """Of one row of metrics, which waits for the device and writes."""


class StrategyCost(NamedTuple):
    """Host seconds of a strategy's own code."""

    step: float
    """Of one optimizer step."""
    each: float
    """Of each unit (fsdp) or parameter (ddp, zero) in one pass over it; see `lm_train.plan.duration.own_passes`."""


class Rates(ABC):
    """Seconds on one rank under one layout, while its neighbours on the node do the same."""

    source: str
    """For a person: data sheets, or which calibration."""
    relative_error: tuple[float, float]
    """Of a step, below and above: see `TimePrediction`."""
    asynchronous: bool
    """Whether the host runs ahead of the device, so that a step takes the longer of the two."""
    overlap: float
    """Share of the backward pass behind which collectives can hide."""
    interference: float
    """By which share computing is slower while a collective is under way."""
    loop: Loop
    making: Mapping[str, float]
    """Seconds of one core until one token of running text, or one value of an image, is in a batch."""

    @abstractmethod
    def device(self, op: Op) -> float:
        """Of one `op`, on the device; where the host does not run ahead, all that it takes."""

    @abstractmethod
    def launch(self, op: Op) -> float:
        """Host seconds until one `op` is under way; 0 where `device` has it."""

    @abstractmethod
    def stream(self, size: float) -> float:
        """Reading and writing `size` bytes in all, in a plain pass over large tensors."""

    @abstractmethod
    def update(self, optim: AnyOptim, sizes: tuple[tuple[int, int], ...], width: int, on_host: bool = False) -> float:
        """One update by an elementwise optimizer.

        Args:
            optim: which.
            sizes: (elements, how many tensors have so many).
            width: bytes of a parameter.
            on_host: parameters and state lie in host memory although the device is a GPU.
        """

    @abstractmethod
    def norm(self, sizes: tuple[tuple[int, int], ...], width: int, clips: bool) -> float:
        """The gradient's norm, and scaling by it; arguments as of `update`."""

    @abstractmethod
    def collective(self, kind: Collective, size: float) -> float:
        """One collective of all ranks."""

    @abstractmethod
    def offload(self, size: float) -> float:
        """Between host and device, in one direction."""

    @abstractmethod
    def strategy(self, name: str) -> StrategyCost:
        """Of the host, besides collectives and copies."""

    @abstractmethod
    def written(self, size: float) -> float:
        """`size` bytes of a checkpoint, by this node, checksums included."""

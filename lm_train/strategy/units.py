"""The parts of a network whose parameters a strategy gathers together: what repeats in it."""

from __future__ import annotations

from torch import nn


def units_of(net: nn.Module) -> list[nn.Module]:
    """The modules that are sharded, and compiled, each by itself: the entries of the network's outermost ModuleLists.

    What is outside of them belongs to the network as a whole; a network without repetition is one unit.
    """
    units: list[nn.Module] = []
    for child in net.children():
        if isinstance(child, nn.ModuleList):
            units += [part for part in child if any(True for _ in part.parameters())]
        else:
            units += units_of(child)
    return units

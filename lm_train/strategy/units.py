"""The parts of a network whose parameters a strategy gathers together: what repeats in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from torch import nn


def units_of(net: nn.Module) -> list[nn.Module]:
    """The modules that are sharded, and compiled, each by itself: the entries of the network's outermost ModuleLists.

    What is outside of them belongs to the network as a whole, as does an entry that shares a parameter with the rest; a
    network without repetition is one unit.
    """
    uses = Counter(id(parameter) for module in net.modules() for parameter in module._parameters.values())
    return [unit for unit in _entries(net) if not _shares(unit, uses)]


def _entries(net: nn.Module) -> Iterator[nn.Module]:
    for child in net.children():
        if isinstance(child, nn.ModuleList):
            yield from (part for part in child if any(True for _ in part.parameters()))
        else:
            yield from _entries(child)


def _shares(unit: nn.Module, uses: Counter[int]) -> bool:
    own = Counter(id(parameter) for module in unit.modules() for parameter in module._parameters.values())
    return any(uses[key] > count for key, count in own.items() if key != id(None))

"""What a rank holds of a training's tensors, as live flat views: the one place that knows each strategy's layout.

Under every strategy a rank's piece of a parameter, and of each optimizer state of it, is one contiguous range of the
flattened tensor, so that one file format serves all. The names of DeepSpeed's attributes are those of 0.19.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lm_train.strategy.buffers import persistent_buffers
from lm_train.strategy.fsdp import local_range

PARAM, BUFFER = "param", "buffer"


class View(NamedTuple):
    """What this rank holds of one tensor, as a live flat view."""

    name: str
    key: str
    start: int
    flat: Tensor
    shape: tuple[int, ...]


class Views(ABC):
    """A network and its optimizer, as one rank holds them.

    Args:
        net: whose parameters and buffers are meant; names and shapes are those of the unsharded network.
        optimizer: torch's own, whose state is meant; None leaves it out.
        rank: of this process.
        world: number of processes.
    """

    def __init__(self, net: nn.Module, optimizer: Optimizer | None, rank: int = 0, world: int = 1) -> None:
        self.net, self.optimizer, self.rank, self.world = net, optimizer, rank, world

    def to_save(self) -> Iterator[View]:
        """The ranges that this rank answers for; over all ranks they cover every tensor once."""
        yield from self.to_load()
        for name, buffer in persistent_buffers(self.net):
            yield View(name, BUFFER, *slice_of(buffer, self.rank, self.world), tuple(buffer.shape))

    @abstractmethod
    def to_load(self) -> Iterator[View]:
        """The ranges of parameters and their states that this rank must be given; writing to them changes the training."""

    @abstractmethod
    def states(self) -> Iterator[tuple[dict[str, Any], Tensor, list[str]]]:
        """The optimizer's state dictionaries, each with the tensor it belongs to and the parameters that share it."""

    @abstractmethod
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and full shape of every parameter."""

    def make_states(self, keys: Mapping[str, set[str]], step: int | None) -> None:
        """Gives a fresh optimizer empty states of the given keys by parameter, as if it had made `step` steps."""
        always: set[str] = set()
        if isinstance(self.optimizer, torch.optim.RMSprop) and any(
            g["momentum"] > 0 for g in self.optimizer.param_groups
        ):
            always = {"momentum_buffer"}  # torch asks for it wherever there is a state, as after a change of the recipe
        fused = self.optimizer is not None and any(group.get("fused") for group in self.optimizer.param_groups)
        for state, tensor, names in self.states():
            wanted = set().union(*(keys.get(name, set()) for name in names))
            for key in wanted | always if wanted else ():
                state[key] = torch.zeros_like(tensor)
            # a momentum alone (Muon's part of its optimizer) has no bias to correct
            if wanted and step is not None and wanted != {"momentum_buffer"}:
                device = tensor.device if fused else torch.device("cpu")
                state["step"] = torch.tensor(float(step), device=device)

    def loaded(self) -> None:  # noqa: B027  # most strategies have nothing to do
        """Must follow writing to the views: whatever is derived from them is made anew."""

    def optimizer_step(self) -> int | None:
        """The step that drives bias correction, the same for every parameter; None for optimizers without one."""
        steps = {int(state["step"]) for state, _, _ in self.states() if "step" in state}
        assert len(steps) <= 1, f"parameters at different steps: {steps}"
        return steps.pop() if steps else None


class Replicated(Views):
    """single and ddp: every rank holds everything, and answers for the rank-th part of each tensor when saving."""

    def to_save(self) -> Iterator[View]:
        for view in super().to_save():
            if view.key == BUFFER or self.world == 1:
                yield view
            else:
                yield View(view.name, view.key, *slice_of(view.flat, self.rank, self.world), view.shape)

    def to_load(self) -> Iterator[View]:
        for name, parameter in self.net.named_parameters():
            tensors = {PARAM: parameter.detach()}
            if self.optimizer is not None:
                tensors |= _elementwise(self.optimizer.state.get(parameter, {}), parameter)
            for key, tensor in tensors.items():
                yield View(name, key, 0, tensor.view(-1), tuple(parameter.shape))

    def states(self) -> Iterator[tuple[dict[str, Any], Tensor, list[str]]]:
        if self.optimizer is not None:
            for name, parameter in self.net.named_parameters():
                if parameter.requires_grad:
                    yield self.optimizer.state[parameter], parameter, [name]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(parameter.shape) for name, parameter in self.net.named_parameters()}


class Sharded(Replicated):
    """FSDP2: parameters and states are DTensors, split by rows."""

    def __init__(self, net: nn.Module, optimizer: Optimizer | None, rank: int = 0, world: int = 1) -> None:
        super().__init__(net, optimizer, rank, world)
        assert isinstance(net, FSDPModule)
        net.reshard()  # a forward pass without a backward one, as in validation, leaves the outermost parameters whole

    to_save = Views.to_save

    def to_load(self) -> Iterator[View]:
        for name, parameter in self.net.named_parameters():
            tensors: dict[str, Tensor] = {PARAM: parameter}
            if self.optimizer is not None:
                tensors |= _elementwise(self.optimizer.state.get(parameter, {}), parameter)
            for key, tensor in tensors.items():
                assert isinstance(tensor, DTensor)
                yield View(name, key, *local_range(tensor), tuple(parameter.shape))


class _Zero(Views):
    """What both forms of DeepSpeed's optimizer share. A parameter lies in a flat fp32 tensor with others of its group; a
    frozen one lies in none, and has the type that the network computes in."""

    def __init__(self, net: nn.Module, engine_optimizer: Any, rank: int, world: int) -> None:
        super().__init__(net, engine_optimizer.optimizer, rank, world)
        self.zero = engine_optimizer
        self.names = {id(parameter): name for name, parameter in net.named_parameters()}

    @abstractmethod
    def _places(self) -> Iterator[tuple[nn.Parameter, Tensor, int, int, int]]:
        """Parameter, its flat fp32 tensor, offset and length there, and start in the flattened parameter."""

    @abstractmethod
    def _frozen(self) -> Iterator[View]:
        """What this rank holds of the parameters that are not trained."""

    def to_load(self) -> Iterator[View]:
        yield from self._trained()
        yield from self._frozen()

    def _trained(self) -> Iterator[View]:
        assert self.optimizer is not None
        for parameter, flat, offset, length, start in self._places():
            tensors = {PARAM: flat.detach()} | _elementwise(self.optimizer.state.get(flat, {}), flat)
            for key, tensor in tensors.items():
                yield View(self.names[id(parameter)], key, start, tensor.narrow(0, offset, length), shape_of(parameter))

    def states(self) -> Iterator[tuple[dict[str, Any], Tensor, list[str]]]:
        assert self.optimizer is not None
        groups: dict[int, tuple[Tensor, list[str]]] = {}
        for parameter, flat, *_ in self._places():
            groups.setdefault(id(flat), (flat, []))[1].append(self.names[id(parameter)])
        for flat, names in groups.values():
            yield self.optimizer.state[flat], flat, names

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: shape_of(parameter) for name, parameter in self.net.named_parameters()}


class ZeroOneTwo(_Zero):
    """ZeRO 1 and 2: each rank updates one fp32 partition of all parameters of a group, laid end to end."""

    def _places(self) -> Iterator[tuple[nn.Parameter, Tensor, int, int, int]]:
        for group, flat in zip(self.zero.bit16_groups, self.zero.single_partition_of_fp32_groups, strict=True):
            for parameter in group:
                here = parameter._hp_mapping  # None if no part of it lies on this rank
                if here is not None:
                    place = here.hp_fragment_address
                    yield parameter, flat, place.start, place.numel, here.lp_fragment_address.start

    def _frozen(self) -> Iterator[View]:
        """Every rank holds them whole."""
        trained = {id(parameter) for group in self.zero.bit16_groups for parameter in group}
        for name, parameter in self.net.named_parameters():
            if id(parameter) not in trained:
                yield View(name, PARAM, 0, parameter.detach().view(-1), tuple(parameter.shape))

    def to_save(self) -> Iterator[View]:
        frozen = {view.name for view in self._frozen()}
        for view in super().to_save():
            if view.name in frozen:
                yield View(view.name, view.key, *slice_of(view.flat, self.rank, self.world), view.shape)
            else:
                yield view

    def loaded(self) -> None:
        self.zero.update_lp_params()


class ZeroThree(_Zero):
    """ZeRO 3: each parameter is cut into one part a rank, all of one length; the last may be padded."""

    def _places(self) -> Iterator[tuple[nn.Parameter, Tensor, int, int, int]]:
        for parameter in self.net.parameters():
            if self._is_frozen(parameter):
                continue
            group, offset, part = self.zero.grad_position[self.zero.get_param_id(parameter)]
            start = self.rank * part
            length = min(part, parameter.ds_numel - start)  # type: ignore[attr-defined]
            if length > 0:
                yield parameter, self.zero.fp32_partitioned_groups_flat[group], offset, length, start

    def _is_frozen(self, parameter: nn.Parameter) -> bool:
        return self.zero.get_param_id(parameter) not in self.zero.grad_position

    def _frozen(self) -> Iterator[View]:
        for name, parameter in self.net.named_parameters():
            if self._is_frozen(parameter):
                part: Tensor = parameter.ds_tensor  # type: ignore[attr-defined]
                start = self.rank * part.numel()
                length = min(part.numel(), parameter.ds_numel - start)  # type: ignore[attr-defined]
                if length > 0:
                    yield View(name, PARAM, start, part.detach().narrow(0, 0, length), shape_of(parameter))

    def loaded(self) -> None:
        for group in range(len(self.zero.fp16_groups)):
            self.zero._reassign_or_swap_out_partitioned_parameters(group)
        # small parameters stay gathered between steps: they are gathered anew, as DeepSpeed does after its own step
        if self.zero.persistent_parameters:
            self.zero.persistent_parameters[0].all_gather(self.zero.persistent_parameters)


def views_of(net: nn.Module, optimizer: Any, rank: int = 0, world: int = 1) -> Views:
    """The views that fit how `net` and `optimizer` are laid out now.

    Args:
        net: the network, sharded or not.
        optimizer: torch's, Lightning's or DeepSpeed's; None where only parameters and buffers count.
        rank: of this process.
        world: number of processes.
    """
    if isinstance(optimizer, LightningOptimizer):
        optimizer = optimizer.optimizer
    if hasattr(optimizer, "single_partition_of_fp32_groups"):
        return ZeroOneTwo(net, optimizer, rank, world)
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        return ZeroThree(net, optimizer, rank, world)
    kind = Sharded if isinstance(net, FSDPModule) else Replicated
    return kind(net, optimizer, rank, world)


def slice_of(tensor: Tensor, rank: int, world: int) -> tuple[int, Tensor]:
    """Where the rank-th of `world` parts of the flattened tensor starts, and the part."""
    flat = tensor.detach().reshape(-1)
    start, end = rank * flat.numel() // world, (rank + 1) * flat.numel() // world
    return start, flat[start:end]


def shape_of(parameter: nn.Parameter) -> tuple[int, ...]:
    """The full shape, also of a parameter that ZeRO 3 has cut up."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _elementwise(state: Mapping[str, Any], like: Tensor) -> dict[str, Tensor]:
    """Of an optimizer's state, whose tensors never take a gradient, what has one value for each element."""
    return {key: value for key, value in state.items() if isinstance(value, Tensor) and value.shape == like.shape}

"""What a network keeps beside its parameters: which of it is saved, and which rank's values hold."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn


def persistent_buffers(net: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of each buffer that belongs into a checkpoint."""
    saved = {name for module_name, module in net.named_modules() for name in _saved_buffers(module_name, module)}
    return ((name, buffer) for name, buffer in net.named_buffers() if name in saved)


def saved_places(net: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Each persistent buffer once, as its module and its name there: a step may put another tensor in its place."""
    seen: set[int] = set()
    for module in net.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set and id(buffer) not in seen:
                seen.add(id(buffer))
                yield module, name


def _saved_buffers(prefix: str, module: nn.Module) -> Iterator[str]:
    for name in module._buffers.keys() - module._non_persistent_buffers_set:
        yield f"{prefix}.{name}" if prefix else name


@torch.no_grad()
def take_buffers_of_first_rank(net: nn.Module) -> None:
    """Gives every rank rank 0's persistent buffers, in one broadcast; all ranks call it.

    Before an evaluation and before saving: else the ranks would evaluate different networks, and a checkpoint, of which each
    rank writes a part, would mix them. Networks of ours, which can be filled by name, keep theirs equal by themselves.
    """
    if hasattr(net, "fill") or not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return
    buffers = [buffer for _, buffer in persistent_buffers(net) if buffer.numel()]
    if not buffers:
        return
    # as bytes, since gloo does not send every type
    packed = torch.cat([buffer.detach().contiguous().view(-1).view(torch.uint8) for buffer in buffers])
    dist.broadcast(packed, src=0)
    pieces = packed.split([buffer.numel() * buffer.element_size() for buffer in buffers])
    for buffer, piece in zip(buffers, pieces, strict=True):
        buffer.copy_(piece.clone().view(buffer.dtype).view(buffer.shape))

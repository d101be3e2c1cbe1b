"""One way to run a recipe: what the scheduler chooses among."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Strategy = Literal["single", "ddp", "fsdp", "zero1", "zero2", "zero3", "zero3_offload"]
Precision = Literal["32-true", "bf16-mixed", "bf16-true", "16-mixed"]
Recomputed = Literal["none", "full"] | int


@dataclass(frozen=True)
class Layout:
    """Global batch = micro batch x accumulation x ranks."""

    nodes: int
    devices: int
    """Ranks on each node."""
    strategy: Strategy
    precision: Precision
    micro_batch_size: int
    """Samples."""
    accumulate_grad_batches: int
    activation_checkpointing: Recomputed
    cross_entropy_chunks: int
    num_workers: int
    compile: bool
    threads_per_rank: int
    accelerator: Literal["cpu", "gpu"]

    @property
    def ranks(self) -> int:
        return self.nodes * self.devices

    @property
    def global_batch_size(self) -> int:
        return self.micro_batch_size * self.accumulate_grad_batches * self.ranks

    @property
    def recomputed_blocks(self) -> int:
        """Every so many-th block recomputes its activations; 0: none."""
        match self.activation_checkpointing:
            case "none":
                return 0
            case "full":
                return 1
            case every:
                return every

"""From the Plan to Lightning's strategy and precision, and how a rank learns who it is."""

from __future__ import annotations

import os

from lightning.fabric.plugins.environments import ClusterEnvironment
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy

from lm_train.plan import Plan
from lm_train.rendezvous import COLLECTIVE_TIMEOUT


class LaunchedRank(ClusterEnvironment):
    """The place of this process among the ranks, as the supervisor wrote it into the environment; alone without one.

    A laptop, one node and several nodes look the same here, and Lightning's own detection of Slurm never runs.
    """

    @property
    def creates_processes_externally(self) -> bool:
        return True

    @property
    def main_address(self) -> str:
        return os.environ.get("MASTER_ADDR", "127.0.0.1")

    @property
    def main_port(self) -> int:
        return int(os.environ.get("MASTER_PORT", 0))

    @staticmethod
    def detect() -> bool:
        return False

    def world_size(self) -> int:
        return int(os.environ.get("WORLD_SIZE", 1))

    def set_world_size(self, size: int) -> None:
        pass  # the supervisor decided

    def global_rank(self) -> int:
        return int(os.environ.get("RANK", 0))

    def set_global_rank(self, rank: int) -> None:
        pass  # the supervisor decided

    def local_rank(self) -> int:
        return int(os.environ.get("LOCAL_RANK", 0))

    def node_rank(self) -> int:
        return int(os.environ.get("NODE_RANK", 0))


def build_strategy(plan: Plan) -> Strategy:
    """The Lightning strategy that the plan names."""
    match plan.strategy:
        case "single":
            return SingleDeviceStrategy("cuda:0" if plan.accelerator == "gpu" else "cpu")
        case "ddp":
            return DDPStrategy(
                process_group_backend="nccl" if plan.accelerator == "gpu" else "gloo",
                timeout=COLLECTIVE_TIMEOUT,
                gradient_as_bucket_view=True,  # gradients live in the buckets: one copy of them less
            )

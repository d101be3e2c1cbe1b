"""How a rank learns who it is."""

from __future__ import annotations

import os

from lightning.fabric.plugins.environments import ClusterEnvironment


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

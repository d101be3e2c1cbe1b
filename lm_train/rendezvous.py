"""How the ranks of a start meet: rank 0 opens a store, tells its address through the start's folder, and all say that
they are there. Who does not come is named; then the process group is made, and Lightning and DeepSpeed find it ready.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import socket
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from lm_train import signals
from lm_train.attempt import Attempt, meeting_timeout
from lm_train.errors import ExitCode, LMTrainError, UsageError
from lm_train.plan import Plan
from lm_train.runs import write_atomically
from lm_train.slurm import node_names

COLLECTIVE_TIMEOUT = timedelta(minutes=10)
"""A rank that waits longer for the others gives up; above the longest pause a rank may take (a checkpoint, a compile)."""
FIRST_PORT, PORTS = 15_000, 15_000
"""Ports that jobs start from, each from its own: below those that Linux gives away by itself (32768 and up)."""
TRIES = 32
"""Ports that are tried one after another where the job's own is taken."""


class NotMet(LMTrainError):
    """A rank did not come, or rank 0 cannot be reached: worth starting again."""

    exit_code = ExitCode.REQUEUE


class Address(NamedTuple):
    """Where rank 0 waits: names by which other nodes may know its host, the port, and a word that shows it is the one."""

    hosts: list[str]
    port: int
    token: str


def meet(plan: Plan, timeout_s: float | None = None) -> None:
    """Makes the process group of all ranks of this start, unless this process has one or the plan needs none.

    The supervisor says in the environment who this rank is, and in `LM_TRAIN_ATTEMPT` where it meets the others; without
    that, MASTER_ADDR and MASTER_PORT count.

    Args:
        timeout_s: seconds; None: `LM_TRAIN_MEETING_TIMEOUT`, else a minute.

    Raises:
        NotMet: naming the ranks that did not come.
    """
    if plan.strategy == "single" or dist.is_initialized():
        return
    backend = "nccl" if plan.accelerator == "gpu" else "gloo"
    if backend == "nccl":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    attempt = os.environ.get("LM_TRAIN_ATTEMPT")
    rank, world = int(os.environ.get("RANK", 0)), plan.world_size
    if world == 1:
        store: dist.Store = dist.HashStore()
    elif attempt is None:
        dist.init_process_group(backend, init_method="env://", timeout=COLLECTIVE_TIMEOUT)
        return
    else:
        store = _Meeting(Attempt(Path(attempt)), plan, rank, timeout_s or meeting_timeout()).store()
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=COLLECTIVE_TIMEOUT)


class _Meeting:
    def __init__(self, attempt: Attempt, plan: Plan, rank: int, timeout_s: float) -> None:
        self.attempt, self.plan, self.rank, self.timeout_s = attempt, plan, rank, timeout_s
        self.world = plan.world_size
        self.deadline = time.monotonic() + timeout_s
        self.node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()

    def store(self) -> dist.Store:
        """The store that all ranks have reached."""
        store, host, port, own = self._open() if self.rank == 0 else self._reach()
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = host, str(port)
        try:
            store.set(f"rank/{self.rank}", self.node)
            store.add("arrived", 1)
            if self.plan.nodes > 1:
                self._choose_interface(store, host, own)
            if not self._wait(lambda: store.add("arrived", 0) >= self.world):
                raise NotMet(self._missing(store))
        except dist.DistError as error:  # rank 0 ended while this one asked
            raise NotMet(f"Connection closed by rank 0 at {host}:{port} ({error})") from None
        return store

    def _missing(self, store: dist.Store) -> str:
        ranks = [rank for rank in range(self.world) if not store.check([f"rank/{rank}"])]
        names = node_names(os.environ.get("SLURM_STEP_NODELIST", ""))
        places = sorted({rank // self.plan.devices for rank in ranks})
        where = [names[place] if place < len(names) else f"node {place}" for place in places]
        return (
            f"rank{'s' if len(ranks) > 1 else ''} {_list(ranks)} on {_list(where) if names else 'this machine'} did not come "
            f"within {self.timeout_s:g} s; {self.world - len(ranks)} of {self.world} are there"
        )

    def _open(self) -> tuple[dist.Store, str, int, str]:
        """Rank 0 opens the store, at the job's port or the next free one, and tells where.

        Returns:
            The store, its host and port, and this end's address on the way there.
        """
        port = _first_port()
        for number in [*range(port, port + TRIES), 0] if port else [0]:
            try:
                store = dist.TCPStore(
                    "127.0.0.1", number, self.world, is_master=True, timeout=COLLECTIVE_TIMEOUT, wait_for_workers=False
                )
                break
            except dist.DistNetworkError:  # taken
                if number == 0:
                    raise
        hosts = _names_of_this_host(self.node) if self.plan.nodes > 1 else ["127.0.0.1"]
        address = Address(hosts, store.port, secrets.token_hex(8))
        store.set("token", address.token)
        write_atomically(self.attempt.address, json.dumps(address._asdict()))
        return store, hosts[0], store.port, "127.0.0.1"

    def _reach(self) -> tuple[dist.Store, str, int, str]:
        if not self._wait(self.attempt.address.exists):
            raise NotMet(
                f"rank 0 gave no address in {self.attempt.folder} within {self.timeout_s:g} s (seen from rank {self.rank} on "
                f"{self.node}); is it on a file system that all nodes share?"
            )
        address = Address(**json.loads(self.attempt.address.read_text(encoding="utf-8")))
        found: list[tuple[dist.Store, str, str]] = []
        tried: dict[str, str] = {}

        def reached() -> bool:
            for host in address.hosts:
                signals.check()
                try:
                    found.append(_client(host, address, self.world))
                    return True
                except (OSError, RuntimeError) as error:
                    tried[host] = str(error).splitlines()[0]
            return False

        if not self._wait(reached):
            raise NotMet(
                f"rank {self.rank} on {self.node} cannot reach rank 0 within {self.timeout_s:g} s: "
                + ", ".join(f"{host}:{address.port} ({why})" for host, why in tried.items())
            )
        store, host, own = found[0]
        return store, host, address.port, own

    def _wait(self, ready: Callable[[], bool]) -> bool:
        """Asks until it is so; False when the time is over. A signal ends it."""
        pause = 0.02
        while not ready():
            signals.check()
            if time.monotonic() > self.deadline:
                return False
            time.sleep(pause)
            pause = min(pause * 1.5, 0.5)
        return True

    def _choose_interface(self, store: dist.Store, host: str, own: str) -> None:
        """Names the network interface between the nodes, where the user has not: gloo would take the one that the host's
        own name resolves to, which on some systems is the loopback.

        Args:
            host: the address at which this rank has reached rank 0.
            own: this end's address on that way.
        """
        if int(os.environ.get("NODE_RANK", 0)) > 0:
            store.set("seen from elsewhere", host)
        elif self._wait(lambda: store.check(["seen from elsewhere"])):
            own = store.get("seen from elsewhere").decode()  # the first node's ranks meet over the loopback
        else:
            return  # who is missing is said next
        name = next((name for name, address in _interfaces() if address == own), None)
        if name is not None:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")


def _first_port() -> int:
    """A port of the job's own, so that jobs on one node seldom meet; 0 (any free one) outside of Slurm."""
    port = os.environ.get("LM_TRAIN_PORT")
    if port:
        if not (port.isascii() and port.isdecimal()) or not 0 < int(port) < 1 << 16:
            raise UsageError(f"LM_TRAIN_PORT={port[:80]!r}: expected a port, such as {FIRST_PORT}")
        return int(port)
    job = os.environ.get("SLURM_JOB_ID", "")
    if not job.isdigit():
        return 0
    return FIRST_PORT + int(job) % PORTS


def _client(host: str, address: Address, world: int) -> tuple[dist.TCPStore, str, str]:
    """Rank 0's store, if it is the one at this host; the numeric address of that host; and this end's on the way there.

    Raises:
        OSError, RuntimeError: if nobody answers there, or another one.
    """
    with socket.create_connection((host, address.port), timeout=3) as probe:  # TCPStore itself would try for minutes
        there, here = probe.getpeername()[0], probe.getsockname()[0]
    store = dist.TCPStore(there, address.port, world, is_master=False, timeout=timedelta(seconds=10))
    if not store.check(["token"]) or store.get("token").decode() != address.token:
        raise ConnectionError("another run answers there")
    store.set_timeout(COLLECTIVE_TIMEOUT)
    return store, there, here


def _names_of_this_host(node: str) -> list[str]:
    """By which other nodes may reach this host: its names, then its addresses, as a name may resolve to the loopback."""
    addresses = [address for _, address in _interfaces() if not address.startswith("127.")]
    return list(dict.fromkeys([node, socket.gethostname(), *addresses]))


def _interfaces() -> Iterator[tuple[str, str]]:
    """Each network interface with its IPv4 address."""
    siocgifaddr = 0x8915
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # one without an IPv4 address
                answer = fcntl.ioctl(probe.fileno(), siocgifaddr, struct.pack("256s", name.encode()[:15]))
                yield name, socket.inet_ntoa(answer[20:24])


def _list(items: Sequence[object]) -> str:
    return ", ".join(map(str, items[:8])) + (" ..." if len(items) > 8 else "")

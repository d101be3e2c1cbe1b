"""How supervisors and ranks of one start find one another, without Slurm: folders, ports, and who is missing."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path

import pytest
import torch.distributed as dist

from lm_train import rendezvous
from lm_train.attempt import Attempt, NotJoined, join, publish
from lm_train.errors import UsageError
from lm_train.hardware import Machine
from lm_train.plan import Plan, make_plan
from lm_train.recipe import load
from lm_train.rendezvous import NotMet, _Meeting
from lm_train.runs import RunFolder
from lm_train.slurm import Allocation
from tests.conftest import TINY


def allocation(node: int = 0, restart: int = 0, job: str = "12") -> Allocation:
    return Allocation(
        job_id=job, step_id="0", nodes=2, tasks_per_node=1, node_rank=node, local_task=0, node_name=f"n{node + 1}",
        restart_count=restart,
    )  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.root.mkdir()
    return folder


@pytest.fixture
def plan() -> Plan:
    return make_plan(load([*TINY]), Machine(2, ()), allocation())


def test_the_word_of_an_earlier_start_is_not_taken(run: RunFolder) -> None:
    publish(run, allocation(), Path("step-5"))
    with pytest.raises(NotJoined, match=r"n2 saw no start .*file system that all nodes share"):
        join(run, allocation(1, restart=1), timeout_s=0.3)
    taken = join(run, allocation(1), timeout_s=1)
    assert taken.word() == (None, Path("step-5"))
    with pytest.raises(NotJoined):  # the same step started a second time, by a loop around it
        join(run, allocation(1), timeout_s=0.3)
    publish(run, allocation())
    again = join(run, allocation(1), timeout_s=1)
    assert again.word() == (None, None)
    assert again.folder != taken.folder


def test_an_end_is_told_without_touching_the_start_under_way(run: RunFolder) -> None:
    first = publish(run, allocation())
    publish(run, allocation(job="13"), exit_code=73)
    assert join(run, allocation(1, job="13"), timeout_s=1).word() == (73, None)
    assert join(run, allocation(1), timeout_s=1).folder == first.folder


def meet(
    attempt: Attempt, plan: Plan, ranks: tuple[int, ...], timeout_s: float = 10
) -> dict[int, dist.Store | Exception]:
    """Lets these ranks meet in threads of this process; returns their stores, or what they raised."""
    found: dict[int, dist.Store | Exception] = {}

    def come(rank: int) -> None:
        try:
            found[rank] = _Meeting(attempt, plan, rank, timeout_s).store()
        except Exception as error:
            found[rank] = error

    threads = [threading.Thread(target=come, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.fixture
def quiet_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "NODE_RANK"):
        monkeypatch.setenv(name, "0")  # so that it is put back
        monkeypatch.delenv(name)


@pytest.mark.usefixtures("quiet_environment")
def test_a_taken_port_moves_on(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    one_node = make_plan(load([*TINY, "trainer.devices=2"]), Machine(2, ()))
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        monkeypatch.setenv("LM_TRAIN_PORT", str(other.getsockname()[1]))
        stores = meet(publish(run, None), one_node, (0, 1))
        assert all(isinstance(store, dist.Store) for store in stores.values()), stores
        assert other.getsockname()[1] < int(os.environ["MASTER_PORT"]) <= other.getsockname()[1] + rendezvous.TRIES


@pytest.mark.usefixtures("quiet_environment")
def test_the_port_is_the_jobs_and_the_rank_that_is_missing_is_named(
    run: RunFolder, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4321")
    monkeypatch.setenv("SLURM_STEP_NODELIST", "n[7-8]")
    attempt = publish(run, allocation())
    found = meet(attempt, plan, (0,), timeout_s=1)
    assert isinstance(found[0], NotMet)
    assert str(found[0]) == "rank 1 on n8 did not come within 1 s; 1 of 2 are there"
    assert found[0].exit_code == 75
    port = int(os.environ["MASTER_PORT"])
    assert 15_000 + 4321 <= port < 15_000 + 4321 + rendezvous.TRIES


def test_a_rank_that_finds_nobody_says_where_it_looked(run: RunFolder, plan: Plan) -> None:
    attempt = publish(run, allocation())
    error = meet(attempt, plan, (1,), timeout_s=0.5)[1]
    assert isinstance(error, NotMet)
    assert "rank 0 gave no address" in str(error)
    with socket.socket() as silent:  # bound, and nobody listens
        silent.bind(("127.0.0.1", 0))
        port = silent.getsockname()[1]
        attempt.address.write_text(f'{{"hosts": ["127.0.0.1"], "port": {port}, "token": "x"}}')
        error = meet(attempt, plan, (1,), timeout_s=0.5)[1]
    assert isinstance(error, NotMet)
    assert f"cannot reach rank 0 within 0.5 s: 127.0.0.1:{port} (" in str(error)


@pytest.mark.usefixtures("quiet_environment")
def test_the_store_of_another_run_is_not_taken(run: RunFolder, plan: Plan) -> None:
    other = dist.TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=False)
    other.set("token", "another")
    attempt = publish(run, allocation())
    attempt.address.write_text(f'{{"hosts": ["127.0.0.1"], "port": {other.port}, "token": "mine"}}')
    error = meet(attempt, plan, (1,), timeout_s=0.5)[1]
    assert isinstance(error, NotMet)
    assert "another run answers there" in str(error)


@pytest.mark.usefixtures("quiet_environment")
def test_several_nodes_name_the_interface_between_them_unless_the_user_has(
    run: RunFolder, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ("lo", "127.0.0.1") in rendezvous._interfaces()
    assert "127.0.0.1" not in rendezvous._names_of_this_host("n1")
    # the two threads share an environment: both stand for the second node's rank, but for what rank 0 opens
    monkeypatch.setattr(rendezvous, "_names_of_this_host", lambda node: ["127.0.0.1"])
    monkeypatch.setenv("NODE_RANK", "1")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "mine")
    stores = meet(publish(run, allocation()), plan, (0, 1))
    assert all(isinstance(store, dist.Store) for store in stores.values()), stores
    assert (os.environ["GLOO_SOCKET_IFNAME"], os.environ["NCCL_SOCKET_IFNAME"]) == ("lo", "mine")


@pytest.mark.parametrize("port", ["http", "0", "-1", "65536", "9" * 30, "$(touch x)", "\uff11\uff12"])
def test_a_port_that_is_none_is_said(port: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LM_TRAIN_PORT", port)
    with pytest.raises(UsageError, match=r"LM_TRAIN_PORT=.*expected a port"):
        rendezvous._first_port()


def test_many_jobs_of_one_port_all_meet(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten starts whose jobs' numbers lead to the same port, at once: each finds one of its own."""
    monkeypatch.setenv("LM_TRAIN_PORT", "25123")
    plan = make_plan(load([*TINY, "trainer.devices=2"]), Machine(2, ()))
    stores = []
    for number in range(10):
        attempt = Attempt(run.root / str(number))
        attempt.folder.mkdir()
        stores.append(_Meeting(attempt, plan, 0, 5.0)._open())
    assert len({port for _, _, port, _ in stores}) == 10

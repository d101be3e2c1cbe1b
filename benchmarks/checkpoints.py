"""How long a save holds up the training, against one copy of its bytes; and how long until it is published.

    python benchmarks/checkpoints.py [--megabytes 50 200 500] [--repeats 7] [--publish]

A network of transformer-like shapes with AdamW's two moments, in one process on the CPU. `copy`: one memcpy of as many bytes from
one piece of memory to another, both touched before. `stall`: what the callback does before the training goes on: the views, the
header, the copy of every tensor into the host memory that is kept from save to save. `cpu`: the same by the time that the
thread had of a core, which other work on the machine does not lengthen.
`written`: from the beginning until the folder has its name. `sync`: a save for which the training waits. Medians.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from report import write_results
from torch import nn

from lm_train.checkpoint import Group, HostMemory, Snapshot, Writer, save, views_of, write
from lm_train.saved.publish import Keeping, remove_old


def network(megabytes: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Parameters and two moments of about so many megabytes in all."""
    width = 512
    block = 12 * width * width * 4 * 3 / 1e6
    blocks = max(1, round(megabytes / block))
    net = nn.Sequential(*(nn.TransformerEncoderLayer(width, 8, 4 * width, batch_first=True) for _ in range(blocks)))
    optimizer = torch.optim.AdamW(net.parameters())
    for parameter in net.parameters():
        optimizer.state[parameter] = {
            "step": torch.tensor(1.0),
            "exp_avg": torch.rand_like(parameter),
            "exp_avg_sq": torch.rand_like(parameter),
        }
    return net, optimizer


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def measure(megabytes: int, repeats: int, place: Path) -> dict[str, Any]:
    net, optimizer = network(megabytes)
    views = views_of(net, optimizer)
    n_bytes = sum(view.flat.numel() * view.flat.element_size() for view in views.to_save())
    source, target = torch.rand(n_bytes // 4), torch.rand(n_bytes // 4)
    memory, writer = HostMemory(), Writer()
    memory.prepare(n_bytes, pinned=False)
    stalls, copies, written, waited, stalls_cpu, copies_cpu = [], [], [], [], [], []
    for number in range(repeats + 1):
        began_cpu = time.thread_time()
        copies.append(timed(lambda: target.copy_(source)))
        copies_cpu.append(time.thread_time() - began_cpu)
        folder = place / f"step-{number}"
        began, began_cpu = time.perf_counter(), time.thread_time()
        snapshot = Snapshot(views, {"step": number}, memory)
        writer.begin(
            lambda folder=folder, snapshot=snapshot: write(  # type: ignore[misc]
                snapshot, folder, Group(1), lambda newest: remove_old(newest, Keeping(2))
            )
        )
        stalls.append(time.perf_counter() - began)
        stalls_cpu.append(time.thread_time() - began_cpu)
        done = writer.finish()
        assert done is not None
        written.append(done[1] + stalls[-1])
        waited.append(timed(lambda number=number: save(place / f"step-{number}", views, {"step": number})))  # type: ignore[misc]
    copy, stall = statistics.median(copies[1:]), statistics.median(stalls[1:])
    return {
        "megabytes": round(n_bytes / 1e6, 1),
        "tensors": sum(1 for _ in views.to_save()),
        "copy_seconds": round(copy, 5),
        "stall_seconds": round(stall, 5),
        "stall_over_copy": round(statistics.median(s / c for s, c in zip(stalls[1:], copies[1:], strict=True)), 3),
        "stall_over_copy_cpu": round(statistics.median(stalls_cpu[1:]) / statistics.median(copies_cpu[1:]), 3),
        "written_seconds": round(statistics.median(written[1:]), 4),
        "sync_seconds": round(statistics.median(waited[1:]), 4),
        "stall_over_sync": round(stall / statistics.median(waited[1:]), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[50, 200, 500])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--publish", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for megabytes in arguments.megabytes:
        with tempfile.TemporaryDirectory(dir=".") as folder:
            rows.append(measure(megabytes, arguments.repeats, Path(folder)))
            print(rows[-1], flush=True)
    if arguments.publish:
        write_results("checkpoints", {"rows": rows})


if __name__ == "__main__":
    main()

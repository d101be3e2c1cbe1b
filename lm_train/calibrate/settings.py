"""What one rank measures while its neighbours measure the same."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from lm_train.calibrate.operations import Timed, operations
from lm_train.calibrate.parts import Work
from lm_train.calibrate.timing import FULL, ONCE, QUICK, Call, Case, Patience, time_all, warm_up
from lm_train.optim import build_optimizer
from lm_train.plan.rates.calibration import Pass, Setting, Sum
from lm_train.plan.rates.tables import Point
from lm_train.recipe import load
from lm_train.strategy import clip_gradients

OPTIMIZERS = ("adamw", "adam", "sgd", "adagrad", "rmsprop")
ELEMENTS = (2**6, 2**11, 2**15, 2**18, 2**20, 2**22)
MANY = 4
"""Tensors of one pass, whose seconds are divided among them."""
CHAIN = 24
"""Pairs of small operations by which their overhead in a network is measured."""
MESSAGES = (2**10, 2**14, 2**18, 2**20, 2**22, 2**24, 2**26)
"""Bytes of a collective."""


def measure(work: Work) -> Setting:
    """Times everything under this process' number of threads, beside as many ranks as there are."""
    device = torch.device("cpu") if work.gpu is None else torch.device("cuda", work.gpu)
    torch.set_num_threads(work.threads)
    if work.gpu is not None:
        torch.cuda.set_device(work.gpu)
    if work.ranks > 1:
        dist.init_process_group(
            "gloo" if work.gpu is None else "nccl",
            store=dist.FileStore(work.store, work.ranks),
            rank=work.rank,
            world_size=work.ranks,
            timeout=timedelta(minutes=5),
        )
    patience = QUICK if work.quick else FULL if work.training else ONCE
    warm_up(device, 0.2 if work.quick else 1.0)
    timed = operations(device, patience.largest) if work.operations else []
    passes = _passes(device, patience) if work.operations else []
    sums = _collectives(device, patience) if work.ranks > 1 else []
    overheads = _overheads(device)
    cases = [each.case for each in timed] + [case for *_, case in passes] + [case for *_, case in sums] + overheads
    time_all(cases, patience, device)
    engine, forward, backward = (_mean_of_ranks(case.seconds, device) for case in overheads)
    points = tuple(_point(each, engine, device) for each in timed)
    if dist.is_initialized():
        dist.destroy_process_group()
    floor = min((point.seconds for point in points if point.kind == "elementwise"), default=0.0)
    return Setting(
        ranks=work.ranks // work.nodes,
        nodes=work.nodes,
        threads=work.threads,
        points=points,
        forward_overhead=max(0.0, forward / (2 * CHAIN) - floor),
        backward_overhead=max(0.0, backward / (2 * CHAIN) - floor),
        passes=tuple(Pass(name=name, elements=n, seconds=case.seconds / MANY) for name, n, case in passes),
        collectives=tuple(Sum(kind=kind, bytes=size, seconds=case.seconds) for kind, size, case in sums),
        noise=statistics.median(case.spread for case in cases),
    )


def _point(each: Timed, engine: float, device: torch.device) -> Point:
    """Without what starting autograd's engine costs, which a network pays once."""
    seconds = _mean_of_ranks(each.case.seconds, device)
    through_engine = each.backward and each.kind != "matmul"
    return each.point(max(seconds - engine, 0.2 * seconds) if through_engine else seconds)


def _mean_of_ranks(seconds: float, device: torch.device) -> float:
    if not dist.is_initialized():
        return seconds
    value = torch.tensor([seconds], dtype=torch.float64 if device.type == "cpu" else torch.float32, device=device)
    dist.all_reduce(value)
    return float(value) / dist.get_world_size()


def _overheads(device: torch.device) -> list[Case]:
    """Of starting autograd's engine; and of a chain of tiny operations in modules, forwards and backwards."""

    def engine() -> Call:
        x = torch.zeros(4, device=device, requires_grad=True)
        out = x.view(2, 2)
        gradient = torch.ones_like(out)
        return lambda: torch.autograd.grad(out, x, gradient, retain_graph=True)

    def chain() -> tuple[nn.Module, torch.Tensor]:
        net = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(CHAIN))).to(device)
        return net, torch.zeros(4, 8, device=device)

    def forward() -> Call:
        net, x = chain()
        return lambda: net(x)

    def backward() -> Call:
        net, x = chain()
        x.requires_grad_()
        out = net(x)
        gradient, inputs = torch.ones_like(out), (x, *net.parameters())
        return lambda: torch.autograd.grad(out, inputs, gradient, retain_graph=True)

    return [Case("engine", engine), Case("chain", forward), Case("chain backward", backward)]


def _passes(device: torch.device, patience: Patience) -> list[tuple[str, int, Case]]:
    """Updates by every optimizer, the gradient's norm, and clipping."""
    found = []
    for n in (each for each in ELEMENTS if each <= ELEMENTS[-1] * max(patience.largest, 2**-6)):
        found += [(name, n, Case(f"{name} {n}", _update(name, n, device))) for name in OPTIMIZERS]
        ways = (("norm", None), ("clip", 1.0))
        found += [(name, n, Case(f"{name} {n}", _clip(n, largest, device))) for name, largest in ways]
    return found


def _update(name: str, n: int, device: torch.device) -> Callable[[], Call]:
    def make() -> Call:
        net = nn.ParameterList(torch.zeros(1, n, device=device) for _ in range(MANY))
        section = load(["recipe=gpt_debug", f"optim={name}"]).optim
        optimizer = build_optimizer(section, net, fused=device.type == "cuda")
        for parameter in net:
            parameter.grad = torch.zeros_like(parameter)
        return optimizer.step

    return make


def _clip(n: int, largest: float | None, device: torch.device) -> Callable[[], Call]:
    def make() -> Call:
        net = nn.ParameterList(torch.zeros(1, n, device=device) for _ in range(MANY))
        for parameter in net:
            parameter.grad = torch.full_like(parameter, 1e-3)
        return lambda: clip_gradients(net, largest)

    return make


def _collectives(device: torch.device, patience: Patience) -> list[tuple[Any, int, Case]]:
    world, found = dist.get_world_size(), []
    for size in (each for each in MESSAGES if each <= MESSAGES[-1] * max(patience.largest, 2**-5)):

        def whole(size: int = size) -> torch.Tensor:
            return torch.zeros(size // 4 // world * world, device=device)

        def reduce(whole: Callable[[], torch.Tensor] = whole) -> Call:
            tensor = whole()
            return lambda: dist.all_reduce(tensor)

        def gather(whole: Callable[[], torch.Tensor] = whole) -> Call:
            out = whole()
            own = out.chunk(world)[0].clone()
            return lambda: dist.all_gather_into_tensor(out, own)

        def scatter(whole: Callable[[], torch.Tensor] = whole) -> Call:
            tensor = whole()
            out = tensor.chunk(world)[0].clone()
            return lambda: dist.reduce_scatter_tensor(out, tensor)

        for kind, make in (("all_reduce", reduce), ("all_gather", gather), ("reduce_scatter", scatter)):
            found.append((kind, size, Case(f"{kind} {size}", make, collective=True)))
    return found

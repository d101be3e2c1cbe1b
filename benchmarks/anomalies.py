"""What guarding a run against bad values costs, and how far healthy runs are from a spike.

    python benchmarks/anomalies.py [LEDGER ...]

CPU microseconds a step, one thread, of what lies between the backward pass and the update: the decision about values that are
not finite, the same with the rule for spikes, keeping the running statistics of a small residual network, and the flag of a
fused optimizer; and of one comparison of replicas. Parts are measured in turn, round after round; medians are reported, and
shares of a step of 20 ms. For each ledger: in how many deviations of the rule its losses stood out at most.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from report import write_results
from torch import Tensor, nn

from lm_train import ledger
from lm_train.callbacks.replicas import sums_of_bits
from lm_train.models.resnet import ResNet
from lm_train.recipe.model_sections import ResNet as ResNetSection
from lm_train.strategy.withholding import SpikeRule, Withholding

ROUNDS, CALLS = 9, 300
STEP_MICROSECONDS = 20_000
WINDOW = 64


def parts() -> dict[str, Callable[[], object]]:
    net = nn.Linear(8, 8)
    plain, fused = (torch.optim.AdamW(net.parameters(), fused=kind) for kind in (False, True))
    net(torch.ones(1, 8)).sum().backward()
    norm, loss, scale = torch.tensor(0.7), torch.tensor(2.5), torch.ones((), requires_grad=True)

    def backward(watch: bool) -> Callable[[], object]:
        withholding = Withholding(net)

        def run() -> None:
            value: Tensor = scale * 2.0
            (withholding.watched(value) if watch else value).backward()

        return run

    def decision(optimizer: torch.optim.Optimizer, spikes: bool) -> Callable[[], object]:
        withholding = Withholding(net)
        withholding.begin()
        if spikes:
            withholding.spikes = SpikeRule(6.0, WINDOW, "cpu")

        def run() -> None:
            withholding.withhold(withholding.judge(norm, loss if spikes else None), optimizer)

        return run

    resnet = ResNet(ResNetSection(), (3, 32, 32), 10)
    keeping = Withholding(resnet)
    keeping.begin()
    big = nn.ParameterList(torch.randn(512, 2048) for _ in range(10))
    return {
        "a backward pass of nothing": backward(watch=False),
        "the same, watched": backward(watch=True),
        "decision, read by the host": decision(plain, spikes=False),
        "decision, flag of a fused optimizer": decision(fused, spikes=False),
        "decision with the rule for spikes": decision(plain, spikes=True),
        "keeping a small ResNet's statistics": keeping.begin,
        "replica check, each 10M parameters": lambda: sums_of_bits(big),
    }


def largest_deviation(file: Path) -> tuple[int, float]:
    """Steps of a ledger, and the most deviations by which a loss stood above the median of the good ones before it."""
    rule, most, steps = SpikeRule(1.0, WINDOW, "cpu"), 0.0, 0
    for steps, row in enumerate(ledger.read(file), 1):
        loss = torch.tensor(float.fromhex(row.loss))
        if steps > WINDOW:
            half = rule.size // 2
            median = rule.window.sort().values[half]
            deviation = 1.4826 * (rule.window - median).abs().sort().values[half]
            most = max(most, float((loss - median) / torch.maximum(deviation, 0.01 * median.abs())))
        rule.take(loss, torch.tensor(True))
    return steps, most


def main() -> None:
    torch.set_num_threads(1)
    found: dict[str, list[float]] = {}
    measured = parts()
    for round_ in range(ROUNDS + 1):
        for name, call in measured.items():
            calls = 3 if "replica" in name else CALLS
            began = time.process_time()
            for _ in range(calls):
                call()
            if round_:
                found.setdefault(name, []).append((time.process_time() - began) / calls * 1e6)
    costs = {}
    for name, values in found.items():
        microseconds = statistics.median(values)
        costs[name] = {
            "cpu_microseconds": round(microseconds, 1),
            "of_a_20_ms_step": round(microseconds / STEP_MICROSECONDS, 5),
        }
        print(f"{name:<40} {microseconds:9.1f} us  {microseconds / STEP_MICROSECONDS:.3%} of 20 ms", flush=True)
    deviations = {}
    for file in map(Path, sys.argv[1:]):
        steps, most = largest_deviation(file)
        deviations[file.parent.name] = {"steps": steps, "most_deviations": round(most, 2)}
        print(f"{file.parent.name:<40} {steps:6} steps, at most {most:.2f} deviations above the median", flush=True)
    write_results("anomalies", {"costs": costs, "healthy_runs": deviations})


if __name__ == "__main__":
    main()

"""A calibration for a person: a few of its figures. Free of torch."""

from __future__ import annotations

from lm_train.plan.rates.calibration import Calibration, Setting
from lm_train.plan.rates.tables import Point


def table(found: Calibration) -> str:
    """One column a setting, one line a figure; what was not measured is left out."""
    settings = found.settings
    heads = [f"{each.ranks * each.nodes} x {each.threads} thread{'s' if each.threads > 1 else ''}" for each in settings]
    lines = {
        "fp32 products, GFLOP/s": [_products(each, "fp32") for each in settings],
        "bf16 products, GFLOP/s": [_products(each, "bf16") for each in settings],
        "memory, GB/s": [_memory(each) for each in settings],
        "operation in a network, us": [
            f"{(each.forward_overhead + each.backward_overhead) * 1e6:.1f}" for each in settings
        ],
        "AdamW, ns a parameter": [_update(each) for each in settings],
        "all-reduce, GB/s": [_sums(each) for each in settings],
        "spread of repeats": [f"{each.noise:.1%}" for each in settings],
    }
    training = found.training
    wide = max(12, *map(len, heads))
    rows = [f"{found.device}, {found.processor}; torch {found.torch}; {found.date}"]
    rows.append(f"  {'':<28}" + "".join(f"{head:>{wide + 2}}" for head in heads))
    rows += [
        f"  {name:<28}" + "".join(f"{value:>{wide + 2}}" for value in values)
        for name, values in lines.items()
        if any(values)
    ]
    rows.append(
        f"  loop: {training.step * 1e3:.2f} ms a step, {training.micro_batch * 1e3:.2f} ms a micro batch, "
        f"{training.row * 1e3:.2f} ms a row of metrics; saving {found.disk.bandwidth / 1e9:.2f} GB/s"
    )
    return "\n".join(rows)


def _fastest(points: list[Point], amount: float) -> str:
    return f"{amount:.0f}" if points else ""


def _products(setting: Setting, number: str) -> str:
    points = [p for p in setting.points if p.kind == "matmul" and p.number == number]
    rates = [2.0 * p.shape[0] * p.shape[1] * p.shape[2] / p.seconds for p in points]
    return _fastest(points, max(rates, default=0.0) / 1e9)


def _memory(setting: Setting) -> str:
    points = [p for p in setting.points if p.kind == "elementwise" and p.number == "fp32" and p.bytes > 2**25]
    return _fastest(points, max((p.bytes / p.seconds for p in points), default=0.0) / 1e9)


def _update(setting: Setting) -> str:
    passes = [each for each in setting.passes if each.name == "adamw"]
    if not passes:
        return ""
    largest = max(passes, key=lambda each: each.elements)
    return f"{largest.seconds / largest.elements * 1e9:.2f}"


def _sums(setting: Setting) -> str:
    sums = [each for each in setting.collectives if each.kind == "all_reduce"]
    return f"{max(each.bytes / each.seconds for each in sums) / 1e9:.2f}" if sums else ""

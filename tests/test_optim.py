"""Each optimizer against its formula written out, and each schedule against values worked out by hand."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lm_train.models import GPT
from lm_train.optim import build_optimizer, learning_rate, parameter_groups
from lm_train.recipe import GPT as GPTSection
from lm_train.recipe.sections import SGD, Adagrad, Adam, AdamW, AnyOptim, RMSprop

RATE, DECAY = 0.1, 0.3


class Small(nn.Module):
    """One matrix and one vector, both with gradients that change from step to step."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.matrix = nn.Parameter(torch.randn(3, 4, generator=generator, dtype=torch.float64))
        self.vector = nn.Parameter(torch.randn(3, generator=generator, dtype=torch.float64))
        self.x = torch.randn(4, generator=generator, dtype=torch.float64)

    def loss(self) -> Tensor:
        return ((self.matrix @ self.x + self.vector) ** 3).sum()


# A rule takes (p, gradient, decay of this parameter, state, step from 1) and returns the new p.
Rule = Callable[[Tensor, Tensor, float, dict, int], Tensor]


def adamw(p: Tensor, g: Tensor, decay: float, state: dict, t: int) -> Tensor:
    return adam(p * (1 - RATE * decay), g, 0.0, state, t, beta2=0.95)


def adam(p: Tensor, g: Tensor, decay: float, state: dict, t: int, beta2: float = 0.999) -> Tensor:
    g = g + decay * p
    state["m"] = 0.9 * state.get("m", 0) + 0.1 * g
    state["v"] = beta2 * state.get("v", 0) + (1 - beta2) * g**2
    m, v = state["m"] / (1 - 0.9**t), state["v"] / (1 - beta2**t)
    return p - RATE * m / (v.sqrt() + 1e-8)


def sgd(p: Tensor, g: Tensor, decay: float, state: dict, t: int) -> Tensor:
    return p - RATE * (g + decay * p)


def momentum(p: Tensor, g: Tensor, decay: float, state: dict, t: int) -> Tensor:
    state["b"] = 0.8 * state.get("b", 0) + g + decay * p
    return p - RATE * state["b"]


def nesterov(p: Tensor, g: Tensor, decay: float, state: dict, t: int) -> Tensor:
    g = g + decay * p
    state["b"] = 0.8 * state.get("b", 0) + g
    return p - RATE * (g + 0.8 * state["b"])


def adagrad(p: Tensor, g: Tensor, decay: float, state: dict, t: int) -> Tensor:
    g = g + decay * p
    state["s"] = state.get("s", 0) + g**2
    return p - RATE * g / (state["s"].sqrt() + 1e-10)


def rmsprop(p: Tensor, g: Tensor, decay: float, state: dict, t: int) -> Tensor:
    g = g + decay * p
    state["s"] = 0.99 * state.get("s", 0) + 0.01 * g**2
    return p - RATE * g / (state["s"].sqrt() + 1e-8)


def rmsprop_momentum(p: Tensor, g: Tensor, decay: float, state: dict, t: int) -> Tensor:
    g = g + decay * p
    state["s"] = 0.99 * state.get("s", 0) + 0.01 * g**2
    state["b"] = 0.7 * state.get("b", 0) + g / (state["s"].sqrt() + 1e-8)
    return p - RATE * state["b"]


COMMON = {"learning_rate": RATE, "weight_decay": DECAY}
CASES = {
    "adamw": (AdamW(**COMMON), adamw),
    "adam": (Adam(**COMMON), adam),
    "sgd": (SGD(**COMMON, momentum=0.0), sgd),
    "sgd-momentum": (SGD(**COMMON, momentum=0.8), momentum),
    "sgd-nesterov": (SGD(**COMMON, momentum=0.8, nesterov=True), nesterov),
    "adagrad": (Adagrad(**COMMON), adagrad),
    "rmsprop": (RMSprop(**COMMON), rmsprop),
    "rmsprop-momentum": (RMSprop(**COMMON, momentum=0.7), rmsprop_momentum),
}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("section", "rule"), CASES.values(), ids=CASES)
def test_three_steps_equal_the_formula(section: AnyOptim, rule: Rule, fused: bool) -> None:
    net, plain = Small(), Small()
    optimizer = build_optimizer(section, net, fused=fused)
    states: list[dict] = [{}, {}]
    for step in (1, 2, 3):
        optimizer.zero_grad()
        net.loss().backward()
        optimizer.step()
        with torch.enable_grad():
            grads = torch.autograd.grad(plain.loss(), [plain.matrix, plain.vector])
        with torch.no_grad():
            # decay on the matrix, none on the vector
            for p, g, decay, state in zip((plain.matrix, plain.vector), grads, (DECAY, 0.0), states, strict=True):
                p.copy_(rule(p, g, decay, state, step))
        torch.testing.assert_close(net.matrix, plain.matrix, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(net.vector, plain.vector, rtol=1e-6, atol=1e-9)


def test_decay_on_matrices_only_and_every_parameter_once() -> None:
    net = GPT(GPTSection(n_layer=2, n_head=2, n_embd=8, block_size=8), 64)
    net.position_embedding.weight.requires_grad = False
    decayed, kept = parameter_groups(net.named_parameters(), 0.1)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    names = {id(p): name for name, p in net.named_parameters()}
    assert {names[id(p)].rsplit(".", 1)[-1] for p in decayed["params"]} == {"weight"}
    assert all(names[id(p)].endswith("bias") or "norm" in names[id(p)] for p in kept["params"])
    both = [id(p) for group in (decayed, kept) for p in group["params"]]
    assert len(both) == len(set(both)) == len(names) - 1, "all but the frozen one"


def test_a_tied_weight_is_updated_once() -> None:
    tied = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    tied[1].weight = tied[0].weight
    (group,) = build_optimizer(AdamW(), tied, fused=False).param_groups
    assert len(group["params"]) == 1


def test_one_group_where_there_are_no_vectors() -> None:
    (group,) = parameter_groups(nn.Linear(2, 2, bias=False).named_parameters(), 0.1)
    assert group["weight_decay"] == 0.1


def rates(steps: list[int], max_steps: int, **section: object) -> list[float]:
    return [learning_rate(AdamW(learning_rate=2.0, **section), step, max_steps) for step in steps]


@pytest.mark.parametrize(
    ("schedule", "warmup", "steps", "expected"),
    [
        ("constant", 0, [1, 50, 100], [2.0, 2.0, 2.0]),
        ("constant", 10, [1, 5, 10, 11, 100], [0.2, 1.0, 2.0, 2.0, 2.0]),
        # to a tenth of the peak: 2 - 1.8 p
        ("linear", 0, [1, 50, 100], [1.982, 1.1, 0.2]),
        ("linear", 20, [10, 20, 60, 100], [1.0, 2.0, 1.1, 0.2]),
        # 0.2 + 1.8 (1 + cos(pi p)) / 2 at p = 1/4, 1/2, 1
        ("cosine", 0, [25, 50, 100], [0.2 + 0.9 * (1 + math.sqrt(0.5)), 1.1, 0.2]),
        ("cosine", 20, [10, 20, 40, 60, 100], [1.0, 2.0, 0.2 + 0.9 * (1 + math.sqrt(0.5)), 1.1, 0.2]),
        # the last 20 steps of 100 come down
        ("warmup_stable_decay", 0, [1, 80, 90, 95, 100], [2.0, 2.0, 1.1, 0.65, 0.2]),
        ("warmup_stable_decay", 40, [20, 40, 41, 80, 90, 100], [1.0, 2.0, 2.0, 2.0, 1.1, 0.2]),
        # the warm-up reaches into them: it comes down from its end, without a jump
        ("warmup_stable_decay", 90, [45, 90, 95, 100], [1.0, 2.0, 1.1, 0.2]),
    ],
)
def test_schedules(schedule: str, warmup: int, steps: list[int], expected: list[float]) -> None:
    found = rates(steps, 100, schedule=schedule, warmup_steps=warmup, min_learning_rate_ratio=0.1)
    assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear", "warmup_stable_decay"])
@pytest.mark.parametrize("warmup", [0, 1, 7, 29])
@pytest.mark.parametrize("minimum", [0.0, 0.3, 1.0])
def test_every_schedule_peaks_at_the_end_of_the_warmup_and_never_jumps_up(
    schedule: str, warmup: int, minimum: float
) -> None:
    settings = {"schedule": schedule, "warmup_steps": warmup, "min_learning_rate_ratio": minimum}
    found = rates(list(range(1, 41)), 30, **settings)
    assert all(0 <= rate <= 2.0 for rate in found), "negative, or above the peak"
    if warmup:
        assert found[warmup - 1] == 2.0
    assert found[:warmup] == pytest.approx([2.0 * step / warmup for step in range(1, warmup + 1)])
    after = found[max(0, warmup - 1) :]
    assert all(a >= b for a, b in itertools.pairwise(after))
    assert found[29:] == pytest.approx([2.0 if schedule == "constant" else 2.0 * minimum] * 11), "steps beyond the last"

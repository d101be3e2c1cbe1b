"""The literature's rules: against figures that were published with them, and against a search by brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lm_train.plan.laws import CHINCHILLA, HOFFMANN, batch_tokens, batch_tokens_of_steps, compute_optimum, final_loss


@pytest.mark.parametrize("law", [CHINCHILLA, HOFFMANN])
@pytest.mark.parametrize("flops", [1e18, 1e21, 5.76e23])
def test_the_optimum_is_where_the_loss_is_lowest(law: object, flops: float) -> None:
    assert isinstance(law, type(CHINCHILLA))
    sizes = np.geomspace(1e6, 1e13, 20_001)
    losses = law.e + law.a / sizes**law.alpha + law.b / (flops / 6 / sizes) ** law.beta
    parameters, tokens = law.optimum(flops)
    assert parameters == pytest.approx(sizes[losses.argmin()], rel=2e-3)
    assert 6 * parameters * tokens == pytest.approx(flops)


def test_chinchilla_itself_lies_near_the_newer_fit() -> None:
    """70B parameters on 1.4T tokens: the newer fit agrees: about 20 tokens a parameter (arXiv:2404.10102)."""
    best = compute_optimum(6 * 70e9 * 1.4e12)
    assert 15 < best.tokens / best.parameters < 30
    assert 50e9 < best.parameters < 100e9


def test_the_interval_holds_both_fits() -> None:
    expected = final_loss(124e6, 10e9)
    for law in (CHINCHILLA, HOFFMANN):
        assert expected.low < law.loss(124e6, 10e9) < expected.high
    assert expected.low < 3.28 < expected.high  # llm.c's 124M on 10B tokens of FineWeb (discussion 481)
    assert final_loss(124e6, 20e9).value < expected.value < final_loss(62e6, 10e9).value


def test_batch_of_steps_and_batch_of_tokens_agree() -> None:
    for steps in (100, 2_000, 19_073, 1e6):
        batch = batch_tokens_of_steps(steps)
        assert batch_tokens(steps * batch) == pytest.approx(batch)


def test_ten_billion_tokens_take_a_batch_of_the_usual_size() -> None:
    """GPT-2 124M is trained with half a million tokens a step on 10B (nanoGPT, llm.c)."""
    assert 0.5 < batch_tokens(10e9) / 2**19 < 2
    assert math.log(batch_tokens(2e10) / batch_tokens(1e10), 2) == pytest.approx(0.571)

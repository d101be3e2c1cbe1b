"""Rules from the literature: the loss of a language model, its compute-optimal size, and the batch size that suits it.

They were fitted to other people's data and tokenizers: priors for a first plan, not promises.
"""

from __future__ import annotations

from typing import NamedTuple

from lm_train.plan.prediction import Interval


class LossLaw(NamedTuple):
    """L(N, D) = E + A / N^alpha + B / D^beta, nats a token, for N parameters and D tokens seen once."""

    e: float
    a: float
    b: float
    alpha: float
    beta: float

    def loss(self, parameters: float, tokens: float) -> float:
        return self.e + self.a / parameters**self.alpha + self.b / tokens**self.beta

    def optimum(self, flops: float) -> tuple[float, float]:
        """Parameters and tokens of the lowest loss with 6 N D = `flops` (Hoffmann et al. 2022, equation 4)."""
        ratio = (self.alpha * self.a / (self.beta * self.b)) ** (1 / (self.alpha + self.beta))
        each = flops / 6
        return (
            ratio * each ** (self.beta / (self.alpha + self.beta)),
            each ** (self.alpha / (self.alpha + self.beta)) / ratio,
        )


CHINCHILLA = LossLaw(1.81686, 482.006, 2085.434, 0.34781, 0.36585)
"""Besiroglu et al. 2024 (arXiv:2404.10102), who fitted the data of Hoffmann et al. 2022 (arXiv:2203.15556) anew: 240 runs.
Standard errors: E 0.026, A 125, B 1293, alpha 0.015, beta 0.021."""
HOFFMANN = LossLaw(1.69, 406.4, 410.7, 0.34, 0.28)
"""The fit that Hoffmann et al. 2022 printed themselves (section D.2); the later one rejects it."""
OTHER_DATA = 0.08
"""Further relative spread of the loss for another corpus and tokenizer: an estimate, not a measurement."""
ASKED_RANGE = (44e6, 16e9)
"""Parameters of the models that the law was fitted to (Hoffmann et al. 2022, figure 2)."""


def final_loss(parameters: float, tokens: float) -> Interval:
    """Nats a token after `tokens` tokens of training, each seen about once, with a learning rate that has come down.

    From the lower to the higher of the two published fits, and 8% around them for other data.
    """
    both = sorted(law.loss(parameters, tokens) for law in (CHINCHILLA, HOFFMANN))
    value = CHINCHILLA.loss(parameters, tokens)
    return Interval(low=both[0] * (1 - OTHER_DATA), value=value, high=both[1] * (1 + OTHER_DATA))


class Optimum(NamedTuple):
    """What a number of FLOPs is best spent on."""

    flops: float
    parameters: float
    tokens: float


def compute_optimum(flops: float) -> Optimum:
    """Model and data of the lowest loss for so many training FLOPs."""
    return Optimum(flops, *CHINCHILLA.optimum(flops))


STEP_LAW = (0.58, 0.571)
"""Li et al. 2025, "Step Law" (arXiv:2503.04715): the batch of lowest loss has 0.58 D^0.571 tokens, whatever the model's size.

Fitted to 3,700 language models with D from 2e9 to 1e11 tokens. Zhang et al. 2024 (arXiv:2410.21676) and Bergsma et al. 2025
(arXiv:2505.13738) find the same dependence on data alone for the critical batch size, from which on more data a step saves
no more steps, with exponents of 0.46 to 0.47; this batch lies below it."""


def batch_tokens(tokens: float) -> float:
    """Tokens in one optimizer step that suit a run over `tokens` tokens."""
    factor, exponent = STEP_LAW
    return factor * tokens**exponent


def batch_tokens_of_steps(steps: float) -> float:
    """Tokens in one of so many steps: what `batch_tokens` gives for steps x itself."""
    factor, exponent = STEP_LAW
    return float((factor * steps**exponent) ** (1 / (1 - exponent)))

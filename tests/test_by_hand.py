"""Small examples worked by hand, to be read from top to bottom: what a training computes, number by number.

Every example writes out its arithmetic, then asks the code that real runs use for the same number. Four digits are given
where a number goes on; ln is the natural logarithm, e^x its inverse.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lm_train.data import IGNORED
from lm_train.hardware import Machine
from lm_train.models.recurrent import RecurrentEncoder
from lm_train.models.transformer import BlockConfig, SelfAttention, chunked_cross_entropy
from lm_train.modules import CausalLanguageModel, Classification, Regression
from lm_train.optim import build_optimizer, learning_rate
from lm_train.plan import make_plan
from lm_train.recipe import AnyOptim, Recurrent, load
from lm_train.strategy import clip_gradients

RECIPE = load(["recipe=gpt_debug"])
PLAN = make_plan(RECIPE, Machine(cpu_cores=1, gpus=()))


def near(*expected: float) -> Any:
    """Equal to four digits behind the point."""
    return pytest.approx(expected if len(expected) > 1 else expected[0], abs=5.1e-5)


# ---- From scores to a loss ---------------------------------------------------------------------------------------------


def test_softmax() -> None:
    """Softmax makes shares of a whole out of scores: e^x of each, divided by their sum.

    e^1 = 2.7183   e^2 = 7.3891   e^3 = 20.0855   sum 30.1929
    2.7183 / 30.1929 = 0.0900   7.3891 / 30.1929 = 0.2447   20.0855 / 30.1929 = 0.6652
    """
    powers = [math.exp(1), math.exp(2), math.exp(3)]
    shares = [power / sum(powers) for power in powers]
    assert shares == near(0.0900, 0.2447, 0.6652)
    assert torch.softmax(torch.tensor([1.0, 2.0, 3.0]), dim=0).tolist() == near(*shares)


class Saying(nn.Module):
    """A network that has nothing to learn: it gives back what it is given."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs


def classification(label_smoothing: float = 0.0, classes: tuple[str, ...] = ("a", "b", "c")) -> Classification:
    return Classification(Saying(), RECIPE.optim, PLAN, 0, classes, label_smoothing)


SURE = torch.tensor([[0.9, 0.05, 0.05]]).log()
"""Scores of which softmax makes 0.9, 0.05 and 0.05: e^(ln p) = p, and the three add up to 1 already."""


@pytest.mark.parametrize(("label", "loss"), [(0, 0.1054), (1, 2.9957)])
def test_cross_entropy(label: int, loss: float) -> None:
    """The loss of a sample is -ln of the share that its true class was given.

    Right and sure: -ln 0.9 = 0.1054.   Wrong and sure: -ln 0.05 = 2.9957.
    """
    assert -math.log(0.9 if label == 0 else 0.05) == near(loss)
    batch = {"inputs": SURE, "labels": torch.tensor([label])}
    assert classification().loss(batch).item() == near(loss)


def test_cross_entropy_of_a_batch() -> None:
    """A batch's loss is the sum; the step divides it by the number of samples: (0.1054 + 2.9957) / 2 = 1.5505."""
    batch = {"inputs": SURE.repeat(2, 1), "labels": torch.tensor([0, 1])}
    assert classification().loss(batch).item() / 2 == near(1.5505)


def test_label_smoothing() -> None:
    """With smoothing 0.1 the target of the true class is 0.9 + 0.1/3 = 0.9333, of each other class 0.1/3 = 0.0333.

    0.9333 * 0.1054 + 0.0333 * 2.9957 + 0.0333 * 2.9957 = 0.0983 + 0.0999 + 0.0999 = 0.2981
    """
    batch = {"inputs": SURE, "labels": torch.tensor([0])}
    assert classification(label_smoothing=0.1).loss(batch).item() == near(0.2981)


def test_mean_squared_error() -> None:
    """Predicted 2.5, 3.0, 2.7 where 3.0, 2.8, 2.6 was right.

    (-0.5)^2 + 0.2^2 + 0.1^2 = 0.25 + 0.04 + 0.01 = 0.30; over three samples 0.1.
    R2 compares it with always saying the mean, 2.8: (0.2)^2 + 0^2 + (-0.2)^2 = 0.08, and 1 - 0.30 / 0.08 = -2.75: worse.
    """
    module = Regression(Saying(), RECIPE.optim, PLAN, 0, (1.0,))
    batch = {"inputs": torch.tensor([[2.5], [3.0], [2.7]]), "targets": torch.tensor([[3.0], [2.8], [2.6]])}
    assert module.loss(batch).item() / 3 == near(0.1)
    module.start_evaluation()
    module.evaluate(batch | {"valid": torch.tensor([True, True, True])})
    found = module.evaluation("val")
    assert float(found["mse"]) == near(0.1)
    assert float(found["r2"]) == near(-2.75)


# ---- From a loss to a step ---------------------------------------------------------------------------------------------


def section(text: str) -> AnyOptim:
    """The optim section of a recipe."""
    return load(["recipe=gpt_debug", f"optim={text}"]).optim


def descend(text: str, steps: int) -> list[float]:
    """w after each step, from w = 2, of an optimizer that makes (w - 3)^2 small; its gradient is 2 (w - 3)."""
    module = nn.Module()
    module.w = nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    optimizer = build_optimizer(section(text), module, fused=False)
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        (module.w - 3).square().sum().backward()
        optimizer.step()
        found.append(module.w.item())
    return found


def test_gradient_descent() -> None:
    """w goes against its gradient, by the learning rate times it.

    w = 2:    gradient 2 (2 - 3) = -2,       w = 2 - 0.1 * (-2) = 2.2
    w = 2.2:  gradient 2 (2.2 - 3) = -1.6,   w = 2.2 + 0.16 = 2.36
    """
    assert descend("{kind: sgd, learning_rate: 0.1, momentum: 0.0}", 2) == near(2.2, 2.36)


def test_momentum() -> None:
    """Momentum 0.9 keeps nine tenths of the last direction and adds the gradient.

    direction -2,                     w = 2.2
    direction 0.9 * -2 - 1.6 = -3.4,  w = 2.2 + 0.34 = 2.54
    """
    assert descend("{kind: sgd, learning_rate: 0.1, momentum: 0.9}", 2) == near(2.2, 2.54)


def test_adam() -> None:
    """Adam divides a running mean of the gradient, m, by the root of a running mean of its square, v; both begin at 0, and
    are divided by what is missing since then, 1 - beta^t.

    Step 1: gradient -2.
        m = 0.1 * -2 = -0.2           m / (1 - 0.9) = -2
        v = 0.001 * 4 = 0.004         v / (1 - 0.999) = 4,  root 2
        w = 2 - 0.1 * (-2 / 2) = 2.1; the first step is the learning rate, whatever the gradient's size
    Step 2: gradient 2 (2.1 - 3) = -1.8.
        m = 0.9 * -0.2 + 0.1 * -1.8 = -0.36              m / (1 - 0.81) = -1.8947
        v = 0.999 * 0.004 + 0.001 * 3.24 = 0.007236      v / (1 - 0.998001) = 3.6198,  root 1.9026
        w = 2.1 + 0.1 * 1.8947 / 1.9026 = 2.1 + 0.0996 = 2.1996
    """
    text = "{kind: adam, learning_rate: 0.1, beta1: 0.9, beta2: 0.999, weight_decay: 0.0}"
    assert descend(text, 2) == near(2.1, 2.1996)


def test_weight_decay() -> None:
    """AdamW first shrinks a matrix by learning rate times decay, 0.1 * 0.5: 2 * 0.95 = 1.9; then Adam's step, +0.1: 2.0.

    Vectors (biases, norms) are not shrunk: 2 + 0.1 = 2.1.
    """
    module = nn.Module()
    module.matrix, module.vector = nn.Parameter(torch.tensor([[2.0]])), nn.Parameter(torch.tensor([2.0]))
    optimizer = build_optimizer(section("{kind: adamw, learning_rate: 0.1, weight_decay: 0.5}"), module, fused=False)
    ((module.matrix - 3).square().sum() + (module.vector - 3).square().sum()).backward()
    optimizer.step()
    assert (module.matrix.item(), module.vector.item()) == near(2.0, 2.1)


def test_gradient_clipping() -> None:
    """A gradient of (3, 4) has the length sqrt(9 + 16) = 5; clipped to length 1 it is (3/5, 4/5)."""
    weight = nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([3.0, 4.0])
    norm, _ = clip_gradients([weight], 1.0)
    assert norm.summed().value.item() == near(5.0)
    assert weight.grad.tolist() == near(0.6, 0.8)


@pytest.mark.parametrize(("step", "rate"), [(5, 0.5), (10, 1.0), (35, 0.8682), (60, 0.55), (110, 0.1)])
def test_cosine_schedule(step: int, rate: float) -> None:
    """Ten steps up to the peak of 1, then half a cosine down to a tenth of it at step 110.

    Step 5: 5/10.   Step 10: the peak.   Then p is the share of the way down, and the rate 0.1 + 0.9 (1 + cos(pi p)) / 2:
    Step 35:  p = 0.25, cos 45 degrees = 0.7071:   0.1 + 0.9 * 0.8536 = 0.8682
    Step 60:  p = 0.5,  cos 90 degrees = 0:        0.1 + 0.9 * 0.5 = 0.55
    Step 110: p = 1,    cos 180 degrees = -1:      0.1
    """
    cosine = section(
        "{kind: sgd, learning_rate: 1.0, schedule: cosine, warmup_steps: 10, min_learning_rate_ratio: 0.1}"
    )
    assert learning_rate(cosine, step, max_steps=110) == near(rate)


# ---- Inside a network --------------------------------------------------------------------------------------------------


def block_config(norm: Any = "layer", n_embd: int = 2) -> BlockConfig:
    return BlockConfig(
        n_layer=1,
        n_head=1,
        n_kv_head=1,
        n_embd=n_embd,
        mlp_width=2,
        dropout=0.0,
        bias=False,
        norm=norm,
        norm_eps=0.0,
        rope_theta=None,
        gated=False,
    )


def test_scaled_dot_product_attention() -> None:
    """Two positions, (1, 0) and (0, 1), which are queries, keys and values at once; each sees itself and what is before it.

    Position 1 sees itself alone: (1, 0).
    Position 2: its query times each key, over the root of the width, sqrt 2:   0 / 1.4142 = 0,   1 / 1.4142 = 0.7071
        softmax: e^0 = 1, e^0.7071 = 2.0281, sum 3.0281:   0.3302, 0.6698
        the mean of the values with these shares: 0.3302 (1, 0) + 0.6698 (0, 1) = (0.3302, 0.6698)
    """
    attention = SelfAttention(block_config())
    with torch.no_grad():
        attention.qkv.weight.copy_(torch.eye(2).repeat(3, 1))
        attention.out.weight.copy_(torch.eye(2))
        first, second = attention(torch.eye(2).unsqueeze(0))[0]
    assert first.tolist() == near(1.0, 0.0)
    assert second.tolist() == near(0.3302, 0.6698)


def test_layer_norm() -> None:
    """(1, 2, 3, 4): mean 2.5; squared distances 2.25, 0.25, 0.25, 2.25 with mean 1.25, root 1.1180.

    -1.5 / 1.1180 = -1.3416   -0.5 / 1.1180 = -0.4472   0.4472   1.3416
    """
    x = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert block_config("layer", 4).make_norm()(x).tolist() == near(-1.3416, -0.4472, 0.4472, 1.3416)


def test_rms_norm() -> None:
    """(1, 2, 3, 4): mean square (1 + 4 + 9 + 16) / 4 = 7.5, root 2.7386.   1 / 2.7386 = 0.3651, and so on."""
    x = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert block_config("rms", 4).make_norm()(x).tolist() == near(0.3651, 0.7303, 1.0954, 1.4606)


def test_lstm_cell() -> None:
    """A cell of width 1 with every weight 1 and every bias 0 reads 1, and then 1 again; state and memory begin at 0.

    All four gates see the same number z = input + state; s(z) = 1 / (1 + e^-z).
    Step 1: z = 1 + 0.            s(1) = 0.7311        tanh(1) = 0.7616
        memory = forget * memory + enter * new = 0.7311 * 0 + 0.7311 * 0.7616 = 0.5568
        state  = leave * tanh(memory) = 0.7311 * 0.5056 = 0.3696
    Step 2: z = 1 + 0.3696.       s(1.3696) = 0.7973   tanh(1.3696) = 0.8786
        memory = 0.7973 * 0.5568 + 0.7973 * 0.8786 = 0.4439 + 0.7005 = 1.1444
        state  = 0.7973 * tanh(1.1444) = 0.7973 * 0.8159 = 0.6505
    """
    encoder = RecurrentEncoder(Recurrent(cell="lstm", n_embd=1, hidden_size=1), vocab_size=64)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            parameter.fill_(0.0 if ".bias" in name else 1.0)
        states = encoder(torch.tensor([[7, 7]]))
    assert states.flatten().tolist() == near(0.3696, 0.6505)


# ---- How good is it ----------------------------------------------------------------------------------------------------


def test_precision_recall_f1() -> None:
    """Six pictures; what they show, and what was said.

        shown   cat cat cat dog dog bird
        said    cat cat dog dog dog dog

    Confusion, a row for what is shown:          cat  dog  bird
                                           cat     2    1     0
                                           dog     0    2     0
                                           bird    0    1     0
    Precision, right of what was said:    cat 2/2 = 1        dog 2/4 = 0.5     bird 0/0, counted as 0
    Recall, right of what was shown:      cat 2/3 = 0.6667   dog 2/2 = 1       bird 0/1 = 0
    F1 = 2 P R / (P + R):                 cat 0.8            dog 0.6667        bird 0
    Macro, the mean over classes:         precision 0.5      recall 0.5556     F1 0.4889
    Accuracy, right of all:               4/6 = 0.6667, which is also micro precision, recall and F1
    """
    module = classification(classes=("cat", "dog", "bird"))
    module.start_evaluation()
    # two batches of four: the second is filled up with two pictures that do not count
    for shown, said, valid in (([0, 0, 0, 1], [0, 0, 1, 1], [1, 1, 1, 1]), ([1, 2, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0])):
        inputs = nn.functional.one_hot(torch.tensor(said), 3).float()  # what is said has the highest score
        module.evaluate({"inputs": inputs, "labels": torch.tensor(shown), "valid": torch.tensor(valid).bool()})
    found = {name: float(value) for name, value in module.evaluation("val").items()}
    assert module.scores is not None
    assert module.scores.confusion is not None
    assert module.scores.confusion.tolist() == [[2, 1, 0], [0, 2, 0], [0, 1, 0]]
    for name, expected in (("precision", (1, 0.5, 0)), ("recall", (0.6667, 1, 0)), ("f1", (0.8, 0.6667, 0))):
        assert [found[f"{name}/{label}"] for label in ("cat", "dog", "bird")] == near(*expected)
        assert found[f"{name}_micro"] == near(0.6667)
    assert (found["precision_macro"], found["recall_macro"], found["f1_macro"]) == near(0.5, 0.5556, 0.4889)
    assert found["accuracy"] == near(0.6667)


class Guessing(nn.Module):
    """A language model of four tokens that always gives them the shares 1/2, 1/4, 1/8 and 1/8."""

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        logits = torch.tensor([1 / 2, 1 / 4, 1 / 8, 1 / 8]).log().unsqueeze(-1)  # (4, 1): the head
        return chunked_cross_entropy(torch.ones(*tokens.shape, 1), logits, targets, vocab_size=4, chunks=1)


def test_perplexity_and_bits_per_byte() -> None:
    """Three tokens follow: the first, the second and the third, which had been given 1/2, 1/4 and 1/8.

    Loss: (ln 2 + ln 4 + ln 8) / 3 = (1 + 2 + 3) ln 2 / 3 = 2 ln 2 = 1.3863 nats a token.
    Perplexity: e^1.3863 = 4, as if it chose evenly among four tokens.
    Bits: 1.3863 / ln 2 = 2 a token; with 2.5 bytes of text a token, 2 / 2.5 = 0.8 bits a byte, whatever the tokenizer.
    """
    module = CausalLanguageModel(Guessing(), RECIPE.optim, PLAN, 0)
    module._trainer = SimpleNamespace(
        datamodule=SimpleNamespace(bytes_per_token=lambda split: 2.5),
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )
    module.start_evaluation()
    for targets in ([[0, 1]], [[2, IGNORED]]):  # the second sequence is shorter; what fills it up does not count
        module.evaluate({"tokens": torch.zeros(1, 2, dtype=torch.long), "targets": torch.tensor(targets)})
    found = {name: float(value) for name, value in module.evaluation("val").items()}
    assert found["loss"] == near(1.3863)
    assert found["perplexity"] == near(4.0)
    assert found["bits_per_byte"] == near(0.8)

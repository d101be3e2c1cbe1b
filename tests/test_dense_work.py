"""Image, table and recurrent networks on the symbolic tape against what torch's CPU allocator reports of real steps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lm_train.plan import DataFacts
from lm_train.plan.layout import Precision
from lm_train.plan.work import work_of
from lm_train.recipe import CNN, MLP, AnyModel, Recurrent, ResNet
from tests.test_work import LAYOUT, VOCABULARY, ids, measured, predicted, real_network

IMAGES = (
    CNN(channels=(32, 64), widths=(128,)),
    CNN(channels=(16, 32, 32), widths=(64,), activation="gelu", dropout=0.1),
    ResNet(stem=16, channels=(32, 64), blocks=(1, 1)),
    ResNet(stem=16, channels=(32, 64), blocks=(0, 2), norm="group"),
    MLP(widths=(512, 256), dropout=0.2),
)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize("model", IMAGES, ids=lambda model: f"{model.kind}-{getattr(model, 'norm', '')}")
def test_peaks_of_image_networks(model: AnyModel, precision: Precision, channels: int) -> None:
    layout = replace(LAYOUT, precision=precision, micro_batch_size=32)
    facts = DataFacts(input_shape=(channels, 32, 32), n_outputs=10)
    images, number = torch.randn(32, channels, 32, 32), torch.bfloat16 if precision == "bf16-true" else torch.float32
    classes = torch.zeros(32, dtype=torch.long)
    work = work_of(model, "classification", facts, layout)
    assert work is not None
    net = real_network(model, "classification", facts, layout)
    said = predicted(work, layout)

    def loss(net: nn.Module) -> Tensor:
        taken = images.to(number)  # held until the loss is there
        return cross_entropy(net(taken).float(), classes, reduction="sum") / 2.0

    was = measured(net, loss, layout, onednn=model.kind != "mlp")
    highest = max(was.forward, was.backward)
    assert max(said.forward, said.backward) == pytest.approx(highest, rel=0.03)


@pytest.mark.parametrize("cell", ["gru", "rnn"])  # an LSTM's memory is oneDNN's own: benchmarks/memory.py measures it
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_peaks_of_recurrent_language_models(cell: str, precision: Precision) -> None:
    layout = replace(LAYOUT, precision=precision, micro_batch_size=16)
    model = Recurrent(cell=cell, n_layer=2, n_embd=64, hidden_size=128, block_size=64)  # type: ignore[arg-type]
    facts = DataFacts(vocab_size=VOCABULARY)
    tokens = ids(16, 64)
    work = work_of(model, "causal_lm", facts, layout)
    assert work is not None
    net = real_network(model, "causal_lm", facts, layout)
    said, was = predicted(work, layout), measured(net, lambda net: net(tokens, tokens) / 2.0, layout)
    assert said.forward == pytest.approx(was.forward, rel=0.02)
    assert said.backward == pytest.approx(was.backward, rel=0.02)

"""Recurrent networks: what torch computes text by text, whatever the batch; shapes by formula; language models."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from lm_train import models
from lm_train.models import RecurrentClassifier, RecurrentLanguageModel
from lm_train.models.recurrent import CELLS
from lm_train.plan import DataFacts, Plan, flops_per_sample, parameter_shapes
from lm_train.recipe import Recurrent
from tests.text_data import plan_of

LENGTHS = torch.tensor([3, 9, 1, 6, 9])
SMALL = {"n_embd": 7, "hidden_size": 6, "block_size": 16}
ALL = list(itertools.product(CELLS, (False, True), (1, 2)))


def plan(task: str) -> Plan:
    return plan_of().model_copy(update={"task": task})


def classifier(seed: int = 0, initialise: bool = True, **changes: object) -> RecurrentClassifier:
    torch.manual_seed(seed)
    section = Recurrent(**(SMALL | changes))  # type: ignore[arg-type]
    facts = DataFacts(vocab_size=50, n_outputs=5)
    net = models.build(section, plan("classification"), facts, initialise)
    assert isinstance(net, RecurrentClassifier)
    return net


def language_model(seed: int = 0, **changes: object) -> RecurrentLanguageModel:
    torch.manual_seed(seed)
    net = models.build(Recurrent(**(SMALL | changes)), plan("causal_lm"), DataFacts(vocab_size=50))  # type: ignore[arg-type]
    assert isinstance(net, RecurrentLanguageModel)
    return net


def texts(padding: int) -> Tensor:
    """Five texts of different lengths, (5, 9), filled up with `padding`."""
    torch.manual_seed(1)
    tokens = torch.randint(2, 50, (5, 9))
    return tokens.masked_fill(torch.arange(9) >= LENGTHS.unsqueeze(1), padding)


def torchs_own(net: RecurrentClassifier, cell: str, n_layer: int, bidirectional: bool) -> nn.LSTM | nn.GRU | nn.RNN:
    """One module of torch with all layers and directions, and the network's weights."""
    reference = CELLS[cell](7, 6, n_layer, bidirectional=bidirectional, batch_first=True)
    directions = 2 if bidirectional else 1
    weights = {}
    for number, part in enumerate(net.encoder.cells):
        layer, direction = divmod(number, directions)
        for name, value in part.named_parameters():
            weights[f"{name[:-1]}{layer}{'_reverse' if direction else ''}"] = value
    reference.load_state_dict(weights)
    return reference


@pytest.mark.parametrize(("cell", "bidirectional", "n_layer"), ALL)
def test_outputs_are_those_of_torch_one_text_at_a_time_and_packed(cell: str, bidirectional: bool, n_layer: int) -> None:
    net = classifier(cell=cell, bidirectional=bidirectional, n_layer=n_layer).eval()
    reference = torchs_own(net, cell, n_layer, bidirectional)
    tokens = texts(padding=0)
    outputs = net.encoder(tokens, LENGTHS)
    embedded = net.encoder.token_embedding(tokens)
    packed, _ = reference(pack_padded_sequence(embedded, LENGTHS, batch_first=True, enforce_sorted=False))
    together, _ = pad_packed_sequence(packed, batch_first=True)
    for row, length in enumerate(LENGTHS.tolist()):
        alone, _ = reference(embedded[row : row + 1, :length])
        torch.testing.assert_close(outputs[row, :length], alone[0], rtol=0, atol=1e-6)
        torch.testing.assert_close(outputs[row, :length], together[row, :length], rtol=0, atol=1e-6)


@pytest.mark.parametrize("pooling", ["last", "mean", "max"])
@pytest.mark.parametrize(("cell", "bidirectional"), [("lstm", True), ("gru", False), ("rnn", True)])
def test_logits_and_gradients_are_those_of_plain_torch(cell: str, bidirectional: bool, pooling: str) -> None:
    net = classifier(cell=cell, bidirectional=bidirectional, n_layer=2, pooling=pooling).eval()
    reference = torchs_own(net, cell, 2, bidirectional)
    tokens = texts(padding=0)
    rows = []
    for row, length in enumerate(LENGTHS.tolist()):
        outputs, state = reference(net.encoder.token_embedding(tokens[row : row + 1, :length]))
        state = state[0] if isinstance(state, tuple) else state
        last = state[-2:, 0].flatten() if bidirectional else state[-1, 0]
        pooled = {"last": last, "mean": outputs[0].mean(0), "max": outputs[0].amax(0)}[pooling]
        rows.append(net.head(pooled))
    expected = torch.stack(rows)
    found = net(tokens, LENGTHS)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    (by_hand,) = torch.autograd.grad(expected.square().sum(), net.encoder.token_embedding.weight)
    (ours,) = torch.autograd.grad(found.square().sum(), net.encoder.token_embedding.weight)
    torch.testing.assert_close(ours, by_hand, rtol=0, atol=1e-6)


@pytest.mark.parametrize("pooling", ["last", "mean", "max"])
def test_what_fills_up_changes_nothing(pooling: str) -> None:
    net = classifier(cell="lstm", bidirectional=True, n_layer=2, pooling=pooling)
    found = []
    for padding in (0, 1):  # neither is in the texts
        tokens = torch.cat((texts(padding), torch.full((5, 4), padding)), dim=1) if padding else texts(padding)
        net.zero_grad()
        logits = net(tokens, LENGTHS)
        logits.square().sum().backward()
        gradient = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
        found.append((logits.detach(), gradient))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-6)
    assert found[1][1]["encoder.token_embedding.weight"][:2].abs().sum() == 0
    longest = LENGTHS == 9
    torch.testing.assert_close(net(texts(0)[longest]), net(texts(0), LENGTHS)[longest])


@pytest.mark.parametrize(("cell", "bidirectional", "n_layer"), ALL)
@pytest.mark.parametrize("task", ["classification", "causal_lm"])
def test_shapes_by_formula(task: str, cell: str, bidirectional: bool, n_layer: int) -> None:
    if task == "causal_lm" and bidirectional:
        return
    section = Recurrent(cell=cell, bidirectional=bidirectional, n_layer=n_layer, **SMALL)  # type: ignore[arg-type]
    facts = DataFacts(vocab_size=50, n_outputs=5)
    net = models.build(section, plan(task), facts)
    shapes = parameter_shapes(section, task, facts)  # type: ignore[arg-type]
    assert shapes == [(name, tuple(p.shape)) for name, p in net.named_parameters()]


def test_flops_by_hand() -> None:
    section = Recurrent(cell="gru", n_layer=2, bidirectional=True, **SMALL)
    facts = DataFacts(vocab_size=50, n_outputs=5, tokens_per_sample=2.5)
    # a token: 2 directions of 3 gates of 6 units, over 7 + 6 inputs in the first layer, over 12 + 6 in the second
    a_token = 2 * (2 * 18 * (7 + 6)) + 2 * (2 * 18 * (12 + 6))
    assert flops_per_sample(section, "classification", facts, 0) == 3 * (2.5 * a_token + 2 * 12 * 5)
    one = Recurrent(cell="lstm", **SMALL)
    assert flops_per_sample(one, "causal_lm", facts, 0) == 3 * 16 * (2 * 24 * (7 + 6) + 2 * 6 * 64)
    assert flops_per_sample(section, "classification", DataFacts(vocab_size=50, n_outputs=5), 0) is None


def test_each_initial_value_by_itself() -> None:
    net, other = (
        classifier(seed=3, n_layer=2, bidirectional=True),
        classifier(n_layer=2, bidirectional=True, initialise=False),
    )
    assert all(p.is_meta for p in other.parameters())
    torch.manual_seed(3)
    for name, parameter in net.named_parameters():
        value = torch.empty(parameter.shape)
        other.fill(name, value)
        assert torch.equal(value, parameter), name
    bound = 6**-0.5
    weights = net.encoder.cells[0].weight_hh_l0
    assert 0.9 * bound < weights.abs().max() <= bound


def test_a_built_network_equals_one_from_the_meta_device() -> None:
    net, other = classifier(seed=3), classifier(initialise=False)
    other.to_empty(device="cpu")
    torch.manual_seed(3)
    other.init_weights()
    torch.testing.assert_close(net(texts(0), LENGTHS), other(texts(0), LENGTHS))


@pytest.mark.parametrize("cell", CELLS)
def test_a_language_model_reads_forwards(cell: str) -> None:
    net = language_model(cell=cell, n_layer=2).eval()
    tokens = texts(0)[1:2]
    changed = tokens.clone()
    changed[0, 5:] = 3
    torch.testing.assert_close(net(changed)[:, :5], net(tokens)[:, :5])
    assert not torch.equal(net(changed)[:, 5], net(tokens)[:, 5])
    assert net(tokens).shape == (1, 9, 50)
    torch.testing.assert_close(net(tokens, last_only=True), net(tokens)[:, -1:])


@pytest.mark.parametrize("chunks", [1, 4])
def test_loss_is_torchs(chunks: int) -> None:
    torch.manual_seed(0)
    section = Recurrent(**SMALL)  # type: ignore[arg-type]
    net = RecurrentLanguageModel(section, 50, cross_entropy_chunks=chunks)
    tokens, targets = texts(0), texts(-100)
    logits = net(tokens)
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
    torch.testing.assert_close(net(tokens, targets), expected)
    (gradient,) = torch.autograd.grad(net(tokens, targets), net.head.weight)
    assert gradient[50:].abs().sum() == 0, "rows that only fill the vocabulary up learn nothing"


def test_generation_repeats_under_a_seed_and_outgrows_the_block() -> None:
    net = language_model().eval()
    drawn = []
    for _ in range(2):
        torch.manual_seed(5)
        drawn.append(net.generate(torch.tensor([[4]]), 40).tolist())
    assert drawn[0] == drawn[1]
    assert len(drawn[0][0]) == 41


def test_dropout_acts_in_training_only() -> None:
    net, tokens = classifier(dropout=0.5, n_layer=2), texts(0)
    assert not torch.equal(net(tokens, LENGTHS), net(tokens, LENGTHS))
    net.eval()
    assert torch.equal(net(tokens, LENGTHS), net(tokens, LENGTHS))

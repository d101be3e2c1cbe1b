"""Muon with AdamW for the rest: the two optimizers of torch, as one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lm_train import checkpoint, resume, runs
from lm_train.checkpoint import CheckpointReader, views_of
from lm_train.models import GPT, Decoder, Llama
from lm_train.optim import Muon, build_optimizer, hidden_matrices
from lm_train.plan import checkpoint_bytes
from lm_train.recipe import GPT as GPTSection
from lm_train.recipe import Llama as LlamaSection
from lm_train.recipe import load
from lm_train.recipe.sections import AdamW
from lm_train.recipe.sections import Muon as MuonSection
from lm_train.runs import RunFolder, read_jsonl
from lm_train.train import train

SECTION = MuonSection(learning_rate=0.02, weight_decay=0.1, momentum=0.9, ns_steps=4, beta2=0.9, eps=1e-7)


def network(kind: str, seed: int = 0) -> Decoder:
    torch.manual_seed(seed)
    if kind == "gpt":
        return GPT(GPTSection(n_layer=2, n_head=2, n_embd=16, block_size=8), 64)
    return Llama(LlamaSection(n_layer=2, n_head=4, n_kv_head=2, n_embd=16, intermediate_size=24, block_size=8), 64)


def backward(net: nn.Module, seed: int) -> float:
    both = torch.randint(0, 64, (4, 9), generator=torch.Generator().manual_seed(seed))
    net.zero_grad()
    loss = net(both[:, :-1], both[:, 1:]) / 32
    loss.backward()
    return loss.item()


def steps(net: nn.Module, optimizer: torch.optim.Optimizer, first: int, n: int) -> list[float]:
    losses = []
    for step in range(first, first + n):
        losses.append(backward(net, step))
        for group in optimizer.param_groups:
            group["lr"] = 0.02 / (1 + step)
        optimizer.step()
    return losses


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", ["gpt", "llama"])
def test_updates_are_those_of_the_two_optimizers(kind: str, fused: bool) -> None:
    net, plain = network(kind), network(kind)
    inside = {name: p for name, p in plain.named_parameters() if name.startswith("blocks.") and p.dim() == 2}
    others = [p for name, p in plain.named_parameters() if name not in inside]
    muon = torch.optim.Muon(inside.values(), 0.02, 0.1, 0.9, nesterov=True, ns_steps=4, adjust_lr_fn="match_rms_adamw")
    decay = [
        {"params": [p for p in others if p.dim() == 2], "weight_decay": 0.1},
        {"params": [p for p in others if p.dim() == 1], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(decay, 0.02, (0.9, 0.9), 1e-7, fused=fused)
    optimizer = build_optimizer(SECTION, net, fused=fused)
    for step in range(5):
        steps(net, optimizer, step, 1)
        backward(plain, step)
        for group in (*muon.param_groups, *adamw.param_groups):
            group["lr"] = 0.02 / (1 + step)
        muon.step()
        adamw.step()
        for (name, p), q in zip(net.named_parameters(), plain.parameters(), strict=True):
            assert torch.equal(p, q), (step, name)


@pytest.mark.parametrize("kind", ["gpt", "llama"])
def test_every_trained_parameter_has_one_of_them(kind: str) -> None:
    net = network(kind)
    net.blocks[0].attention.out.weight.requires_grad = False
    optimizer = build_optimizer(MuonSection(), net, fused=False)
    steps(net, optimizer, 0, 1)
    trained = [name for name, p in net.named_parameters() if p.requires_grad]
    assert len(optimizer.state) == len(trained)
    for name, p in net.named_parameters():
        if p.requires_grad:
            expected = (
                {"momentum_buffer"}
                if name.startswith("blocks.") and p.dim() == 2
                else {"step", "exp_avg", "exp_avg_sq"}
            )
            assert optimizer.state[p].keys() == expected, name
    per_block = 4 if kind == "gpt" else 5
    assert len(hidden_matrices(net)) == 2 * per_block - 1


def test_a_network_without_blocks_is_adamws() -> None:
    nets = [nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    for net, section in zip(nets, (MuonSection(), AdamW()), strict=True):
        optimizer = build_optimizer(section, net, fused=False)
        net(torch.ones(2, 5)).square().sum().backward()
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(*(net.parameters() for net in nets), strict=True))


def test_updates_are_as_large_as_adamws() -> None:
    """Of a gradient with random directions: a root mean square of 0.2 times the rate, in tall and in flat matrices."""
    net = network("gpt")
    before = copy.deepcopy(net)
    optimizer = build_optimizer(MuonSection(learning_rate=0.1, weight_decay=0.0), net, fused=False)
    generator = torch.Generator().manual_seed(0)
    for p in net.parameters():
        p.grad = torch.randn(p.shape, generator=generator)
    optimizer.step()
    for p, q in zip(hidden_matrices(net), hidden_matrices(before), strict=True):
        assert (p - q).square().mean().sqrt().item() == pytest.approx(0.02, rel=0.25)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", ["gpt", "llama"])
def test_what_is_loaded_goes_on_to_the_bit(tmp_path: Path, kind: str, fused: bool) -> None:
    net = network(kind)
    optimizer = build_optimizer(SECTION, net, fused=fused)
    steps(net, optimizer, 0, 3)
    checkpoint.save(tmp_path / "step-3", views_of(net, optimizer), {"step": 3})
    expected = steps(net, optimizer, 3, 4)

    other = network(kind, seed=9)
    other_optimizer = build_optimizer(SECTION, other, fused=fused)
    CheckpointReader(tmp_path / "step-3").load(views_of(other, other_optimizer))
    assert steps(other, other_optimizer, 3, 4) == expected
    checkpoint.save(tmp_path / "step-7", views_of(other, other_optimizer), {"step": 7})
    states = [optimizer.state, other_optimizer.state]
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
        ours, again = states[0][p], states[1][q]
        assert ours.keys() == again.keys()
        assert all(torch.equal(ours[key], again[key]) for key in ours)


def test_torchs_own_state_dict_works_too() -> None:
    net, other = network("llama"), network("llama")
    optimizer, second = (build_optimizer(SECTION, n, fused=False) for n in (net, other))
    steps(net, optimizer, 0, 2)
    other.load_state_dict(net.state_dict())
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert steps(net, optimizer, 2, 3) == steps(other, second, 2, 3)


def losses(folder: RunFolder) -> dict[int, float]:
    return {row["step"]: row["train/loss"] for row in read_jsonl(folder.metrics) if "train/loss" in row}


def test_a_run_learns_at_least_as_well_as_with_adamw_and_resumes(new_run: Callable[..., RunFolder]) -> None:
    """Each at its best rate of 1e-3, 2e-3, 3e-3, 5e-3 and 1e-2, tried with two seeds."""
    words = "optim={{kind: {}, learning_rate: {}, schedule: constant}}"
    found = {}
    for kind, rate in (("adamw", 3e-3), ("muon", 1e-2)):
        folder = new_run(words.format(kind, rate), "checkpoint.every_n_steps=40", "checkpoint.keep_last=5", name=kind)
        assert train(folder) == 0
        found[kind] = losses(folder)
    assert found["muon"][50] < found["adamw"][50]

    recipe = load([f"recipe={folder.recipe}"])
    assert resume.check_resumable(folder.checkpoints / "step-40", recipe, runs.Plan.read(folder.plan)) == 40
    again = new_run(words.format("muon", 1e-2), "checkpoint.every_n_steps=40", name="again")
    assert train(again, resume_from=folder.checkpoints / "step-40") == 0
    assert {step: loss for step, loss in found["muon"].items() if step > 40} == losses(again)


def test_bytes_of_a_checkpoint(tmp_path: Path) -> None:
    recipe = load(["recipe=gpt_debug", "optim=muon"])
    net = network("llama")
    optimizer = build_optimizer(recipe.optim, net, fused=False)
    steps(net, optimizer, 0, 1)
    checkpoint.save(tmp_path / "step-1", views_of(net, optimizer), {"step": 1})
    tensors: list[Tensor] = list(net.parameters())
    tensors += [value for state in optimizer.state.values() for key, value in state.items() if key != "step"]
    shapes = [(name, tuple(parameter.shape)) for name, parameter in net.named_parameters()]
    assert checkpoint_bytes(shapes, "single", "32-true", recipe.optim) == sum(4 * tensor.numel() for tensor in tensors)
    assert isinstance(optimizer, Muon)

"""Text from a trained language model: a continuation, outputs for sources, guesses of hidden tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import nn

from lm_train.data import MaskedTextDataModule, PairDataModule
from lm_train.data.batches import Split
from lm_train.data.tokenizer import end_of_text_id

_PAIRS = 6
_GUESSED_BLOCKS = 2


def sample_text(net: nn.Module, tokenizer: Tokenizer, n_tokens: int, seed: int, prompt: str = "\n") -> str:
    """A continuation of `prompt`, drawn with the given seed; the network's mode is left as it was."""
    device = next(net.parameters()).device
    start = tokenizer.encode(prompt, add_special_tokens=False).ids or [end_of_text_id(tokenizer) or 0]
    with _evaluating(net), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        ids = net.generate(torch.tensor([start], device=device), n_tokens)  # type: ignore[operator]
    return tokenizer.decode(ids[0].tolist(), skip_special_tokens=False).strip("\n")


def sample_pairs(net: nn.Module, data: PairDataModule, split: Split) -> str:
    """The first sources of a split and what the network makes of each, a line each, with the target where it differs."""
    device = next(net.parameters()).device
    samples = data.samples(split)
    batch = samples.batch(np.arange(min(_PAIRS, len(samples))), None)
    n_tokens = batch["targets"].shape[1]
    with _evaluating(net):
        found = net.generate(  # type: ignore[operator]
            batch["tokens"].to(device), batch["lengths"].to(device), n_tokens, data.start_id, data.end_id
        )
    lines = []
    for i in range(len(found)):
        source, target = (data.tokenizer.decode(ids.tolist()) for ids in samples.pairs.pair(i))
        output = data.tokenizer.decode(found[i].tolist(), skip_special_tokens=True)
        lines.append(f"{source} -> {output}" + ("" if output == target else f"  (wanted: {target})"))
    return "\n".join(lines)


@torch.no_grad()
def sample_guesses(net: nn.Module, data: MaskedTextDataModule, split: Split) -> str:
    """The first blocks of a split, each hidden token as [guess], or as [guess|token] where the guess is wrong."""
    device = next(net.parameters()).device
    batch = data.evaluation_batches(split, rank=0)[0]
    part = {name: value[:_GUESSED_BLOCKS] for name, value in batch.items()}
    with _evaluating(net):
        inputs = {name: part[name].to(device) for name in ("tokens", "lengths", "positions")}
        guesses = net(**inputs).argmax(dim=-1).cpu()  # (B, k)
    blocks = []
    for tokens, length, places, rights, found in zip(
        part["tokens"], part["lengths"], part["positions"], part["targets"], guesses, strict=True
    ):
        pieces, behind = [], 0
        for at, right, guess in zip(places.tolist(), rights.tolist(), found.tolist(), strict=True):
            if right < 0:
                continue
            pieces.append(data.tokenizer.decode(tokens[behind:at].tolist(), skip_special_tokens=False))
            guessed, true = (data.tokenizer.decode([i], skip_special_tokens=False) for i in (guess, right))
            pieces.append(f"[{guessed}]" if guess == right else f"[{guessed}|{true}]")
            behind = at + 1
        pieces.append(data.tokenizer.decode(tokens[behind : int(length)].tolist(), skip_special_tokens=False))
        blocks.append("".join(pieces))
    return "\n---\n".join(blocks)


@contextmanager
def _evaluating(net: nn.Module) -> Iterator[None]:
    was_training = net.training
    net.eval()
    try:
        yield
    finally:
        net.train(was_training)

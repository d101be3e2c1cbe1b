"""Text from a trained language model."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer
from torch import nn

from lm_train.data.tokenizer import end_of_text_id


def sample_text(net: nn.Module, tokenizer: Tokenizer, n_tokens: int, seed: int, prompt: str = "\n") -> str:
    """A continuation of `prompt`, drawn with the given seed; the network's mode is left as it was."""
    device = next(net.parameters()).device
    start = tokenizer.encode(prompt, add_special_tokens=False).ids or [end_of_text_id(tokenizer) or 0]
    was_training = net.training
    net.eval()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            ids = net.generate(torch.tensor([start], device=device), n_tokens)  # type: ignore[operator]
    finally:
        net.train(was_training)
    return tokenizer.decode(ids[0].tolist(), skip_special_tokens=False).strip("\n")

"""A convolutional language model, which lm_train does not ship."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from lm_train.plan import DataFacts


class Layer(nn.Module):
    """Looks back: a causal convolution over the last `reach` positions, then a small MLP, added to the stream."""

    def __init__(self, width: int, reach: int) -> None:
        super().__init__()
        self.reach = reach
        self.norm = nn.LayerNorm(width)
        self.look_back = nn.Conv1d(width, width, reach)
        self.mix = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C) -> (B, T, C)
        past = F.pad(self.norm(x).transpose(1, 2), (self.reach - 1, 0))  # nothing before the first token
        return x + self.mix(F.gelu(self.look_back(past).transpose(1, 2)))


class ConvolutionalLM(nn.Module):
    """Predicts each next token from the ones before it by causal convolutions."""

    def __init__(self, vocab_size: int, width: int, n_layer: int, reach: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        # entries of a ModuleList are what fsdp gathers one at a time
        self.layers = nn.ModuleList(Layer(width, reach) for _ in range(n_layer))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab_size, bias=False)
        nn.init.normal_(self.head.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:  # (B, T) -> (B, T, vocabulary)
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def build(facts: DataFacts, width: int = 64, n_layer: int = 2, reach: int = 3) -> nn.Module:
    """What `factory: "examples.custom_model.nets:build"` calls; `facts` is what the data say, the rest comes from `args`."""
    assert facts.vocab_size is not None
    return ConvolutionalLM(facts.vocab_size, width, n_layer, reach)

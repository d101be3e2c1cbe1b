"""Parameters and floating-point operations of a model by formula; the tests compare them with the real modules."""

from __future__ import annotations

from lm_train.recipe import ModelSection


def parameter_count(model: ModelSection, vocab_size: int) -> int:
    """Parameters of a GPT whose embedding has `vocab_size` rows (the padded size); tied weights count once."""
    d, bias = model.n_embd, int(model.bias)
    attention = 4 * d * d + bias * 4 * d
    mlp = 8 * d * d + bias * 5 * d
    norm = d + bias * d
    return vocab_size * d + model.block_size * d + model.n_layer * (attention + mlp + 2 * norm) + norm


def flops_per_token(model: ModelSection, n_parameters: int) -> int:
    """Forward and backward FLOPs of one token: 6N + 12 L d T.

    N counts every parameter, tied embeddings once; attention is counted without regard to the causal mask
    (Chowdhery et al. 2022, arXiv:2204.02311, appendix B).
    """
    return 6 * n_parameters + 12 * model.n_layer * model.n_embd * model.block_size

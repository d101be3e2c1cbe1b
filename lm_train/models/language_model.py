"""What every network that predicts the next token does: loss, sampling, drawing its initial weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lm_train.models.transformer import chunked_cross_entropy


class LanguageModel(nn.Module):
    """A network over tokens; a family builds its layers, and says what `hidden`, `head_weight` and `fill` are."""

    vocab_size: int
    """Token ids. Embedding and head have this many rows, rounded up to a multiple of 64; the ids above never take
    probability."""
    block_size: int
    """Most tokens of one sequence."""
    cross_entropy_chunks: int
    """Pieces in which the loss computes its logits."""

    def hidden(self, tokens: Tensor, documents: Tensor | None = None) -> Tensor:  # (B, T), (B, T) -> (B, T, C)
        raise NotImplementedError

    @property
    def head_weight(self) -> Tensor:  # (V padded, C)
        raise NotImplementedError

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        last_only: bool = False,
        documents: Tensor | None = None,
    ) -> Tensor:
        """Logits of the next token, or with targets the loss (one entry point, so that wrappers see every use).

        Args:
            tokens: (B, T).
            targets: (B, T), -100 where nothing is to be predicted.
            last_only: logits of the last position only.
            documents: number of the document that each token belongs to, (B, T), in ascending order; what is computed for
                one has no part in another's. None: a row is one document.

        Returns:
            Without targets (B, T, vocab_size) logits, T being 1 with `last_only`; with targets the summed cross-entropy
            in nats, ().
        """
        t = tokens.shape[1]
        if t > self.block_size:
            raise ValueError(f"a sequence of {t} tokens is longer than block_size={self.block_size}")
        hidden = self.hidden(tokens, documents)
        if targets is None:
            return F.linear(hidden[:, -1:] if last_only else hidden, self.head_weight)[..., : self.vocab_size]
        return chunked_cross_entropy(hidden, self.head_weight, targets, self.vocab_size, self.cross_entropy_chunks)

    @torch.no_grad()
    def generate(self, tokens: Tensor, n_tokens: int, temperature: float = 0.8, top_k: int = 50) -> Tensor:
        """Samples `n_tokens` more tokens; where parameters are sharded every rank calls it, with the same seed.

        Args:
            tokens: prompt, (1, T) with T at least 1.
            n_tokens: how many to add.
            temperature: divides the logits; above 0.
            top_k: only the k most likely tokens are drawn.

        Returns:
            Prompt and continuation, (1, T + n_tokens).
        """
        with torch.compiler.set_stance("force_eager"):  # a graph for each new length costs more than it saves
            for _ in range(n_tokens):
                logits = self(tokens[:, -self.block_size :], last_only=True)[:, -1].float() / temperature  # (1, V)
                best, ids = logits.topk(min(top_k, self.vocab_size))  # (1, k)
                choice = torch.multinomial(best.softmax(dim=-1), 1)
                tokens = torch.cat((tokens, ids.gather(1, choice)), dim=1)
        return tokens

    def init_weights(self) -> None:
        """Draws the initial weights; after `to_empty` of a model built on the meta device, the same as built in place."""
        for name, parameter in self.named_parameters():
            self.fill(name, parameter)

    def fill(self, name: str, tensor: Tensor) -> None:
        """Puts the initial value of parameter `name` into `tensor`, which has the parameter's shape.

        Called in the order of `named_parameters`, it draws the numbers that `init_weights` draws.
        """
        raise NotImplementedError

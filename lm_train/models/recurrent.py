"""Recurrent networks over tokens. Shapes in comments: B batch, T tokens, E embedding, H state, D directions, V vocabulary."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lm_train.models.language_model import LanguageModel
from lm_train.models.transformer import positions_within
from lm_train.plan import padded_vocab_size
from lm_train.recipe import Recurrent as RecurrentSection

CELLS: dict[str, type[nn.LSTM | nn.GRU | nn.RNN]] = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
EMBEDDING_STD = 0.1
"""Standard deviation of the initial embedding."""


class RecurrentEncoder(nn.Module):
    """Embedding and stacked recurrent layers over texts of unequal length.

    The results are those of torch's packed sequences, without packing: texts are filled up at their end, where a layer that
    reads forwards has already passed them, and for the other direction each text is turned around within its own length.
    Packing would bring the lengths to the host in every step, which waits for the GPU, and takes torch's slow path on a CPU.
    Each direction is a module of its own: a unit for strategies that gather parameters.
    """

    def __init__(self, section: RecurrentSection, vocab_size: int) -> None:
        super().__init__()
        self.directions = 2 if section.bidirectional else 1
        self.width = self.directions * section.hidden_size
        self.token_embedding = nn.Embedding(padded_vocab_size(vocab_size), section.n_embd)
        self.cells = nn.ModuleList(
            CELLS[section.cell](section.n_embd if layer == 0 else self.width, section.hidden_size)
            for layer in range(section.n_layer)
            for _ in range(self.directions)
        )
        """Layer by layer, the forward direction before the backward one."""
        self.dropout = nn.Dropout(section.dropout)

    def forward(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Outputs of the last layer, (B, T, D*H); behind a text's length they mean nothing.

        Args:
            tokens: (B, T).
            lengths: valid tokens of each text, (B,), from 1 to T; None: all.
        """
        # torch's layers keep time first, and return views of it where they are asked for another order
        tokens = tokens.t()
        x = self.dropout(self.token_embedding(tokens))  # (T, B, E)
        turned = _turned(tokens, lengths) if self.directions == 2 else None
        for first in range(0, len(self.cells), self.directions):
            if first:
                x = self.dropout(x)
            y, _ = self.cells[first](x)  # (T, B, H)
            if turned is not None:
                backwards, _ = self.cells[first + 1](_gathered(x, turned))
                y = torch.cat((y, _gathered(backwards, turned)), dim=-1)  # (T, B, 2H)
            x = y
        return x.transpose(0, 1)


def _turned(tokens: Tensor, lengths: Tensor | None) -> Tensor:
    """Positions of each text from its last token to its first, those behind it as they are, (T, B); its own inverse."""
    time, batch = tokens.shape
    positions = torch.arange(time, device=tokens.device).unsqueeze(1).expand(time, batch)
    if lengths is None:
        return positions.flip(0)
    last = lengths - 1
    return torch.where(positions <= last, last - positions, positions)


def _gathered(x: Tensor, positions: Tensor) -> Tensor:  # (T, B, F), (T, B) -> (T, B, F)
    return x.gather(0, positions.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def _laid_out(documents: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column of each token where every document has a row of its own, as all start from a state of zeros; (B, T) each.

    How many rows there are, and how long the longest is, must be known before the layers run: the host waits for a GPU here.
    """
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return begins.flatten().cumsum(0).view_as(documents) - 1, positions_within(documents)


def _initial_value(name: str, tensor: Tensor, hidden_size: int) -> None:
    """torch's own: uniform in +-1/sqrt(H) for every weight and bias of a cell; Glorot & Bengio 2010 for the head."""
    if ".cells." in name:
        bound = 1 / math.sqrt(hidden_size)
        nn.init.uniform_(tensor, -bound, bound)
    elif name.endswith("token_embedding.weight"):
        nn.init.normal_(tensor, std=EMBEDDING_STD)
    elif name.endswith("bias"):
        nn.init.zeros_(tensor)
    else:
        nn.init.xavier_uniform_(tensor)


class RecurrentLanguageModel(LanguageModel):
    """Predicts each next token from the state after the tokens before it; a block starts from a state of zeros.

    Args:
        section: sizes; see `lm_train.recipe.Recurrent`.
        vocab_size: token ids.
        cross_entropy_chunks: pieces in which the loss computes its logits.
        initialise: draw the weights; else they stay on the meta device, for whoever calls `fill`.
    """

    def __init__(
        self, section: RecurrentSection, vocab_size: int, cross_entropy_chunks: int = 1, initialise: bool = True
    ) -> None:
        super().__init__()
        assert not section.bidirectional, "a language model reads forwards"
        self.vocab_size, self.block_size = vocab_size, section.block_size
        self.cross_entropy_chunks = cross_entropy_chunks
        self.hidden_size = section.hidden_size
        with torch.device("meta"):  # torch's own initial weights would cost time and random numbers
            self.encoder = RecurrentEncoder(section, vocab_size)
            self.dropout = nn.Dropout(section.dropout)
            self.head = nn.Linear(self.encoder.width, padded_vocab_size(vocab_size), bias=False)
        if initialise:
            self.to_empty(device=torch.get_default_device())
            self.init_weights()

    @property
    def head_weight(self) -> Tensor:  # (V padded, H)
        return self.head.weight

    def hidden(self, tokens: Tensor, documents: Tensor | None = None) -> Tensor:  # (B, T), (B, T) -> (B, T, H)
        if documents is None:
            return self.dropout(self.encoder(tokens))
        rows, columns = _laid_out(documents)
        apart = tokens.new_zeros(int(rows.max()) + 1, int(columns.max()) + 1)
        apart[rows, columns] = tokens
        return self.dropout(self.encoder(apart)[rows, columns])

    @torch.no_grad()
    def fill(self, name: str, tensor: Tensor) -> None:
        _initial_value(name, tensor, self.hidden_size)


class RecurrentClassifier(nn.Module):
    """Reads a text and scores its classes.

    Args:
        section: sizes; see `lm_train.recipe.Recurrent`.
        vocab_size: token ids.
        n_classes: what the head tells apart.
        initialise: draw the weights; else they stay on the meta device, for whoever calls `fill`.
    """

    def __init__(self, section: RecurrentSection, vocab_size: int, n_classes: int, initialise: bool = True) -> None:
        super().__init__()
        self.pooling, self.hidden_size = section.pooling, section.hidden_size
        with torch.device("meta"):
            self.encoder = RecurrentEncoder(section, vocab_size)
            self.dropout = nn.Dropout(section.dropout)
            self.head = nn.Linear(self.encoder.width, n_classes)
        if initialise:
            self.to_empty(device=torch.get_default_device())
            self.init_weights()

    def forward(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Logits, (B, classes).

        Args:
            tokens: (B, T).
            lengths: valid tokens of each text, (B,), from 1 to T; None: all.
        """
        outputs = self.encoder(tokens, lengths)
        if lengths is None:
            lengths = torch.full((len(tokens),), tokens.shape[1], device=tokens.device)
        return self.head(self.dropout(self._pooled(outputs, lengths)))

    def _pooled(self, outputs: Tensor, lengths: Tensor) -> Tensor:  # (B, T, D*H), (B,) -> (B, D*H)
        if self.pooling == "last":
            last = (lengths - 1).view(-1, 1, 1).expand(-1, 1, self.hidden_size)
            forwards = outputs[..., : self.hidden_size].gather(1, last).squeeze(1)  # (B, H)
            backwards = outputs[:, 0, self.hidden_size :]  # (B, H), or (B, 0)
            return torch.cat((forwards, backwards), dim=-1)
        positions = torch.arange(outputs.shape[1], device=outputs.device)
        behind = (positions >= lengths.unsqueeze(1)).unsqueeze(-1)  # (B, T, 1)
        if self.pooling == "max":
            return outputs.masked_fill(behind, float("-inf")).amax(dim=1)
        return outputs.masked_fill(behind, 0).sum(dim=1) / lengths.unsqueeze(1).to(outputs.dtype)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draws the initial weights; after `to_empty` of a model built on the meta device, the same as built in place."""
        for name, parameter in self.named_parameters():
            self.fill(name, parameter)

    @torch.no_grad()
    def fill(self, name: str, tensor: Tensor) -> None:
        """Puts the initial value of parameter `name` into `tensor`, which has the parameter's shape.

        Called in the order of `named_parameters`, it draws the numbers that `init_weights` draws.
        """
        _initial_value(name, tensor, self.hidden_size)

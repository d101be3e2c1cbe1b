"""What users of tests/test_custom.py write: networks, good and bad."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from torchmetrics import CatMetric, SumMetric

from lm_train.plan import DataFacts


class Plain(nn.Module):
    """A language model that knows none of our names."""

    def __init__(self, vocab_size: int, width: int, blocks: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.head = nn.Linear(width, vocab_size)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x)
        for block in self.blocks:
            x = x + block(x).tanh()
        return self.head(x)


def build(facts: DataFacts, width: int = 32) -> nn.Module:
    assert facts.vocab_size is not None
    return Plain(facts.vocab_size, width)


def other_on_each_call(facts: DataFacts) -> nn.Module:
    """Draws from the machine, not from the seed: other weights on each rank."""
    net = build(facts)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(std=0.02, generator=torch.Generator().manual_seed(torch.seed() % 1000))
    return net


def image_classifier(facts: DataFacts) -> nn.Module:
    assert facts.input_shape is not None
    assert facts.n_outputs is not None
    return nn.Sequential(nn.Flatten(), nn.Linear(torch.Size(facts.input_shape).numel(), facts.n_outputs))


class Trace(nn.Module):
    """Keeps what it saw last, as codebooks do: another thing on each rank."""

    last: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("last", torch.zeros(31))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.last.mul_(0.5).add_(x.detach().mean(0), alpha=0.5)
        return x + 0.1 * self.last


def normalised_classifier(facts: DataFacts, trace: bool = False) -> nn.Module:
    """One or two sorts of statistics of the batch."""
    assert facts.input_shape is not None
    assert facts.n_outputs is not None
    size = torch.Size(facts.input_shape).numel()
    last = [Trace()] if trace else []
    # a bias in front of a batch norm has no gradient but rounding, which Adam would blow up
    first = nn.Linear(size, 31, bias=False)
    return nn.Sequential(nn.Flatten(), first, nn.BatchNorm1d(31), nn.ReLU(), *last, nn.Linear(31, facts.n_outputs))


def wrong_size(facts: DataFacts) -> nn.Module:
    return Plain(facts.vocab_size - 1, 8)  # type: ignore[operator]


def tuple_of_logits(facts: DataFacts) -> nn.Module:
    class Tuple(Plain):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x), None

    return Tuple(facts.vocab_size, 8)  # type: ignore[arg-type]


def nothing() -> None:
    return None


def without_parameters() -> nn.Module:
    return nn.Identity()


def raises() -> nn.Module:
    raise RuntimeError("the user's own fault,\non two lines")


not_callable = 5


class Own(L.LightningModule):
    """A LightningModule with its own steps, optimizer and scheduler."""

    def __init__(self, vocab_size: int, rate: float = 1e-2) -> None:
        super().__init__()
        self.rate = rate
        self.net = Plain(vocab_size, 32)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.net(tokens)

    def _loss(self, batch: dict[str, Any]) -> Tensor:
        return F.cross_entropy(self(batch["tokens"]).flatten(0, 1), batch["targets"].flatten())

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        loss = self._loss(batch)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Any]) -> None:
        loss = self._loss(batch)
        self.log_dict({"val_loss": loss, "val_perplexity": loss.exp()})

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), self.rate)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 3, gamma=0.5)]


def lightning(facts: DataFacts, rate: float = 1e-2) -> L.LightningModule:
    assert facts.vocab_size is not None
    return Own(facts.vocab_size, rate)


def by_hand(facts: DataFacts) -> L.LightningModule:
    module = lightning(facts)
    module.automatic_optimization = False
    return module


def two_optimizers(facts: DataFacts) -> L.LightningModule:
    class Two(Own):
        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(self.parameters(), 0.1), torch.optim.SGD(self.parameters(), 0.1)]

    return Two(facts.vocab_size)  # type: ignore[arg-type]


def own_backward(facts: DataFacts) -> L.LightningModule:
    class Backward(Own):
        def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
            loss.backward()

    return Backward(facts.vocab_size)  # type: ignore[arg-type]


def no_loss(facts: DataFacts) -> L.LightningModule:
    class NoLoss(Own):
        def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:  # type: ignore[override]
            return None

    return NoLoss(facts.vocab_size)  # type: ignore[arg-type]


class Points(L.LightningDataModule):
    """Two clouds of points; batches as dictionaries, or as pairs."""

    facts = {"input_shape": (3,), "n_outputs": 2}  # noqa: RUF012

    def __init__(self, n: int = 50, pairs: bool = False) -> None:
        super().__init__()
        self.n, self.pairs = n, pairs

    def setup(self, stage: str) -> None:
        draw = torch.Generator().manual_seed(5)
        labels = torch.arange(self.n) % 2
        points = torch.randn(self.n, 3, generator=draw) + 2 * labels[:, None]
        self.samples = [
            (points[i], labels[i]) if self.pairs else {"inputs": points[i], "labels": labels[i]} for i in range(self.n)
        ]

    def train_dataloader(self) -> Any:
        return DataLoader(self.samples, batch_size=4, shuffle=True)  # type: ignore[arg-type]

    def val_dataloader(self) -> Any:
        return DataLoader(self.samples[:21], batch_size=4)  # type: ignore[arg-type]


class ShufflesAll(Points):
    """Shuffles what it evaluates on as well."""

    def val_dataloader(self) -> Any:
        return DataLoader(range(10), batch_size=2, shuffle=True)  # type: ignore[arg-type]


def shuffles_all() -> L.LightningDataModule:
    return ShufflesAll()


def points(n: int = 50, pairs: bool = False) -> L.LightningDataModule:
    return Points(n, pairs)


class PointStream(IterableDataset[Any]):
    """The points one after another."""

    def __iter__(self) -> Iterator[Any]:
        draw = torch.Generator().manual_seed(5)
        for i in range(50):
            yield {"inputs": torch.randn(3, generator=draw) + 2 * (i % 2), "labels": torch.tensor(i % 2)}


def point_stream() -> L.LightningDataModule:
    class Streamed(Points):
        def train_dataloader(self) -> Any:
            return DataLoader(PointStream(), batch_size=4)

    return Streamed()


def row_stream(reads: str, buffer: int = 0) -> L.LightningDataModule:
    """The same points as a stream of the `datasets` package, in five shards, shuffled in a buffer if it has a size.

    Args:
        reads: a file that takes a byte for each row read.
        buffer: rows.
    """

    def read(row: dict[str, Any]) -> dict[str, Any]:
        with open(reads, "ab") as file:
            file.write(b".")
        return row

    class Streamed(Points):
        def train_dataloader(self) -> Any:
            from datasets import Dataset  # seconds, which the other parts do not need

            points = [PointStream()] * 4
            rows = [{k: v.tolist() for k, v in row.items()} for stream in points for row in stream]
            both = Dataset.from_list(rows).to_iterable_dataset(num_shards=5).map(read).with_format("torch")
            self.val, stream = both.take(20), both.skip(20)
            return DataLoader(stream.shuffle(seed=3, buffer_size=buffer) if buffer else stream, batch_size=4)

        def val_dataloader(self) -> Any:
            return DataLoader(self.val, batch_size=2)

    return Streamed()


def broken_points() -> L.LightningDataModule:
    class Broken(Points):
        def setup(self, stage: str) -> None:
            raise OSError("no such thing")

    return Broken()


def point_classifier(facts: DataFacts) -> nn.Module:
    return nn.Linear(3, facts.n_outputs)  # type: ignore[arg-type]


class Undecided(nn.Linear):
    """Adds to its logits what no seed decides."""

    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs) + int.from_bytes(os.urandom(2), "little") / 2**16 * torch.arange(
            self.out_features
        )


def undecided(facts: DataFacts) -> nn.Module:
    return Undecided(3, facts.n_outputs)  # type: ignore[arg-type]


class PairModule(L.LightningModule):
    """Takes batches as pairs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.layer(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def pair_module() -> L.LightningModule:
    return PairModule()


def half_frozen(facts: DataFacts, shift: float = 0.0) -> nn.Module:
    """A backbone that is not trained, of odd sizes, and a head that is."""
    net = Plain(facts.vocab_size, 31)  # type: ignore[arg-type]
    net.embedding.requires_grad_(False)
    net.blocks[0].requires_grad_(False)
    for parameter in (net.embedding.weight, *net.blocks[0].parameters()):
        parameter.data += shift
    return net


def unused_parameter(facts: DataFacts) -> nn.Module:
    net = build(facts)
    net.spare = nn.Linear(3, 5)
    return net


class Asking(Own):
    """Asks its trainer in the middle of a step, as many do."""

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        assert self.trainer.max_steps > 0
        return super().training_step(batch, batch_idx)


def asks_its_trainer(facts: DataFacts) -> L.LightningModule:
    return Asking(facts.vocab_size)  # type: ignore[arg-type]


class Counting(Own):
    """Counts its batches by metrics, one that adds up and one that keeps lists."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__(vocab_size)
        self.seen, self.firsts, self.steps = SumMetric(), CatMetric(), SumMetric()

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        self.steps.update(1)
        self.log("steps", self.steps)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: dict[str, Any]) -> None:
        self.firsts(batch["tokens"][:, 0])
        self.seen.update(len(batch["tokens"]))
        self.log("val_seen", self.seen)
        super().validation_step(batch)


def counting(facts: DataFacts) -> L.LightningModule:
    return Counting(facts.vocab_size)  # type: ignore[arg-type]

"""The user's LightningDataModule: its own loaders, of which each rank takes its share.

* All ranks make the same loaders. Of the batches of a training epoch, in the loader's order, each rank takes every W-th one; a
  short batch and what does not make a full round of the ranks is left out. Of an evaluation every batch is counted once.
  A sampler of one's own that divides the samples among ranks would divide them twice, and is refused.
* The loader's batch size is that of one process: `data.micro_batch_size` must say the same.
* Shuffling is seeded by (seed, epoch), so that a resumed run goes on at its place in the same order. What a data set draws by
  itself, such as augmentation, is drawn anew then: an exact resume, bit by bit, is not promised. A stream goes on by its own
  state, or is read again up to that place; see `lm_train.data.streams`. A loader of an evaluation that shuffles has the same
  order on all ranks, and each time.
* A batch that is a dictionary of tensors goes to networks of lm_train as it is (`inputs` or `tokens`, `lengths`, `labels` or
  `targets`); any other batch is for a LightningModule, whose steps get it as it came.
* What the data say for the network stands in the module's attribute `facts`, a dictionary with the names of
  `lm_train.plan.DataFacts`; names of classes in `class_names`; what tells one data set from another in `fingerprint`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lm_train import plugins
from lm_train.data.batches import Batch, Integers, Split, StepBatches
from lm_train.data.cache import cache_folder, locked
from lm_train.data.loading import LOOK_S, TimedLoader, watched
from lm_train.data.module import DataModule
from lm_train.data.order import key_of
from lm_train.data.streams import Places, is_stream, places_of, resume_in_words
from lm_train.errors import DataError, UsageError
from lm_train.plan import DataFacts, Plan
from lm_train.recipe import AnyModel, CustomData

_REMEMBERED_STEPS = 1024
"""Steps of whose samples the order is kept: those whose ledger may still be waiting."""
OWN = "own"
"""Key under which a batch stands that is no dictionary of tensors."""
_LOADERS: dict[Split, str] = {"train": "train_dataloader", "val": "val_dataloader", "test": "test_dataloader"}


class CustomDataModule(DataModule):
    """Serves the batches of a LightningDataModule that the section's factory makes."""

    def __init__(self, section: CustomData, plan: Plan, seed: int) -> None:
        super().__init__(plan, seed)
        self.section = section
        self._orders: dict[int, Integers | None] = {}
        self.places: Places | None = None
        self._start: dict[str, Any] | None = None

    def prepare(self, model: AnyModel) -> None:
        factory = self.section.factory
        self.inner = plugins.make("data.factory", factory, self.section.args, {"seed": self.seed})
        if not isinstance(self.inner, L.LightningDataModule):
            raise UsageError(
                f"data.factory: {factory} returned a {type(self.inner).__name__}; expected a LightningDataModule"
            )
        self.label = f"{factory}"
        # it may download: the ranks call it one after another, and the later ones find it done
        with locked(cache_folder() / "custom" / f"{_digest(factory, self.section.args)}.lock"):
            self._call("prepare_data")
        self._call("setup", "fit")
        if self.has("test"):
            self._call("setup", "test")
        self.loader = self._loader("train")
        self.facts = self._facts()
        classes = range(self.facts.n_outputs or 0)
        self.class_names = tuple(getattr(self.inner, "class_names", None) or map(str, classes))
        self.target_scale = (1.0,) * (self.facts.n_outputs or 0)
        told = str(getattr(self.inner, "fingerprint", ""))
        self.fingerprint = _digest(factory, self.section.args, _length(self.loader), told)
        self._rounds: int | None = None
        if is_stream(self.loader):
            self.places = places_of(self.loader)
            self._say(resume_in_words(self.loader.dataset, self.places is not None))
            if self.places is not None:
                self.loader = self.places.loader
        if not is_stream(self.loader):
            self._rounds = len(self._indices(0)) // self.plan.world_size
            if self._rounds == 0:
                raise DataError(
                    f"{factory}: {_length(self.loader)} training samples make no full batch of {self.plan.micro_batch_size} "
                    f"for each of {self.plan.world_size} ranks"
                )

    def _facts(self) -> DataFacts:
        given = getattr(self.inner, "facts", None) or {}
        if isinstance(given, DataFacts):
            return given
        try:
            known: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in given.items()}
            return DataFacts(**known)
        except (TypeError, AttributeError) as error:
            raise UsageError(f"data.factory: facts of {self.label}: {error}; see lm_train.plan.DataFacts") from error

    def _call(self, method: str, *args: Any) -> Any:
        try:
            return getattr(self.inner, method)(*args)
        except Exception as error:
            raise DataError(f"{self.section.factory}: {method} failed with {plugins.told(error)}") from error

    def _loader(self, split: Split) -> DataLoader[Any]:
        loader = self._call(_LOADERS[split])
        if not isinstance(loader, DataLoader):
            raise UsageError(
                f"data.factory: {_LOADERS[split]} of {self.section.factory} gave a {type(loader).__name__}; expected one "
                "DataLoader"
            )
        sampler = getattr(loader.batch_sampler, "sampler", loader.sampler)
        if isinstance(sampler, DistributedSampler):
            raise UsageError(
                f"data.factory: {self.section.factory} divides the samples among ranks by itself; leave its DistributedSampler "
                "out, each rank gets its share of the batches"
            )
        size, micro = loader.batch_size, self.plan.micro_batch_size
        if split == "train" and size is not None and size != micro:
            raise UsageError(
                f"data.micro_batch_size: {micro}, but {self.section.factory} makes batches of {size}; give "
                f"data.micro_batch_size={size} and data.global_batch_size={size * self.plan.world_size} or a multiple"
            )
        return loader

    def has(self, split: Split) -> bool:
        name = _LOADERS[split]
        return getattr(type(self.inner), name) is not getattr(L.LightningDataModule, name)

    def epoch(self, step: int) -> float:
        return 0.0 if not self._rounds else self.rounds_passed(step) / self._rounds

    def rounds_passed(self, step: int) -> int:
        """Rounds of micro batches, one a rank, that lie behind the run after `step` optimizer steps."""
        return self.passed(step) // (self.plan.micro_batch_size * self.plan.world_size)

    def _say(self, what: str) -> None:
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"{self.label}: {what}", file=sys.stderr, flush=True)

    def saved_state(self, step: int) -> dict[str, Any]:
        place = None if self.places is None else self.places.last(self.rounds_passed(step))
        if self.places is None or place is None:
            return {}
        passed = place.rounds * self.plan.micro_batch_size * self.plan.world_size
        return {"passed": passed, "epoch": place.epoch, "state": place.state, "identity": self.places.identity}

    def restore_state(self, state: dict[str, Any]) -> None:
        self._start = state or None

    def start_of_stream(self, rounds: int) -> tuple[int, int]:
        """Epoch and number of the round from which a stream is read on, so that the run's place is after `rounds` of them."""
        place = self._start
        if place is None or self.places is None:
            return 0, 0
        if place["identity"] != self.places.identity:
            self._say("the stream is made another way than when this was saved; it is read again up to the place")
            return 0, 0
        number, rest = divmod(place["passed"], self.plan.micro_batch_size * self.plan.world_size)
        if rest or number > rounds:
            return 0, 0
        self.places.go_to(place["state"])
        return place["epoch"], number

    def skips(self, round_: int) -> bool:
        """Whether the training leaves a round of micro batches out."""
        position = round_ * self.plan.micro_batch_size * self.plan.world_size
        return any(start <= position < stop for start, stop in self.skipped)

    def size_in_words(self) -> str:
        length = _length(self.loader)
        return "a stream" if length is None else f"{length:,} training samples"

    def train_batches(self, rank: int) -> StepBatches:
        raise AssertionError("the loaders are the user's")

    def evaluation_batches(self, split: Split, rank: int) -> Dataset[Batch]:
        raise AssertionError("the loaders are the user's")

    def sample_ids(self, step: int) -> Integers | None:
        """As of any data; the numbers are those by which the loader asks its data set. None for a stream, which has none, and
        for a sampler that names its samples by anything else."""
        if not self._rounds:
            return None
        world, first, pairs = self.plan.world_size, self.rounds_passed(step), []
        for number in range(first, first + self.plan.accumulate_grad_batches):
            epoch, round_ = divmod(number, self._rounds)
            if epoch not in self._orders:
                self._indices(epoch)
            order = self._orders.get(epoch)  # rank 0 alone remembers
            if order is None:
                return None
            samples = order[round_ * world : (round_ + 1) * world].reshape(-1)
            pairs.append(np.stack((np.full_like(samples, epoch), samples), axis=1))
        return np.concatenate(pairs)

    def count_batches(self, split: Split, rank: int) -> int:
        return 0

    def train_dataloader(self) -> TimedLoader:
        self.inner.trainer = self.trainer
        rank = self._rank()
        if self.start_step and rank == 0:
            print(
                f"{self.label}: goes on at its place in the order; what the data set draws by itself is drawn anew",
                file=sys.stderr,
            )
        if is_stream(self.loader) and rank == 0:
            print(f"{self.label}: its samples have no numbers; ledger.jsonl says null in their place", file=sys.stderr)
        self.train_loader = TimedLoader(_Training(self, rank))  # type: ignore[arg-type]
        return self.train_loader

    def _evaluation(self, split: Split) -> Any:
        self.inner.trainer = self.trainer
        return _Evaluation(self, self._loader(split), self._rank()) if self.has(split) else []

    def _indices(self, epoch: int) -> list[list[int]]:
        """The samples of each full batch of an epoch, the same on every rank."""
        with self.seeded(epoch, self.loader):
            batches = [list(batch) for batch in self.loader.batch_sampler or ()]
        batches = [batch for batch in batches if len(batch) == self.plan.micro_batch_size]
        if self._rank() == 0:
            self._remember(epoch, batches)
        return batches

    def _remember(self, epoch: int, batches: list[list[int]]) -> None:
        """Keeps the order of an epoch for the ledger: a sampler may draw another one when it is asked again."""
        numbers = np.array(batches)  # (rounds x ranks, B)
        numbered = numbers.ndim == 2 and numbers.dtype.kind in "iu"
        self._orders[epoch] = numbers.astype(np.int64) if numbered else None
        rounds = max(1, len(batches) // self.plan.world_size)
        waiting = _REMEMBERED_STEPS * self.plan.accumulate_grad_batches // rounds + 1
        for old in [e for e in self._orders if e < epoch - waiting]:
            del self._orders[old]

    @contextlib.contextmanager
    def seeded(self, epoch: int, loader: DataLoader[Any]) -> Iterator[None]:
        """Shuffling draws what (seed, epoch) says; the process' generator is left as it was."""
        key = key_of(self.seed, epoch) % 2**63
        sampler = getattr(loader.batch_sampler, "sampler", loader.sampler)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(key)
            for generator in (loader.generator, getattr(sampler, "generator", None)):
                if generator is not None:
                    generator.manual_seed(key)
            for part in (sampler, *((loader.dataset,) if self.places is not None and loader is self.loader else ())):
                if hasattr(part, "set_epoch"):
                    part.set_epoch(epoch)
            yield


class _Training:
    """One rank's micro batches from the start step to the last step, epoch after epoch."""

    def __init__(self, data: CustomDataModule, rank: int) -> None:
        self.data, self.rank = data, rank

    def __len__(self) -> int:
        return (self.data.horizon.furthest - self.data.start_step) * self.data.plan.accumulate_grad_batches

    def __iter__(self) -> Iterator[Batch]:
        plan, left = self.data.plan, len(self)
        done = self.data.rounds_passed(self.data.start_step)
        total = float(plan.global_batch_size)
        for batch in self._streamed(done) if is_stream(self.data.loader) else self._chosen(done):
            yield {**_as_dict(batch), "total": total}
            left -= 1
            if left == 0:
                return

    def _chosen(self, done: int) -> Iterator[Any]:
        data, world = self.data, self.data.plan.world_size
        assert data._rounds
        epoch, first = divmod(done, data._rounds)
        while True:
            mine = data._indices(epoch)[self.rank :: world][: data._rounds]
            numbered = enumerate(mine[first:], epoch * data._rounds + first)
            mine_left = [batch for number, batch in numbered if not data.skips(number)]
            yield from _watched(iter(_with_samples(data.loader, mine_left, LOOK_S)), data.loader)
            epoch, first = epoch + 1, 0

    def _streamed(self, done: int) -> Iterator[Any]:
        data, world = self.data, self.data.plan.world_size
        epoch, number = data.start_of_stream(done)
        rounds = number  # of an epoch; those before a place that it was told count as well
        while True:
            waiting: list[Any] = []
            if data.loader.num_workers:
                data.loader.timeout = LOOK_S
            with data.seeded(epoch, data.loader):
                batches = iter(data.loader)
            for batch in _watched(batches, data.loader):
                if _rows(batch) != data.plan.micro_batch_size:
                    continue
                waiting.append(batch if len(waiting) == self.rank else None)
                if len(waiting) == world:
                    rounds += 1
                    number += 1
                    if self.rank == 0 and data.places is not None and number % data.plan.accumulate_grad_batches == 0:
                        data.places.note(number, epoch)
                    if number > done and not data.skips(number - 1):
                        yield waiting[self.rank]
                    waiting = []
            if rounds == 0:
                raise DataError(
                    f"{data.label}: the stream ended without a batch of {data.plan.micro_batch_size} for each rank"
                )
            epoch, rounds = epoch + 1, 0


class _Evaluation:
    """One rank's micro batches, as many as any other's; those that only fill up are marked as not valid."""

    def __init__(self, data: CustomDataModule, loader: DataLoader[Any], rank: int) -> None:
        self.data, self.loader, self.rank, self.world = data, loader, rank, data.plan.world_size

    def __len__(self) -> int:
        if is_stream(self.loader):
            raise TypeError("a stream has no length")
        return -(-len(self.loader) // self.world)

    def __iter__(self) -> Iterator[Batch]:
        if is_stream(self.loader):
            yield from self._streamed()
            return
        with self.data.seeded(0, self.loader):
            everything = [list(batch) for batch in self.loader.batch_sampler or ()]
        mine = everything[self.rank :: self.world]
        missing = len(self) - len(mine)
        for number, batch in enumerate(_with_samples(self.loader, mine + everything[:1] * missing)):
            yield _marked(batch, counts=number < len(mine))

    def _streamed(self) -> Iterator[Batch]:
        group: list[Any] = []
        with self.data.seeded(0, self.loader):
            batches = iter(self.loader)
        for batch in batches:
            group.append(batch)
            if len(group) == self.world:
                yield _marked(group[self.rank], counts=True)
                group = []
        if group:
            yield _marked(group[min(self.rank, len(group) - 1)], counts=self.rank < len(group))


def _watched(batches: Iterator[Any], loader: DataLoader[Any]) -> Iterator[Any]:
    """Training batches, with an eye on the processes that make them."""
    return watched(batches, loader.timeout if loader.timeout > LOOK_S else None) if loader.num_workers else batches


def _with_samples(loader: DataLoader[Any], batches: list[list[int]], timeout: float | None = None) -> DataLoader[Any]:
    """The user's loader over other batches of the same data set."""
    workers: dict[str, Any] = {"multiprocessing_context": loader.multiprocessing_context} if loader.num_workers else {}
    return DataLoader(
        loader.dataset,
        batch_sampler=batches,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=timeout if timeout is not None and loader.num_workers else loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        prefetch_factor=loader.prefetch_factor,
        **workers,
    )


def _length(loader: DataLoader[Any]) -> int | None:
    return None if is_stream(loader) else len(loader.dataset)  # type: ignore[arg-type]


def _as_dict(batch: Any) -> Batch:
    tensors = isinstance(batch, dict) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in batch.items())
    return batch if tensors else {OWN: batch}


def _rows(batch: Any) -> int:
    """Samples of a batch: the length of the first tensor in it."""
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.dim() else 1
    parts = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, list | tuple) else ()
    return next((_rows(part) for part in parts if isinstance(part, Tensor | dict | list | tuple)), 0)


def _marked(batch: Any, counts: bool) -> Batch:
    return {**_as_dict(batch), "valid": torch.full((_rows(batch),), counts)}


def _digest(*values: Any) -> str:
    return hashlib.blake2b(json.dumps(values).encode(), digest_size=16).hexdigest()

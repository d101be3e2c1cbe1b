"""The order of samples, the batches of every layout of processes, and the coverage of validation."""

from __future__ import annotations

import itertools
import multiprocessing
import subprocess
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
import torch

from lm_train.data import TextDataModule
from lm_train.data.order import SampleOrder, key_of, permute
from lm_train.data.text import IGNORED, EvalBatches, TrainBatches, train_blocks
from lm_train.errors import DataError
from lm_train.horizon import Horizon
from tests.text_data import plan_of, prepared


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def counting_text(path: Path, n: int = 600) -> Path:
    """A file in which any few tokens say where they stand."""
    path.write_text("".join(f"{i:04d}" for i in range(n)))
    return path


def samples_of(batches: list[dict[str, torch.Tensor]]) -> list[tuple[int, ...]]:
    return [tuple(row.tolist()) for batch in batches for row in batch["tokens"]]


@pytest.mark.parametrize("sizes", [range(1, 201), [255, 256, 257, 4095, 4097, 65536, 100_003]], ids=["small", "large"])
def test_permutation_is_a_bijection(sizes: list[int]) -> None:
    for size in sizes:
        found = permute(np.arange(size), size, key=size * 7 + 1)
        assert np.array_equal(np.sort(found), np.arange(size)), size


def test_permutation_scatters() -> None:
    n = 10_000
    found = permute(np.arange(n), n, key=3)
    assert abs(np.corrcoef(np.arange(n), found)[0, 1]) < 0.05
    assert abs(np.corrcoef(found[:-1], found[1:])[0, 1]) < 0.05
    assert (np.diff(found) == 1).sum() < 10, "neighbours stayed neighbours"


def test_a_position_far_out_costs_no_list() -> None:
    size = 10**15
    found = permute(np.array([0, 1, size - 1]), size, key=1)
    assert len(set(found.tolist())) == 3
    assert ((found >= 0) & (found < size)).all()


def test_order_differs_by_epoch_and_seed_and_repeats() -> None:
    def epoch(seed: int, number: int) -> list[int]:
        epochs, samples = SampleOrder(seed, 100).samples(np.arange(100 * number, 100 * (number + 1)))
        assert set(epochs) == {number}
        assert sorted(samples) == list(range(100))
        return samples.tolist()

    assert epoch(1, 0) == epoch(1, 0)
    assert len({tuple(epoch(*case)) for case in ((1, 0), (1, 1), (1, 2), (2, 0), (2, 1))}) == 5


@pytest.mark.parametrize("size", [20, 1000, 5000])
def test_order_is_the_same_however_it_is_asked(size: int) -> None:
    """In stretches, as training does, and far-off positions at once."""
    whole = np.arange(min(3 * size + 10_000, 20_000))
    epochs, samples = whole // size, np.empty_like(whole)
    for epoch in np.unique(epochs):
        samples[epochs == epoch] = permute(whole[epochs == epoch] % size, size, key_of(3, int(epoch)))
    order = SampleOrder(3, size)
    for batch in (whole[4090:4100], whole[:16], whole[9_000:14_000], whole[::1500], whole[::-1][:20], whole[:0]):
        found = order.samples(batch)
        assert np.array_equal(found[0], epochs[batch])
        assert np.array_equal(found[1], samples[batch])


def test_one_question_may_span_epochs() -> None:
    order = SampleOrder(5, 7)
    epochs, samples = order.samples(np.arange(21))
    assert epochs.tolist() == [0] * 7 + [1] * 7 + [2] * 7
    for position in range(21):
        assert samples[position] == order.samples(np.array([position]))[1][0]


def test_windowed_order_stays_in_its_window_and_does_not_depend_on_what_follows() -> None:
    _, all_of_it = SampleOrder(1, 100, window=32).samples(np.arange(100))
    for start in range(0, 100, 32):
        window = all_of_it[start : start + 32]
        assert sorted(window) == list(range(start, min(start + 32, 100)))
    assert all_of_it[:32].tolist() != sorted(all_of_it[:32])
    assert (all_of_it[:32] + 32).tolist() != all_of_it[32:64].tolist(), "windows are shuffled alike"
    _, so_far = SampleOrder(1, 64, window=32).samples(np.arange(64))
    assert so_far.tolist() == all_of_it[:64].tolist()


LAYOUTS = [(1, 8, 1), (2, 4, 1), (4, 2, 1), (1, 2, 4), (2, 1, 4), (2, 2, 2), (4, 1, 2)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda x: "x".join(map(str, x)))
def test_every_layout_sees_the_same_global_batches(layout: tuple[int, int, int], tmp_path: Path) -> None:
    file, steps = counting_text(tmp_path / "a.txt"), 12
    reference = prepared(file, plan_of(1, 8, 1, steps)).train_dataloader()
    wanted = [samples_of([batch]) for batch in reference]

    world, micro, accumulate = layout
    module = prepared(file, plan_of(world, micro, accumulate, steps))
    ranks = [list(loader_of_rank(module, rank)) for rank in range(world)]
    assert {len(batches) for batches in ranks} == {steps * accumulate}
    for step in range(steps):
        mine = [batches[step * accumulate + m] for m in range(accumulate) for batches in ranks]
        assert samples_of(mine) == wanted[step], f"step {step}: ranks take turns within each micro batch"


def loader_of_rank(module: TextDataModule, rank: int) -> TrainBatches:
    batches = module.train_batches(rank)
    assert isinstance(batches, TrainBatches)
    return batches


def test_loader_workers_change_nothing(tmp_path: Path) -> None:
    file = counting_text(tmp_path / "a.txt")
    none = list(prepared(file, plan_of(steps=30)).train_dataloader())
    two = list(prepared(file, plan_of(steps=30, workers=2)).train_dataloader())
    assert len(none) == len(two) == 30
    for a, b in zip(none, two, strict=True):
        assert torch.equal(a["tokens"], b["tokens"])
        assert torch.equal(a["targets"], b["targets"])


def test_targets_are_the_next_tokens(tmp_path: Path) -> None:
    module = prepared(counting_text(tmp_path / "a.txt"), plan_of(micro=3, steps=400), block_size=8)
    tokenizer = module.corpus.tokenizer
    text = (tmp_path / "a.txt").read_text()
    for batch in module.train_dataloader():
        for row, target in zip(batch["tokens"], batch["targets"], strict=True):
            piece = tokenizer.decode([*row.tolist(), int(target[-1])])
            assert piece in text
            assert torch.equal(row[1:], target[:-1])
        assert batch["tokens"].dtype == torch.int64
        assert batch["tokens"].shape == (3, 8)


def test_an_epoch_holds_every_block_once_and_the_next_ones_are_cut_elsewhere(tmp_path: Path) -> None:
    module = prepared(counting_text(tmp_path / "a.txt"), plan_of(micro=1))
    info = module.corpus.tokens("train").info()
    assert info is not None
    blocks = train_blocks(info.tokens, 4)
    module.horizon = Horizon(4 * blocks)
    samples = samples_of(list(module.train_dataloader()))
    text = [c for i in range(600) for c in module.corpus.tokenizer.encode(f"{i:04d}").ids][: info.tokens]
    cuts = []
    for epoch in range(4):
        found = samples[epoch * blocks : (epoch + 1) * blocks]
        possible = [{tuple(text[o + 4 * b : o + 4 * b + 4]) for b in range(blocks)} for o in range(4)]
        (cut,) = [o for o in range(4) if sorted(possible[o]) == sorted(found)]
        cuts.append(cut)
    assert cuts[0] == 0
    assert len(set(cuts)) > 1


def test_the_last_token_can_be_reached(tmp_path: Path) -> None:
    """Blocks and offsets of later epochs end exactly where the text ends, for every length."""
    for tokens in range(9, 40):
        for block_size in range(1, 5):
            last = (train_blocks(tokens, block_size) - 1) * block_size + (block_size - 1) + block_size + 1
            assert tokens - block_size < last <= tokens


@pytest.mark.parametrize("streaming", [False, True])
def test_a_start_in_the_middle_continues(streaming: bool, tmp_path: Path) -> None:
    file, plan = counting_text(tmp_path / "a.txt"), plan_of(2, 2, 2, steps=40)
    whole = prepared(file, plan, streaming=streaming)
    wanted = list(loader_of_rank(whole, 1))
    resumed = prepared(file, plan, streaming=streaming)
    resumed.start_step = 25
    found = list(loader_of_rank(resumed, 1))
    assert len(found) == 15 * 2
    assert samples_of(found) == samples_of(wanted[25 * 2 :])


def test_waiting_time_is_counted(tmp_path: Path) -> None:
    loader = prepared(counting_text(tmp_path / "a.txt"), plan_of()).train_dataloader()
    assert len(loader) == len(list(loader)) == 10
    assert loader.wait_seconds > 0


def evaluation(module: TextDataModule, rank: int, world: int, micro: int) -> list[dict[str, torch.Tensor]]:
    batches = EvalBatches(module.corpus.tokens("val"), plan_of(world, micro), rank)
    return [batches[i] for i in range(len(batches))]


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("micro", [1, 2, 5])
@pytest.mark.parametrize("length", [2, 3, 9, 30, 33, 41])
def test_validation_covers_every_token_once(world: int, micro: int, length: int, tmp_path: Path) -> None:
    file = counting_text(tmp_path / "a.txt")
    text = "".join(chr(ord("!") + i) for i in range(length))
    (tmp_path / "v.txt").write_text(text)
    module = prepared(file, plan_of(), val_path=str(tmp_path / "v.txt"))
    ranks = [evaluation(module, rank, world, micro) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1, "ranks make the same number of steps"
    pairs = []
    for batches in ranks:
        for batch in batches:
            assert batch["tokens"].shape == batch["targets"].shape == (micro, 4)
            counted = batch["targets"] != IGNORED
            pairs += zip(batch["tokens"][counted].tolist(), batch["targets"][counted].tolist(), strict=True)
    ids = module.corpus.tokenizer.encode(text).ids
    assert sorted(pairs) == sorted(itertools.pairwise(ids))


def test_bytes_per_token_is_text_over_tokens(tmp_path: Path) -> None:
    file = counting_text(tmp_path / "a.txt")
    (tmp_path / "v.txt").write_text("grüße, 世界 " * 20)
    module = prepared(file, plan_of(), val_path=str(tmp_path / "v.txt"), tokenizer="bpe:300")
    text = (tmp_path / "v.txt").read_text()
    tokens = len(module.corpus.tokenizer.encode(text).ids)
    assert module.bytes_per_token("val") == pytest.approx(len(text.encode()) / tokens, rel=1e-12)
    (tmp_path / "c.txt").write_text("grüße, 世界 " * 20)
    chars = prepared(file, plan_of(), val_path=str(tmp_path / "c.txt"), tokenizer="chars")
    assert chars.bytes_per_token("val") == pytest.approx(len(text.encode()) / len(text), rel=1e-12)


def test_too_little_text_for_a_batch_or_an_evaluation(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("x" * 100)
    with pytest.raises(
        DataError, match=r"a.txt: 90 training tokens make 8 samples of model.block_size=10, fewer than one"
    ):
        prepared(file, plan_of(micro=9), block_size=10)
    prepared(file, plan_of(micro=8), block_size=10)
    (tmp_path / "v.txt").write_text("x")
    with pytest.raises(DataError, match="1 val tokens; at least 2"):
        prepared(file, plan_of(), val_path=str(tmp_path / "v.txt"))


def test_a_token_beyond_the_models_vocabulary_is_named(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("abc" * 100)
    module = prepared(file, plan_of())
    largest = max(module.corpus.tokenizer.encode("abc").ids)
    with pytest.raises(DataError) as caught:
        prepared(file, plan_of(), vocab_size=largest)
    assert str(caught.value) == (
        f"{file} at byte 0: token id {largest} is not below model.vocab_size={largest}; "
        f"set model.vocab_size=auto or at least {largest + 1}"
    )
    assert prepared(file, plan_of(), vocab_size=largest + 1).vocab_size == 257


def test_a_workers_error_reads_like_the_ranks_own(tmp_path: Path) -> None:
    module = prepared(counting_text(tmp_path / "a.txt"), plan_of(workers=1))
    tokens = module.corpus.tokens("train")
    loader = module.train_dataloader()
    tokens.info_file.unlink()
    tokens.fault.write_text("a.txt: gone")
    tokens.file.unlink()
    loader.loader.dataset.streaming = True
    with pytest.raises(DataError, match=r"^a.txt: gone$"):
        list(loader)


def one_worker(tmp_path: Path) -> tuple[Iterator[dict[str, torch.Tensor]], BaseProcess]:
    """A loader's batches after the first of 50, and the process that makes them."""
    before = set(multiprocessing.active_children())
    batches = iter(prepared(counting_text(tmp_path / "a.txt"), plan_of(workers=1, steps=50)).train_dataloader())
    next(batches)
    (worker,) = set(multiprocessing.active_children()) - before
    return batches, worker


def test_workers_outlive_a_signal_to_the_whole_job(tmp_path: Path) -> None:
    batches, worker = one_worker(tmp_path)
    for number in ("TERM", "INT", "USR1"):  # from another process, as a scheduler does
        subprocess.run(["kill", f"-{number}", str(worker.pid)], check=True)
    assert len(list(batches)) == 49


def test_a_rank_can_end_its_workers(tmp_path: Path) -> None:
    batches, worker = one_worker(tmp_path)
    worker.terminate()
    worker.join(timeout=10)
    assert worker.exitcode == 0
    del batches

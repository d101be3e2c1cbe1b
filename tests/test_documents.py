"""Documents that are kept apart: marked as they lie, and computed as if each stood alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lm_train.data.batches import IGNORED
from lm_train.models import GPT, Llama, RecurrentLanguageModel
from lm_train.models.language_model import LanguageModel
from lm_train.models.transformer import positions_within
from lm_train.recipe import GPT as GPTSection
from lm_train.recipe import Llama as LlamaSection
from lm_train.recipe import Recurrent as RecurrentSection
from tests.shard_folders import END, make_folder
from tests.test_shard_stream import batches_of, module_of, own_cache  # noqa: F401
from tests.text_data import plan_of

T = 16
SIZES = {"n_layer": 2, "n_embd": 32, "block_size": T}


def networks() -> list[LanguageModel]:
    return [
        GPT(GPTSection(n_head=2, **SIZES), 50),
        Llama(LlamaSection(n_head=4, n_kv_head=2, **SIZES), 50),
        RecurrentLanguageModel(RecurrentSection(cell="lstm", hidden_size=24, **SIZES), 50),
        RecurrentLanguageModel(RecurrentSection(cell="gru", hidden_size=24, **SIZES), 50),
    ]


ROWS = [[0] * 5 + [1] + [2] * 10, [0] * 16, list(range(16)), [0] * 15 + [1]]


@pytest.mark.parametrize("number", range(4), ids=["gpt", "llama", "lstm", "gru"])
def test_documents_of_a_row_are_computed_as_if_each_stood_alone(number: int) -> None:
    torch.manual_seed(0)
    net = networks()[number]
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    tokens, documents = torch.randint(0, 50, (4, T)), torch.tensor(ROWS)
    targets = torch.randint(0, 50, (4, T))
    targets[:, :-1][documents[:, 1:] != documents[:, :-1]] = IGNORED

    loss = net(tokens, targets, documents=documents)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    alone = torch.zeros(())
    for row in range(4):
        for document in documents[row].unique():
            mine = documents[row] == document
            alone = alone + net(tokens[row, mine][None], targets[row, mine][None])
    alone.backward()
    n = int((targets != IGNORED).sum())
    assert loss.item() / n == pytest.approx(alone.item() / n, abs=1e-6)
    for name, p in net.named_parameters():
        assert p.grad is not None
        torch.testing.assert_close(gradients[name] / n, p.grad / n, atol=1e-6, rtol=1e-5)
    mixed = net(tokens, targets)
    assert abs(mixed.item() - loss.item()) / n > 1e-4, "the test could not tell"


def test_a_row_of_one_document_is_what_it_is_without_boundaries() -> None:
    for net in networks():
        tokens = torch.randint(0, 50, (2, T))
        torch.testing.assert_close(net(tokens, documents=torch.zeros(2, T, dtype=torch.int64)), net(tokens))


def test_positions_start_anew_in_each_document() -> None:
    found = positions_within(torch.tensor(ROWS))
    assert found[0].tolist() == [*range(5), 0, *range(10)]
    assert found[2].tolist() == [0] * 16


@pytest.mark.parametrize("longest", [3, 40])
def test_batches_say_where_documents_end(longest: int, tmp_path: Path) -> None:
    """Against the end-of-text ids, of which these documents have one each, at their end; rows run over shards' ends as well."""
    make_folder(tmp_path / "a", n_shards=4, documents=25, longest=longest)
    plan = plan_of(2, 3, 2, steps=12, block_size=8)
    module = module_of(tmp_path / "a", plan, document_boundaries=True)
    ranks = [list(batches_of(module, rank)) for rank in (0, 1)]
    for step in range(12):
        targets = 0
        for batch in (ranks[rank][2 * step + micro] for micro in (0, 1) for rank in (0, 1)):
            ended = batch["tokens"] == END
            assert torch.equal(batch["documents"], (ended.cumsum(1) - ended.long()))
            assert torch.equal(batch["targets"] == IGNORED, ended)
            kept = ~ended[:, :-1]
            assert torch.equal(batch["targets"][:, :-1][kept], batch["tokens"][:, 1:][kept])
            targets += int((batch["targets"] != IGNORED).sum())
            total = batch["total"]
        assert total == targets, "the divisor is the number of targets of the global batch"


def test_an_evaluation_keeps_documents_apart_too(tmp_path: Path) -> None:
    make_folder(tmp_path / "a")
    plan = plan_of(2, 3, block_size=8)
    module = module_of(tmp_path / "a", plan, document_boundaries=True)
    whole = np.fromfile(tmp_path / "a/val-00000.bin", "<u2")
    counted = 0
    for rank in (0, 1):
        for batch in (module.evaluation_batches("val", rank)[i] for i in range(module.count_batches("val", rank))):
            wanted = batch["targets"] != IGNORED
            assert not (batch["tokens"][wanted] == END).any()
            counted += int(wanted.sum())
    assert counted == int((whole[:-1] != END).sum())

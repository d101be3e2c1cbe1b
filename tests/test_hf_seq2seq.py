"""Encoder-decoders of transformers on pairs of texts: transformers' own loss and greedy search, under every strategy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lm_train import cli, models
from lm_train.errors import ExitCode, UsageError
from lm_train.hardware import Machine
from lm_train.plan import DataFacts, make_plan
from lm_train.recipe import load
from lm_train.runs import RunFolder, read_jsonl
from lm_train.train import train
from tests.conftest import Ranks
from tests.test_strategies import LOSS_BOUND, NORM_BOUND, curve, difference

NewRun = Callable[..., RunFolder]
VOCAB, PAD, START, END = 61, 58, 59, 60
FACTS = DataFacts(vocab_size=VOCAB, pad_id=PAD, start_id=START, end_id=END, max_length=24)
LENGTHS, WANTED = torch.tensor([13, 1, 7]), torch.tensor([9, 3, 1])
_LAYERS = (
    "encoder_layers: 1, decoder_layers: 1, encoder_attention_heads: 2, decoder_attention_heads: 2, d_model: 32, "
    "encoder_ffn_dim: 64, decoder_ffn_dim: 64, dropout: 0.0, activation_function: gelu"
)
CONFIGS = {
    "t5": "{model_type: t5, num_layers: 2, num_heads: 2, d_model: 32, d_kv: 16, d_ff: 64, dropout_rate: 0.0, "
    "feed_forward_proj: gated-gelu}",
    "marian": f"{{model_type: marian, {_LAYERS}}}",
    "bart": f"{{model_type: bart, {_LAYERS}}}",
}


def model_word(config: str) -> str:
    return f"model={{kind: hf, block_size: 24, config: {config}}}"


def built(word: str, facts: DataFacts = FACTS) -> Any:
    recipe = load(["recipe=gpt_debug", "data={kind: pairs, tokenizer: chars}", word])
    torch.manual_seed(0)
    return models.build(recipe.model, make_plan(recipe, Machine(cpu_cores=2, gpus=())), facts)


def batch() -> dict[str, Tensor]:
    torch.manual_seed(1)
    tokens, target = torch.randint(PAD, (3, 13)), torch.randint(PAD, (3, 9))
    tokens[torch.arange(13) >= LENGTHS[:, None]] = PAD
    targets = target.masked_fill(torch.arange(9) >= WANTED[:, None], -100)
    read = torch.cat((torch.full((3, 1), START), target[:, :-1]), dim=1).masked_fill(targets == -100, PAD)
    return {"tokens": tokens, "lengths": LENGTHS, "target_tokens": read, "targets": targets}


@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_greedy_search_are_transformers_own(name: str, tmp_path: Path) -> None:
    """Also of a folder whose decoder begins with another token than the data's; transformers shifts the labels itself."""
    drawn = built(model_word(CONFIGS[name])).eval()
    with torch.no_grad():  # off the initial values, from which all sources give the same
        for parameter in (p for p in drawn.model.parameters() if p.requires_grad):
            parameter.add_(torch.randn_like(parameter), alpha=0.4)
    drawn.model.config.decoder_start_token_id = PAD
    drawn.model.save_pretrained(tmp_path)
    drawn.model.config.decoder_start_token_id = START
    read = built(f"model={{kind: hf, path: {tmp_path}, block_size: 24}}").eval()
    given = batch()
    mask = (torch.arange(13) < LENGTHS[:, None]).long()
    losses = []
    for net, start in ((drawn, START), (read, PAD)):
        theirs = net.model(input_ids=given["tokens"], attention_mask=mask, labels=given["targets"]).loss.item()
        assert net(**given).item() / WANTED.sum() == pytest.approx(theirs, rel=1e-6)
        losses.append(theirs)
        found = net.generate(given["tokens"], LENGTHS, 8, START, END)
        searched = net.model.generate(
            input_ids=given["tokens"], attention_mask=mask, max_new_tokens=8, num_beams=1, do_sample=False,
            decoder_start_token_id=start, eos_token_id=END, pad_token_id=END, forced_eos_token_id=None,
        )[:, 1:]  # fmt: skip
        assert torch.equal(found[:, : searched.shape[1]], searched)
        assert (found[:, searched.shape[1] :] == END).all()
        assert len({tuple(row) for row in found.tolist()}) > 1
    assert losses[0] != pytest.approx(losses[1], rel=1e-3), "the start made no difference"


def test_debug_learns_one_batch_by_heart(new_run: NewRun, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("data.kind=pairs", "data.path=null", "data.tokenizer=chars", "trainer.max_steps=2", "debug=true")
    assert train(new_run(model_word(CONFIGS["t5"]), *words)) == ExitCode.DONE
    assert "steps, as it should" in capsys.readouterr().err


def test_ids_that_the_data_decide_and_the_recipe_overrules() -> None:
    config = built(model_word(CONFIGS["t5"])).model.config
    ids = (config.pad_token_id, config.decoder_start_token_id, config.eos_token_id, config.vocab_size)
    assert ids == (PAD, START, END, VOCAB)
    own = built(model_word(CONFIGS["t5"].replace("}", ", decoder_start_token_id: 3}")))
    assert own.start_id == 3


def test_a_vocabulary_without_a_start_of_its_own_fits(tmp_path: Path) -> None:
    """T5 and Marian have no <s>: the one that is added stands behind all their ids, and is never read."""
    word = model_word(CONFIGS["marian"].replace("}", f", decoder_start_token_id: {PAD}, vocab_size: {VOCAB}}}"))
    facts = DataFacts(vocab_size=VOCAB + 1, pad_id=PAD, start_id=VOCAB, end_id=END, max_length=24)
    given = batch()
    given["target_tokens"][:, 0] = VOCAB
    assert built(word, facts)(**given).isfinite()
    with pytest.raises(UsageError, match=f"{VOCAB + 1} ids"):
        built(word, DataFacts(vocab_size=VOCAB + 1, pad_id=VOCAB, start_id=START, end_id=END, max_length=24))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_dry_run_counts_parameters_before_the_data_are_read(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["data={kind: pairs, tokenizer: bytes}", "dry_run=true", model_word(CONFIGS[name])]
    assert cli.main(["train", "recipe=gpt_debug", *words]) == ExitCode.DONE
    n_parameters = sum(p.numel() for p in built(words[-1], DataFacts(vocab_size=260)).parameters())
    assert f"{n_parameters:,}" in capsys.readouterr().out


def test_a_decoder_alone_does_not_take_pairs() -> None:
    with pytest.raises(UsageError, match="gpt2 for Seq2SeqLM"):
        built(model_word("{model_type: gpt2}"))


FAST = {("t5", "ddp")}


@pytest.mark.parametrize(
    ("name", "strategy"),
    [
        pytest.param(name, strategy, marks=[] if (name, strategy) in FAST else [pytest.mark.slow])
        for name in CONFIGS
        for strategy in ("ddp", "fsdp", "zero2", "zero3")
    ],
)
def test_two_processes_compute_what_one_computes(ranks: Ranks, new_run: NewRun, name: str, strategy: str) -> None:
    words = (
        model_word(CONFIGS[name]), "data.kind=pairs", "data.path=null", "data.tokenizer=chars", "trainer.max_steps=6",
        "trainer.limit_val_batches=2", "trainer.limit_test_batches=1", "trainer.sample_tokens=8",
    )  # fmt: skip
    one = new_run(*words, name="alone")
    both = new_run(*words, "trainer.devices=2", f"trainer.strategy={strategy}", name="both")
    assert train(one) == ExitCode.DONE
    answers = ranks(strategy).run("run", folder=str(both.root))
    assert " -> " in answers[0]["sample"]
    largest = difference(curve(one), curve(both))
    assert largest.loss <= LOSS_BOUND
    assert largest.norm <= NORM_BOUND
    ends = [next(row for row in read_jsonl(run.metrics) if "val/loss" in row) for run in (one, both)]
    assert 0 <= ends[1]["val/exact_match"] <= 1
    assert ends[1]["val/perplexity"] > 1

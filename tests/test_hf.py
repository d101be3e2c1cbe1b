"""Models of transformers: the same numbers as transformers itself, under every strategy; what does not fit is one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from lm_train import models
from lm_train.errors import DataError, ExitCode, UsageError
from lm_train.hardware import Machine
from lm_train.plan import DataFacts, Plan, make_plan
from lm_train.recipe import Recipe, load
from lm_train.runs import RunFolder
from lm_train.strategy.units import units_of
from lm_train.train import train
from tests.conftest import Ranks
from tests.test_strategies import LOSS_BOUND, NORM_BOUND, STRATEGIES, curve, difference

NewRun = Callable[..., RunFolder]
GPT2 = "{model_type: gpt2, n_layer: 2, n_head: 2, n_embd: 64, resid_pdrop: 0.0, embd_pdrop: 0.0, attn_pdrop: 0.0}"
LLAMA = (
    "{model_type: llama, num_hidden_layers: 2, num_attention_heads: 4, num_key_value_heads: 2, hidden_size: 64, "
    "intermediate_size: 128}"
)
BERT = (
    "{model_type: bert, num_hidden_layers: 2, num_attention_heads: 2, hidden_size: 32, intermediate_size: 64, "
    "hidden_dropout_prob: 0.0, attention_probs_dropout_prob: 0.0}"
)
CONFIGS = {"gpt2": GPT2, "llama": LLAMA}


def model_word(config: str, *more: str) -> str:
    return f"model={{{', '.join(['kind: hf', 'block_size: 16', f'config: {config}', *more])}}}"


def recipe_of(*words: str) -> tuple[Recipe, Plan]:
    recipe = load(["recipe=gpt_debug", "data.tokenizer=bytes", *words])
    return recipe, make_plan(recipe, Machine(cpu_cores=2, gpus=()))


def built(word: str, **facts: Any) -> Any:
    recipe, plan = recipe_of(word)
    if "n_outputs" in facts:
        plan = plan.model_copy(update={"task": "classification"})
    torch.manual_seed(0)
    return models.build(recipe.model, plan, DataFacts(**({"vocab_size": 257} | facts)))


@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_the_loss_is_transformers_own(config: str) -> None:
    net = built(model_word(config)).eval()
    tokens = torch.randint(257, (3, 16), generator=torch.Generator().manual_seed(1))
    labels = tokens.clone()
    labels[1, 10:] = -100
    theirs = net.model(input_ids=tokens, labels=labels).loss  # shifts by itself, and takes the mean
    targets = labels[:, 1:]
    ours = net(tokens[:, :-1], targets)
    assert ours.item() / (targets != -100).sum() == pytest.approx(theirs.item(), rel=1e-6)
    assert torch.equal(net(tokens[:, :-1], last_only=True)[:, -1], net(tokens[:, :-1])[:, -1])


def test_a_masked_model_is_given_its_targets_where_they_stand() -> None:
    net = built(model_word(BERT, "language_task: masked_lm")).eval()
    tokens = torch.randint(257, (3, 16), generator=torch.Generator().manual_seed(1))
    targets = torch.full_like(tokens, -100)
    targets[:, ::5] = tokens[:, ::5]
    theirs = net.model(input_ids=tokens, labels=targets).loss
    assert net(tokens, targets).item() / (targets != -100).sum() == pytest.approx(theirs.item(), rel=1e-6)
    assert not hasattr(net, "generate")


def test_a_classifier_sees_no_padding() -> None:
    net = built(model_word(BERT), n_outputs=3, pad_id=0).eval()
    tokens = torch.randint(1, 257, (2, 9), generator=torch.Generator().manual_seed(1))
    other = tokens.clone()
    other[1, 4:] = 0
    lengths = torch.tensor([9, 4])
    both = net(tokens=other, lengths=lengths)
    alone = net.model(input_ids=tokens[1:, :4]).logits
    assert both.shape == (2, 3)
    torch.testing.assert_close(both[1:], alone, rtol=1e-5, atol=1e-6)


def test_images() -> None:
    vit = "{model_type: vit, num_hidden_layers: 1, num_attention_heads: 2, hidden_size: 16, intermediate_size: 32, patch_size: 4}"
    net = built(model_word(vit), vocab_size=None, input_shape=(1, 8, 8), n_outputs=10).eval()
    images = torch.rand(2, 1, 8, 8)
    assert torch.equal(net(inputs=images), net.model(pixel_values=images).logits)
    assert net(inputs=images).shape == (2, 10)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_folder_of_weights(name: str, tmp_path: Path) -> None:
    theirs = built(model_word(CONFIGS[name])).model.eval()
    with torch.no_grad():
        next(theirs.parameters()).mul_(2)
    theirs.save_pretrained(tmp_path)
    net = built(f"model={{kind: hf, path: {tmp_path}, block_size: 16}}").eval()
    tokens = torch.randint(257, (2, 16))
    assert torch.equal(net(tokens), theirs(input_ids=tokens).logits)
    fresh = built(f"model={{kind: hf, path: {tmp_path}, block_size: 16, from_scratch: true}}").eval()
    assert not torch.allclose(fresh(tokens), theirs(input_ids=tokens).logits)


def test_half_precision_weights_are_trained_in_fp32(tmp_path: Path) -> None:
    built(model_word(GPT2)).model.to(torch.bfloat16).save_pretrained(tmp_path)
    net = built(f"model={{kind: hf, path: {tmp_path}, block_size: 16}}")
    assert {parameter.dtype for parameter in net.parameters()} == {torch.float32}


def test_wavelengths_of_rotary_positions_are_never_rounded() -> None:
    net = built(model_word(LLAMA))
    exact = net.model.model.rotary_emb.inv_freq.clone()
    net.to(torch.bfloat16)
    assert next(net.parameters()).dtype == torch.bfloat16
    assert torch.equal(net.model.model.rotary_emb.inv_freq, exact)


def test_what_repeats_is_sharded_by_itself() -> None:
    for config, parts in ((GPT2, "transformer.h"), (LLAMA, "model.layers")):
        net = built(model_word(config))
        assert units_of(net) == list(net.model.get_submodule(parts))


def test_an_entry_that_shares_a_parameter_is_no_unit() -> None:
    net = torch.nn.Module()
    net.parts = torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)])
    net.parts[2].weight = net.parts[1].weight
    assert units_of(net) == [net.parts[0]]


@pytest.fixture(scope="session")
def alone() -> Callable[..., list[tuple[float, float]]]:
    known: dict[str, list[tuple[float, float]]] = {}

    def of(make: NewRun, model: str) -> list[tuple[float, float]]:
        if model not in known:
            folder = make(model, "trainer.max_steps=12", name="alone")
            assert train(folder) == ExitCode.DONE
            known[model] = curve(folder)
        return known[model]

    return of


FAST = {("gpt2", "ddp"), ("gpt2", "fsdp"), ("llama", "fsdp"), ("llama", "zero3")}


@pytest.mark.parametrize(
    ("name", "strategy"),
    [
        pytest.param(
            name, strategy, marks=[] if (name, strategy) in FAST else [pytest.mark.slow], id=f"{name}-{strategy}"
        )
        for name in CONFIGS
        for strategy in STRATEGIES
    ],
)
def test_two_processes_compute_what_one_computes(
    ranks: Ranks, new_run: NewRun, alone: Callable[..., Any], name: str, strategy: str
) -> None:
    model = model_word(CONFIGS[name])
    both = new_run(model, "trainer.max_steps=12", "trainer.devices=2", f"trainer.strategy={strategy}", name="both")
    assert [answer["code"] for answer in ranks(strategy).run("run", folder=str(both.root))] == [0, 0]
    expected = alone(new_run, model)
    largest = difference(expected, curve(both))
    assert expected[-1][0] < expected[0][0] - 0.1
    assert largest.loss <= LOSS_BOUND
    assert largest.norm <= NORM_BOUND


@pytest.mark.parametrize(
    ("first", "second"),
    [("fsdp", "zero3"), pytest.param("zero2", "fsdp", marks=pytest.mark.slow),
     pytest.param("zero3", "ddp", marks=pytest.mark.slow), pytest.param("ddp", "zero1", marks=pytest.mark.slow)],
)  # fmt: skip
def test_a_checkpoint_moves_between_strategies(
    ranks: Ranks, new_run: NewRun, alone: Callable[..., Any], first: str, second: str
) -> None:
    words = (model_word(LLAMA), "trainer.devices=2")
    before = new_run(*words, "trainer.max_steps=6", f"trainer.strategy={first}", name="before")
    ranks(first).run("run", folder=str(before.root))
    after = new_run(*words, "trainer.max_steps=12", f"trainer.strategy={second}", name="after")
    ranks(second).run("run", folder=str(after.root), resume_from=str(before.checkpoints / "step-6"))
    expected = alone(new_run, words[0])
    assert difference(expected[:6], curve(before)).loss <= LOSS_BOUND
    assert difference(expected[6:], curve(after)).loss <= LOSS_BOUND


@pytest.mark.parametrize("strategy", ["zero2", pytest.param("zero3", marks=pytest.mark.slow)])
def test_sixteen_bits_start_from_the_same_weights(
    ranks: Ranks, new_run: NewRun, alone: Callable[..., Any], strategy: str
) -> None:
    words = (model_word(LLAMA), "trainer.max_steps=12", "trainer.devices=2", f"trainer.strategy={strategy}")
    both = new_run(*words, "trainer.precision=bf16-mixed", name="both")
    ranks(strategy).run("run", folder=str(both.root))
    expected, found = alone(new_run, words[0]), curve(both)
    assert difference(expected, found).loss <= 2e-3


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["model={kind: hf}"], "model.config={model_type: gpt2"),
        (["model={kind: hf, config: {n_layer: 2}}"], "model_type"),
        (["model={kind: hf, config: 5}"], "keys and values such as {key: value}"),
        (["model={kind: hf, path: .}"], "config.json"),
        (["model={kind: hf, path: no/such/folder}"], "no such file or folder"),
        (["model={kind: hf, config: {model_type: gpt2, trust_remote_code: true}}"], "run code"),
        (["model={kind: hf, config: {model_type: gpt2, n_positions: 64}, block_size: 128}"], "model.block_size=64"),
        (
            ["model={kind: hf, config: {model_type: bert, max_position_embeddings: 64}}", "data={kind: text_classes}"],
            "try data.max_length=64",
        ),
        (
            ["model={kind: hf, config: {model_type: bart, max_position_embeddings: 64}}", "data={kind: pairs}"],
            "try model.block_size=64",
        ),
        (
            [
                "model={kind: hf, config: {model_type: roberta, max_position_embeddings: 66, pad_token_id: 1}}",
                "data={kind: text_classes, max_length: 65}",
            ],
            "try data.max_length=64",
        ),
        (["model={kind: hf, config: {model_type: gpt2, vocab_size: 100}}"], "257"),
        (["model={kind: hf, config: {model_type: gpt2}}", "trainer.cross_entropy_chunks=2"], "cross_entropy_chunks=1"),
        (["model={kind: hf, config: {model_type: gpt2}}", "trainer.activation_checkpointing=2"], "full"),
        (["model={kind: hf, config: {model_type: gpt2}}", "optim=muon"], "optim.kind=adamw"),
    ],
)  # fmt: skip
def test_what_the_recipe_alone_contradicts_is_told_before_torch(words: list[str], said: str) -> None:
    with pytest.raises(UsageError) as raised:
        recipe_of(*words)
    assert len(raised.value.problems) == 1
    assert said in raised.value.problems[0]


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("{model_type: llamma}", "did you mean llama?"),
        ("{model_type: gpt2, n_layers: 2}", "did you mean n_layer?"),
        ("{model_type: gpt2, attn_implementation: someone/kernel}", "someone/kernel"),
        ("{model_type: gpt2, n_embd: 63, n_head: 2}", "gpt2 cannot be built"),
        ("{model_type: vit}", "vit for CausalLM"),
        ("{model_type: gpt2, n_layer: two}", "Field 'n_layer' expected int"),
    ],
)
def test_a_configuration_that_transformers_does_not_know_is_one_line(config: str, said: str) -> None:
    with pytest.raises(UsageError) as raised:
        built(model_word(config))
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_weights_that_would_have_to_be_unpickled_are_refused(tmp_path: Path) -> None:
    model = built(model_word(GPT2)).model
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UsageError, match="safetensors"):
        recipe_of(f"model={{kind: hf, path: {tmp_path}, block_size: 16}}")


def test_damaged_weights_are_one_line(tmp_path: Path) -> None:
    built(model_word(GPT2)).model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(DataError, match=str(tmp_path)):
        built(f"model={{kind: hf, path: {tmp_path}, block_size: 16}}")


def test_code_that_comes_with_a_model_does_not_run(tmp_path: Path) -> None:
    built(model_word(GPT2)).model.save_pretrained(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path).to_dict()
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Net"}}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    canary = tmp_path / "canary"
    (tmp_path / "own.py").write_text(f"open({str(canary)!r}, 'w')\n", encoding="utf-8")
    with pytest.raises((DataError, UsageError)) as raised:
        built(f"model={{kind: hf, path: {tmp_path}, block_size: 16}}")
    assert not canary.exists()
    assert "\n" not in str(raised.value)

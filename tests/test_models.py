"""GPT against transformers' GPT-2, and what checkpointing, chunks, padding and precision must change in no network."""

from __future__ import annotations

import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from lm_train.generate import sample_text
from lm_train.models import GPT, Decoder, Llama
from lm_train.models.transformer import Block, chunked_cross_entropy
from lm_train.plan import DataFacts, padded_vocab_size, parameter_count, parameter_shapes
from lm_train.recipe import GPT as GPTSection
from lm_train.recipe import Llama as LlamaSection

SECTIONS = {
    "gpt": GPTSection(n_layer=3, n_head=2, n_embd=24, block_size=16),
    "llama": LlamaSection(n_layer=3, n_head=4, n_kv_head=2, n_embd=24, intermediate_size=40, block_size=16),
    "llama-tied": LlamaSection(n_layer=3, n_head=2, n_embd=24, block_size=16, tie_embeddings=True),
}
both_kinds = pytest.mark.parametrize("kind", ["gpt", "llama"])
every_network = pytest.mark.parametrize("kind", SECTIONS)


def make(kind: str, vocab: int = 64, *, seed: int = 0, **changes: object) -> Decoder:
    """The small network of SECTIONS; `changes` are its sizes, or the network's own options."""
    torch.manual_seed(seed)
    section = SECTIONS[kind]
    sizes = {key: value for key, value in changes.items() if key in type(section).model_fields}
    options = {key: value for key, value in changes.items() if key not in sizes}
    return (GPT if kind == "gpt" else Llama)(section.model_copy(update=sizes), vocab, **options)


def tokens_and_targets(vocab: int = 64, shape: tuple[int, int] = (3, 16)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    both = torch.randint(0, vocab, (shape[0], shape[1] + 1), generator=generator)
    return both[:, :-1], both[:, 1:]


def gradients(net: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def loss_and_gradients(net: Decoder, tokens: Tensor, targets: Tensor) -> tuple[float, dict[str, Tensor]]:
    net.zero_grad()
    loss = net(tokens, targets)
    loss.backward()
    return loss.item(), gradients(net)


# transformers' names of our parameters; its Conv1D weights lie transposed
def theirs(name: str) -> str:
    block = (
        name.replace("blocks.", "transformer.h.")
        .replace("attention_norm", "ln_1")
        .replace("attention.qkv", "attn.c_attn")
        .replace("attention.out", "attn.c_proj")
        .replace("mlp_norm", "ln_2")
        .replace("mlp.up", "mlp.c_fc")
        .replace("mlp.down", "mlp.c_proj")
    )
    outside = {
        "token_embedding.weight": "transformer.wte.weight",
        "position_embedding.weight": "transformer.wpe.weight",
        "norm.weight": "transformer.ln_f.weight",
        "norm.bias": "transformer.ln_f.bias",
    }
    return outside.get(name, block)


def is_transposed(name: str) -> bool:
    return name.endswith(("qkv.weight", "out.weight", "up.weight", "down.weight"))


def hugging_face_copy(net: Decoder) -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=net.vocab_size,
        n_positions=net.block_size,
        n_embd=24,
        n_layer=len(net.blocks),
        n_head=2,
        attn_implementation="eager",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    other = GPT2LMHeadModel(config)
    weights = dict(other.named_parameters())
    with torch.no_grad():
        for name, p in net.named_parameters():
            value = p.T if is_transposed(name) else p
            weights.pop(theirs(name)).copy_(value[: net.vocab_size] if name == "token_embedding.weight" else value)
    assert not weights, f"parameters of transformers' model that we lack: {list(weights)}"
    return other


@pytest.mark.parametrize("vocab", [64, 50])
def test_logits_loss_and_gradients_equal_transformers(vocab: int) -> None:
    net = make("gpt", vocab)
    with torch.no_grad():  # biases of 0 and norms of 1 would hide a mistake
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    other = hugging_face_copy(net)
    tokens, targets = tokens_and_targets(vocab)

    logits = other(tokens).logits
    assert net(tokens).shape == logits.shape
    torch.testing.assert_close(net(tokens), logits, rtol=1e-5, atol=1e-5)

    F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").backward()
    loss, ours = loss_and_gradients(net, tokens, targets)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
    assert loss == pytest.approx(expected, rel=1e-6)
    wanted = gradients(other)
    assert len(ours) == len(wanted)
    for name, gradient in ours.items():
        reference = wanted[theirs(name)]
        if name == "token_embedding.weight":
            assert not gradient[vocab:].any(), "padded rows took a gradient"
            gradient = gradient[:vocab]
        torch.testing.assert_close(gradient, reference.T if is_transposed(name) else reference, rtol=1e-5, atol=1e-5)


@every_network
def test_padded_rows_take_no_probability(kind: str) -> None:
    net = make(kind, 50)
    assert len(net.head_weight) == padded_vocab_size(50) == 64
    tokens, targets = tokens_and_targets(50)
    before = net(tokens, targets).item()
    with torch.no_grad():
        net.head_weight[50:] = 1e3
    assert net(tokens, targets).item() == before


@pytest.mark.parametrize("chunks", [2, 3, 7, 48, 1000])
@pytest.mark.parametrize("vocab", [64, 50])
@every_network
def test_chunked_loss_equals_the_whole(chunks: int, vocab: int, kind: str) -> None:
    tokens, targets = tokens_and_targets(vocab)
    targets = targets.masked_fill(torch.arange(16) % 5 == 0, -100)
    targets[0] = -100  # whole pieces without a target
    loss, wanted = loss_and_gradients(make(kind, vocab), tokens, targets)
    chunked_loss, chunked = loss_and_gradients(make(kind, vocab, cross_entropy_chunks=chunks), tokens, targets)
    assert chunked_loss == pytest.approx(loss, rel=1e-6)
    for name, gradient in wanted.items():
        torch.testing.assert_close(chunked[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_chunked_loss_holds_one_piece_of_logits_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, whole = [], F.cross_entropy
    monkeypatch.setattr(F, "cross_entropy", lambda x, t, **options: rows.append(len(x)) or whole(x, t, **options))
    hidden, weight = torch.randn(4, 8, 6, requires_grad=True), torch.randn(64, 6)
    chunked_cross_entropy(hidden, weight, torch.zeros(4, 8, dtype=torch.int64), 64, 4).backward()
    assert rows == [8] * 8, "four pieces forward, four again in the backward pass"


def test_ignored_targets_count_nothing() -> None:
    net = make("gpt")
    tokens, targets = tokens_and_targets()
    assert net(tokens, torch.full_like(targets, -100)).item() == 0.0
    half = targets.clone()
    half[:, 8:] = -100
    assert net(tokens, half).item() == pytest.approx(net(tokens[:, :8], targets[:, :8]).item(), rel=1e-5)


@pytest.mark.parametrize(("setting", "recomputed"), [("none", 0), ("full", 4), (2, 2), (3, 1)])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@both_kinds
def test_activation_checkpointing_recomputes_and_changes_nothing(
    setting: str | int, recomputed: int, dropout: float, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, targets = tokens_and_targets()
    plain = make(kind, n_layer=4, dropout=dropout)
    torch.manual_seed(5)
    loss, wanted = loss_and_gradients(plain, tokens, targets)

    net = make(kind, n_layer=4, dropout=dropout, activation_checkpointing=setting)
    calls = []
    inner = Block._forward
    monkeypatch.setattr(Block, "_forward", lambda *given: calls.append(1) or inner(*given))
    torch.manual_seed(5)
    checkpointed_loss, checkpointed = loss_and_gradients(net, tokens, targets)
    assert len(calls) == 4 + recomputed
    assert checkpointed_loss == loss
    for name, gradient in wanted.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=0, atol=0, msg=name)


def test_evaluation_recomputes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    net = make("gpt", activation_checkpointing="full", cross_entropy_chunks=3).eval()
    with torch.inference_mode():
        assert net(*tokens_and_targets()).item() == pytest.approx(make("gpt")(*tokens_and_targets()).item(), rel=1e-6)


def is_constant(name: str) -> bool:
    return name.endswith("bias") or "norm" in name


def larger(kind: str, seed: int, **changes: object) -> Decoder:
    return make(kind, 256, seed=seed, n_layer=2, n_embd=64, block_size=64, **changes)


@every_network
def test_initial_weights(kind: str) -> None:
    net = larger(kind, 0)
    for name, p in net.named_parameters():
        if is_constant(name):
            assert (p == (0 if name.endswith("bias") else 1)).all(), name
        else:
            residual = name.endswith(("attention.out.weight", "mlp.down.weight"))
            std = 0.02 / math.sqrt(2 * 2) if residual else 0.02
            assert p.std().item() == pytest.approx(std, rel=0.1), name
            assert abs(p.mean().item()) < 4 * std / math.sqrt(p.numel()), name
    again, other = larger(kind, 0).parameters(), larger(kind, 1).parameters()
    for (name, a), b, c in zip(net.named_parameters(), again, other, strict=True):
        assert torch.equal(a, b), name
        assert torch.equal(a, c) == is_constant(name), name


def test_initial_weights_of_gpt_stay_what_they_were() -> None:
    """A seed means the same network in every version: sums that torch 2.13 on a CPU gave for the first one."""
    torch.manual_seed(1337)
    net = GPT(GPTSection(n_layer=2, n_head=2, n_embd=64, block_size=64), 256)
    sums = [p.double().abs().sum().item() for p in (net.token_embedding.weight, net.blocks[1].mlp.down.weight)]
    assert sums == pytest.approx([261.2011465055232, 130.52553274731773], rel=1e-6)


@every_network
def test_meta_device_then_initialised_is_the_same_network(kind: str) -> None:
    with torch.device("meta"):
        net = larger(kind, 0)
    assert all(p.is_meta for p in net.parameters())
    net.to_empty(device="cpu")
    with torch.no_grad():
        for p in net.parameters():
            p.fill_(math.nan)
    torch.manual_seed(0)
    net.init_weights()
    for (name, a), b in zip(net.named_parameters(), larger(kind, 0).parameters(), strict=True):
        assert torch.equal(a, b), name


@every_network
def test_each_initial_value_by_itself(kind: str) -> None:
    net = larger(kind, 0, initialise=False)
    assert torch.rand(1) == torch.rand(1, generator=torch.Generator().manual_seed(0)), "a number was drawn"
    assert all(p.is_meta for p in net.parameters())
    whole = larger(kind, 0)
    torch.manual_seed(0)
    for (name, p), wanted in zip(net.named_parameters(), whole.parameters(), strict=True):
        value = torch.full(p.shape, math.nan)
        net.fill(name, value)
        assert torch.equal(value, wanted), name


@pytest.mark.parametrize("bias", [True, False])
@every_network
def test_shapes_by_formula(kind: str, bias: bool) -> None:
    section = SECTIONS[kind].model_copy(update={"bias": bias} if kind == "gpt" else {"n_kv_head": 2 if bias else 1})
    net = (GPT if kind == "gpt" else Llama)(section, 50, initialise=False)
    wanted = [(name, tuple(p.shape)) for name, p in net.named_parameters()]
    shapes = parameter_shapes(section, "causal_lm", DataFacts(vocab_size=50))
    assert shapes == wanted
    assert parameter_count(shapes) == sum(p.numel() for p in net.parameters())


@both_kinds
def test_a_later_token_changes_no_earlier_logit(kind: str) -> None:
    net = make(kind).eval()
    tokens, _ = tokens_and_targets()
    changed = tokens.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 64
    before, after = net(tokens), net(changed)
    assert torch.equal(before[:, :9], after[:, :9])
    assert (before[:, 9:] != after[:, 9:]).any(dim=-1).all(), "every later position sees the change"


@both_kinds
def test_positions_matter_and_sequences_longer_than_the_block_are_refused(kind: str) -> None:
    net = make(kind, block_size=16)
    # rotary positions are relative: two tokens in the other order, not one token everywhere
    logits = net(torch.tensor([[3, 5, 7], [5, 3, 7]]))[:, -1]
    assert not torch.allclose(logits[0], logits[1], rtol=1e-6, atol=1e-9)
    with pytest.raises(ValueError, match="17 tokens is longer than block_size=16"):
        net(torch.zeros(1, 17, dtype=torch.int64))


def test_without_biases_there_are_none() -> None:
    net = GPT(GPTSection(n_layer=1, n_head=2, n_embd=8, block_size=8, bias=False), 64)
    assert not [name for name, _ in net.named_parameters() if name.endswith("bias")]


@both_kinds
def test_dropout_acts_in_training_only(kind: str) -> None:
    net, (tokens, targets) = make(kind, dropout=0.5), tokens_and_targets()
    assert net(tokens, targets).item() != net(tokens, targets).item()
    net.eval()
    assert net(tokens, targets).item() == net(tokens, targets).item() == make(kind)(tokens, targets).item()


@every_network
def test_generation_repeats_under_a_seed_and_outgrows_the_block(kind: str) -> None:
    net = make(kind, 50, block_size=8).eval()
    prompt = torch.tensor([[1, 2, 3]])

    def run(seed: int, **options) -> list[int]:
        torch.manual_seed(seed)
        return net.generate(prompt, 20, **options)[0].tolist()

    assert run(0) == run(0) != run(1)
    assert run(0)[:3] == [1, 2, 3]
    assert len(run(0)) == 23, "block_size=8 limits what is looked at, not what is written"
    assert max(run(0, temperature=1e4)) < 50, "a padded id was drawn"
    assert run(0, top_k=1) == run(1, top_k=1), "the most likely token leaves no choice"


@both_kinds
def test_generation_takes_the_likeliest_of_the_last_block(kind: str) -> None:
    net = make(kind, 50, block_size=8).eval()
    with torch.no_grad():  # with its initial weights it would repeat one token
        for p in net.parameters():
            p.add_(0.3 * torch.randn_like(p))
    tokens = torch.randint(0, 50, (1, 8), generator=torch.Generator().manual_seed(3))
    for _ in range(9):
        wanted = net(tokens[:, -8:])[0, -1].argmax()
        tokens = net.generate(tokens, 1, top_k=1)
        assert tokens[0, -1] == wanted


def test_sample_text_leaves_mode_and_random_numbers_alone() -> None:
    from lm_train.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer("bytes")
    assert tokenizer is not None
    net = make("gpt", 257, dropout=0.5).train()
    torch.manual_seed(7)
    untouched = torch.rand(3)
    torch.manual_seed(7)
    first = sample_text(net, tokenizer, 30, seed=1, prompt="ab")
    assert torch.equal(torch.rand(3), untouched)
    assert net.training
    assert first == sample_text(net, tokenizer, 30, seed=1, prompt="ab") != sample_text(net, tokenizer, 30, seed=2)
    assert first.startswith("ab")


@both_kinds
def test_bf16_autocast_trains_near_fp32(kind: str) -> None:
    tokens, targets = tokens_and_targets(50)
    loss, wanted = loss_and_gradients(make(kind, 50), tokens, targets)
    for chunks in (1, 3):
        net = make(kind, 50, cross_entropy_chunks=chunks, activation_checkpointing="full")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = net(tokens, targets)
        value.backward()
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(loss, rel=1e-2)
        for name, gradient in gradients(net).items():
            assert gradient.dtype == torch.float32
            assert F.cosine_similarity(gradient.flatten(), wanted[name].flatten(), dim=0) > 0.98, name


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"activation_checkpointing": 2, "cross_entropy_chunks": 3}])
@both_kinds
def test_compiled_equals_eager(options: dict, kind: str) -> None:
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("torch.compile on the CPU needs a C++ compiler")
    tokens, targets = tokens_and_targets(50)
    loss, wanted = loss_and_gradients(make(kind, 50, **options), tokens, targets)
    net = make(kind, 50, **options)
    net.compile()
    compiled_loss, compiled = loss_and_gradients(net, tokens, targets)
    assert compiled_loss == pytest.approx(loss, rel=1e-5)
    for name, gradient in wanted.items():
        torch.testing.assert_close(compiled[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.slow
def test_generation_compiles_nothing() -> None:
    net = make("gpt", 50, block_size=8).eval()
    torch.manual_seed(0)
    wanted = net.generate(torch.tensor([[1, 2, 3]]), 8)
    net.compile(backend=lambda *_: pytest.fail("a graph was compiled"))
    torch.manual_seed(0)
    assert torch.equal(net.generate(torch.tensor([[1, 2, 3]]), 8), wanted)

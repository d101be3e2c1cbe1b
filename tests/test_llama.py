"""Llama against transformers' LlamaForCausalLM, and positions that no cast and no device may spoil."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from lm_train.models import Llama
from lm_train.models.transformer import rotary_angles, rotate
from lm_train.recipe import Llama as LlamaSection
from lm_train.recipe import load

CASES = {
    "grouped": LlamaSection(n_layer=3, n_head=6, n_kv_head=2, n_embd=48, intermediate_size=88, block_size=16),
    "one key head, tied": LlamaSection(n_layer=2, n_head=4, n_kv_head=1, n_embd=32, block_size=16, tie_embeddings=True),
    "all heads, Llama 3's positions": LlamaSection(
        n_layer=2, n_head=4, n_embd=32, block_size=16, rope_theta=5e5, norm_eps=1e-6
    ),
}


def moved(section: LlamaSection, vocab: int, **options) -> Llama:
    """A network off its initial values: norms of 1 and attention that is all but uniform would hide a mistake."""
    torch.manual_seed(0)
    net = Llama(section, vocab, **options)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return net


def theirs(net: Llama, named: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors (weights, or their gradients) under transformers' names, without the padding of the vocabulary."""
    values: dict[str, Tensor] = {}
    for name, value in named.items():
        if name.endswith("qkv.weight"):
            attention = net.blocks[0].attention
            parts = value.split([heads * attention.head_size for heads in attention.heads])
            prefix = name.replace("blocks.", "model.layers.").replace("attention.qkv.weight", "self_attn.")
            values |= {f"{prefix}{letter}_proj.weight": part for letter, part in zip("qkv", parts, strict=True)}
        elif name in ("token_embedding.weight", "head.weight"):
            there = {"token_embedding.weight": "model.embed_tokens.weight", "head.weight": "lm_head.weight"}[name]
            values[there] = value[: net.vocab_size]
        elif name == "norm.weight":
            values["model.norm.weight"] = value
        else:
            there = (
                name.replace("blocks.", "model.layers.")
                .replace("attention_norm", "input_layernorm")
                .replace("attention.out", "self_attn.o_proj")
                .replace("mlp_norm", "post_attention_layernorm")
            )
            for part in ("gate", "up", "down"):
                there = there.replace(f"mlp.{part}", f"mlp.{part}_proj")
            values[there] = value
    return values


def hugging_face_copy(net: Llama, section: LlamaSection) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=net.vocab_size,
        hidden_size=section.n_embd,
        intermediate_size=section.mlp_width,
        num_hidden_layers=section.n_layer,
        num_attention_heads=section.n_head,
        num_key_value_heads=section.key_value_heads,
        max_position_embeddings=section.block_size,
        rms_norm_eps=section.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": section.rope_theta},
        tie_word_embeddings=section.tie_embeddings,
        attn_implementation="eager",
    )
    other = LlamaForCausalLM(config)
    weights = dict(other.named_parameters())
    with torch.no_grad():
        for name, value in theirs(net, dict(net.named_parameters())).items():
            weights.pop(name).copy_(value)
    assert not weights, f"parameters of transformers' model that we lack: {list(weights)}"
    return other


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("vocab", [64, 50])
@pytest.mark.parametrize("section", CASES.values(), ids=CASES)
def test_logits_loss_and_gradients_equal_transformers(section: LlamaSection, vocab: int, chunks: int) -> None:
    net = moved(section, vocab, activation_checkpointing=2, cross_entropy_chunks=chunks)
    other = hugging_face_copy(net, section)
    both = torch.randint(0, vocab, (3, 17), generator=torch.Generator().manual_seed(1))
    tokens, targets = both[:, :-1], both[:, 1:]

    logits = other(tokens).logits
    assert net(tokens).shape == logits.shape
    torch.testing.assert_close(net(tokens), logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(net(tokens, last_only=True), net(tokens)[:, -1:], rtol=1e-5, atol=1e-6)

    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    expected.backward()
    loss = net(tokens, targets)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    wanted = {name: p.grad for name, p in other.named_parameters()}
    ours = {name: p.grad for name, p in net.named_parameters()}
    assert not ours["token_embedding.weight"][vocab:].any(), "padded rows took a gradient"
    found = theirs(net, ours)
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-5, atol=1e-5, msg=name)


def test_rotation_depends_on_the_distance_only() -> None:
    """The product of a query at position m with a key at n: the same for equal m - n, with complex numbers too."""
    cos, sin = rotary_angles(32, 8, 10000.0, torch.device("cpu"))
    q, k = torch.randn(2, 8, dtype=torch.float64).float()
    turned_q, turned_k = (rotate(x.expand(1, 32, 1, 8), cos, sin)[0, :, 0] for x in (q, k))
    products = turned_q @ turned_k.T  # (32, 32)
    for distance in range(-31, 32):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-4, atol=1e-4)
    frequencies = 10000.0 ** (-torch.arange(4, dtype=torch.float64) / 4)
    turned = torch.complex(q[:4].double(), q[4:].double()) * torch.polar(torch.ones(4).double(), 5 * frequencies)
    torch.testing.assert_close(turned_q[5].double(), torch.cat((turned.real, turned.imag)), rtol=1e-5, atol=1e-6)


def test_bf16_leaves_the_positions_exact() -> None:
    """At position 4000 angles in bf16 would be off by up to 8 radians."""
    section = LlamaSection(n_layer=1, n_head=2, n_embd=32, block_size=4096)
    fp32 = moved(section, 64)
    half = moved(section, 64).to(torch.bfloat16)
    with torch.no_grad():
        for p, q in zip(fp32.parameters(), half.parameters(), strict=True):
            p.copy_(q)  # the same rounded weights
    tokens = torch.randint(0, 64, (1, 4096), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        wanted, found = fp32(tokens)[0, -64:], half(tokens)[0, -64:].float()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = fp32(tokens)[0, -64:].float()
            angles = rotary_angles(4096, 16, 10000.0, tokens.device)
    assert F.cosine_similarity(wanted, found, dim=-1).min() > 0.999
    assert F.cosine_similarity(wanted, mixed, dim=-1).min() > 0.999
    for mine, exact in zip(angles, rotary_angles(4096, 16, 10000.0, tokens.device), strict=True):
        assert torch.equal(mine, exact)


def test_a_network_built_without_values_turns_as_one_built_at_once() -> None:
    section = CASES["grouped"]
    whole = moved(section, 64).eval()
    with torch.device("meta"):
        net = Llama(section, 64, initialise=False)
    net = net.to_empty(device="cpu").eval()
    assert not list(net.buffers())
    net.load_state_dict(whole.state_dict())
    tokens = torch.arange(16).unsqueeze(0)
    assert torch.equal(net(tokens), whole(tokens))


@pytest.mark.parametrize(("width", "expected"), [(4096, 11008), (5120, 13824), (8192, 22016), (24, 256)])
def test_width_of_the_mlp_by_llamas_rule(width: int, expected: int) -> None:
    """11008, 13824 and 22016 are Llama's 7B, 13B and 65B (Touvron et al. 2023; config.json on the hub)."""
    assert LlamaSection(n_embd=width, n_head=1).mlp_width == expected


def test_switching_the_kind_keeps_what_both_kinds_have() -> None:
    recipe = load(["recipe=gpt_small", "model=llama", "model.n_kv_head=4"])
    assert recipe.model == LlamaSection(
        n_layer=12, n_head=12, n_embd=768, block_size=1024, vocab_size=50257, n_kv_head=4
    )
    assert load(["recipe=llama_1b", "model.kind=gpt"]).model.kind == "gpt"

"""GPT and Llama by formula."""

from __future__ import annotations

from collections.abc import Iterator

from lm_train.recipe import GPT, Llama


def decoder_shapes(model: GPT | Llama, vocab_size: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of each parameter of the network, in the order of its `named_parameters`.

    Args:
        model: the recipe's model section.
        vocab_size: rows of the embedding (the padded size). A head tied to it is no parameter of its own.
    """
    d = model.n_embd
    match model.kind:
        case "gpt":
            biases, qkv, up = model.bias, 3 * d, {"up": 4 * d}
            before = {"token_embedding": vocab_size, "position_embedding": model.block_size}
            after = {}
        case "llama":
            biases, qkv = False, d + 2 * model.key_value_heads * d // model.n_head
            up = {"gate": model.mlp_width, "up": model.mlp_width}
            before = {"token_embedding": vocab_size}
            after = {} if model.tie_embeddings else {"head": vocab_size}

    def layer(name: str, *shape: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{name}.weight", shape
        if biases:
            yield f"{name}.bias", shape[:1]

    for name, rows in before.items():
        yield f"{name}.weight", (rows, d)
    for i in range(model.n_layer):
        block = f"blocks.{i}"
        yield from layer(f"{block}.attention_norm", d)
        yield from layer(f"{block}.attention.qkv", qkv, d)
        yield from layer(f"{block}.attention.out", d, d)
        yield from layer(f"{block}.mlp_norm", d)
        for name, rows in up.items():
            yield from layer(f"{block}.mlp.{name}", rows, d)
        yield from layer(f"{block}.mlp.down", d, up["up"])
    yield from layer("norm", d)
    for name, rows in after.items():
        yield f"{name}.weight", (rows, d)

"""The encoder-decoder against transformers' MarianMTModel with the same weights, and pairs of texts from their source on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import MarianConfig, MarianMTModel

from lm_train import data
from lm_train.data import IGNORED, PairDataModule
from lm_train.data.pairs import PairSamples
from lm_train.errors import DataError
from lm_train.models import Seq2Seq
from lm_train.plan import DataFacts, Plan, flops_per_sample, parameter_shapes
from lm_train.recipe import Seq2Seq as Seq2SeqSection
from lm_train.recipe import load
from lm_train.runs import RunFolder, read_jsonl
from lm_train.train import train

VOCAB, PAD, START, END = 61, 58, 59, 60
SECTION = Seq2SeqSection(n_layer=2, n_head=4, n_embd=32, block_size=20, dropout=0.0)
LENGTHS = torch.tensor([13, 1, 7])
WANTED = torch.tensor([9, 3, 1])
"""Real tokens of each source and target."""
MODEL = "model={kind: seq2seq, n_layer: 1, n_head: 2, n_embd: 32, block_size: 24, dropout: 0.0}"
NewRun = Callable[..., RunFolder]


def moved(**options) -> Seq2Seq:
    """A network off its initial values: norms of 1 and biases of 0 would hide a mistake."""
    torch.manual_seed(0)
    net = Seq2Seq(SECTION, VOCAB, **options)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return net


def renamed(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors (weights, or their gradients) under transformers' names, without the padding of the vocabulary."""
    values: dict[str, Tensor] = {}
    for name, value in named.items():
        if name == "token_embedding.weight":
            values["model.shared.weight"] = value[:VOCAB]
            continue
        stack, layer, *inner, kind = name.split(".")
        prefix = f"model.{stack}.layers.{layer}."
        match inner:
            case ["attention", "qkv"]:
                parts = zip("qkv", value.chunk(3), strict=True)
                values |= {f"{prefix}self_attn.{letter}_proj.{kind}": part for letter, part in parts}
            case ["cross_attention", "key_value"]:
                parts = zip("kv", value.chunk(2), strict=True)
                values |= {f"{prefix}encoder_attn.{letter}_proj.{kind}": part for letter, part in parts}
            case _:
                there = {
                    "attention.out": "self_attn.out_proj",
                    "attention_norm": "self_attn_layer_norm",
                    "cross_attention.query": "encoder_attn.q_proj",
                    "cross_attention.out": "encoder_attn.out_proj",
                    "cross_norm": "encoder_attn_layer_norm",
                    "mlp.up": "fc1",
                    "mlp.down": "fc2",
                    "mlp_norm": "final_layer_norm",
                }[".".join(inner)]
                values[f"{prefix}{there}.{kind}"] = value
    return values


def reference(net: Seq2Seq) -> MarianMTModel:
    config = MarianConfig(
        vocab_size=VOCAB, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=128, decoder_ffn_dim=128, activation_function="relu", dropout=0.0,
        attention_dropout=0.0, max_position_embeddings=20, scale_embedding=True, pad_token_id=PAD,
        decoder_start_token_id=START, eos_token_id=END, forced_eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    model = MarianMTModel(config)
    missing, unexpected = model.load_state_dict(renamed(net.state_dict()), strict=False)
    assert not unexpected
    tied = ("embed_tokens", "embed_positions", "lm_head", "final_logits_bias")
    assert all(any(part in name for part in tied) for name in missing)
    assert not model.final_logits_bias.any()
    return model.train()


def batch() -> dict[str, Tensor]:
    tokens, target = torch.randint(PAD, (3, 13)), torch.randint(PAD, (3, 9))
    tokens[torch.arange(13) >= LENGTHS[:, None]] = PAD
    targets = target.masked_fill(torch.arange(9) >= WANTED[:, None], IGNORED)
    read = torch.cat((torch.full((3, 1), START), target[:, :-1]), dim=1).masked_fill(targets == IGNORED, PAD)
    return {"tokens": tokens, "lengths": LENGTHS, "target_tokens": read, "targets": targets}


@pytest.mark.parametrize("options", [{}, {"activation_checkpointing": "full", "cross_entropy_chunks": 3}], ids=str)
def test_equals_transformers(options: dict) -> None:
    net = moved(**options).train()
    model = reference(net)
    given = batch()
    seen = (torch.arange(13) < LENGTHS[:, None]).long()
    answer = model(
        given["tokens"], attention_mask=seen, decoder_input_ids=given["target_tokens"], labels=given["targets"]
    )
    real = given["targets"] != IGNORED
    found = net(given["tokens"], given["lengths"], given["target_tokens"])
    torch.testing.assert_close(found[real], answer.logits[real], rtol=1e-4, atol=2e-5)
    loss = net(**given) / WANTED.sum()
    torch.testing.assert_close(loss, answer.loss, rtol=1e-5, atol=1e-6)
    loss.backward()
    answer.loss.backward()
    theirs = {name: p.grad for name, p in model.named_parameters() if "embed_positions" not in name}
    ours = renamed({name: p.grad for name, p in net.named_parameters()})
    assert set(ours) == set(theirs)
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-4, atol=1e-5, msg=name)


def test_generate_equals_transformers_greedy_search() -> None:
    net = moved().eval()
    model = reference(net).eval()
    given = batch()
    seen = (torch.arange(13) < LENGTHS[:, None]).long()
    theirs = model.generate(given["tokens"], attention_mask=seen, num_beams=1, do_sample=False, max_new_tokens=12)[
        :, 1:
    ]
    ours = net.generate(given["tokens"], given["lengths"], 12, START, END)
    for a, b in zip(ours.tolist(), theirs.tolist(), strict=True):
        until = b.index(END) + 1 if END in b else len(b)
        assert a[:until] == b[:until]
        assert set(a[until:]) <= {END}
    assert len({tuple(row) for row in ours.tolist()}) == 3


def test_padding_changes_nothing() -> None:
    net, given = moved().eval(), batch()
    row = net(given["tokens"][2:, :7], None, given["target_tokens"][2:, :1])
    torch.testing.assert_close(net(given["tokens"], LENGTHS, given["target_tokens"])[2:, :1], row, rtol=1e-4, atol=1e-5)


def test_filling_draws_what_building_draws_and_the_plan_counts_it() -> None:
    torch.manual_seed(3)
    built = Seq2Seq(SECTION, VOCAB)
    torch.manual_seed(3)
    empty = Seq2Seq(SECTION, VOCAB, initialise=False)
    for name, parameter in empty.named_parameters():
        tensor = torch.empty(parameter.shape)
        empty.fill(name, tensor)
        assert torch.equal(tensor, built.get_parameter(name)), name
    facts = DataFacts(vocab_size=VOCAB, pair_lengths=(7.0, 5.0))
    shapes = [(n, tuple(p.shape)) for n, p in empty.named_parameters()]
    assert parameter_shapes(SECTION, "seq2seq", facts) == shapes
    size = {name: p.numel() for name, p in empty.named_parameters() if p.dim() == 2}
    of_source = sum(n for name, n in size.items() if name.startswith("encoder") or "key_value" in name)
    products = 7 * of_source + 5 * (sum(size.values()) - of_source)  # the head is the embedding
    exact = 6 * products + 12 * 2 * 32 * (7 * 7 + 5 * 5 + 7 * 5)
    n_parameters = sum(p.numel() for p in empty.parameters())
    assert flops_per_sample(SECTION, "seq2seq", facts, n_parameters) == pytest.approx(
        exact, rel=0.05
    )  # N also counts norms and biases


def opened(run: RunFolder) -> PairDataModule:
    recipe, plan = load([f"recipe={run.recipe}"]), Plan.read(run.plan)
    module = data.build(recipe.data, plan, recipe.seed, run)
    module.prepare(recipe.model)
    assert isinstance(module, PairDataModule)
    return module


def written(module: PairDataModule, samples: PairSamples, number: int) -> tuple[str, str]:
    source, target = samples.pairs.pair(number)
    return module.tokenizer.decode(source.tolist()), module.tokenizer.decode(target.tolist())


@pytest.fixture
def pair_file(tmp_path: Path) -> Path:
    draw = np.random.default_rng(0)
    rows = ["source\ttarget"]
    for _ in range(300):
        word = "".join(draw.choice(list("abcdef"), draw.integers(2, 9)))
        rows.append(f"{word}\t{word[::-1].upper()}")
    file = tmp_path / "pairs.tsv"
    file.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return file


def pair_run(new_run: NewRun, file: Path | str, *words: str, **options: str) -> RunFolder:
    return new_run(MODEL, "data.kind=pairs", "data.tokenizer=chars", f"data.path={file}", *words, **options)


def test_a_batch_is_what_teacher_forcing_needs(new_run: NewRun, pair_file: Path) -> None:
    module = opened(pair_run(new_run, pair_file))
    batches = module.train_batches(0)
    seen = set()
    for step in range(3):
        found = batches[step]
        assert found["total"] == (found["targets"] != IGNORED).sum()
        for i, length in enumerate(found["lengths"].tolist()):
            source = module.tokenizer.decode(found["tokens"][i, :length].tolist())
            wanted = found["targets"][i][found["targets"][i] != IGNORED].tolist()
            assert module.tokenizer.decode(wanted[:-1]) == source[::-1].upper()
            assert wanted[-1] == module.end_id
            assert found["target_tokens"][i, : len(wanted)].tolist() == [module.start_id, *wanted[:-1]]
            assert (found["tokens"][i, length:] == module.pad_id).all()
            assert (found["target_tokens"][i, len(wanted) :] == module.pad_id).all()
            seen.add(source)
    assert len(seen) > 30


def test_embedded_splits_share_no_string(new_run: NewRun) -> None:
    module = opened(pair_run(new_run, "null"))
    strings = {}
    for split in ("train", "val", "test"):
        samples = module.samples(split)
        pairs = [written(module, samples, i) for i in range(len(samples))]
        for source, target in pairs[:50]:
            task, _, word = source.partition(": ")
            assert target == {"copy": word, "reverse": word[::-1]}[task]
        strings[split] = {source.partition(": ")[2] for source, _ in pairs}
        assert len(pairs) == 2 * len(strings[split]) > 500
    assert not strings["train"] & strings["val"]
    assert not strings["train"] & strings["test"]
    assert not strings["val"] & strings["test"]


def test_long_pairs_are_dropped_or_cut_and_said(
    new_run: NewRun, pair_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pair_file.open("a", encoding="utf-8") as file:
        for i in range(5):
            file.write(f"{'abc' * 8}{'abcde'[i]}\tF\n")
    dropped = opened(pair_run(new_run, pair_file, name="dropped"))
    assert "pairs are longer than 24 tokens: dropped" in capsys.readouterr().err
    cut = opened(pair_run(new_run, pair_file, "data.longer=cut", name="cut"))
    assert "pairs are longer than 24 tokens: cut" in capsys.readouterr().err
    sizes = [sum(len(module.samples(split)) for split in ("train", "val")) for module in (dropped, cut)]
    assert sizes == [300, 305]
    assert cut.samples("train").source_lengths.max() == 24


@pytest.mark.parametrize(
    ("row", "told"), [("abc\t", "line 302: target is missing"), ("\tabc", "line 302: source is missing")]
)
def test_a_pair_without_one_side_is_named(new_run: NewRun, pair_file: Path, row: str, told: str) -> None:
    with pair_file.open("a", encoding="utf-8") as file:
        file.write(row + "\n")
    with pytest.raises(DataError, match=told):
        opened(pair_run(new_run, pair_file))


def test_a_source_in_two_splits_is_told(
    new_run: NewRun, pair_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    test = tmp_path / "other.tsv"
    test.write_text("\n".join(pair_file.read_text(encoding="utf-8").splitlines()[:4]) + "\n", encoding="utf-8")
    opened(pair_run(new_run, pair_file, f"data.test_path={test}"))
    assert "of 3 test sources stand in the train split too" in capsys.readouterr().err


def test_it_learns_to_reverse(new_run: NewRun, pair_file: Path) -> None:
    """On a small alphabet in seconds; the metrics of the run equal a count by hand."""
    words = ("optim={kind: adamw, learning_rate: 3e-3}", "trainer.max_steps=30", "data.micro_batch_size=4")
    folder = pair_run(new_run, pair_file, *words)
    assert train(folder) == 0
    (row,) = [row for row in read_jsonl(folder.metrics) if "val/loss" in row]
    assert row["val/perplexity"] == pytest.approx(float(np.exp(row["val/loss"])), rel=1e-5)
    assert 0.1 < row["val/accuracy"] < 1
    assert 0 <= row["val/exact_match"] <= 1
    losses = [row["train/loss"] for row in read_jsonl(folder.metrics) if "train/loss" in row]
    assert losses[-1] < losses[0] - 1

"""BERT against transformers' own with the same weights: logits and gradients, padded batches too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

from lm_train.data.labelled_texts import prepare_texts
from lm_train.data.tokenizer import make_word_tokenizer
from lm_train.errors import UsageError
from lm_train.models import BERT
from lm_train.plan import DataFacts, flops_per_sample, parameter_shapes
from lm_train.recipe import BERT as BERTSection
from lm_train.recipe import TextClassData, load

VOCAB = 61
SECTION = BERTSection(n_layer=3, n_head=4, n_embd=32, block_size=24, dropout=0.0)
LENGTHS = torch.tensor([24, 1, 11])


def moved(n_classes: int | None, **options) -> BERT:
    """A network off its initial values: norms of 1, biases of 0 and attention that is all but uniform would hide a mistake."""
    torch.manual_seed(0)
    net = BERT(SECTION, VOCAB, n_classes, **options)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return net


def renamed(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors (weights, or their gradients) under transformers' names, without the padding of the vocabulary."""
    values: dict[str, Tensor] = {}
    for name, value in named.items():
        module, kind = name.rsplit(".", 1)
        if module.endswith("attention.qkv"):
            prefix = module.replace("blocks.", "bert.encoder.layer.").replace("attention.qkv", "attention.self.")
            for part, tensor in zip(("query", "key", "value"), value.chunk(3), strict=True):
                values[f"{prefix}{part}.{kind}"] = tensor
            continue
        if name in ("token_embedding.weight", "head.bias"):
            value = value[:VOCAB]
        for ours, there in {
            "token_embedding": "bert.embeddings.word_embeddings",
            "position_embedding": "bert.embeddings.position_embeddings",
            "type_embedding": "bert.embeddings.token_type_embeddings",
            "embedding_norm": "bert.embeddings.LayerNorm",
            "blocks.": "bert.encoder.layer.",
            "attention.out": "attention.output.dense",
            "attention_norm": "attention.output.LayerNorm",
            "mlp.up": "intermediate.dense",
            "mlp.down": "output.dense",
            "mlp_norm": "output.LayerNorm",
            "transform_norm": "cls.predictions.transform.LayerNorm",
            "transform": "cls.predictions.transform.dense",
            "head": "cls.predictions",
            "pooler": "bert.pooler.dense",
        }.items():
            if "cls." not in module:
                module = module.replace(ours, there)
        values[f"{module}.{kind}"] = value
    return values


def reference(net: BERT, n_classes: int | None) -> torch.nn.Module:
    config = BertConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=128,
        max_position_embeddings=24, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, pad_token_id=0,
        num_labels=n_classes or 2,
    )  # fmt: skip
    model = BertForMaskedLM(config) if n_classes is None else BertForSequenceClassification(config)
    missing, unexpected = model.load_state_dict(renamed(net.state_dict()), strict=False)
    assert not unexpected
    assert set(missing) <= {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"}, "tied"
    return model.train()


def check_gradients(net: BERT, model: torch.nn.Module) -> None:
    theirs = {name: p.grad for name, p in model.named_parameters()}
    ours = renamed({name: p.grad for name, p in net.named_parameters() if p.grad is not None})
    assert set(ours) == set(theirs)
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["full", "padded"])
@pytest.mark.parametrize("options", [{}, {"activation_checkpointing": 2, "cross_entropy_chunks": 3}], ids=str)
def test_masked_lm_equals_transformers(lengths: Tensor | None, options: dict) -> None:
    net = moved(None, **options).train()
    model = reference(net, None)
    tokens = torch.randint(1, VOCAB, (3, 24))
    seen = None if lengths is None else (torch.arange(24) < lengths[:, None]).long()
    positions = torch.tensor([[0, 7, 10, 23], [0, 0, 0, 0], [2, 3, 5, 0]])
    targets = torch.randint(VOCAB, (3, 4))
    targets[1, 1:], targets[2, 3] = -100, -100
    labels = torch.full((3, 24), -100)
    for row, at, target in zip(labels, positions, targets, strict=True):
        row[at[target != -100]] = target[target != -100]
    found = net(tokens, lengths, positions)
    answer = model(tokens, attention_mask=seen, labels=labels)
    torch.testing.assert_close(
        found, answer.logits.gather(1, positions[..., None].expand(-1, -1, VOCAB)), rtol=1e-4, atol=1e-5
    )
    loss = net(tokens, lengths, positions, targets)
    torch.testing.assert_close(loss / 8, answer.loss, rtol=1e-5, atol=1e-6)
    (loss / 8).backward()
    answer.loss.backward()
    check_gradients(net, model)


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["full", "padded"])
def test_classifier_equals_transformers(lengths: Tensor | None) -> None:
    net = moved(5).train()
    model = reference(net, 5)
    tokens, labels = torch.randint(1, VOCAB, (3, 24)), torch.tensor([4, 0, 2])
    seen = None if lengths is None else (torch.arange(24) < lengths[:, None]).long()
    found, answer = net(tokens, lengths), model(tokens, attention_mask=seen, labels=labels)
    torch.testing.assert_close(found, answer.logits, rtol=1e-4, atol=1e-5)
    torch.nn.functional.cross_entropy(found, labels).backward()
    answer.loss.backward()
    check_gradients(net, model)


def test_padding_changes_nothing() -> None:
    net = moved(None).eval()
    tokens = torch.randint(1, VOCAB, (1, 11))
    padded = torch.cat((tokens, torch.randint(1, VOCAB, (1, 13))), dim=1)
    torch.testing.assert_close(net(padded, torch.tensor([11]))[:, :11], net(tokens), rtol=1e-5, atol=1e-5)
    assert (net(padded)[:, :11] - net(tokens)).abs().max() > 0.1, "the padding matters where it is not said"


def test_first_loss_is_that_of_a_uniform_guess() -> None:
    torch.manual_seed(0)
    net = BERT(SECTION, VOCAB)
    tokens = torch.randint(VOCAB, (8, 24))
    loss = net(tokens, targets=torch.randint(VOCAB, (8, 24))).item() / (8 * 24)
    assert loss == pytest.approx(torch.tensor(float(VOCAB)).log().item(), abs=0.3)


@pytest.mark.parametrize("n_classes", [None, 5])
def test_filling_draws_what_building_draws(n_classes: int | None) -> None:
    torch.manual_seed(3)
    built = BERT(SECTION, VOCAB, n_classes)
    torch.manual_seed(3)
    empty = BERT(SECTION, VOCAB, n_classes, initialise=False)
    for name, parameter in empty.named_parameters():
        assert parameter.is_meta
        tensor = torch.empty(parameter.shape)
        empty.fill(name, tensor)
        assert torch.equal(tensor, built.get_parameter(name)), name


@pytest.mark.parametrize(("task", "n_classes"), [("masked_lm", None), ("classification", 5)])
def test_plan_counts_it(task: str, n_classes: int | None) -> None:
    net = BERT(SECTION, VOCAB, n_classes, initialise=False)
    facts = DataFacts(vocab_size=VOCAB, n_outputs=n_classes)
    assert parameter_shapes(SECTION, task, facts) == [(n, tuple(p.shape)) for n, p in net.named_parameters()]
    assert parameter_shapes(SECTION, task, DataFacts()) is None


def test_flops_count_the_products() -> None:
    """Three times the forward's multiply-adds of the linear layers, the head at the guessed positions, and attention."""
    facts = DataFacts(vocab_size=64, guessed_fraction=0.25)
    recipe = load(["recipe=gpt_debug", "model={kind: bert, n_layer: 2, n_head: 2, n_embd: 32, block_size: 16}"])
    net = BERT(recipe.model, 64)
    products = {name: p.numel() for name, p in net.named_parameters() if p.dim() == 2 and "embedding" not in name}
    transform = products.pop("transform.weight")
    exact = 6 * (16 * sum(products.values()) + 4 * (64 * 32 + transform)) + 12 * 2 * 32 * 16 * 16
    n_parameters = sum(p.numel() for p in net.parameters())
    assert flops_per_sample(recipe.model, "masked_lm", facts, n_parameters) == pytest.approx(exact, rel=0.1)


def test_texts_longer_than_the_positions_are_refused_before_torch() -> None:
    words = ("recipe=bert_news", "model.block_size=100")
    with pytest.raises(UsageError) as raised:
        load(list(words))
    (problem,) = raised.value.problems
    assert "; try data.max_length=100 " in problem
    assert load([*words, "data.max_length=100"]).data.kind == "text_classes"


def test_special_tokens_count_as_tokens_of_a_text(tmp_path: Path, cache: Path) -> None:
    tokenizer = make_word_tokenizer(["one two three four"], 20, 1)
    tokenizer.add_special_tokens(["[CLS]", "[SEP]"])
    ends = {name: tokenizer.token_to_id(name) for name in ("[CLS]", "[SEP]")}
    tokenizer.post_processor = TemplateProcessing("[CLS] $A [SEP]", special_tokens=list(ends.items()))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    rows = "".join(f"{'one two three four ' * (i % 5 + 1)}\t{'ab'[i % 2]}\n" for i in range(60))
    (tmp_path / "rows.tsv").write_text("text\tlabel\n" + rows, encoding="utf-8")
    section = TextClassData(path=str(tmp_path / "rows.tsv"), tokenizer=str(tmp_path / "tokenizer.json"), max_length=7)
    train = prepare_texts(section).splits["train"]
    assert train.lengths.max() == 7
    for start, length in zip(train.starts, train.lengths, strict=False):
        assert train.ids[[start, start + length - 1]].tolist() == list(ends.values())

"""What a run learns to do: decided by the kinds of model and data together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from lm_train.recipe.sections import Recipe
from lm_train.recipe.tokenizer_names import MASKS, PAIR_SYMBOLS, has_symbol

Task = Literal["causal_lm", "masked_lm", "seq2seq", "classification", "regression", "custom"]
RUNNING_TEXT = ("embedded", "text", "shards")
_LANGUAGE = {"gpt": "causal_lm", "llama": "causal_lm", "recurrent": "causal_lm", "bert": "masked_lm"}
"""What a network does with running text."""
_READS = {
    "embedded": (*_LANGUAGE, "hf", "custom"),
    "text": (*_LANGUAGE, "hf", "custom"),
    "shards": (*_LANGUAGE, "hf", "custom"),
    "text_classes": ("bert", "recurrent", "hf", "custom"),
    "images": ("mlp", "cnn", "resnet", "hf", "custom"),
    "table": ("mlp", "custom"),
    "pairs": ("seq2seq", "hf", "custom"),
}
"""By kind of data: the kinds of model that take it; data of the user's own go into any."""


def task_of(recipe: Recipe) -> Task:
    """The task of a recipe whose model and data fit each other."""
    model, data = recipe.model, recipe.data
    match data.kind:
        case "embedded" | "text" | "shards":
            if model.kind in ("hf", "custom"):
                return model.language_task
            return _LANGUAGE.get(model.kind, "causal_lm")  # type: ignore[return-value]
        case "text_classes" | "images":
            return "classification"
        case "table":
            return data.task
        case "pairs":
            return "seq2seq"
        case "custom":
            return data.task or "custom"


def task_conflicts(recipe: Recipe) -> Iterator[tuple[list[tuple[str, ...]], str]]:
    """A model that cannot take the data: the keys concerned, and a sentence with what would."""
    model, data = recipe.model, recipe.data
    takes = _READS.get(data.kind)
    if data.kind == "custom" and data.task is None and model.kind != "custom":
        yield (
            [("data", "task"), ("model", "kind")],
            f"model={model.kind} must know what to learn from data=custom; give data.task=classification or regression",
        )
    if takes is not None and model.kind not in takes:
        fitting = [kind for kind, models in _READS.items() if model.kind in models]
        yield (
            [("model", "kind"), ("data", "kind")],
            f"model={model.kind} does not take data={data.kind}; it takes data={', '.join(fitting)}; data={data.kind} goes into "
            f"model={', '.join(takes)}",
        )

    if model.kind == "recurrent" and model.bidirectional and data.kind in RUNNING_TEXT:
        yield (
            [("model", "bidirectional"), ("data", "kind")],
            f"a language model reads forwards, so that model.bidirectional=true does not take data={data.kind}; try "
            "model.bidirectional=false, or data=text_classes",
        )
    if data.kind == "shards" and data.document_boundaries and model.kind not in ("gpt", "llama", "recurrent"):
        yield (
            [("data", "document_boundaries"), ("model", "kind")],
            f"model={model.kind} knows no document boundaries; try data.document_boundaries=false, or model=gpt, llama or "
            "recurrent",
        )


def length_conflicts(recipe: Recipe) -> Iterator[tuple[list[tuple[str, ...]], str]]:
    """Labelled texts that may be longer than a BERT has positions for; data.max_length counts special tokens too."""
    model, data = recipe.model, recipe.data
    if model.kind == "bert" and data.kind == "text_classes" and data.max_length > model.block_size:
        yield (
            [("data", "max_length"), ("model", "block_size")],
            f"data.max_length={data.max_length} is more than the positions of model.block_size={model.block_size}; try "
            f"data.max_length={model.block_size}",
        )


def further_ids(task: Task, tokenizer: str) -> int:
    """Token ids that a task needs beside those of the text: one to hide a token behind; start, end and padding of pairs."""
    match task:
        case "masked_lm":
            return 0 if has_symbol(tokenizer, MASKS) else 1
        case "seq2seq":
            return sum(not has_symbol(tokenizer, (symbol,)) for symbol in PAIR_SYMBOLS)
    return 0


def samples_are_sequences(recipe: Recipe) -> bool:
    """Whether a sample is model.block_size tokens of running text."""
    return recipe.data.kind in RUNNING_TEXT

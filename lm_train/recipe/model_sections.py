"""The `model` section: one class for each kind of network."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from lm_train.recipe.base import Count, Dropout, Factory, FreeMapping, PositiveInt, PositiveIntOrAuto, Section, Text

Activation = Literal["relu", "gelu", "tanh", "sigmoid", "silu", "leaky_relu"]
Widths = Annotated[tuple[PositiveInt, ...], Field(strict=False, min_length=1)]


class ModelSection(Section):
    """What every kind of model shares. Switching the kind keeps the keys of the nearest class that both come from."""


class TransformerSection(ModelSection):
    """The keys that every transformer of ours shares."""

    n_layer: PositiveInt = 12
    """Number of transformer blocks."""
    n_head: PositiveInt = 12
    n_embd: PositiveInt = 768
    """Width of the residual stream; a multiple of n_head."""
    block_size: PositiveInt = 1024
    """Tokens in one sequence."""
    vocab_size: PositiveIntOrAuto = "auto"
    """Number of token ids; `auto` takes the tokenizer's. The embedding itself is padded to a multiple of 64."""
    dropout: Dropout = 0.0
    """Probability, after the embedding, in the attention and on each block's two outputs."""

    def conflicts(self) -> list[tuple[tuple[str, ...], str]]:
        return self._width_conflicts(self.n_head, f"model.n_head={self.n_head}")

    def _width_conflicts(self, unit: int, named: str) -> list[tuple[tuple[str, ...], str]]:
        if self.n_embd % unit == 0:
            return []
        near = max(unit, round(self.n_embd / unit) * unit)
        return [
            (("n_embd", "n_head"), f"model.n_embd={self.n_embd} is not a multiple of {named}; try model.n_embd={near}")
        ]


class GPT(TransformerSection):
    """A GPT-2 style decoder (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners")."""

    kind: Literal["gpt"] = "gpt"
    bias: bool = True
    """Biases in linear layers and layer norms, as GPT-2 has."""


class Llama(TransformerSection):
    """A Llama style decoder (Touvron et al. 2023, arXiv:2302.13971; grouped-query attention as in arXiv:2307.09288)."""

    kind: Literal["llama"] = "llama"
    n_kv_head: PositiveIntOrAuto = "auto"
    """Heads of keys and values, each shared by n_head / n_kv_head query heads; `auto`: as many as n_head."""
    intermediate_size: PositiveIntOrAuto = "auto"
    """Width inside the MLP; `auto`: Llama's rule, 8/3 n_embd rounded up to a multiple of 256."""
    rope_theta: Annotated[float, Field(gt=1)] = 10000.0
    """Base of the rotary positions' wavelengths; longer contexts take a larger one (Llama 3: 500000)."""
    norm_eps: Annotated[float, Field(gt=0)] = 1e-5
    tie_embeddings: bool = False
    """The head shares the embedding's weights."""

    @property
    def key_value_heads(self) -> int:
        return self.n_head if self.n_kv_head == "auto" else self.n_kv_head

    @property
    def mlp_width(self) -> int:
        return -(-(8 * self.n_embd // 3) // 256) * 256 if self.intermediate_size == "auto" else self.intermediate_size

    def conflicts(self) -> list[tuple[tuple[str, ...], str]]:
        # rotary positions turn pairs of a head's values
        found = self._width_conflicts(2 * self.n_head, f"2 x model.n_head={self.n_head}")
        if self.n_head % self.key_value_heads:
            near = max(n for n in range(1, min(self.n_head, self.key_value_heads) + 1) if self.n_head % n == 0)
            found.append(
                (
                    ("n_kv_head", "n_head"),
                    f"model.n_head={self.n_head} is not a multiple of model.n_kv_head={self.n_kv_head}; "
                    f"try model.n_kv_head={near}",
                )
            )
        return found


class BERT(TransformerSection):
    """BERT (Devlin et al. 2019, arXiv:1810.04805): on text a masked language model, on labelled text a classifier."""

    kind: Literal["bert"] = "bert"
    block_size: PositiveInt = 512
    dropout: Dropout = 0.1


class Seq2Seq(TransformerSection):
    """The encoder-decoder Transformer (Vaswani et al. 2017, arXiv:1706.03762), for pairs of texts."""

    kind: Literal["seq2seq"] = "seq2seq"
    n_layer: PositiveInt = 6
    """Blocks of the encoder, and as many of the decoder."""
    n_head: PositiveInt = 8
    n_embd: PositiveInt = 512
    block_size: PositiveInt = 256
    """Most tokens of a source, and of a target."""
    dropout: Dropout = 0.1


class Recurrent(ModelSection):
    """A recurrent network (LSTM: Hochreiter & Schmidhuber 1997; GRU: Cho et al. 2014): on text a language model, on labelled
    text a classifier."""

    kind: Literal["recurrent"] = "recurrent"
    cell: Literal["lstm", "gru", "rnn"] = "lstm"
    n_layer: PositiveInt = 1
    n_embd: PositiveInt = 128
    """Width of the token embedding."""
    hidden_size: PositiveInt = 256
    """Width of the state, in each direction."""
    block_size: PositiveInt = 128
    """Tokens in one sequence of a language model."""
    vocab_size: PositiveIntOrAuto = "auto"
    bidirectional: bool = False
    """Read in both directions; for classifiers only."""
    pooling: Literal["last", "mean", "max"] = "last"
    """What a classifier sees of a sequence: its last state (of each direction), or the mean or maximum of its outputs."""
    dropout: Dropout = 0.0
    """Probability, after the embedding, between layers, and before the head."""


class MLP(ModelSection):
    """A multi-layer perceptron (Rumelhart, Hinton & Williams 1986) on images or tables."""

    kind: Literal["mlp"] = "mlp"
    widths: Annotated[tuple[PositiveInt, ...], Field(strict=False)] = (128,)
    """Of the hidden layers, from input to output; none leaves a linear model."""
    activation: Activation = "relu"
    dropout: Dropout = 0.0
    """Probability, after each hidden layer."""


class CNN(ModelSection):
    """Convolution, activation, pooling, repeated; then dense layers (LeCun et al. 1998, "Gradient-based learning")."""

    kind: Literal["cnn"] = "cnn"
    channels: Widths = (32, 64)
    """Of the convolutions, each followed by 2 x 2 max pooling."""
    kernel_size: PositiveInt = 3
    widths: Annotated[tuple[PositiveInt, ...], Field(strict=False)] = (128,)
    """Of the hidden dense layers behind them."""
    activation: Activation = "relu"
    dropout: Dropout = 0.0
    """Probability, after each hidden dense layer."""


class ResNet(ModelSection):
    """A small residual network (He et al. 2016, arXiv:1512.03385; its shape: D. Page 2018, "How to Train Your ResNet")."""

    kind: Literal["resnet"] = "resnet"
    stem: PositiveInt = 32
    """Channels of the first convolution."""
    channels: Widths = (64, 128, 256)
    """Of the stages; each halves height and width."""
    blocks: Annotated[tuple[Count, ...], Field(strict=False, min_length=1)] = (1, 0, 1)
    """Residual blocks in each stage."""
    norm: Literal["batch", "group"] = "batch"
    """batch: over the micro batches of all processes (Ioffe & Szegedy 2015); group: over groups of a sample's channels (Wu & He
    2018, arXiv:1803.08494), for small micro batches."""
    head_scale: Annotated[float, Field(gt=0)] = 0.125
    """Factor of the logits."""

    def groups(self, channels: int) -> int:
        """Groups of so many channels: 8, or as many below as divide them."""
        return next(n for n in range(min(8, channels), 0, -1) if channels % n == 0)

    def conflicts(self) -> list[tuple[tuple[str, ...], str]]:
        if len(self.blocks) == len(self.channels):
            return []
        fit = [*self.blocks, *[0] * len(self.channels)][: len(self.channels)]
        return [
            (
                ("blocks", "channels"),
                f"model.blocks={list(self.blocks)} has {len(self.blocks)} entries for {len(self.channels)} stages of "
                f"model.channels={list(self.channels)}; try model.blocks={fit}",
            )
        ]


class HuggingFace(ModelSection):
    """Any model of transformers as it is, from a folder of weights or drawn anew from a configuration."""

    kind: Literal["hf"] = "hf"
    path: Text | None = None
    """Folder with config.json and safetensors weights, or a model of the Hugging Face hub (owner/name)."""
    from_scratch: bool = False
    """Take only the configuration from `path`, and draw the weights anew."""
    config: FreeMapping = Field(default={})
    """The configuration's keys, model_type among them, where there is no path; with one, what is changed in it."""
    block_size: PositiveInt = 128
    """Tokens in one sequence of running text."""
    language_task: Literal["causal_lm", "masked_lm"] = "causal_lm"
    """What it learns on running text."""

    def conflicts(self) -> list[tuple[tuple[str, ...], str]]:
        found: list[tuple[tuple[str, ...], str]] = []
        model_type = self.config.get("model_type")
        if self.path is None and not isinstance(model_type, str):
            found.append(
                (
                    ("config", "path"),
                    "model=hf needs model.config={model_type: gpt2, ...}, or model.path=FOLDER with config.json and weights",
                )
            )
        if self.path is not None and model_type is not None:
            found.append(
                (
                    ("config", "path"),
                    "model.config: model_type is what model.path says; leave it out, or leave out model.path",
                )
            )
        if self.path is None and self.from_scratch:
            found.append(
                (("from_scratch", "path"), "model.from_scratch=true needs model.path; a configuration is always drawn")
            )
        code = next((key for key in ("trust_remote_code", "auto_map", "custom_pipelines") if key in self.config), None)
        if code is not None:
            found.append(
                (
                    ("config",),
                    f"model.config: {code} would run code that comes with a model; write a model of your own as model=custom",
                )
            )
        return found


class CustomModel(ModelSection):
    """A network or a LightningModule of the user's own."""

    kind: Literal["custom"] = "custom"
    factory: Factory
    """`package.module:function`; the package must also be allowed by `plugins=package`."""
    args: FreeMapping = Field(default={})
    """Keyword arguments of the factory; what the data say comes as `facts`, if it has such a parameter."""
    block_size: PositiveInt = 128
    """Tokens in one sequence of running text."""
    language_task: Literal["causal_lm", "masked_lm"] = "causal_lm"
    """What it learns on running text."""


AnyModel = Annotated[
    GPT | Llama | BERT | Seq2Seq | Recurrent | MLP | CNN | ResNet | HuggingFace | CustomModel,
    Field(discriminator="kind"),
]

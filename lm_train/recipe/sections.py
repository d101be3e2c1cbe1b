"""What a user may ask for: every key of a recipe, its type, unit and default.

The sections are frozen and refuse unknown keys. Checks that need two keys of one section stand here; checks that need two
sections stand in ``checks.py``; checks that need the machine belong to the plan.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from lm_train.recipe.text import WrittenFloat, WrittenInt
from lm_train.recipe.tokenizer_names import is_tokenizer_name

Auto = Literal["auto"]
PositiveInt = Annotated[int, Field(ge=1, lt=2**31)]
Count = Annotated[int, Field(ge=0, lt=2**31)]
PositiveIntOrAuto = PositiveInt | Auto
NonNegativeFloat = Annotated[float, Field(ge=0)]


def _as_text(value: Any) -> Any:
    """``name=2024`` is a name, not a number, and stays as it was written."""
    if isinstance(value, WrittenInt | WrittenFloat):
        return value.text
    return str(value) if type(value) in (int, float) else value


Text = Annotated[str, BeforeValidator(_as_text), Field(min_length=1)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    def conflicts(self) -> list[tuple[tuple[str, ...], str]]:
        """What contradicts itself inside the section: the keys concerned, and a sentence with values and a way out."""
        return []


class ModelSection(Section):
    """The keys that every kind of model shares; switching the kind keeps these and drops the rest."""

    n_layer: PositiveInt = 12
    """Number of transformer blocks."""
    n_head: PositiveInt = 12
    n_embd: PositiveInt = 768
    """Width of the residual stream; a multiple of n_head."""
    block_size: PositiveInt = 1024
    """Tokens in one sequence."""
    vocab_size: PositiveIntOrAuto = "auto"
    """Number of token ids; `auto` takes the tokenizer's. The embedding itself is padded to a multiple of 64."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
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


class GPT(ModelSection):
    """A GPT-2 style decoder (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners")."""

    kind: Literal["gpt"] = "gpt"
    bias: bool = True
    """Biases in linear layers and layer norms, as GPT-2 has."""


class Llama(ModelSection):
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


AnyModel = Annotated[GPT | Llama, Field(discriminator="kind")]


class DataSection(Section):
    """The keys that every kind of data shares; switching the kind keeps these and drops the rest."""

    global_batch_size: PositiveInt = 16
    """Samples (for text: sequences of model.block_size tokens) between two optimizer steps, over all processes."""
    micro_batch_size: PositiveIntOrAuto = "auto"
    """Samples that one process sends through the network at a time."""
    num_workers: Count | Auto = "auto"
    """Loader processes of each rank."""


def _tokenizer(value: Any) -> Any:
    if isinstance(value, str) and not is_tokenizer_name(value):
        raise ValueError(
            "expected bytes, chars, bpe:N (N from 300 to 200000, trained on the corpus), gpt2, or the path of a "
            f"tokenizer.json or of a folder with encoder.json and vocab.bpe; got {value[:80]!r}"
        )
    return value


Tokenizer = Annotated[str, BeforeValidator(_tokenizer)]


class EmbeddedData(DataSection):
    """The source files of the Python standard library: real text that every machine with Python has."""

    kind: Literal["embedded"] = "embedded"
    tokenizer: Tokenizer = "bpe:2048"


class TextData(DataSection):
    """Text from plain files, jsonl, csv, parquet, a folder of them, or a data set of the Hugging Face hub."""

    kind: Literal["text"] = "text"
    path: Text
    """File, folder, or hub name (owner/name)."""
    subset: Text | None = None
    """The hub data set's configuration, such as sample-10BT."""
    tokenizer: Tokenizer = "bpe:2048"
    text_column: Text = "text"
    """Column that holds the text, where rows have columns."""
    val_path: Text | None = None
    """File of validation text; else the source's own validation split, else val_fraction of the training text."""
    test_path: Text | None = None
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share that validates where the source has no validation split: the end of a single text file, else a
    pseudo-random choice of documents."""
    streaming: bool = False
    """Train while the corpus is still being tokenised, instead of after; the tokens are cached either way."""
    val_tokens: PositiveInt = 1_000_000
    """With streaming and no validation split: so many tokens from the start of the stream validate."""


AnyData = Annotated[EmbeddedData | TextData, Field(discriminator="kind")]


class OptimSection(Section):
    """The keys that every optimizer shares; switching the kind keeps these and drops the rest."""

    learning_rate: Annotated[float, Field(gt=0)] = 6e-4
    """Peak of the schedule."""
    weight_decay: NonNegativeFloat = 0.1
    """Applied to matrices only: neither to biases nor to norms."""
    schedule: Literal["constant", "cosine", "linear", "warmup_stable_decay"] = "cosine"
    warmup_steps: Count = 0
    """Optimizer steps of linear warm-up from 0, before any schedule."""
    min_learning_rate_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Where cosine, linear and warmup_stable_decay end, as a share of learning_rate."""
    decay_fraction: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Share of all steps in which warmup_stable_decay comes down."""


Beta = Annotated[float, Field(ge=0, lt=1)]
Eps = Annotated[float, Field(gt=0)]


class AdamW(OptimSection):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019, arXiv:1711.05101)."""

    kind: Literal["adamw"] = "adamw"
    beta1: Beta = 0.9
    beta2: Beta = 0.95
    eps: Eps = 1e-8


class Adam(OptimSection):
    """Adam (Kingma & Ba 2015, arXiv:1412.6980); its weight decay is the L2 term of that paper's gradient."""

    kind: Literal["adam"] = "adam"
    weight_decay: NonNegativeFloat = 0.0
    beta1: Beta = 0.9
    beta2: Beta = 0.999
    eps: Eps = 1e-8


class SGD(OptimSection):
    """Stochastic gradient descent with momentum."""

    kind: Literal["sgd"] = "sgd"
    weight_decay: NonNegativeFloat = 0.0
    momentum: Beta = 0.9
    nesterov: bool = False

    def conflicts(self) -> list[tuple[tuple[str, ...], str]]:
        if self.nesterov and self.momentum == 0:
            return [(("nesterov", "momentum"), "optim.nesterov=true needs a momentum above 0; try optim.momentum=0.9")]
        return []


class Adagrad(OptimSection):
    """Adagrad (Duchi et al. 2011)."""

    kind: Literal["adagrad"] = "adagrad"
    weight_decay: NonNegativeFloat = 0.0
    eps: Eps = 1e-10


class RMSprop(OptimSection):
    """RMSprop (Tieleman & Hinton 2012)."""

    kind: Literal["rmsprop"] = "rmsprop"
    weight_decay: NonNegativeFloat = 0.0
    alpha: Beta = 0.99
    """Decay of the running mean of squared gradients."""
    momentum: Beta = 0.0
    eps: Eps = 1e-8


class Muon(OptimSection):
    """Muon for the matrices of the blocks (Jordan et al. 2024, kellerjordan.github.io/posts/muon), AdamW for the rest.

    Muon's updates are as large as AdamW's (Liu et al. 2025, arXiv:2502.16982): learning rate and weight decay serve both.
    """

    kind: Literal["muon"] = "muon"
    momentum: Beta = 0.95
    nesterov: bool = True
    ns_steps: Annotated[int, Field(ge=1, lt=100)] = 5
    """Newton-Schulz steps that bring an update's singular values near 1."""
    beta1: Beta = 0.9
    """Of AdamW's part, as beta2 and eps."""
    beta2: Beta = 0.95
    eps: Eps = 1e-8


AnyOptim = Annotated[AdamW | Adam | SGD | Adagrad | RMSprop | Muon, Field(discriminator="kind")]


class TrainerSection(Section):
    strategy: Literal["auto", "single", "ddp", "fsdp", "zero1", "zero2", "zero3", "zero3_offload"] = "auto"
    """What the processes divide: nothing (single, ddp), optimizer state (zero1), gradients too (zero2), parameters too (fsdp,
    zero3); zero3_offload keeps them in host memory. `auto`: single on one process, else ddp."""
    precision: Literal["auto", "32-true", "bf16-mixed", "bf16-true", "16-mixed"] = "auto"
    devices: PositiveIntOrAuto = "auto"
    """GPUs, or without a GPU processes, on this machine; `auto`: every GPU, else one process."""
    num_nodes: PositiveIntOrAuto = "auto"
    """Machines; `auto`: those of the Slurm step, else one."""
    max_steps: PositiveInt = 1000
    """Optimizer steps of the whole run."""
    accumulate_grad_batches: PositiveIntOrAuto = "auto"
    """Micro batches of one process between two optimizer steps."""
    gradient_clip_val: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest global 2-norm of the gradient; null: no clipping."""
    log_every_n_steps: PositiveInt = 10
    val_check_interval: PositiveInt | None = None
    """Optimizer steps between two validations; null: only at the end."""
    limit_val_batches: Count | None = None
    """Micro batches of one validation on each process; null: the whole split; 0: no validation."""
    limit_test_batches: Count | None = None
    early_stopping_patience: PositiveInt | None = None
    """Validations without improvement of val/loss after which the run ends; null: never."""
    activation_checkpointing: Literal["none", "full"] | PositiveInt = "none"
    """Blocks whose activations are recomputed in the backward pass: none, all, or every n-th."""
    cross_entropy_chunks: PositiveInt = 1
    """Pieces in which logits and loss are computed, so that only one piece of vocabulary x tokens is in memory."""
    compile: bool = False
    """torch.compile on the network; with dropout it draws other numbers than without."""
    deterministic: bool = False
    """Refuse operations without a deterministic implementation."""
    sample_tokens: Count = 120
    """Tokens of text generated at the end of the run; 0: none."""


class CheckpointSection(Section):
    every_n_steps: PositiveInt | None = 500
    """Optimizer steps between two saves; null: only at the end."""
    keep_last: PositiveInt = 1
    """Checkpoints kept beside the best one."""


class TrackingSection(Section):
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """`auto`: online where WANDB_API_KEY is in the environment, else offline."""
    project: Text = "lm_train"
    entity: Text | None = None
    group: Text | None = None
    tags: tuple[Text, ...] = Field(default=(), strict=False)


class Recipe(Section):
    """Everything that was asked for. Loading one is a pure function of the command line and files."""

    recipe: Text
    """Name of the recipe, as it was asked for."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 1337
    """Decides the initial weights, the order of samples and dropout."""
    name: Annotated[Text, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")] | None = None
    """Name of the run's folder; an existing run goes on. Without it: the recipe's name and the next free number."""
    runs_dir: Text = "runs"
    resume: Text = "auto"
    """auto: go on from the run's newest checkpoint; never: refuse a folder that has one; else a run or checkpoint."""
    debug: bool = False
    """One process, 20 steps, checks and profile; see README."""
    dry_run: bool = False
    """Build on the meta device, print parameters and plan, write nothing."""
    model: AnyModel = GPT()
    data: AnyData = EmbeddedData()
    optim: AnyOptim = AdamW()
    trainer: TrainerSection = TrainerSection()
    checkpoint: CheckpointSection = CheckpointSection()
    tracking: TrackingSection = TrackingSection()


SECTIONS = ("model", "data", "optim", "trainer", "checkpoint", "tracking")

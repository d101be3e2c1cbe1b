"""What a user may ask for: every key of a recipe, its type, unit and default.

The sections are frozen and refuse unknown keys. Checks that need two keys of one section stand here; checks that need two
sections stand in ``checks.py``; checks that need the machine belong to the plan.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from lm_train.recipe.base import (
    Auto,
    Changes,
    Count,
    NonNegativeFloat,
    Packages,
    PositiveInt,
    PositiveIntOrAuto,
    Section,
    Text,
)
from lm_train.recipe.data_sections import AnyData, EmbeddedData
from lm_train.recipe.model_sections import GPT, AnyModel
from lm_train.recipe.prepare_section import PrepareSection


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
    zero3); zero3_offload keeps them in host memory. `auto`: the fastest that fits into memory."""
    precision: Literal["auto", "32-true", "bf16-mixed", "bf16-true", "16-mixed"] = "auto"
    devices: PositiveIntOrAuto = "auto"
    """GPUs, or without a GPU processes, on this machine; `auto`: every GPU, else one process."""
    num_nodes: PositiveIntOrAuto = "auto"
    """Machines; `auto`: those of the Slurm step, else one."""
    max_steps: PositiveIntOrAuto = 1000
    """Optimizer steps of the whole run; `auto`: what the budget pays for."""
    max_tokens: PositiveInt | None = None
    """Tokens of the whole run, in place of max_steps; for running text."""
    max_epochs: Annotated[float, Field(gt=0)] | None = None
    """Passes over the training split, in place of max_steps."""
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
    activation_checkpointing: Literal["auto", "none", "full"] | PositiveInt = "auto"
    """Blocks whose activations are recomputed in the backward pass: none, all, or every n-th; `auto`: none where it fits."""
    cross_entropy_chunks: PositiveIntOrAuto = "auto"
    """Pieces in which logits and loss are computed, so that only one piece of vocabulary x tokens is in memory; `auto`: 1
    where it fits."""
    compile: bool = False
    """torch.compile on the network; with dropout it draws other numbers than without."""
    hang_timeout_s: Annotated[float, Field(ge=1)] | None = 30.0
    """Seconds after which a process without progress is taken to hang: it is named with its Python stack and the run ends, to
    be started again; slow steps, saving, compiling and loading have a multiple of it. null: no watch."""
    restarts_without_progress: Count | None = 3
    """Starts that may follow one another from the same checkpoint, each ended early, before the run is given up with exit code
    76; the same failure at the same step again is given up at once. null: never."""
    nonfinite_patience: PositiveInt | None = 3
    """Updates in a row that are withheld since loss or gradient is not finite, after which the run goes back to its newest
    checkpoint and leaves their data out; null: never."""
    spike_threshold: Annotated[float, Field(gt=0)] | None = None
    """Loss, in deviations above the median of the good losses before it, from which on an update is withheld; null: never."""
    spike_window: Annotated[int, Field(ge=8, le=1024)] = 64
    """Good losses that this looks back on."""
    spike_patience: PositiveInt | None = 10
    """As nonfinite_patience, for updates withheld for either reason."""
    replica_check_every_n_steps: PositiveInt | None = 1000
    """Optimizer steps between two comparisons of the ranks' parameters, also compared before each save; null: never."""
    deterministic: bool = False
    """Refuse operations without a deterministic implementation."""
    sample_tokens: Count = 120
    """Tokens of text generated at the end of the run; 0: none."""


class CheckpointSection(Section):
    every_n_steps: PositiveInt | None = 500
    """Optimizer steps between two saves; null: only at the end."""
    keep_last: PositiveInt = 2
    """The newest checkpoints that are kept; with one there is none to fall back to where it is damaged."""
    keep_every_n_steps: PositiveInt | None = None
    """Checkpoints whose step is a multiple are kept for ever; null: none."""
    monitor: Annotated[Text, Field(pattern=r"^(val|train)/[A-Za-z0-9_@.-]+$")] = "val/loss"
    """Metric of a validation by which the best checkpoint is kept beside the newest."""
    mode: Literal["min", "max"] = "min"
    """Whether the lowest or the highest value of `monitor` is best."""
    asynchronous: bool | Auto = "auto"
    """Write while the training goes on, from a copy in host memory; `auto`: where there is memory for the copy."""


class TrackingSection(Section):
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """`auto`: online where WANDB_API_KEY is in the environment, else offline."""
    project: Text = "lm_train"
    entity: Text | None = None
    group: Text | None = None
    tags: tuple[Text, ...] = Field(default=(), strict=False)


PositiveFloat = Annotated[float, Field(gt=0, le=1e9)]


class BudgetSection(Section):
    """What a run may use in all its starts together. It stops, saved, before any of these is used up."""

    gpu_hours: PositiveFloat | None = None
    """Devices x hours; a CPU process counts as a device."""
    money: PositiveFloat | None = None
    """In `currency`, at the cluster's price."""
    currency: Annotated[Text, Field(pattern=r"^[A-Z]{3}$")] | None = None
    """ISO 4217 code, such as USD; null: the cluster's."""
    hours: PositiveFloat | None = None
    """Wall-clock hours in which the run holds its devices."""
    kwh: PositiveFloat | None = None
    """Energy by the devices' rated power."""
    optimize: Literal["soonest", "cheapest", "best"] = "soonest"
    """What the scheduler seeks within the budget: the earliest end, the lowest cost, or the lowest final loss."""

    @property
    def limits(self) -> dict[str, float]:
        """The amounts that are limited, by name."""
        named = {"gpu_hours": self.gpu_hours, "money": self.money, "hours": self.hours, "kwh": self.kwh}
        return {name: value for name, value in named.items() if value is not None}

    def conflicts(self) -> list[tuple[tuple[str, ...], str]]:
        if self.currency is not None and self.money is None:
            return [(("currency", "money"), "budget.currency says of which money; give budget.money too, or drop it")]
        return []


class ClusterSection(Section):
    """Where it may run. What is given here wins over what the named cluster says."""

    name: Text = "auto"
    """`auto`: this machine, or the Slurm step or partition; a shipped description (h100x8); or the path of a YAML file."""
    nodes: PositiveIntOrAuto = "auto"
    """At most so many nodes; `auto`: as many as there are."""
    devices_per_node: PositiveIntOrAuto = "auto"
    """At most so many GPUs of each node; `auto`: as many as there are."""
    price_per_gpu_hour: NonNegativeFloat | None = None
    currency: Annotated[Text, Field(pattern=r"^[A-Z]{3}$")] | None = None
    """ISO 4217 code of the price."""
    calibration: Text | None = None
    """File of `lm-train calibrate` by whose figures times are foretold; null: this machine's own, where there is one."""
    partition: Text | None = None
    account: Text | None = None
    qos: Text | None = None


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
    allow_change: Changes = ()
    """What may be other than in the checkpoint that the run goes on from, although it makes another run of it: `seed`, `data`,
    `model`, or keys of these, such as data.global_batch_size."""
    debug: bool = False
    """One process, 20 steps, checks and profile; see README."""
    dry_run: bool = False
    """Build on the meta device, print parameters and plan, write nothing."""
    plan: Text | None = None
    """File of a plan that this start follows exactly, as `lm-train plan sbatch=PATH` writes it; null: a new plan."""
    plugins: Packages = ()
    """Top-level packages whose code this start may run, for model=custom and data=custom; a recipe file cannot allow any."""
    model: AnyModel = GPT()
    data: AnyData = EmbeddedData()
    prepare: PrepareSection = PrepareSection()
    optim: AnyOptim = AdamW()
    trainer: TrainerSection = TrainerSection()
    checkpoint: CheckpointSection = CheckpointSection()
    tracking: TrackingSection = TrackingSection()
    budget: BudgetSection = BudgetSection()
    cluster: ClusterSection = ClusterSection()


SECTIONS = ("model", "data", "prepare", "optim", "trainer", "checkpoint", "tracking", "budget", "cluster")

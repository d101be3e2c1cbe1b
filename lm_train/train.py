"""What a rank does: read the plan, build, fit, finish."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import EarlyStopping
from torch import nn

from lm_train import data, heartbeat, models, modules, resume, runs
from lm_train.budget import Spending, rank_spending
from lm_train.callbacks import (
    Anomalies,
    BudgetGuard,
    Checkpoints,
    DebugChecks,
    Evaluation,
    Heartbeats,
    Ledger,
    Metrics,
    Progress,
    Replicas,
    Sample,
    StopAgreement,
)
from lm_train.callbacks.checkpoints import MONITOR, has_stopped_early, restore_state
from lm_train.callbacks.debugging import overfit_one_batch
from lm_train.callbacks.metrics import forget_peak
from lm_train.checkpoint import CheckpointReader, group_of_all, open_agreed, seed_random, set_initial_weights, views_of
from lm_train.data import DataModule, MaskedTextDataModule, PairDataModule, TextDataModule
from lm_train.ending import closing_batches, find_horizon, find_skipped
from lm_train.errors import CheckpointError, ExitCode
from lm_train.generate import sample_guesses, sample_pairs, sample_text
from lm_train.heartbeat import Phase
from lm_train.loop import StepTrainer
from lm_train.modules import TrainingModule
from lm_train.plan import Plan, flops_per_sample
from lm_train.recipe import Recipe, load
from lm_train.rendezvous import meet
from lm_train.runs import RunFolder
from lm_train.strategy import (
    LaunchedRank,
    Weights,
    build_strategy,
    built_anew,
    casts_initial_weights,
    compile_network,
    drawn,
    read_by,
    shards_at_build,
    trainer_precision,
)
from lm_train.tracking import loggers


def train(folder: RunFolder, resume_from: Path | None = None, callbacks: Sequence[L.Callback] = ()) -> ExitCode:
    """Runs this rank's part of the run in `folder`, from its recipe.yaml and plan.json.

    Args:
        folder: made by the supervisor.
        resume_from: a checkpoint folder to go on from; None starts at step 0.
        callbacks: further Lightning callbacks.

    Returns:
        DONE, or what a signal asked for.
    """
    recipe, plan = load([f"recipe={folder.recipe.resolve()}"]), Plan.read(folder.plan)
    rank = int(os.environ.get("RANK", 0))
    with rank_spending(folder, plan, rank) as spending:
        return _train(recipe, plan, folder, rank, spending, resume_from, callbacks)


def _train(
    recipe: Recipe,
    plan: Plan,
    folder: RunFolder,
    rank: int,
    spending: Spending | None,
    resume_from: Path | None,
    callbacks: Sequence[L.Callback],
) -> ExitCode:
    _quieten(plan)
    heartbeat.enter(Phase.MEET)
    meet(plan)
    heartbeat.mark(Phase.PREPARE)
    checkpoint = _open(resume_from, folder, rank) if resume_from else None

    datamodule = data.build(recipe.data, plan, recipe.seed, folder)
    datamodule.prepare(recipe.model)
    if checkpoint is not None:
        _check_data(checkpoint, datamodule.fingerprint)
    datamodule.leave(folder)
    forget_peak()
    horizon = find_horizon(recipe, plan, datamodule, checkpoint, folder)
    datamodule.horizon = horizon
    datamodule.skipped, rollbacks, is_new = find_skipped(plan, checkpoint, folder)
    done_before = checkpoint is not None and (
        checkpoint.state["step"] >= horizon.max_steps or has_stopped_early(checkpoint.state, recipe)
    )
    heartbeat.mark(Phase.BUILD)
    seed_random(recipe.seed, 0 if checkpoint is None else checkpoint.state["step"], rank)
    torch.manual_seed(recipe.seed)
    net = models.build(recipe.model, plan, datamodule.facts, initialise=not shards_at_build(plan))
    build_whole = partial(models.build, recipe.model, plan, datamodule.facts)
    weights = drawn(recipe.seed) if hasattr(net, "fill") else built_anew(recipe.seed, build_whole)
    module = modules.build(net, recipe, plan, datamodule)
    module.horizon = horizon
    if recipe.trainer.spike_threshold is not None:
        module.watch_spikes(recipe.trainer.spike_threshold, recipe.trainer.spike_window)
    if plan.compile:
        compile_network(net, plan)

    n_parameters = sum(p.numel() for p in net.parameters())
    budget = BudgetGuard(spending, plan, recipe, horizon, closing_batches(datamodule, recipe, rank))
    earlier = checkpoint.state.get("anomalies", {}) if checkpoint is not None else {}
    anomalies = Anomalies(
        folder, recipe.trainer, plan, datamodule, rollbacks, earlier | ({"streak": None} if is_new else {})
    )
    ledger, replicas = Ledger(folder, [anomalies.hear]), Replicas(plan, recipe.trainer.replica_check_every_n_steps)
    metrics = Metrics(
        plan,
        ledger,
        flops_per_sample(recipe.model, plan.task, datamodule.facts, n_parameters),
        recipe.trainer.log_every_n_steps,
        lambda: budget.metrics() | anomalies.metrics(),
    )
    fingerprint = datamodule.fingerprint
    saving = Checkpoints(
        recipe.checkpoint,
        folder,
        ledger,
        metrics,
        state=lambda: {
            "gpu_hours": budget.metrics().get("budget/gpu_hours"),
            "horizon": horizon.state() | {"limits": plan.limits},
            "seed": recipe.seed,
            "recipe": resume.recipe_state(recipe),
            "global_batch_size": plan.global_batch_size,
            "data": fingerprint,
            "skipped": datamodule.skipped,
            "anomalies": anomalies.state() | {"window": module.anomaly_window()},
            "module": module.saved_state(),
            "stream": datamodule.saved_state(trainer.global_step),
        },
        saved=budget.saved,
        before=replicas.compare,
    )
    progress = Progress(metrics, budget)
    budget.say = progress.line
    sample, evaluation = _sample(recipe, datamodule, net), Evaluation(folder)
    with loggers(recipe, plan, folder, rank) as run_loggers:
        trainer = StepTrainer(
            accelerator=plan.accelerator,
            devices=int(os.environ.get("LOCAL_WORLD_SIZE", plan.devices)),  # the GPUs that this process sees
            num_nodes=plan.nodes,
            strategy=build_strategy(plan, read_by(checkpoint.fill) if checkpoint and done_before else weights),
            plugins=[LaunchedRank()],
            precision=trainer_precision(plan),
            horizon=horizon,
            accumulate=plan.accumulate_grad_batches,
            gradient_clip_val=recipe.trainer.gradient_clip_val,
            validate_every=recipe.trainer.val_check_interval,
            limit_val_batches=_limit(recipe.trainer.limit_val_batches, datamodule.has("val")),
            limit_test_batches=_limit(recipe.trainer.limit_test_batches, datamodule.has("test")),
            log_every_n_steps=recipe.trainer.log_every_n_steps,
            deterministic=recipe.trainer.deterministic,
            detect_anomaly=recipe.debug,
            use_distributed_sampler=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder.root,
            logger=run_loggers,
            callbacks=[
                *([_Restore(checkpoint)] if checkpoint is not None else []),
                *([_ExactStart(weights)] if checkpoint is None and casts_initial_weights(plan) else []),
                Heartbeats(plan.compile),
                ledger,
                anomalies,
                replicas,
                budget,
                StopAgreement(budget),
                evaluation,
                metrics,
                progress,
                *_early_stopping(recipe),
                saving,
                *([sample] if sample is not None else []),
                *([DebugChecks()] if recipe.debug else []),
                *callbacks,
            ],
        )
        if checkpoint is not None:
            datamodule.start_step = checkpoint.state["step"]
            datamodule.restore_state(checkpoint.state.get("stream", {}))
            trainer.start_at(datamodule.start_step)
        if rank == 0:
            _announce(
                recipe, plan.model_copy(update={"max_steps": horizon.max_steps}), n_parameters, datamodule, checkpoint
            )
        if checkpoint is not None and done_before:
            _finish(trainer, module, datamodule, checkpoint, folder, sample, build_whole)
        else:
            trainer.fit(module, datamodule=datamodule)
        if trainer.stop_code is None:
            _say_why_early(trainer)
            if datamodule.has("test") and recipe.trainer.limit_test_batches != 0:
                trainer.test(module, datamodule=datamodule, verbose=False)
        budget.leave(done=trainer.stop_code is None)
        if trainer.stop_code is not None:
            return trainer.stop_code
        evaluation.show(trainer)
    if recipe.debug:
        _check_overfit(recipe, plan, datamodule, trainer)
    if rank == 0 and sample is not None and sample.text is not None:
        print(f"--- sample ---\n{sample.text}\n--- end of sample ---", flush=True)
    return ExitCode.DONE


class _Restore(L.Callback):
    """Loads a checkpoint at the last moment before the first batch, when optimizer and devices exist."""

    def __init__(self, checkpoint: CheckpointReader) -> None:
        self.checkpoint = checkpoint

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        heartbeat.mark(Phase.RESTORE)
        self.checkpoint.load(views_of(pl_module.net, trainer.optimizers[0], trainer.global_rank, trainer.world_size))
        restore_state(trainer, self.checkpoint.state)
        pl_module.restore_state(self.checkpoint.state.get("module", {}))
        pl_module.restore_anomaly_window(self.checkpoint.state.get("anomalies", {}).get("window"))


class _ExactStart(L.Callback):
    """Gives the optimizer the fp32 initial weights that a strategy has rounded on its way."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        views = views_of(pl_module.net, trainer.optimizers[0], trainer.global_rank, trainer.world_size)
        set_initial_weights(views, self.weights)


def _open(resume_from: Path, folder: RunFolder, rank: int) -> CheckpointReader:
    """The checkpoint to go on from; where the run's newest is damaged, the one before it, and its rows are cut to that."""
    own = resume_from.parent.resolve() == folder.checkpoints.resolve()
    say = partial(print, "lm-train: warning:", file=sys.stderr, flush=True)
    with heartbeat.during(Phase.WAIT):  # every file is read whole
        checkpoint = open_agreed(resume_from, rank, group_of_all(), strict=resume.terms().strict or not own, say=say)
    if rank == 0 and checkpoint.folder != resume_from:
        runs.cut_jsonl(folder.metrics, checkpoint.state["step"])
    return checkpoint


def _check_data(checkpoint: CheckpointReader, fingerprint: str) -> None:
    """That a run goes on with its own data, before anything of others is written into its folder."""
    if checkpoint.state["data"] != fingerprint and not resume.terms().allows("data"):
        raise CheckpointError(
            f"{checkpoint.folder}: was trained on other data or another tokenizer (fingerprint {checkpoint.state['data'][:8]}, "
            f"now {fingerprint[:8]}); give the data it was trained on, allow_change=[data] to go on with these, or start a new "
            "run with another name="
        )


def _finish(
    trainer: StepTrainer,
    module: TrainingModule,
    datamodule: DataModule,
    checkpoint: CheckpointReader,
    folder: RunFolder,
    sample: Sample | None,
    build_whole: Callable[[], nn.Module],
) -> None:
    """What is left of a run whose last step was saved and whose end was cut off: its last validation, and the text.

    Where the strategy will cut the network up, rank 0 alone draws the text, from a whole one on the host.
    """
    heartbeat.mark(Phase.RESTORE)
    net: nn.Module | None = module.net
    if any(parameter.is_meta for parameter in module.net.parameters()):
        net = build_whole() if trainer.is_global_zero and sample is not None else None
    if net is not None:
        checkpoint.load(views_of(net, None, trainer.global_rank, trainer.world_size))
        if sample is not None:
            sample.draw(net)
    del net
    rows = runs.read_jsonl(folder.metrics)
    validated = any(row.get("step") == trainer.global_step and MONITOR in row for row in rows)
    if not validated and trainer.limit_val_batches:
        trainer.validate(module, datamodule=datamodule, verbose=False)


def _say_why_early(trainer: StepTrainer) -> None:
    for callback in trainer.callbacks:
        if isinstance(callback, EarlyStopping) and callback.stopped_epoch and trainer.is_global_zero:
            print(f"stopped early: {callback.stopping_reason_message}", file=sys.stderr)


class _EarlyStopping(EarlyStopping):
    """Does not count a validation that a stop has cut off."""

    def on_validation_end(self, trainer: StepTrainer, pl_module: L.LightningModule) -> None:
        if trainer.stop_code is None:
            super().on_validation_end(trainer, pl_module)


def _early_stopping(recipe: Recipe) -> list[L.Callback]:
    patience = recipe.trainer.early_stopping_patience
    return [] if patience is None else [_EarlyStopping(MONITOR, patience=patience, check_on_train_epoch_end=False)]


def _limit(batches: int | None, there: bool) -> int | float:
    """Lightning's spelling: 1.0 is the whole split, 0 none of it."""
    return 0 if not there else 1.0 if batches is None else batches


def _sample(recipe: Recipe, datamodule: DataModule, net: nn.Module) -> Sample | None:
    """What shows at the end what the network does, where it is made of text and the recipe asks for it."""
    n_tokens = recipe.trainer.sample_tokens
    if not n_tokens:
        return None
    match datamodule:
        case MaskedTextDataModule() if datamodule.has("val"):
            return Sample(partial(sample_guesses, data=datamodule, split="val"))
        case PairDataModule() if hasattr(net, "generate"):
            return Sample(partial(sample_pairs, data=datamodule, split="val"))
        case TextDataModule() if hasattr(net, "generate"):
            return Sample(partial(sample_text, tokenizer=datamodule.tokenizer, n_tokens=n_tokens, seed=recipe.seed))
    return None


def _announce(
    recipe: Recipe, plan: Plan, n_parameters: int, datamodule: DataModule, checkpoint: CheckpointReader | None
) -> None:
    print(
        f"{recipe.recipe}: {n_parameters:,} parameters, {datamodule.label} ({datamodule.size_in_words()}), {plan.strategy} on "
        f"{plan.world_size} {plan.accelerator}, {plan.precision}, {plan.steps_in_words()}",
        file=sys.stderr,
    )
    if checkpoint is not None:
        print(f"resuming from {checkpoint.folder}", file=sys.stderr, flush=True)


def _check_overfit(recipe: Recipe, plan: Plan, datamodule: DataModule, trainer: StepTrainer) -> None:
    checks = next(c for c in trainer.callbacks if isinstance(c, DebugChecks))
    assert checks.first_batch is not None
    torch.manual_seed(recipe.seed)
    fresh = models.build(recipe.model, plan, datamodule.facts).to(trainer.strategy.root_device)
    overfit_one_batch(modules.build(fresh, recipe, plan, datamodule), checks.first_batch)


def _quieten(plan: Plan) -> None:
    """Of Lightning's and torch's remarks only those a user can act on; TF32 where precision is mixed anyway."""
    if plan.accelerator == "gpu" and plan.precision != "32-true":
        torch.set_float32_matmul_precision("high")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*srun. command is available on your system but is not used.*",  # a run outside of Slurm is as good
        ".*number of training batches.*smaller than the logging interval.*",
        ".*isinstance.treespec, LeafSpec.*",  # lightning 2.6.6 on torch 2.13
        ".*DeepSpeed handles gradient clipping internally.*",
        ".*recommended to use `self.log.*sync_dist=True.*",  # evaluations are summed over the ranks already
    ):
        warnings.filterwarnings("ignore", message=message, module="lightning.*")
    # deepspeed 0.19 on torch 2.13
    warnings.filterwarnings("ignore", message=".*is deprecated. Please use .*_single", module="torch.distributed.*")

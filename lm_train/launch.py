"""`lm-train train`: plans, makes the run folder, and supervises the ranks; in a Slurm step one supervisor a task.

The first task's supervisor, the primary, speaks and writes for all; the others wait for its word. Free of torch.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from lm_train import plugins, restarts, resume, runs, signals
from lm_train.attempt import WRONG_S, Attempt, NotJoined, join, publish
from lm_train.budget import Account, Spending, check_currency, held_since
from lm_train.errors import ExitCode, LMTrainError, NoProgressError, OutputError, UsageError
from lm_train.failures import Report, reports
from lm_train.hardware import Machine, this_machine
from lm_train.owner import Owner
from lm_train.plan import Plan, places, plan_for, plan_table
from lm_train.recipe import Recipe
from lm_train.runs import RunFolder
from lm_train.saved import checkpoints_in
from lm_train.saved.space import check_space
from lm_train.slurm import Allocation, TimeLimit, current_allocation
from lm_train.supervisor import Supervisor, say, signals_forwarded, within

RESERVE_S = 60.0
"""What the way out takes at most: the rest of a step, a checkpoint, W&B."""
FINISH_S = 60.0
"""How long the other supervisors leave rank 0's to finish after a stop."""


def train(recipe: Recipe, series: str | None = None) -> int:
    """Trains as the recipe says, on this machine or in this Slurm step.

    Args:
        recipe: what is asked.
        series: the name by which a person takes this run up again, where it is one of several that a command starts.

    Returns:
        The exit code of the run; see `ExitCode`.

    Raises:
        LMTrainError: if it cannot be started.
    """
    allocation = current_allocation()
    since = held_since(allocation)
    machine = this_machine()
    plugins.allow(recipe.plugins)  # the ranks have it from the environment
    if allocation is None or allocation.is_primary:
        return _lead(recipe, machine, allocation, since, series)
    return _follow(recipe, machine, allocation)


def _lead(recipe: Recipe, machine: Machine, allocation: Allocation | None, since: float, series: str | None) -> int:
    """The primary's part: everything that is done once."""
    try:
        plugins.check(recipe)
        earlier = runs.existing(recipe, allocation)
        plan = plan_for(recipe, machine, allocation, earlier=_plan_of(earlier))
        account = Account([]) if earlier is None else Account.read(earlier)
        check_currency(plan, account)
        nothing_to_do = None if earlier is None else _nothing_to_do(recipe, plan, earlier, account, series)
        if earlier is not None and nothing_to_do is not None:
            say(nothing_to_do)
            _tell_others(recipe, allocation, ExitCode.DONE)
            _note_folder(earlier)
            print(earlier.root)
            return ExitCode.DONE
        _checkpoint(recipe, plan, earlier)  # before anything is made
        _check_space(recipe, plan, earlier)
        folder = runs.make_folder(recipe, allocation)
        with Owner(folder, allocation):
            checkpoint, step, skipped = _checkpoint(recipe, plan, earlier)
            for problem in skipped:
                say(f"lm-train: warning: {problem}")
            for difference in _differences(recipe, earlier, checkpoint):
                say(f"{folder.root}: the recipe has changed: {difference}")
            for difference in _planned_otherwise(folder, plan):
                say(f"{folder.root}: planned otherwise than before: {difference}")
            before = runs.beginning(folder)
            changed = earlier is not None and bool(runs.recipe_differences(folder, recipe))
            start = _begin_start(recipe, folder, step, changed)
            runs.begin(folder, recipe, plan)
            runs.cut_jsonl(folder.metrics, step)
            _note_folder(folder)
            for warning in _warnings(recipe, plan, machine, allocation):
                say(f"lm-train: warning: {warning}")
            say(f"run folder {folder.root}\nplan\n{plan_table(plan)}")
            attempt = publish(folder, allocation, checkpoint)
            spending = Spending.begin(folder, plan, since)
            code = _supervise(recipe, folder, plan, machine, allocation, attempt, checkpoint, spending, series)
            code = _after(recipe, folder, plan, start, code)
            if code == ExitCode.BAD_CHECKPOINT:  # the ranks found that the run cannot go on as this recipe says
                runs.put_back(before)
    except LMTrainError as error:
        _tell_others(recipe, allocation, error.exit_code)
        raise
    print(folder.root, flush=True)
    return code


def _begin_start(recipe: Recipe, folder: RunFolder, step: int, changed: bool) -> restarts.Start:
    """Counts this start, unless it would be in vain.

    Raises:
        NoProgressError: which a batch script finds in the folder, too, in place of what the last start ended with.
    """
    try:
        return restarts.begin(folder, step, recipe.trainer.restarts_without_progress, changed)
    except NoProgressError:
        _note_outcome(folder)
        _note_folder(folder)
        raise


def _note_outcome(folder: RunFolder) -> None:
    """Over what another supervisor of this start, or an earlier start, has written."""
    with contextlib.suppress(OSError):
        runs.write_atomically(folder.exit_code, f"{ExitCode.NO_PROGRESS}\n")


def _after(recipe: Recipe, folder: RunFolder, plan: Plan, start: restarts.Start, code: int) -> int:
    """Writes down how a start ended; another exit code where a next one would be in vain."""
    try:
        step = _checkpoint(recipe, plan, folder)[1]
    except LMTrainError:
        step = start.step
    causes = [report for report in reports(folder) if not report.stopped]
    cause = min(causes, key=lambda report: report.is_cut_off, default=None)
    problem = restarts.end(folder, start, code, cause, step, recipe.trainer.restarts_without_progress)
    if problem is None:
        return code
    say(f"lm-train: {problem}")
    _note_outcome(folder)
    return ExitCode.NO_PROGRESS


def _follow(recipe: Recipe, machine: Machine, allocation: Allocation) -> int:
    """What the supervisors of the other tasks do: the same as the primary says, in silence."""
    problem: LMTrainError | None = None
    try:
        plugins.check(recipe)
        earlier = runs.existing(recipe, allocation)
        plan = plan_for(recipe, machine, allocation, earlier=_plan_of(earlier))
        _checkpoint(recipe, plan, earlier)
    except LMTrainError as error:
        problem = error
    name = runs.run_name(recipe, allocation)
    assert name is not None
    folder = RunFolder(Path(recipe.runs_dir) / name)
    try:
        # what is wrong here is wrong at the primary, too, if that does not go on
        attempt = join(folder, allocation, timeout_s=None if problem is None else WRONG_S)
    except NotJoined as error:
        if problem is None and allocation.local_task == 0:  # one line a node
            say(f"lm-train: {error}")
        return (problem or error).exit_code
    code, checkpoint = attempt.word()
    if code is not None:
        return code
    plan = Plan.read(folder.plan)
    try:
        if problem is not None:
            raise problem
        return _supervise(recipe, folder, plan, machine, allocation, attempt, checkpoint)
    except LMTrainError as error:
        say(f"lm-train: on {allocation.node_name}: {error}")
        task = allocation.node_rank * allocation.tasks_per_node + allocation.local_task
        Report(task * plan.world_size // allocation.tasks, error.exit_code, str(error)).write(folder)
        folder.write_outcome(error.exit_code)
        return error.exit_code


def _supervise(
    recipe: Recipe,
    folder: RunFolder,
    plan: Plan,
    machine: Machine,
    allocation: Allocation | None,
    attempt: Attempt,
    checkpoint: Path | None,
    spending: Spending | None = None,
    series: str | None = None,
) -> int:
    """Runs the ranks of this task and writes the outcome; success is the primary's to tell, and what was used to count."""
    primary = allocation is None or allocation.is_primary
    node_name = socket.gethostname() if allocation is None else allocation.node_name
    timeout_s = None if recipe.debug else recipe.trainer.hang_timeout_s
    limit = None if allocation is None or not primary else TimeLimit(allocation.job_id, _reserve(plan))
    supervisor = Supervisor(folder, plan, places(plan, machine, allocation), node_name, spending, timeout_s, limit)
    with signals_forwarded(supervisor), _counted(supervisor) as counted:
        code, failure = supervisor.run(attempt, checkpoint)
        while code == signals.ROLL_BACK:
            if not supervisor.alone or supervisor.stopping:  # with other supervisors, all of them start anew
                code = ExitCode.REQUEUE
                break
            checkpoint, step, _ = _checkpoint(recipe, plan, folder)
            runs.cut_jsonl(folder.metrics, step)
            code, failure = supervisor.run(publish(folder, allocation, checkpoint), checkpoint)
        counted.append(code)
        if not primary and failure is None and code in (ExitCode.REQUEUE, ExitCode.INTERRUPTED):
            # with --kill-on-bad-exit this task's end is the end of all, and rank 0 may still be sending to W&B
            within(FINISH_S, folder.exit_code.exists)
    first = True
    if primary or code != ExitCode.DONE:
        try:
            first = folder.write_outcome(code)
        except OutputError as error:
            say(f"lm-train: {error}")
    if failure is not None and (first or supervisor.alone):
        supervisor.tell(failure, recipe.debug)
    if primary and code in (ExitCode.REQUEUE, ExitCode.INTERRUPTED):
        told = "stopped without saving" if supervisor.at_once else "stopped" if supervisor.stopping else "ended early"
        if supervisor.stopping or allocation is None or not allocation.batch:  # else the job goes on by itself
            say(f"{told}; go on with the same command and name={series or folder.name}")
    account = Account.read(folder)
    if spending is not None and code == ExitCode.DONE and account.stopped_by_budget:
        say(f"the budget is used up: {_how_to_go_on(recipe, folder, plan, account, series)}")
    return code


@contextlib.contextmanager
def _counted(supervisor: Supervisor) -> Iterator[list[int]]:
    """Writes the end of what this supervisor counts, however it comes, with the exit code that is put into the list."""
    codes: list[int] = []
    try:
        yield codes
    finally:
        spending = supervisor.spending
        if spending is not None:
            with contextlib.suppress(OutputError):
                if supervisor.at_limit:
                    spending.note("stopped", forced=True)
                spending.finish(codes[0] if codes else None)


def _reserve(plan: Plan) -> float:
    """Seconds before a job's time limit in which the run saves and ends."""
    saving = plan.prediction.checkpoint_seconds.high if plan.prediction is not None else 0.0
    return max(RESERVE_S, 2 * saving + 30)


def _nothing_to_do(recipe: Recipe, plan: Plan, folder: RunFolder, account: Account, series: str | None) -> str | None:
    """Why a run is not started again, or None."""
    if recipe.resume == "auto" and runs.is_finished(recipe, folder) and not account.stopped_by_budget:
        more = "a larger budget" if recipe.trainer.max_steps == "auto" else "a larger trainer.max_steps"
        return f"{folder.root} is finished already; give another name= to train anew, or {more} to go on"
    if account.is_spent(plan):
        return f"{folder.root}: the budget is spent: {_how_to_go_on(recipe, folder, plan, account, series)}"
    return None


def _how_to_go_on(recipe: Recipe, folder: RunFolder, plan: Plan, account: Account, series: str | None) -> str:
    """What a run has used that its budget has ended, where it stands, and with what it goes on."""
    last = account.last
    stopped = {} if last is None or last.stopped is None else last.stopped
    max_steps = None if recipe.trainer.max_steps == "auto" else stopped.get("max_steps", plan.max_steps)
    try:
        saved = runs.latest_checkpoint(folder)
    except LMTrainError:
        saved = None
    step = None if saved is None else saved.name.removeprefix("step-")
    where = (
        "before its first checkpoint" if step is None else f"at step {step}" + (f" of {max_steps}" if max_steps else "")
    )
    how = f", saved {where}" if saved is not None else f", ended {where}"
    enough = account.enough_for(plan, max_steps)
    return f"{account.told(plan)} used{how}; to go on, the same command with name={series or folder.name} {enough}"


def _checkpoint(recipe: Recipe, plan: Plan, earlier: RunFolder | None) -> tuple[Path | None, int, list[str]]:
    """The checkpoint to go on from and its step, or None and 0; and what was found wrong with newer ones.

    Raises:
        LMTrainError: if the recipe cannot go on from it.
    """
    (checkpoint, skipped), terms = resume.checkpoint_to_resume(recipe, earlier)
    step = resume.check_resumable(checkpoint, recipe, plan, terms) if checkpoint is not None else 0
    terms.tell_ranks()
    trainer = recipe.trainer
    is_estimate = trainer.max_epochs is not None or (trainer.max_steps == "auto" and trainer.max_tokens is None)
    if step > plan.max_steps and not is_estimate:
        raise UsageError(
            f"trainer.max_steps: {checkpoint} is at step {step} already, trainer.max_steps={plan.max_steps} lies before it; "
            f"give a larger one, or start a new run with another name="
        )
    return checkpoint, step, skipped


def _differences(recipe: Recipe, earlier: RunFolder | None, checkpoint: Path | None) -> list[str]:
    """What the recipe says otherwise than what the run was trained with so far."""
    if checkpoint is not None:
        return resume.differences(checkpoint, recipe)
    return [] if earlier is None else runs.recipe_differences(earlier, recipe)


def _check_space(recipe: Recipe, plan: Plan, earlier: RunFolder | None) -> None:
    """That two checkpoints fit on the disk, the second of which is written before the first may go; one where there is no more.

    Raises:
        OutputError: saying what to free.
    """
    if plan.prediction is None:
        return
    folder = RunFolder(Path(recipe.runs_dir)).root if earlier is None else earlier.checkpoints
    every = recipe.checkpoint.every_n_steps
    saves = 2 if every is not None and every < plan.max_steps else 1
    more = max(1, saves - len(checkpoints_in(folder)))
    what = "a checkpoint" if more == 1 else "two checkpoints"
    check_space(folder, more * plan.prediction.checkpoint_bytes, more * (plan.world_size + 4), what)


def _tell_others(recipe: Recipe, allocation: Allocation | None, code: int) -> None:
    """Lets the other supervisors end with the primary; without a run folder they find out by themselves."""
    if allocation is None or allocation.tasks == 1:
        return
    folder = RunFolder(Path(recipe.runs_dir) / str(runs.run_name(recipe, allocation)))
    if folder.root.is_dir():
        with contextlib.suppress(OutputError):  # the primary is about to say so
            publish(folder, allocation, exit_code=code)


def _note_folder(folder: RunFolder) -> None:
    """Tells a batch script where the run is: in the file that `LM_TRAIN_RUN_FILE` names."""
    file = os.environ.get("LM_TRAIN_RUN_FILE")
    if file:
        try:
            Path(file).write_text(f"{folder.root.resolve()}\n", encoding="utf-8")
        except OSError as error:
            raise OutputError(f"LM_TRAIN_RUN_FILE={file}: {error.strerror}") from None


def _planned_otherwise(folder: RunFolder, plan: Plan) -> list[str]:
    """Where this start's plan lays the run out otherwise than the last start's."""
    earlier = _plan_of(folder)
    return [] if earlier is None else plan.changes_from(earlier)


def _plan_of(folder: RunFolder | None) -> Plan | None:
    """With which a run began; None where there is none yet, or one of another version."""
    try:
        return None if folder is None else Plan.read(folder.plan)
    except (OSError, ValueError):
        return None


def _warnings(recipe: Recipe, plan: Plan, machine: Machine, allocation: Allocation | None) -> list[str]:
    """What is done otherwise than one may have expected."""
    warnings = []
    warmup, steps = recipe.optim.warmup_steps, plan.max_steps
    if warmup >= steps:
        peak = "never reaches its peak" if warmup > steps else "is at its peak in the last step only"
        warnings.append(
            f"optim.warmup_steps={warmup} is not shorter than trainer.max_steps={steps}: the learning rate {peak}"
        )
    if plan.paid_share < 1 and recipe.trainer.max_steps != "auto":
        warnings.append(
            f"the budget pays for about {plan.paid_share:.0%} of {plan.max_steps:,} steps; the run will stop inside it, "
            "saved. With trainer.max_steps=auto the learning rate comes down where the budget ends"
        )
    if allocation is not None and not allocation.batch:
        warnings.append(
            f"srun alone: Slurm cannot start {allocation} again. Told to stop, it saves and ends with exit code 75, and goes on "
            f"with the same command and name={runs.run_name(recipe, allocation)}; sbatch slurm/train.sbatch starts itself again"
        )
    if os.environ.get("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"):
        warnings.append(
            "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD is set: code of yours that calls torch.load runs what a file says; unset it "
            "(lm_train itself unpickles nothing)"
        )
    nodes = os.environ.get("SLURM_JOB_NUM_NODES", "1")
    if allocation is None and "SLURM_JOB_ID" in os.environ and nodes != "1":
        warnings.append(
            f"Slurm job {os.environ['SLURM_JOB_ID']} has {nodes} nodes, this runs on {socket.gethostname()} alone; srun "
            "launch/train.sh uses them all"
        )
    if allocation is not None and not machine.gpus and recipe.plan is None:
        if allocation.gpus_on_node:
            given = f"{allocation.gpus_on_node} GPU{'s' if allocation.gpus_on_node > 1 else ''}"
            warnings.append(
                f"{allocation} has {given} on {allocation.node_name}, nvidia-smi shows none: training on the CPU; see "
                "nvidia-smi there, or give the job up with scancel"
            )
        else:
            warnings.append(f"{allocation} has no GPU: training on the CPU; srun --gpus-per-node=1 asks for one")
    return warnings

"""`lm-train plan`: how to spend a budget, on a login node as well as on the machine itself. Free of torch."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from lm_train import plugins
from lm_train.calibrate.probe import corrected, probe_step
from lm_train.clusters import find
from lm_train.errors import ExitCode, UsageError
from lm_train.hardware import this_machine
from lm_train.plan import Schedule, Target, plan_table, schedule, size_of, with_measured_step
from lm_train.recipe import Recipe, load
from lm_train.recipe.explain import nearest, shown
from lm_train.sbatch import write
from lm_train.slurm import current_allocation

WORDS: dict[str, tuple[str, ...]] = {
    "why": ("true", "false"),
    "probe": ("true", "false"),
    "format": ("text", "json"),
    "sbatch": (),
}
"""What this verb understands beside a recipe's words, and the values; none: any text."""
SHOWN_REJECTED = 12
"""Lines of `why=true`; format=json has them all."""


def plan(words: Sequence[str]) -> int:
    """Prints the plan for a recipe, with why not another if asked to, and writes its job file.

    Args:
        words: a recipe's, and `why=true probe=true format=json sbatch=PATH`.

    Returns:
        DONE; USAGE where the budget does not pay for the steps that the recipe fixes, after the plan.

    Raises:
        UsageError: with every problem, one line each; or if nothing fits.
    """
    own, rest = split_words(words, WORDS)
    recipe = load(rest)
    plugins.allow(recipe.plugins)
    plugins.check(recipe)
    target = target_of(recipe)
    if target.allocation is not None and not target.allocation.is_primary:
        return ExitCode.DONE
    made = schedule(recipe, target)
    if own.get("probe") == "true":
        made = _probed(recipe, target, made)
    print(_as_json(made) if own.get("format") == "json" else _as_text(recipe, target, made, own.get("why") == "true"))
    if made.shortage is not None:
        raise UsageError(made.shortage)
    if "sbatch" in own:
        for note in write(Path(own["sbatch"]), rest, recipe, made.plan, target.cluster):
            print(f"lm-train: note: {note}", file=sys.stderr)
        print(own["sbatch"])
    return ExitCode.DONE


def target_of(recipe: Recipe) -> Target:
    """Where the recipe's cluster section points: this machine or Slurm step, the partition of a login node, a description."""
    machine, allocation = this_machine(), current_allocation()
    cluster = find(recipe.cluster, machine, allocation, for_planning=True)
    return Target(cluster, machine, allocation) if cluster.here else Target.described(cluster)


def split_words(words: Iterable[str], own: dict[str, tuple[str, ...]]) -> tuple[dict[str, str], list[str]]:
    """A verb's own words and the rest, which is the recipe's.

    Raises:
        UsageError: for a value that a word of the verb's does not know, or a word given twice.
    """
    found: dict[str, str] = {}
    rest: list[str] = []
    problems: list[str] = []
    for word in words:
        key, equals, value = word.partition("=")
        if key not in own or not equals:
            rest.append(word)
        elif key in found:
            problems.append(f"{key}: given twice; keep one")
        elif not value or (own[key] and value not in own[key]):
            expected = " or ".join(own[key]) or "a path"
            near = nearest(value, own[key])
            problems.append(
                f"{key}: expected {expected}; got {shown(value)}" + (f"; did you mean {key}={near}?" if near else "")
            )
        else:
            found[key] = value
    if problems:
        raise UsageError(problems)
    return found, rest


def _probed(recipe: Recipe, target: Target, made: Schedule) -> Schedule:
    """The schedule corrected by a few real steps of its layout."""
    measured = probe_step(recipe, made.plan, target.cluster, target.allocation)
    told = made.plan.prediction
    seen = f"a probe's step took {measured.step_seconds:.3g} s and {size_of(measured.peak_bytes)}"
    if told is None:
        return replace(made, notes=(*made.notes, seen))
    fixed = recipe.trainer.max_steps != "auto"
    plan = with_measured_step(made.plan, corrected(told.step, measured), fixed)
    seen += f"; foretold were {told.step.seconds:.3g} s and {size_of(told.memory.total)}"
    shortage = made.shortage
    if fixed and plan.paid_share < 1 and shortage is None:
        shortage = f"the budget pays for about {plan.paid_share:.0%} of {plan.max_steps:,} steps at the probe's speed"
    return replace(made, plan=plan, shortage=shortage, notes=(*made.notes, seen))


def _as_text(recipe: Recipe, target: Target, made: Schedule, why: bool) -> str:
    lines = [f"recipe {recipe.recipe} on {target.cluster.name}", "plan", plan_table(made.plan)]
    lines += [f"note: {note}" for note in made.notes]
    if why and made.rejected:
        lines.append("rejected")
        shown = min(SHOWN_REJECTED, made.telling)
        lines += [f"  {line}" for line in made.rejected[:shown]]
        if len(made.rejected) > shown:
            lines.append(f"  and {len(made.rejected) - shown} more; format=json has them all")
    return "\n".join(lines)


def _as_json(made: Schedule) -> str:
    content = {
        "plan": made.plan.model_dump(mode="json"),
        "rejected": list(made.rejected),
        "notes": list(made.notes),
        "shortage": made.shortage,
    }
    return json.dumps(content, indent=2)

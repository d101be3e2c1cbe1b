"""Every recipe that is shipped: short, with a head that says what a person wants to know, and true to its model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lm_train import cli, dry_run, models
from lm_train.hardware import GPU, Machine
from lm_train.plan import known_facts, make_plan, parameter_count, parameter_shapes, with_assumptions
from lm_train.recipe import Recipe, load, shipped_recipes

NAMES = tuple(shipped_recipes())
LAPTOP = Machine(cpu_cores=2, gpus=())
EIGHT_H100 = Machine(cpu_cores=104, gpus=(GPU("NVIDIA H100 80GB HBM3", 80 << 30, (9, 0)),) * 8)

pytestmark = pytest.mark.parametrize("name", NAMES)


def recipe_of(name: str, *words: str) -> Recipe:
    return load([f"recipe={name}", *words])


def test_loads(name: str) -> None:
    assert recipe_of(name).recipe == name
    assert recipe_of(name, "debug=true").trainer.max_steps == 20


def test_is_a_page_with_a_head(name: str) -> None:
    lines = shipped_recipes()[name].read_text(encoding="utf-8").splitlines()
    head = [line for line in lines if line.startswith("#")]
    assert len(lines) <= 30
    assert lines[: len(head)] == head
    assert head[0].removeprefix("# ").endswith(".")  # the sentence that `lm-train recipes` prints
    for label in ("# Command:", "# Hardware:", "# Result:"):
        (line,) = [line for line in head if line.startswith(label)]
        assert line.removeprefix(label).strip(), label
    assert f"launch/train.sh recipe={name}" in "".join(head)
    assert all(len(line) <= 130 for line in lines)


@pytest.mark.parametrize("machine", [LAPTOP, EIGHT_H100], ids=["laptop", "8xH100"])
def test_plan(name: str, machine: Machine) -> None:
    recipe = recipe_of(name)
    plan = make_plan(recipe, machine, must_fit=False)
    assert plan.micro_batch_size * plan.accumulate_grad_batches * plan.world_size == recipe.data.global_batch_size
    asked = recipe.trainer.precision
    assert plan.precision == (("bf16-mixed" if machine.gpus else "32-true") if asked == "auto" else asked)
    named = recipe.trainer.strategy
    assert plan.strategy == named or named == "auto"
    assert (plan.peak_flops_per_device is not None) == bool(machine.gpus)


def test_plan_counts_the_real_parameters(name: str) -> None:
    recipe = recipe_of(name)
    if recipe.model.kind == "hf":
        pytest.skip("transformers alone knows")
    plan = make_plan(recipe, LAPTOP, must_fit=False)
    facts, _ = with_assumptions(recipe, known_facts(recipe))  # what only the data know
    counted = parameter_shapes(recipe.model, plan.task, facts)
    assert counted is not None
    with torch.device("meta"):
        net = models.build(recipe.model, plan, facts)
    assert counted == [(name, tuple(p.shape)) for name, p in net.named_parameters()]
    assert plan.n_parameters in (None, parameter_count(counted))


def test_dry_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dry_run, "this_machine", lambda: LAPTOP)
    assert cli.main(["train", f"recipe={name}", "dry_run=true"]) == 0
    told = capsys.readouterr().out
    plan = make_plan(recipe_of(name), LAPTOP, must_fit=False)
    total = [line for line in told.splitlines() if line.split()[:1] == ["total"]]
    assert len(total) == 1
    assert plan.n_parameters is None or f"{plan.n_parameters:,}" in total[0]
    assert f"runs/{name}-N" in told
    assert list(tmp_path.iterdir()) == []

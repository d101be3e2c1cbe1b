"""The user's own models: found, allowed, called, trained under every strategy; what is wrong with them is one line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from lm_train import cli, models, plugins
from lm_train.callbacks.debugging import OVERFIT_LOSS, overfit_one_batch
from lm_train.errors import ExitCode, UsageError
from lm_train.hardware import Machine
from lm_train.modules import Classification
from lm_train.plan import DataFacts, make_plan
from lm_train.recipe import dump, load
from lm_train.runs import RunFolder, read_jsonl
from lm_train.train import train
from tests.conftest import Ranks
from tests.pair import ROOT
from tests.test_strategies import LOSS_BOUND, NORM_BOUND, STRATEGIES, curve, difference

NewRun = Callable[..., RunFolder]


@pytest.fixture(autouse=True)
def allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LM_TRAIN_PLUGINS", "tests")


def model_word(function: str, args: str = "{}") -> str:
    return f'model={{kind: custom, factory: "tests.custom_parts:{function}", args: {args}, block_size: 16}}'


def built(*words: str) -> torch.nn.Module:
    recipe = load(["recipe=gpt_debug", "data.tokenizer=bytes", *words])
    return models.build(recipe.model, make_plan(recipe, Machine(cpu_cores=2, gpus=())), DataFacts(vocab_size=257))


@pytest.mark.parametrize(
    "strategy", [s if s in ("ddp", "fsdp") else pytest.param(s, marks=pytest.mark.slow) for s in STRATEGIES]
)
def test_two_processes_compute_what_one_computes(ranks: Ranks, new_run: NewRun, strategy: str) -> None:
    words = (model_word("build"), "trainer.max_steps=12", "trainer.sample_tokens=5")
    one = new_run(*words, name="alone")
    both = new_run(*words, "trainer.devices=2", f"trainer.strategy={strategy}", name="both")
    assert train(one) == ExitCode.DONE
    answers = ranks(strategy).run("run", folder=str(both.root))
    assert answers[0]["sample"]
    largest = difference(curve(one), curve(both))
    assert largest.loss <= LOSS_BOUND
    assert largest.norm <= NORM_BOUND
    assert curve(one)[-1][0] < curve(one)[0][0] - 0.05


def test_a_factory_that_ignores_the_seed_still_gives_all_ranks_one_model(ranks: Ranks, new_run: NewRun) -> None:
    run = new_run(model_word("other_on_each_call"), "trainer.max_steps=4", "trainer.devices=2", "trainer.strategy=fsdp")
    ranks("fsdp").run("run", folder=str(run.root))
    (row,) = [row for row in read_jsonl(run.metrics) if row.get("step") == 1]
    assert row["train/loss"] == pytest.approx(5.55, abs=0.05)


@pytest.mark.parametrize(
    ("function", "said"),
    [("build", "CustomDecoder either has a fault, or cannot"), ("half_frozen", "8,959 parameters are frozen")],
)
def test_debug_of_a_network_that_need_not_learn_one_batch(
    new_run: NewRun, capsys: pytest.CaptureFixture[str], function: str, said: str
) -> None:
    """It guesses the next token from one alone."""
    assert train(new_run(model_word(function), "trainer.max_steps=2", "debug=true")) == ExitCode.DONE
    told = capsys.readouterr().err
    assert "expected below 0.1" in told
    assert said in told


def test_debug_learns_images_by_heart_in_sixteen_bits() -> None:
    """The fresh network is fp32, whatever the run's precision."""
    recipe = load(["recipe=gpt_debug", "data=images", "model=mlp", "trainer.precision=bf16-true"])
    plan = make_plan(recipe, Machine(cpu_cores=2, gpus=()))
    torch.manual_seed(0)
    net = models.build(recipe.model, plan, DataFacts(input_shape=(1, 8, 8), n_outputs=10))
    module = Classification(net, recipe.optim, plan, 0, tuple("0123456789"), 0.0)
    assert module.input_type == torch.bfloat16
    found = overfit_one_batch(module, {"inputs": torch.rand(8, 1, 8, 8), "labels": torch.arange(8), "total": 8.0})
    assert found is not None
    assert found < OVERFIT_LOSS


def test_debug_leaves_out_what_it_can_take_no_few_samples_of(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = load(["recipe=gpt_debug", "data=images", "model=mlp"])
    plan = make_plan(recipe, Machine(cpu_cores=2, gpus=()))
    module = Classification(torch.nn.Linear(3, 2), recipe.optim, plan, 0, ("a", "b"), 0.0)
    assert overfit_one_batch(module, {"own": [torch.rand(4, 3), torch.zeros(4)], "total": 4.0}) is None
    assert "left out, since the batch is no dictionary" in capsys.readouterr().err


def test_an_image_classifier_by_position(new_run: NewRun) -> None:
    recipe = load(["recipe=gpt_debug", "data=images", model_word("image_classifier")])
    plan = make_plan(recipe, Machine(cpu_cores=2, gpus=()))
    net = models.build(recipe.model, plan, DataFacts(input_shape=(1, 8, 8), n_outputs=10))
    assert net(inputs=torch.rand(3, 1, 8, 8)).shape == (3, 10)


@pytest.mark.parametrize(
    ("function", "args", "said"),
    [
        ("bild", "{}", "bild is not in it; there are"),
        ("not_callable", "{}", "not callable"),
        ("build", "{widht: 5}", "takes (facts: 'DataFacts', width: 'int' = 32)"),
        ("nothing", "{}", "returned None; expected an nn.Module"),
        ("without_parameters", "{}", "without parameters"),
        ("raises", "{}", "RuntimeError: the user's own fault, on two lines (custom_parts.py:"),
    ],
)
def test_a_factory_that_cannot_be_used_is_one_line(function: str, args: str, said: str) -> None:
    with pytest.raises(UsageError) as raised:
        built(model_word(function, args))
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("function", "said"), [("wrong_size", "(2, 3, 257)"), ("tuple_of_logits", "gave a tuple")])
def test_an_output_that_cannot_be_used_is_one_line(function: str, said: str) -> None:
    net = built(model_word(function))
    with pytest.raises(UsageError) as raised:
        net(torch.zeros(2, 3, dtype=torch.int64))
    assert said in str(raised.value)


@pytest.fixture
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package that leaves a file behind as soon as it is imported."""
    file = tmp_path / "imported"
    (tmp_path / "canary").mkdir()
    (tmp_path / "canary" / "__init__.py").write_text(f"open({str(file)!r}, 'w')\n", encoding="utf-8")
    (tmp_path / "canary" / "nets.py").write_text("def build():\n    pass\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LM_TRAIN_PLUGINS")
    yield file
    sys.modules.pop("canary", None)


CANARY = 'model={kind: custom, factory: "canary.nets:build"}'


@pytest.mark.parametrize("more", ["", "dry_run=true"])
def test_a_recipe_alone_runs_no_code(canary: Path, capsys: pytest.CaptureFixture[str], more: str) -> None:
    words = ["train", "recipe=gpt_debug", CANARY, f"runs_dir={canary.parent}/runs", *([more] if more else [])]
    assert cli.main(words) == ExitCode.USAGE
    told = capsys.readouterr().err.strip()
    assert "plugins=canary" in told
    assert "LM_TRAIN_PLUGINS=canary" in told
    assert "\n" not in told
    assert not canary.exists()
    assert not (canary.parent / "runs").exists()
    with pytest.raises(UsageError, match="plugins=canary"):  # nor does a rank
        built(CANARY)
    assert not canary.exists()


def test_allowing_another_package_is_not_enough(canary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LM_TRAIN_PLUGINS", "tests")
    with pytest.raises(UsageError, match=r"plugins=\[tests,canary\]"):
        plugins.check(load(["recipe=gpt_debug", CANARY]))
    assert not canary.exists()


def test_what_is_allowed_is_found_in_the_current_folder_and_not_imported_by_the_check(
    canary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LM_TRAIN_PLUGINS", "canary")
    plugins.check(load(["recipe=gpt_debug", CANARY]))
    assert not canary.exists()
    monkeypatch.chdir("/")
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p != str(canary.parent)])
    with pytest.raises(UsageError, match="no package canary in /"):
        plugins.check(load(["recipe=gpt_debug", CANARY]))


NO_FACTORIES = (
    "mypkg.nets:build; rm", "../x:y", "mypkg.nets", "mypkg:build:more", ":build", "a b:c", "mypkg..nets:build", "class:x",
)  # fmt: skip


@pytest.mark.parametrize("factory", NO_FACTORIES)
def test_a_factory_is_a_module_and_a_function(factory: str) -> None:
    for section in ("model", "data"):
        with pytest.raises(UsageError, match=r"expected package\.module:function"):
            load(["recipe=gpt_debug", f'{section}={{kind: custom, factory: "{factory}"}}'])


def test_pythons_own_functions_are_no_factories(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LM_TRAIN_PLUGINS", "os")
    recipe = load(["recipe=gpt_debug", 'model={kind: custom, factory: "os:system", args: {command: "exit 1"}}'])
    with pytest.raises(UsageError, match="of Python itself"):
        plugins.check(recipe)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("plugins=os", "belongs to Python itself"),
        ("plugins=mypkg.nets", "did you mean plugins=mypkg?"),
        ("plugins=mypkg:build", "did you mean plugins=mypkg?"),
        ("plugins=../x", "top-level package"),
        ("plugins={a: b}", "expected a package's name"),
        ("plugin=mypkg", "did you mean plugins?"),
    ],
)
def test_plugins_are_packages(word: str, said: str) -> None:
    with pytest.raises(UsageError) as raised:
        load(["recipe=gpt_debug", word])
    assert said in str(raised.value)


def test_a_recipe_file_cannot_allow_itself(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("plugins: canary\n" + 'model: {kind: custom, factory: "canary.nets:build"}\n', encoding="utf-8")
    with pytest.raises(UsageError) as raised:
        load([f"recipe={file}"])
    (problem,) = raised.value.problems
    assert "plugins=PACKAGE on the command line" in problem
    assert "mine.yaml:1" in problem


def test_several_packages_and_none_in_the_run_folder() -> None:
    recipe = load(["recipe=gpt_debug", "plugins=[mypkg,other]"])
    assert recipe.plugins == ("mypkg", "other")
    assert "plugins" not in dump(recipe)


EXAMPLE = (
    "recipe=examples/custom_model/recipe.yaml",
    "plugins=examples",
    "trainer.devices=2",
    "tracking.wandb=disabled",
)


def start(*words: str) -> subprocess.Popen[str]:
    environment = {k: v for k, v in os.environ.items() if k != "LM_TRAIN_PLUGINS"}
    return subprocess.Popen(
        [sys.executable, "-m", "lm_train", "train", *EXAMPLE, *words],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def example_words(tmp_path: Path, text_file: Path, strategy: str) -> tuple[str, ...]:
    place = (f"runs_dir={tmp_path}", "name=own", f"data.path={text_file}")
    return (*place, f"trainer.strategy={strategy}", "trainer.log_every_n_steps=1", "checkpoint.every_n_steps=10")


@pytest.mark.parametrize("strategy", [pytest.param("fsdp", marks=pytest.mark.slow), "ddp"])
def test_the_example_by_its_own_command_killed_and_gone_on_with(tmp_path: Path, text_file: Path, strategy: str) -> None:
    words = example_words(tmp_path, text_file, strategy)
    run, steps = RunFolder(tmp_path / "own"), 40
    if strategy == "fsdp":  # one of them is enough
        first = start(*words, "trainer.max_steps=4000")
        deadline = time.monotonic() + 120
        while not (run.checkpoints / "latest").exists() and first.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        first.send_signal(signal.SIGKILL)
        first.communicate()
        steps = json.loads((run.checkpoints / "latest").read_text())["step"] + 20
    last = start(*words, f"trainer.max_steps={steps}")
    _, told = last.communicate(timeout=240)
    assert last.returncode == 0, told
    rows = [row for row in read_jsonl(run.metrics) if "train/loss" in row]
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    assert rows[-1]["train/loss"] < rows[0]["train/loss"] - 0.3
    assert ("resuming from" in told) == (strategy == "fsdp")
    assert "plugins" not in run.recipe.read_text(encoding="utf-8")

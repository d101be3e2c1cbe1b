"""Payloads in everything that a run reads: none of them runs, and each is refused in one line or does nothing.

A payload would touch a file, the canary; the last line of each test looks for it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE

from lm_train import cli, data, models
from lm_train.checkpoint import CheckpointReader
from lm_train.errors import CheckpointError, DataError, LMTrainError, UsageError
from lm_train.hardware import Machine
from lm_train.plan import DataFacts, make_plan
from lm_train.recipe import load
from lm_train.runs import RunFolder
from lm_train.saved.places import pointed
from lm_train.saved.sealed import sealed
from lm_train.train import train
from tests import payloads
from tests.pair import ROOT


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Path]:
    """The file that a payload would make; `os.system` is called by name in them all."""
    file = tmp_path / "canary"
    yield file
    assert not file.exists(), "the payload ran"


@pytest.fixture
def no_unpickling(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was unpickled, by whom: the names of the functions."""
    called: list[str] = []

    def watched(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            called.append(name)
            return real(*args, **kwargs)

        return call

    for module, name in ((pickle, "load"), (pickle, "loads"), (torch, "load")):
        monkeypatch.setattr(module, name, watched(f"{module.__name__}.{name}", getattr(module, name)))
    return called


@pytest.fixture
def run(trained: RunFolder, tmp_path: Path) -> RunFolder:
    return RunFolder(shutil.copytree(trained.root, tmp_path / "run"))


class Answer(list[str]):
    """The lines on standard error, with the exit code."""

    code: int | str


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    """A command line in this process; ranks are not started: the answer's code is `ranks` then."""

    class Started(BaseException):
        pass

    def start(*args: Any) -> None:
        raise Started

    monkeypatch.setattr("lm_train.launch.Supervisor.run", start)

    def go(*words: str) -> Answer:
        capsys.readouterr()
        try:
            code: int | str = cli.main(words)
        except Started:
            code = "ranks"
        answer = Answer(line for line in capsys.readouterr().err.splitlines() if line.startswith("lm-train"))
        answer.code = code
        return answer

    return go


def again(run: RunFolder) -> list[str]:
    """The words that take a run up again."""
    words = [f"recipe={run.recipe}", f"runs_dir={run.root.parent}", "name=run", "trainer.max_steps=6"]
    return ["train", *words]


def test_recipes(canary: Path, command: Callable[..., Answer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "evil.py").write_text(payloads.python_file(canary))
    monkeypatch.chdir(tmp_path)
    tried = payloads.yaml_texts(canary)
    assert len(tried) >= 20
    for name, text in tried.items():
        (tmp_path / "recipe.yaml").write_text(text)
        for verb in ("train", "show", "plan"):
            answer = command(verb, "recipe=./recipe.yaml", f"runs_dir={tmp_path / 'runs'}", "trainer.devices=1")
            if verb == "show" and "factory" in name and "expression" not in name:
                continue  # shows the recipe; nothing of it is called
            assert answer.code == 2, (name, verb, answer)
            assert 1 <= len(answer) <= 2, (name, answer)  # a line a problem
            assert not canary.exists(), name
    assert not (tmp_path / "runs").exists()


def test_words_and_the_job_file(canary: Path, command: Callable[..., Answer], tmp_path: Path) -> None:
    """Commands in words: refused, or plain text; also in the #SBATCH lines of the job file."""
    code = f"x; touch {canary}; $(touch {canary}) `touch {canary}`"
    job = tmp_path / "job.sbatch"
    for field in ("partition", "account", "qos"):
        for value in (code, f"a\n#SBATCH --wrap=touch\ntouch {canary}", "a\n", "--wrap=x y", "'"):
            answer = command("plan", "recipe=gpt_debug", "cluster=h100x8", f"cluster.{field}={value}", f"sbatch={job}")
            assert (answer.code, len(answer), job.exists()) == (2, 1, False), (field, value, answer)
    shutil.copy(ROOT / "recipes" / "gpt_debug.yaml", tmp_path / "a\n touch canary ; $(touch canary).yaml")
    words = (
        f"tracking.group={code}",
        f"tracking.entity=it's {code}",
        f'tracking.tags=["{code}"]',
        f"runs_dir={tmp_path}/a\\ x; touch {canary} & `touch {canary}`",
    )
    answer = command(
        "plan", f"recipe={tmp_path}/a\n touch canary ; $(touch canary).yaml", "cluster=h100x8", f"sbatch={job}", *words
    )
    assert answer.code == 0, answer
    text = job.read_text(encoding="utf-8").replace(str(ROOT), str(tmp_path / "checkout"))
    assert next(line for line in text.splitlines() if line.startswith("#SBATCH --job-name")).count(" ") == 1
    (tmp_path / "checkout" / "slurm").mkdir(parents=True)
    (tmp_path / "checkout" / "slurm" / "train.sbatch").write_text('printf "%s\\0" "$@" >words\n')
    job.write_text(text, encoding="utf-8")
    done = subprocess.run(["bash", str(job)], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    given = (tmp_path / "checkout" / "words").read_text(encoding="utf-8").split("\0")
    assert set(words) <= set(given)
    assert not list(tmp_path.rglob("canary"))


def spoil(file: Path, content: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)


def test_pickles_in_every_file_of_a_checkpoint(
    canary: Path, run: RunFolder, no_unpickling: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    newest = run.checkpoints / "step-4"
    files = sorted(newest.iterdir())
    assert len(files) >= 3
    contents = (payloads.pickled(canary, 0), payloads.pickled(canary), payloads.torch_file(canary))
    for file in files:
        before = file.read_bytes()
        for content in contents:
            # once as an accident, and once as somebody would who makes the sizes and checksums right
            for forged in (False, True):
                spoil(file, content)
                manifest = newest / "manifest.json"
                kept = manifest.read_bytes()
                if forged and file != manifest:
                    told = json.loads(kept)
                    digest = hashlib.blake2b(content, digest_size=32).hexdigest()
                    told["files"][file.name] = {"bytes": len(content), "blake2b": digest}
                    told.pop("blake2b")
                    manifest.write_text(sealed(told))
                with pytest.raises(CheckpointError) as refused:
                    CheckpointReader(newest)
                assert file.name in str(refused.value)
                assert "\n" not in str(refused.value)
                spoil(manifest, kept) if file != manifest else None
        spoil(file, before)
    CheckpointReader(newest)
    assert no_unpickling == []


def test_hostile_shards(canary: Path, run: RunFolder) -> None:
    newest = run.checkpoints / "step-4"
    shard, manifest = newest / "shard-0.safetensors", newest / "manifest.json"
    told = json.loads(manifest.read_bytes())
    told.pop("blake2b")
    for name, content in payloads.safetensors_faults().items():
        spoil(shard, content)
        digest = hashlib.blake2b(content, digest_size=32).hexdigest()
        told["files"][shard.name] = {"bytes": len(content), "blake2b": digest}
        manifest.write_text(sealed(told))
        with pytest.raises(CheckpointError) as refused:
            CheckpointReader(newest).read("transformer.wte.weight", "param", 0, 8)
        assert "\n" not in str(refused.value), name


def test_hostile_manifests(canary: Path, run: RunFolder) -> None:
    newest = run.checkpoints / "step-4"
    manifest = newest / "manifest.json"
    good = json.loads(manifest.read_bytes())
    good.pop("blake2b")
    entry = good["files"]["state.json"]
    tensor = next(iter(good["tensors"].values()))
    secret = run.root / "secret.safetensors"
    secret.write_bytes(b"x" * 100)
    changes: dict[str, dict[str, Any]] = {
        "a file above": {"files": {**good["files"], "../secret.safetensors": entry}},
        "an absolute file": {"files": {**good["files"], str(secret): entry}},
        "a file in a folder": {"files": {**good["files"], "a/shard-0.safetensors": entry}},
        "no files": {"files": {}},
        "a file of 1 TB": {"files": {**good["files"], "shard-0.safetensors": {**entry, "bytes": 1 << 40}}},
        "a world of 2^60": {"world_size": 1 << 60},
        "a newer format": {"format": 999},
        "another format": {"format": "../../x"},
        "a type that is a function": {
            "tensors": {n: {**t, "keys": dict.fromkeys(t["keys"], "load")} for n, t in good["tensors"].items()}
        },
        "a type with dots": {
            "tensors": {n: {**t, "keys": dict.fromkeys(t["keys"], "os.system")} for n, t in good["tensors"].items()}
        },
        "a shape of 2^59 x 2^59": {"tensors": {**good["tensors"], "more": {**tensor, "shape": [1 << 59, 1 << 59]}}},
        "a negative shape": {"tensors": {**good["tensors"], "more": {**tensor, "shape": [-1]}}},
        "tensors as a list": {"tensors": []},
        "a further key": {"__reduce__": "os.system"},
    }
    for name, change in changes.items():
        manifest.write_text(sealed({**good, **change}))
        with pytest.raises(CheckpointError) as refused:
            CheckpointReader(newest)
        assert "\n" not in str(refused.value), name
        assert len(str(refused.value)) < 600, name


def test_pointers_that_leave_the_folder(run: RunFolder, command: Callable[..., Answer], tmp_path: Path) -> None:
    elsewhere = Path(shutil.copytree(run.checkpoints / "step-4", tmp_path / "elsewhere" / "step-9"))
    for pointer in ("latest", "best"):
        before = (run.checkpoints / pointer).read_bytes() if (run.checkpoints / pointer).exists() else None
        for name in (
            "../../elsewhere/step-9",
            str(elsewhere),
            "..",
            ".",
            "",
            "step-4/../../../elsewhere/step-9",
            "step-4\0",
            7,
        ):
            told = {"checkpoint": name, "step": 9, "val/loss": 1.0}
            for text in (json.dumps(told), sealed(told)):
                (run.checkpoints / pointer).write_text(text)
                with pytest.raises(CheckpointError):
                    pointed(run.checkpoints, pointer)
        answer = command(*again(run))
        assert answer.code in ("ranks", 65), answer
        assert not any("elsewhere" in line and "step-9" in line and "resum" in line for line in answer)
        if before is None:
            (run.checkpoints / pointer).unlink()
        else:
            (run.checkpoints / pointer).write_bytes(before)


def test_pickles_in_every_file_of_a_run_folder(
    canary: Path, run: RunFolder, command: Callable[..., Answer], no_unpickling: list[str]
) -> None:
    """The supervisor's part: refused in one line, or the file is of no account."""
    files = [file for file in sorted(run.root.iterdir()) if file.is_file()]
    assert len(files) >= 4
    files += [
        run.root / name
        for name in ("exit_code", "rng.pt", "last.ckpt", ".metadata", ".start/x/word.json", "errors/rank-0.json")
    ]
    recipe = run.recipe.read_bytes()
    for file in files:
        before = file.read_bytes() if file.exists() else None
        for content in (payloads.pickled(canary, 0), payloads.torch_file(canary), b"\xff\xfe\0", b"[" * 3000):
            spoil(file, content)
            own = run.root.parent / "recipe.yaml"
            own.write_bytes(recipe)
            answer = command("train", f"recipe={own}", f"runs_dir={run.root.parent}", "name=run", "trainer.max_steps=6")
            assert answer.code in ("ranks", 2, 65, 73), (file, answer)
            assert answer.code == "ranks" or len(answer) == 1, (file, answer)
            assert not canary.exists(), file
            if file != run.recipe:
                run.recipe.write_bytes(recipe)
        if before is not None:
            file.write_bytes(before)
    assert no_unpickling == []


def test_a_real_resume_with_payloads_beside_its_files(canary: Path, run: RunFolder, tmp_path: Path) -> None:
    """Supervisor and rank as they are, in a folder of hostile modules, with an environment that allows what it can."""
    newest = run.checkpoints / "step-4"
    for name in (
        ".metadata",
        "model.ckpt",
        "rng_state_0.pth",
        "mp_rank_00_model_states.pt",
        "optimizer.bin",
        "zero_to_fp32.py",
    ):
        spoil(newest / name, payloads.torch_file(canary))
        spoil(run.checkpoints / name, payloads.pickled(canary))
        spoil(run.root / name, payloads.pickled(canary))
    spoil(run.checkpoints / "step-9" / "manifest.json", payloads.pickled(canary))
    here = tmp_path / "here"
    here.mkdir()
    for module in ("sitecustomize", "usercustomize", "wandb", "torch", "yaml", "evil", "pydantic", "lm_train"):
        (here / f"{module}.py").write_text(payloads.python_file(canary))
        (run.root / f"{module}.py").write_text(payloads.python_file(canary))
    startup = here / "startup.py"
    startup.write_text(payloads.python_file(canary))
    environment = os.environ | {
        "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1",
        "PYTHONSTARTUP": str(startup),
        "LM_TRAIN_ATTEMPT": str(newest),
        "LM_TRAIN_SPENDING": "__import__('os')",
        "LM_TRAIN_PORT": f"$(touch {canary})",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
    }
    program = [
        sys.executable,
        "-P",
        "-c",
        "from lm_train.cli import main; raise SystemExit(main())",
    ]  # as lm-train does
    done = subprocess.run(
        [*program, *again(run)], cwd=here, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "resuming from" in done.stderr
    assert "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD is set" in done.stderr
    assert "Traceback" not in done.stderr


def refusal(action: Callable[[], object]) -> str:
    with pytest.raises(LMTrainError) as refused:
        action()
    assert isinstance(refused.value, UsageError | DataError)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_models_of_others(
    canary: Path, command: Callable[..., Answer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder as the hub has it, with code and with weights that are pickles."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "evil.py").write_text(payloads.python_file(canary))
    for name in ("pytorch_model.bin", "model.pt", "tf_model.h5", "model.ckpt", "flax_model.msgpack"):
        spoil(folder / name, payloads.torch_file(canary))
    own = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
    gpt2 = {"model_type": "gpt2", "n_layer": 1, "n_head": 1, "n_embd": 8, "vocab_size": 257}
    for config in (own, gpt2 | {"auto_map": own["auto_map"]}, gpt2 | {"_attn_implementation": "evil/kernel"}):
        (folder / "config.json").write_text(json.dumps(config))
        words = ["recipe=gpt_debug", "data.tokenizer=bytes", f"model={{kind: hf, path: {folder}, block_size: 16}}"]
        answer = command("train", *words)
        assert (answer.code, len(answer)) == (2, 1), answer
        assert "safetensors" in answer[0]
        for shard in ("model.safetensors", "model-00001-of-00001.safetensors"):
            for content in (payloads.pickled(canary), *payloads.safetensors_faults().values()):
                spoil(folder / shard, content)
                if shard != "model.safetensors":
                    weight_map = {
                        "transformer.wte.weight": shard,
                        "x": "../../evil.safetensors",
                        "y": str(folder / "model.pt"),
                    }
                    index = {"metadata": {}, "weight_map": weight_map}
                    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
                words = [
                    "recipe=gpt_debug",
                    "data.tokenizer=bytes",
                    f"model={{kind: hf, path: {folder}, block_size: 16}}",
                ]
                recipe = load(words)

                def build(recipe: Any = recipe) -> None:
                    plan = make_plan(recipe, Machine(cpu_cores=2, gpus=()))
                    models.build(recipe.model, plan, DataFacts(vocab_size=257))

                refusal(build)
                assert not canary.exists()
            (folder / shard).unlink()


def test_tokenizers_and_data_of_others(canary: Path, tmp_path: Path, no_unpickling: list[str], cache: Path) -> None:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "evil.py").write_text(payloads.python_file(canary))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}, "tokenizer_class": "evil.Tokenizer"})
    )
    good = json.loads(Tokenizer(BPE({"a": 0, "b": 1}, [])).to_str())
    spoilt = (
        payloads.pickled(canary),
        b"[" * 100_000,
        json.dumps(good | {"model": {"type": "os.system"}}).encode(),
        b"{}",
        b"",
    )
    for content in spoilt:
        spoil(folder / "tokenizer.json", content)
        assert "tokenizer" in refusal(lambda: load(["recipe=gpt_debug", f"data.tokenizer={folder}"]))
    text = tmp_path / "data"
    text.mkdir()
    for name, content in {
        "data.py": payloads.python_file(canary).encode(),
        "dataset_infos.json": b"{}",
        "a.pkl": payloads.pickled(canary),
        "b.pt": payloads.torch_file(canary),
        "c.npz": payloads.numpy_file(canary),
        "d.parquet": payloads.pickled(canary),
        "e.jsonl": payloads.pickled(canary, 0),
        "f.csv": b"text\n=cmd|'/C touch canary'!A0\n",
        "g.json.gz": payloads.pickled(canary),
    }.items():
        spoil(text / name, content)
        for kind in ("text", "text_classes", "table", "pairs"):
            try:
                words = [
                    f"data={{kind: {kind}, path: {text / name}, global_batch_size: 4}}",
                    f"runs_dir={tmp_path}",
                    "name=x",
                ]
                model = {"table": "mlp", "pairs": "seq2seq"}.get(kind, "gpt" if kind == "text" else "bert")
                recipe = load(["recipe=gpt_debug", f"model={model}", *words])
                plan = make_plan(recipe, Machine(cpu_cores=2, gpus=()))
                folder_of_run = RunFolder(tmp_path / "x")
                folder_of_run.root.mkdir(exist_ok=True)
                data.build(recipe.data, plan, 1, folder_of_run).prepare(recipe.model)
            except (UsageError, DataError):
                pass
            assert not canary.exists(), (name, kind)
    assert not [name for name in no_unpickling if name != "pickle.loads"]


def test_a_cache_that_somebody_else_has_filled(canary: Path, trained: RunFolder, cache: Path, tmp_path: Path) -> None:
    """Every file of the user's cache replaced: it is made anew, or refused, and nothing in it runs."""
    copy = Path(shutil.copytree(cache, tmp_path / "cache"))
    files = [file for file in copy.rglob("*") if file.is_file()]
    assert files
    for content in (payloads.pickled(canary), payloads.numpy_file(canary)):
        for file in files:
            spoil(file, content)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("XDG_CACHE_HOME", str(copy))
            run = RunFolder(shutil.copytree(trained.root, tmp_path / f"run-{len(content)}"))
            with contextlib.suppress(DataError, CheckpointError):
                train(run, run.checkpoints / "step-2")
        assert not canary.exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("LM_TRAIN_PLUGINS", "os"),
        ("LM_TRAIN_PLUGINS", "../evil"),
        ("LM_TRAIN_PLUGINS", "subprocess,evil"),
    ],
)
def test_the_environment_allows_no_code_of_python_itself(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch, canary: Path, command: Callable[..., Answer]
) -> None:
    monkeypatch.setenv(name, value)
    for factory in ("os:system", "subprocess:run", "builtins:exec"):
        answer = command(
            "train",
            "recipe=gpt_debug",
            f"model={{kind: custom, factory: '{factory}', args: {{command: 'touch {canary}'}}}}",
        )
        assert (answer.code, len(answer)) == (2, 1), answer

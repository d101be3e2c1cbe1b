"""`lm-train checkpoint`: the command line as a person uses it, on checkpoints of two ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lm_train import checkpoint
from lm_train.checkpoint import views_of
from lm_train.cli import main
from lm_train.errors import ExitCode
from lm_train.saved import BEST, LATEST, point
from tests.ranks_as_threads import on_ranks
from tests.test_damaged_checkpoints import save, trained


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that has saved at steps 10, 20 and 30, the best at 20."""
    folder = tmp_path / "run" / "checkpoints"
    for step in (10, 20, 30):
        save(folder / f"step-{step}")
    point(folder, BEST, folder / "step-20", monitor="val/loss", mode="min", value=0.5)
    (tmp_path / "run" / "recipe.yaml").write_text("checkpoint:\n  keep_last: 1\n  keep_every_n_steps: 10\n")
    return tmp_path / "run"


def say(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(["checkpoint", *words])
    told = capsys.readouterr()
    return code, told.out, told.err


def test_list_says_step_size_age_ranks_metric_and_what_for(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = say(capsys, f"run={run}")
    assert code == ExitCode.DONE
    lines = out.splitlines()
    assert [line.split()[1] for line in lines] == ["10", "20", "30"]
    assert lines[0].endswith("2 ranks  every 10")
    assert lines[1].endswith("2 ranks  best, every 10  val/loss 0.5")
    assert "latest, every 10" in lines[2]
    assert all(" kB " in line and " s old" in line for line in lines)
    code, out, _ = say(capsys, f"run={run}", "format=json")
    rows = json.loads(out)["checkpoints"]
    assert rows[1]["metric"] == {"val/loss": 0.5}
    assert rows[1]["bytes"] == sum(f.stat().st_size for f in (run / "checkpoints" / "step-20").iterdir()) - (
        (run / "checkpoints" / "step-20" / "manifest.json").stat().st_size
    )
    assert rows[2]["kept_for"] == ["latest", "every 10"]


def test_verify_says_which_are_good_and_ends_with_65(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = say(capsys, "do=verify", f"run={run}")
    assert code == ExitCode.DONE
    assert [line.split(":")[0] for line in out.splitlines()] == ["step-10", "step-20", "step-30"]
    shard = run / "checkpoints" / "step-20" / "shard-1.safetensors"
    content = bytearray(shard.read_bytes())
    content[-3] ^= 8
    shard.write_bytes(content)
    assert say(capsys, "do=list", f"run={run}")[0] == ExitCode.DONE, "reads no tensor"
    code, out, _ = say(capsys, "do=verify", f"run={run}")
    assert code == ExitCode.BAD_CHECKPOINT
    assert out.splitlines()[-1].startswith(f"lm-train: {shard}: damaged: expected ")
    assert "step-30: good" in out
    assert say(capsys, "do=verify", f"run={run}", "step=30")[0] == ExitCode.DONE
    assert say(capsys, "do=verify", f"run={run}", "step=best")[0] == ExitCode.BAD_CHECKPOINT
    assert say(capsys, "do=verify", f"run={run / 'checkpoints' / 'step-20'}")[0] == ExitCode.BAD_CHECKPOINT
    (run / "checkpoints" / LATEST).write_text("{}")
    code, out, _ = say(capsys, "do=list", f"run={run}")
    assert code == ExitCode.BAD_CHECKPOINT
    assert f"{run / 'checkpoints' / LATEST}: damaged" in out


@pytest.mark.parametrize("shards", [1, 3])
def test_convert_gives_whole_tensors_that_safetensors_reads(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], shards: int
) -> None:
    net, optimizer = trained(20)
    out = tmp_path / "out"
    words = ("do=convert", f"run={run}", "step=20", f"shards={shards}", f"out={out}")
    code, said, _ = say(capsys, *words, "what=all")
    assert (code, said.splitlines()[-1]) == (ExitCode.DONE, str(out))
    found: dict[str, torch.Tensor] = {}
    for file in sorted(out.glob("model*.safetensors")):
        found |= load_file(file)
    expected = net.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    states: dict[str, torch.Tensor] = {}
    for file in sorted(out.glob("optimizer*.safetensors")):
        states |= load_file(file)
    weight = optimizer.state[net[0].weight]  # type: ignore[index]
    assert torch.equal(states["0.weight.exp_avg_sq"], weight["exp_avg_sq"])
    if shards > 1:
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert {name: (out / file).exists() for name, file in index["weight_map"].items()} == dict.fromkeys(
            expected, True
        )
        assert index["metadata"]["total_size"] == sum(4 * tensor.numel() for tensor in expected.values())
    code, _, told = say(capsys, *words)
    assert (code, "is there already" in told) == (ExitCode.USAGE, True)


def test_convert_keeps_types_that_stand_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = torch.nn.Sequential(torch.nn.Linear(3, 3).to(torch.bfloat16), torch.nn.BatchNorm1d(3))
    folder = tmp_path / "checkpoints" / "step-1"
    on_ranks(2, lambda rank, group: checkpoint.save(folder, views_of(net, None, rank, 2), {"step": 1}, group))
    assert say(capsys, "do=convert", f"run={tmp_path}", f"out={tmp_path / 'out'}")[0] == ExitCode.DONE
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in net.state_dict().items())
    assert found["1.num_batches_tracked"].shape == ()


def test_wrong_words_are_said_in_a_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, told in (
        (("do=verfy", f"run={run}"), "do=verfy: expected list, verify or convert; did you mean do=verify?"),
        (("do=list",), "run: expected a run's folder"),
        ((f"run={run}/no",), "no such folder"),
        (("do=verify", f"run={run}", "shard=2"), "do=verify takes no such word"),
        (("do=convert", f"run={run}", "shards=0"), "expected a number of files from 1 to 9999"),
        (("do=convert", f"run={run}", "what=everything"), "expected model, optimizer or all"),
        (("do=verify", f"run={run}", "step=x"), "expected a number, latest or best"),
        (("do=verify", f"run={run}", f"run={run}"), "run: given twice"),
        (("verify",), "expected key=value"),
    ):
        code, _, error = say(capsys, *words)
        assert code == ExitCode.USAGE
        assert told in error
        assert len(error.splitlines()) == 1
    code, _, error = say(capsys, "do=verify", f"run={run}", "step=15")
    assert (code, error.strip().endswith("no checkpoint of step 15; there are 30, 20, 10")) == (65, True)
    (run / "empty").mkdir()
    assert say(capsys, "do=verify", f"run={run / 'empty'}")[0] == ExitCode.BAD_CHECKPOINT
    assert "no checkpoint yet" in say(capsys, f"run={run / 'empty'}")[1]

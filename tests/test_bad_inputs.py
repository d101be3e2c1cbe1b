"""Recipes, names and checkpoints that are wrong: one line with what to do, the right exit code, in a moment, without torch."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lm_train import cli
from lm_train.runs import RunFolder
from lm_train.saved.sealed import sealed
from tests.bad_recipes import FILES

CPU_S = 5.0
Command = Callable[..., tuple[int | str, list[str]]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Command:
    """A training's exit code, or `ranks` where its ranks would have been started; and the lines on standard error."""

    class Started(BaseException):
        pass

    def start(*args: object) -> None:
        raise Started

    monkeypatch.setattr("lm_train.launch.Supervisor.run", start)
    monkeypatch.chdir(tmp_path)

    def go(*words: str) -> tuple[int | str, list[str]]:
        capsys.readouterr()
        began = time.process_time()
        try:
            code: int | str = cli.main(["train", *words])
        except Started:
            code = "ranks"
        assert time.process_time() - began < CPU_S
        err = capsys.readouterr().err
        assert "Traceback" not in err
        return code, [line for line in err.splitlines() if line.startswith("lm-train")]

    return go


def test_there_are_80_cases() -> None:
    assert len(FILES) + len(CHECKPOINTS) + len(NAMES) >= 80


@pytest.mark.parametrize("name", FILES)
def test_a_recipe_file(name: str, command: Command, tmp_path: Path) -> None:
    content, says = FILES[name]
    (tmp_path / "recipe.yaml").write_bytes(content)
    code, said = command("recipe=./recipe.yaml", "trainer.devices=1")
    assert (code, len(said)) == (2, 1), said
    assert says in said[0]
    assert "recipe.yaml" in said[0]
    assert said[0].isprintable()
    assert len(said[0]) < 1000
    assert [file.name for file in tmp_path.iterdir()] == ["recipe.yaml"]


def test_recipe_files_that_are_right(command: Command, tmp_path: Path) -> None:
    """As editors of other systems write them, and numbers as people do."""
    for content in (
        b"\xef\xbb\xbfseed: 3\n",
        b"seed: 3\r\ntrainer:\r\n  max_steps: 5\r\n",
        b"optim: {learning_rate: 1e-4}",
    ):
        (tmp_path / "recipe.yaml").write_bytes(content)
        assert command("recipe=./recipe.yaml", "trainer.devices=1") == ("ranks", [])


NAMES = (
    ("name=a/b", "name: expected text of letters"),
    ("name=../a", "did you mean a?"),
    ("name=..", "name: expected text of letters"),
    ("name=.", "name: expected text of letters"),
    ("name=.hidden", "did you mean hidden?"),
    ("name=-rf", "did you mean rf?"),
    ("name=a\nb", "name: expected text of letters"),
    ("name=" + "a" * 101, "(100 at most)"),
    ("name=" + "a" * 5000, "(100 at most)"),
    ("name=a b", "did you mean a-b?"),
    ("name=$(touch x)", "name: expected text of letters"),
    ("name=~x", "name: expected text of letters"),
    ("name=null/x", "name: expected text of letters"),
    ("name=a\\b", "name: expected text of letters"),
    ("name=con:x", "did you mean con-x?"),
)


@pytest.mark.parametrize(
    ("word", "says"), NAMES, ids=[word[:24].encode("unicode_escape").decode() for word, _ in NAMES]
)
def test_the_name_of_a_run(word: str, says: str, command: Command, tmp_path: Path) -> None:
    code, said = command("recipe=gpt_debug", word)
    assert (code, len(said)) == (2, 1), said
    assert says in said[0]
    assert list(tmp_path.iterdir()) == []


def _reseal(checkpoint: Path, **change: object) -> None:
    file = checkpoint / "manifest.json"
    content = json.loads(file.read_bytes())
    content.pop("blake2b")
    file.write_text(sealed({**content, **change}))


def _remove(name: str) -> Callable[[Path], object]:
    return lambda checkpoint: (checkpoint / name).unlink()


def _write(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda checkpoint: (checkpoint / name).write_bytes(content)


def _loop(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint)
    checkpoint.symlink_to(checkpoint.name)


def _empty(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()


def _lightning(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint)
    checkpoint.write_bytes(b"PK\x03\x04")


def _transformers(checkpoint: Path) -> None:
    _empty(checkpoint)
    (checkpoint / "config.json").write_text("{}")
    (checkpoint / "model.safetensors").write_bytes(b"x")


CHECKPOINTS: dict[str, tuple[Callable[[Path], object], tuple[str, ...], int]] = {
    "not there": (shutil.rmtree, (), 2),
    "an empty folder": (_empty, (), 65),
    "a Lightning checkpoint": (_lightning, (), 65),
    "a folder of transformers": (_transformers, (), 65),
    "a link to itself": (_loop, (), 2),
    "without its manifest": (_remove("manifest.json"), (), 65),
    "without its state": (_remove("state.json"), (), 65),
    "without its shard": (_remove("shard-0.safetensors"), (), 65),
    "a manifest of no bytes": (_write("manifest.json", b""), (), 65),
    "a manifest that is no JSON": (_write("manifest.json", b"{"), (), 65),
    "a manifest that is a list": (_write("manifest.json", b"[]"), (), 65),
    "a manifest of others": (_write("manifest.json", b'{"format": 2}'), (), 65),
    "a manifest in Latin-1": (_write("manifest.json", b'{"\xfc": 1}'), (), 65),
    "of a newer version": (lambda path: _reseal(path, format=99), (), 65),
    "of an older version": (lambda path: _reseal(path, format=1), (), 65),
    "a state of no bytes": (_write("state.json", b""), (), 65),
    "a state that is no JSON": (_write("state.json", b"{"), (), 65),
    "a shard of no bytes": (_write("shard-0.safetensors", b""), (), 65),
    "a shard too long": (lambda path: (path / "shard-0.safetensors").open("ab").write(b"x"), (), 65),
    "of another seed": (lambda path: None, ("seed=7",), 65),
    "of another width": (lambda path: None, ("model.n_embd=32",), 65),
    "of another optimizer": (lambda path: None, ("optim=sgd",), 65),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_to_resume(name: str, trained: RunFolder, command: Command, tmp_path: Path) -> None:
    spoil, words, expected = CHECKPOINTS[name]
    checkpoint = Path(shutil.copytree(trained.checkpoints / "step-4", tmp_path / "step-4"))
    spoil(checkpoint)
    own = [word for word in words if "=" in word]
    code, said = command(
        f"recipe={trained.recipe}", "name=new", f"runs_dir={tmp_path}/runs", f"resume={checkpoint}", *own
    )
    assert (code, len(said)) == (expected, 1), said
    assert said[0].isprintable()
    assert str(checkpoint) in said[0] or "seed" in said[0] or name.startswith("of another")
    assert len(said[0]) < 600
    assert not (tmp_path / "runs").exists()


def test_resume_words(trained: RunFolder, command: Command, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(trained.root, tmp_path / "run"))
    for word, expected, says in (
        ("resume=nowhere", 2, "no such folder: 'nowhere'"),
        ("resume=last", 2, "did you mean resume=auto?"),
        ("resume=", 2, "resume: expected"),
        ("resume=a\0b", 2, "resume: expected"),
        (f"resume={'x/' * 3000}", 2, "no such folder"),
        ("resume=~nobody-of-that-name", 2, "no such folder"),
        (f"resume={tmp_path}", 65, "holds no checkpoint"),
        (f"resume={folder}/recipe.yaml", 65, "recipe.yaml"),
        ("resume=never", 2, "has checkpoints"),
    ):
        name = "run" if word == "resume=never" else "new"
        words = (f"recipe={trained.recipe}", f"name={name}", f"runs_dir={tmp_path}", "trainer.max_steps=9", word)
        code, said = command(*words)
        assert (code, len(said)) == (expected, 1), (word[:40], said)
        assert says in said[0], said

"""Recipes: where each value comes from, how strictly files are read, and what a person is told of a faulty one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lm_train.errors import UsageError
from lm_train.recipe import Recipe, dump, load, shipped_recipes
from lm_train.recipe.files import MAX_BYTES
from lm_train.recipe.text import parse_scalar, parse_yaml
from lm_train.recipe.tokenizer_names import known_vocab_size

Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes a file into the working folder and gives the word `recipe=./NAME` for it."""
    monkeypatch.chdir(tmp_path)

    def to_file(content: str | bytes, name: str = "mine.yaml") -> str:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        return f"recipe=./{name}"

    return to_file


def problems(*words: str) -> list[str]:
    """What is wrong with a command that must be refused."""
    with pytest.raises(UsageError) as caught:
        load(words)
    return caught.value.problems


# where a value comes from


def test_precedence(write: Write) -> None:
    write("trainer: {max_steps: 11, log_every_n_steps: 11, val_check_interval: 11}\nseed: 11", "base.yaml")
    mine = write("base: base.yaml\ntrainer: {log_every_n_steps: 22, val_check_interval: 22}")
    recipe = load([mine, "trainer.val_check_interval=33"])
    assert recipe.trainer.max_steps == recipe.seed == 11  # the base
    assert recipe.trainer.log_every_n_steps == 22  # the file over the base
    assert recipe.trainer.val_check_interval == 33  # the word over the file
    assert recipe.trainer.sample_tokens == 120  # the default

    debug = load([mine, "debug=true", "trainer.max_steps=7"])
    assert debug.trainer.log_every_n_steps == 1  # debug over the file
    assert debug.trainer.max_steps == 7  # the word over debug
    assert debug.trainer.strategy == "single"
    assert load([mine, "debug=false"]).trainer.log_every_n_steps == 22


def test_debug_in_a_file_is_debug(write: Write) -> None:
    assert load([write("debug: true\ntrainer: {max_steps: 500}")]).trainer.max_steps == 20


def test_words_may_come_in_any_order() -> None:
    first = load(["optim.momentum=0.8", "optim.kind=sgd", "recipe=gpt_debug"])
    assert first.optim.momentum == 0.8  # type: ignore[union-attr]
    assert first == load(["recipe=gpt_debug", "optim=sgd", "optim.momentum=0.8"])
    assert load(["model.n_layer=3", "model={n_layer: 2, n_head: 1, n_embd: 8}", "recipe=gpt_debug"]).model.n_layer == 3


def test_base_by_name_and_by_path(write: Write) -> None:
    write("base: gpt_medium\nmodel: {block_size: 64}", "below/base.yaml")
    recipe = load([write("base: ./base.yaml\nseed: 3", "below/mine.yaml")])
    assert (recipe.model.n_layer, recipe.model.block_size, recipe.seed) == (24, 64, 3)
    assert recipe.data.tokenizer == "gpt2"  # gpt_small, the base of gpt_medium
    assert recipe.recipe == "mine"


def test_base_that_leads_back(write: Write) -> None:
    write("seed: 1\nbase: b.yaml", "a.yaml")
    write("base: c.yaml", "b.yaml")
    write("\nbase: a.yaml", "c.yaml")
    expected = "base=a.yaml: leads back to itself: a.yaml -> b.yaml -> c.yaml -> a.yaml (c.yaml:2)"
    assert problems("recipe=./a.yaml") == [expected]


@pytest.mark.parametrize(
    ("base", "said"),
    [
        ("gpt_smal", "base=gpt_smal: no such recipe; did you mean gpt_small? (mine.yaml:2)"),
        ("./nope.yaml", "base=./nope.yaml: no such file (mine.yaml:2)"),
        ("./mien.yaml", "base=./mien.yaml: no such file; did you mean ./mine.yaml? (mine.yaml:2)"),
        ("[a]", "base: expected the name or the path of a recipe; got ['a'] (mine.yaml:2)"),
    ],
)
def test_base_that_is_not_there(write: Write, base: str, said: str) -> None:
    assert problems(write(f"seed: 1\nbase: {base}")) == [said]


def test_recipe_that_cannot_be_read_makes_no_further_problems(write: Write) -> None:
    """What only that recipe could have made right or wrong is not judged; what is wrong by itself is told."""
    words = ("data.subset=x", "optim.warmup_steps=1500", "model.n_layers=4", "seed=x")
    said = problems("recipe=gpt_smal", *words)
    assert [line.split(":")[0] for line in said] == ["recipe=gpt_smal", "seed", "model.n_layers"]


def test_section_without_keys_takes_words(write: Write) -> None:
    """`model:` with nothing under it is refused at its line, with or without words, and breaks nothing else."""
    mine = write("seed: 1\nmodel:\n")
    said = ["model: expected keys and values such as {key: value}; got null (mine.yaml:2)"]
    assert problems(mine) == problems(mine, "model.n_layer=4") == said


# kinds


def test_other_kind_keeps_what_all_kinds_share() -> None:
    small, embedded = load(["recipe=gpt_small"]), load(["recipe=gpt_small", "data=embedded"])
    assert embedded.data.kind == "embedded"
    assert embedded.data.global_batch_size == small.data.global_batch_size == 512
    assert embedded.data.tokenizer == "bpe:2048"  # gpt2 went with the kind
    images = load(["recipe=gpt_small", "data=images", "model=mlp"])
    assert images.data.global_batch_size == 512
    assert not hasattr(images.data, "tokenizer")
    assert load(["recipe=gpt_small", "model=llama"]).model.n_embd == small.model.n_embd
    assert not hasattr(embedded.data, "path")
    sgd = load(["recipe=gpt_small", "optim.kind=sgd"])
    assert (sgd.optim.kind, sgd.optim.learning_rate) == ("sgd", small.optim.learning_rate)


def test_path_makes_the_data_text(write: Write, tmp_path: Path) -> None:
    (tmp_path / "input.txt").write_text("text")
    recipe = load(["recipe=gpt_char", "data.path=input.txt"])
    assert (recipe.data.kind, recipe.data.tokenizer, recipe.data.global_batch_size) == ("text", "chars", 12)
    refused = problems("recipe=gpt_char", "data.path=input.txt", "data=embedded")
    assert refused == ["data.path: no such key; did you mean data=text, which has path?"]


def test_braces_replace_a_section_whole() -> None:
    recipe = load(["recipe=gpt_char", "model={n_layer: 2, n_head: 2, n_embd: 32}"])
    assert recipe.model.n_layer == 2
    assert recipe.model.bias is True  # gpt_char says false
    assert recipe.model.block_size == 1024


# dump and load


@pytest.mark.parametrize("name", shipped_recipes())
@pytest.mark.parametrize("words", [(), ("debug=true", "name=run-1")], ids=["plain", "debug"])
def test_round_trip(name: str, words: tuple[str, ...], write: Write) -> None:
    recipe = load([f"recipe={name}", *words])
    assert load([write(dump(recipe))]) == recipe


TEXTS = (
    "1e-4",
    "None",
    "null",
    "~",
    "True",
    "no",
    "0123",
    "12:30:00",
    "5",
    "[a",
    "a: b",
    "ünïcode",
    "#x",
    "'",
    "-",
    "a\n",
)


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip_of_text_that_looks_like_something_else(text: str, write: Write) -> None:
    recipe = load(["recipe=gpt_debug"])
    tracking = recipe.tracking.model_copy(update={"group": text, "tags": (text, "plain")})
    recipe = recipe.model_copy(update={"tracking": tracking})
    assert load([write(dump(recipe))]) == recipe


@pytest.mark.parametrize("text", ["2024", "5e3", "12e4567", "1_000", "007", "1.50"])
def test_name_stays_as_it_was_written(text: str, write: Write) -> None:
    assert load(["recipe=gpt_debug", f"name={text}"]).name == text
    assert load([write(f"name: {text}")]).name == text


def test_recipe_is_frozen() -> None:
    recipe = load(["recipe=gpt_debug"])
    with pytest.raises(ValueError, match="frozen"):
        recipe.model.n_layer = 3  # type: ignore[misc]
    assert isinstance(recipe, Recipe)


# how strictly a file is read


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("4", 4),
        ("-4", -4),
        ("1_000", 1000),
        (".5", 0.5),
        ("6.", 6.0),
        ("2E3", 2000.0),
        ("true", True),
        ("null", None),
        ("~", None),
        ("no", "no"),
        ("yes", "yes"),
        ("off", "off"),
        ("0123", "0123"),
        ("0123.5", "0123.5"),
        ("01e5", "01e5"),
        ("0o17", "0o17"),
        ("0x1f", "0x1f"),
        ("12:30:00", "12:30:00"),
        ("2026-01-01", "2026-01-01"),
        (".inf", ".inf"),
        ("nan", "nan"),
        ("1e", "1e"),
        ("bf16-mixed", "bf16-mixed"),
    ],
)
def test_plain_scalars(text: str, value: object) -> None:
    parsed = parse_scalar(text)
    assert parsed == value
    assert isinstance(parsed, type(value))
    assert parse_yaml(f"key: {text}", "x.yaml")[0] == {"key": value}


@pytest.mark.parametrize("content", ["\ufeffseed: 3\n", "seed: 3\r\nname: a\r\n", "--- \nseed: 3\n", '{"seed": 3}'])
def test_files_that_are_fine(content: str, write: Write) -> None:
    assert load([write(content)]).seed == 3


REFUSED = {
    "empty": (b"", "mine.yaml:1: empty; a recipe has sections such as model: and data:"),
    "comment only": (b"# nothing\n", "mine.yaml:1: empty; a recipe has sections such as model: and data:"),
    "not a map": (b"[1]", "mine.yaml:1: expected sections such as model: and data:; got [1]"),
    "text": (b"words", "mine.yaml:1: expected sections such as model: and data:; got 'words'"),
    "duplicate key": (b"seed: 1\nseed: 2", "mine.yaml:2: duplicate key 'seed', first on line 1; keep one"),
    "nested duplicate": (
        b"model:\n  n_layer: 1\n  n_layer: 2",
        "mine.yaml:3: duplicate key 'n_layer', first on line 2; keep one",
    ),
    "tag": (
        b"\nseed: !!python/object:os.system 5",
        "mine.yaml:2: tags (tag:yaml.org,2002:python/object:os.system) are not allowed; write a plain value",
    ),
    "anchor": (b"name: &x a", "mine.yaml:1: anchors (&) and aliases (*) are not allowed; write the value out"),
    "alias": (b"a: 1\nb: *a", "mine.yaml:2: anchors (&) and aliases (*) are not allowed; write the value out"),
    "tab": (b"model:\n\tn_layer: 3", "mine.yaml:2: not YAML: a tab indents this line; use spaces"),
    "unclosed": (b"seed: [1", "mine.yaml:1: not YAML: did not find expected ',' or ']'"),
    "two documents": (b"seed: 1\n---\nseed: 2", "mine.yaml:2: not YAML: but found another document"),
    "map as key": (b"? {a: 1}\n: 3", "mine.yaml:1: a key must be a plain name"),
    "not UTF-8": (b"seed: 1\nname: \xff", "mine.yaml:2: not UTF-8 (byte 14)"),
    "UTF-16": ("seed: 1".encode("utf-16"), "mine.yaml:1: not UTF-8 (byte 0)"),
    "deep": (b"a: " + b"[" * 20 + b"]" * 20, "mine.yaml:1: nested more than 12 deep"),
    "very deep": (b"a: " + b"[" * 400_000, "mine.yaml:1: nested more than 12 deep"),  # overflows a stack if composed
    "large": (b"# " + b"x" * MAX_BYTES, "mine.yaml:1: larger than 1,048,576 bytes; a recipe is a page at most"),
    "large in bytes": (
        b"# " + "ü".encode() * (MAX_BYTES // 2),
        "mine.yaml:1: larger than 1,048,576 bytes; a recipe is a page at most",
    ),
    "section is no map": (
        b"seed: 1\ntrainer: 5",
        "trainer: expected keys and values such as {key: value}; got 5 (mine.yaml:2)",
    ),
    "kind as value": (b"data: text", "data: expected keys and values such as {kind: text}; got 'text' (mine.yaml:1)"),
    "dotted key": (
        b"model.n_layer: 3",
        "model.n_layer: a file nests its keys; write model: {n_layer: VALUE} (mine.yaml:1)",
    ),
    "octal": (b"seed: 0123", "seed: expected an integer of at least 0; got '0123' (mine.yaml:1)"),
    "time": (b"seed: 12:30:00", "seed: expected an integer of at least 0; got '12:30:00' (mine.yaml:1)"),
    "no": (b"debug: no", "debug: expected true or false; got 'no'; did you mean false? (mine.yaml:1)"),
    "infinite": (
        b"optim: {learning_rate: 1e400}",
        "optim.learning_rate: expected a number above 0; got 1e400 (mine.yaml:1)",
    ),
    "thousands of digits": (
        b"seed: " + b"9" * 5000,
        f"seed: expected an integer of at least 0; got '{'9' * 76}... (mine.yaml:1)",
    ),
}


@pytest.mark.parametrize(("content", "said"), REFUSED.values(), ids=REFUSED)
def test_files_that_are_refused(content: bytes, said: str, write: Write) -> None:
    assert problems(write(content)) == [said]


def test_file_that_may_not_be_read(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    word = write("seed: 1")
    monkeypatch.setattr(Path, "open", refuse)
    assert problems(word) == ["mine.yaml: cannot read: Permission denied"]


def test_fifo_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    assert problems(f"recipe={tmp_path}/pipe.yaml") == [f"recipe={tmp_path}/pipe.yaml: not a plain file"]


# what is said


def test_all_problems_at_once_each_with_its_line(write: Write) -> None:
    mine = write(
        "seed: x\n"
        "modle: {n_layer: 3}\n"
        "model:\n"
        "  n_layer: 0\n"
        "  n_heads: 3\n"
        "data: {kind: text}\n"
        "optim:\n"
        "  kind: adamx\n"
        "  lerning_rate: 3\n"
    )
    assert problems(mine, "trainer.max_steps=many", "tracking.wandb=off") == [
        "seed: expected an integer of at least 0; got 'x' (mine.yaml:1)",
        "model.n_layer: expected an integer of at least 1; got 0 (mine.yaml:4)",
        "model.n_heads: no such key; did you mean model.n_head? (mine.yaml:5)",
        "optim.kind: expected adamw, adam, sgd, adagrad, rmsprop, muon; got 'adamx'; did you mean optim=adam? (mine.yaml:8)",
        "trainer.max_steps: expected an integer of at least 1 or auto; got 'many'",
        "tracking.wandb: expected auto, online, offline, disabled; got 'off'; did you mean disabled?",
        "modle: no such key; did you mean model? (mine.yaml:2)",
        "optim.lerning_rate: no such key; did you mean optim.learning_rate? (mine.yaml:9)",
        "data.path: data=text needs it; give data.path=VALUE (mine.yaml:6)",
    ]


def test_word_takes_the_blame_from_the_file(write: Write) -> None:
    mine = write("trainer: {max_steps: x}\nmodel: {n_layer: y}")
    assert load([mine, "trainer.max_steps=3", "model={n_layer: 2}"]).trainer.max_steps == 3
    said = problems(mine, "trainer.max_steps=0", "model={n_layer: -1}")
    assert len(said) == 2
    assert not any("mine.yaml" in line for line in said)


def test_conflict_names_the_line_of_the_file_only(write: Write) -> None:
    mine = write("trainer:\n  activation_checkpointing: 9\n")
    said = "trainer.activation_checkpointing: every 9th block of model.n_layer=2 is none; write none, full, or a number up to 2"
    assert problems(mine, "model.n_layer=2") == [f"{said} (mine.yaml:2)"]
    assert problems("recipe=gpt_debug", "trainer.activation_checkpointing=9", "model.n_layer=2") == [said]


def test_debug_takes_the_blame_from_the_file() -> None:
    said = "data.global_batch_size=8 is not a multiple of data.micro_batch_size=3 x trainer.devices=1; try "
    # 8 is debug's, not the file's
    assert problems("recipe=gpt_debug", "debug=true", "data.micro_batch_size=3") == [said + "data.global_batch_size=9"]


def test_tokenizer_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "tok.json").write_text('{"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"id": 7}]}')
    word = "data.tokenizer=~/tok.json"
    assert load(["recipe=gpt_debug", word, "model.vocab_size=8"]).model.vocab_size == 8
    said = problems("recipe=gpt_debug", word, "model.vocab_size=7")
    assert said[0].startswith("model.vocab_size: data.tokenizer=~/tok.json has 8 ids, model.vocab_size=7 is smaller")
    for content in ("5", "[]", "{]", '{"model": 5}', '{"model": {"vocab": {}}, "added_tokens": [{}]}', "[" * 100_000):
        (tmp_path / "tok.json").write_text(content)
        assert "holds no vocabulary" in problems("recipe=gpt_debug", word)[0], content[:40]


def test_folder_of_that_name_does_not_hide_a_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("chars", "bytes"):
        (tmp_path / name).mkdir()
        assert load(["recipe=gpt_debug", f"data.tokenizer={name}"]).data.tokenizer == name


def test_loading_and_planning_leave_torch_alone(tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "from lm_train.hardware import this_machine\n"
        "from lm_train.plan import make_plan\n"
        "from lm_train.recipe import load\n"
        "make_plan(load(['recipe=gpt_debug']), this_machine())\n"
        "print(sorted(m for m in sys.modules if m.split('.')[0] in ('torch', 'lightning', 'numpy', 'datasets')))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert list(tmp_path.iterdir()) == []


def test_a_vocabulary_with_the_word_model_is_still_counted(tmp_path: Path) -> None:
    """GPT-2's own encoder.json has it."""
    (tmp_path / "encoder.json").write_text('{"a": 0, "model": 1, "b": 2}')
    assert known_vocab_size(str(tmp_path)) == 3

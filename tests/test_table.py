"""Tables: what is learnt of columns against scikit-learn, what is said of bad rows, and runs from file to metric."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.impute import SimpleImputer
from sklearn.metrics import mean_squared_error, r2_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler, RobustScaler, StandardScaler

from lm_train.data.preprocessing import Cells, Preprocessing
from lm_train.data.table import TableDataModule
from lm_train.errors import DataError, UsageError
from lm_train.hardware import Machine
from lm_train.modules import Regression
from lm_train.plan import Plan, known_facts, make_plan
from lm_train.recipe import TableData, load
from lm_train.runs import RunFolder, read_jsonl
from lm_train.train import train
from tests.conftest import Ranks
from tests.small_runs import small_run

MLP = "model={kind: mlp, widths: [8]}"


def opened(folder: Path, *words: str) -> TableDataModule:
    recipe = load(["recipe=tabular_debug", *(f"data.{word}" for word in words)])
    data = TableDataModule(recipe.data, make_plan(recipe, Machine(2, ())), 0, RunFolder(folder))  # type: ignore[arg-type]
    data.prepare(recipe.model)
    return data


def written(file: Path, header: str, *rows: str) -> str:
    file.write_text("\n".join((header, *rows)) + "\n", encoding="utf-8")
    return f"path={file}"


def plain_rows(n: int = 60) -> list[str]:
    draw = np.random.default_rng(1)
    return [f"{a:.3f},{b:.3f},{'red' if a > 0 else 'blue'},{int(a + b > 0)}" for a, b in draw.normal(size=(n, 2))]


@pytest.mark.parametrize("missing", ["mean", "median"])
@pytest.mark.parametrize(
    ("scaling", "theirs"), [("standard", StandardScaler()), ("minmax", MinMaxScaler()), ("robust", RobustScaler())]
)
def test_numbers_become_what_scikit_learn_makes_of_them(missing: str, scaling: str, theirs: Any) -> None:
    values = np.random.default_rng(0).lognormal(size=(200, 3)) * (1, 50, 1e4)
    values[::7, 1] = math.nan
    section = TableData(missing=missing, scaling=scaling)  # type: ignore[arg-type]
    names = ["a", "b", "c"]
    train, test = (
        Cells({name: part[:, i].tolist() for i, name in enumerate(names)}, [""] * len(part))
        for part in (values[:150], values[150:])
    )
    ours = Preprocessing.learn(train, names, section)
    pipeline = make_pipeline(SimpleImputer(strategy=missing), theirs).fit(values[:150])
    for cells, part in ((train, values[:150]), (test, values[150:])):
        found, _ = ours.apply(cells, clip=False)
        np.testing.assert_allclose(found, pipeline.transform(part), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rule", ["deviations", "iqr"])
def test_outliers(tmp_path: Path, rule: str, capsys: pytest.CaptureFixture[str]) -> None:
    rows = plain_rows()
    path = written(tmp_path / "t.csv", "a,b,colour,y", *rows, "1000,0,red,1", "0,-1000,blue,0")
    words = (path, "global_batch_size=8", f"outlier_rule={rule}", "outlier_limit=4", "val_fraction=0.02")
    kept = opened(tmp_path, *words).samples["train"].inputs
    clipped = opened(tmp_path, *words, "outliers=clip")
    dropped = opened(tmp_path, *words, "outliers=drop")
    assert len(clipped.samples["train"]) == len(kept)
    assert len(dropped.samples["train"]) in (len(kept) - 2, len(kept) - 1)  # one may validate
    assert "training rows have an outlier and are left out" in capsys.readouterr().err
    # with the far value at its limit, or out of the way, the others have a deviation again
    spread = [
        np.sort(np.abs(x[:, 0]))[-10] for x in (kept, clipped.samples["train"].inputs, dropped.samples["train"].inputs)
    ]
    assert spread[0] < spread[1] < spread[2]
    assert spread[2] > 1


def test_a_limit_comes_from_training_rows_alone() -> None:
    train = Cells({"a": [float(i) for i in range(101)]}, [""] * 101)
    section = TableData(outliers="clip", outlier_rule="iqr", outlier_limit=1.0, scaling="none")
    learnt = Preprocessing.learn(train, ["a"], section)
    found, _ = learnt.apply(Cells({"a": [-1e9, 50.0, 1e9]}, [""] * 3), clip=True)
    assert found[:, 0].tolist() == [25 - 50, 50, 75 + 50]  # quartiles 25 and 75, one range of 50 beyond them


@pytest.mark.parametrize("outliers", ["clip", "drop"])
def test_a_column_whose_quartiles_coincide_keeps_its_values(
    outliers: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [f"{max(0, i - 79)},{i},{i % 2}" for i in range(100)]  # 80 zeros and 1 to 20
    path = written(tmp_path / "t.csv", "seldom,a,y", *rows)
    data = opened(tmp_path, path, f"outliers={outliers}", "outlier_rule=iqr", "outlier_limit=1.5")
    seldom = data.samples["train"].inputs[:, 0]
    assert len(np.unique(seldom)) > 15
    assert (seldom.mean(), seldom.std()) == (pytest.approx(0, abs=1e-6), pytest.approx(1))
    assert "the quartiles of seldom are one value" in capsys.readouterr().err
    facts = json.loads(json.dumps(data.preprocessing.facts(), allow_nan=False))
    assert facts["columns"][0]["low"] is None


def test_a_column_that_is_constant_without_the_outliers_is_left_out() -> None:
    flag, values = [0.0] * 98 + [1.0] * 2, [float(i) for i in range(98)] + [1e6] * 2
    section = TableData(outliers="drop", outlier_rule="iqr", outlier_limit=3.0)
    learnt = Preprocessing.learn(Cells({"flag": flag, "a": values}, [""] * 100), ["flag", "a"], section)
    assert learnt.unused == {"flag": "it is 0 in every training row without its outliers"}
    (column,) = learnt.columns
    assert column.shift == pytest.approx(np.mean(values[:98]))  # type: ignore[union-attr]


def test_texts_are_one_hot_and_unknown_ones_all_zeros(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "d").mkdir()
    written(tmp_path / "d" / "train.csv", "x,colour,y", *(f"{i},{'rgb'[i % 3]},{i % 2}" for i in range(60)))
    written(tmp_path / "d" / "test.csv", "y,colour,x", "0,g,1", "1,violet,2", "0,,3", "1,pink,4")
    data = opened(tmp_path, f"path={tmp_path / 'd'}", "target=y")
    _, colour = data.preprocessing.columns
    assert colour.values == ("b", "g", "r")  # type: ignore[union-attr]
    assert data.samples["test"].inputs[:, 1:].tolist() == [[0, 1, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]]
    told = capsys.readouterr().err
    assert "2 texts in test rows occur in no training row" in told
    assert "values missing in test rows: colour 1" in told
    assert data.facts.input_shape == (4,)


def test_missing_values_are_counted_by_column(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [*plain_rows(), "NA,1,red,1", ",2,blue,0", "3,?,red,1"]
    words = (written(tmp_path / "t.csv", "a,b,colour,y", *rows), "global_batch_size=8", "val_fraction=0.001")
    assert len(opened(tmp_path, *words).samples["train"]) == 61
    assert "values missing in train rows: a 2, b 1; the training rows' mean" in capsys.readouterr().err
    assert len(opened(tmp_path, *words, "missing=drop").samples["train"]) == 58
    assert "3 of 63 train rows lack a value and are left out (a 2, b 1)" in capsys.readouterr().err
    with pytest.raises(DataError, match=r"t.csv line 62: column 'a' has no value \(missing by column: a 2, b 1\)"):
        opened(tmp_path, *words, "missing=error")


BAD = {
    "fields": (["1,2,red"], r"t.csv line 62: 3 cells, the header has 4", ()),
    "text": (["1,many,red,1"], r"t.csv line 62: column 'b' is 'many', expected a number", ("val_fraction=0.001",)),
    "infinite": (["1,inf,red,1"], r"t.csv line 62: column 'b' is 'inf', expected a finite number", ("val_fraction=0.001",)),
    "column": ([], r"no column 'yy'; it has a, b, colour, y; did you mean data.target=y\?", ("target=yy",)),
    "dropped": ([], r"no column 'color'; .*did you mean data.drop_columns=colour\?", ("drop_columns=color",)),
    "no target": (["1,2,red,"], r"t.csv line 62: column 'y' has no value .*set data.missing=drop", ("val_fraction=0.001",)),
    "numbers": (["1,2,red,0.5"], r"has numbers such as 0.5, not classes; set data.task=regression", ("val_fraction=0.001",)),
    "words": (["1,2,red,no"], r"line 62: column 'y' is 'no', expected a number", ("task=regression", "val_fraction=0.001")),
    "batch": ([], r"54 training rows are fewer than data.global_batch_size=512", ("global_batch_size=512",)),
    "nothing left": ([], r"no columns beside y", ("drop_columns=[a, b, colour]",)),
}  # fmt: skip


@pytest.mark.parametrize("fault", BAD)
def test_what_is_wrong_is_said_in_one_line(tmp_path: Path, fault: str) -> None:
    rows, message, words = BAD[fault]
    path = written(tmp_path / "t.csv", "a,b,colour,y", *plain_rows(), *rows)
    with pytest.raises(DataError, match=message) as caught:
        opened(tmp_path, path, *words)
    assert "\n" not in str(caught.value)


def test_classes_are_the_texts_that_stand_in_the_file(tmp_path: Path) -> None:
    texts = ("7", "007", "none", "NA", "nan")
    path = written(tmp_path / "t.csv", "a,y", *(f"{i},{texts[i % 5]}" for i in range(60)))
    data = opened(tmp_path, path, "global_batch_size=8")
    assert set(data.class_names) == set(texts)
    (tmp_path / "t.jsonl").write_text("".join(f'{{"a": {i}, "y": {("1", "1.0", "0")[i % 3]}}}\n' for i in range(60)))
    assert opened(tmp_path, f"path={tmp_path / 't.jsonl'}").class_names == ("0", "1")


def test_every_documented_word_is_a_missing_feature(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [f"{word},{i % 2}" for i, word in enumerate(("", "?", "NA", "n/a", "NaN", "NULL", "None"))]
    opened(tmp_path, written(tmp_path / "t.csv", "a,y", *(f"{i},{i % 2}" for i in range(60)), *rows))
    assert "values missing in train rows: a 7;" in capsys.readouterr().err


def test_rows_are_equal_by_value(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path / "t.csv", "a,g,y", *(f"{i},{'xy'[i % 2]},{i % 3}" for i in range(60)))
    written(tmp_path / "test.csv", "a,g,y", "3.0, y,0", "4e0,x,1", "5,x,2")
    opened(tmp_path, path, "val_fraction=0.01", f"test_path={tmp_path / 'test.csv'}")
    said = capsys.readouterr().err
    assert "2 of 3 test rows" in said or said.count("1 of 3 test rows") == 2


@pytest.mark.parametrize("fold", [1, 2, 3])
def test_a_class_of_one_row_trains_in_every_fold(fold: int, tmp_path: Path) -> None:
    path = written(tmp_path / "t.csv", "a,y", *(f"{i},{i % 2}" for i in range(60)), "60,rare")
    data = opened(tmp_path, path, "folds=3", f"fold={fold}")
    assert 2 in data.samples["train"].labels  # type: ignore[operator]
    assert 2 not in data.samples["val"].labels  # type: ignore[operator]


def test_a_row_that_is_left_out_is_not_its_classs_one_training_row(tmp_path: Path) -> None:
    rows = [f"{i},{i % 2}" for i in range(60)]
    for rare in ("60,rare", "61,rare", "62,rare"):
        path = written(tmp_path / "t.csv", "a,y", *rows, rare, ",rare")
        assert 2 in opened(tmp_path, path, "missing=drop").samples["train"].labels  # type: ignore[operator]


def test_folds_say_that_the_sources_validation_rows_are_not_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "d").mkdir()
    written(tmp_path / "d" / "train.csv", "a,y", *(f"{i},{i % 2}" for i in range(60)))
    written(tmp_path / "d" / "val.csv", "a,y", *(f"{i},{i % 2}" for i in range(100, 107)))
    data = opened(tmp_path, f"path={tmp_path / 'd'}", "folds=2", "fold=1", "global_batch_size=8")
    assert len(data.samples["val"]) == 30
    assert "its 7 validation rows are not used" in capsys.readouterr().err


def test_a_class_of_test_rows_alone_is_named(tmp_path: Path) -> None:
    path = written(tmp_path / "t.csv", "a,b,colour,y", *plain_rows())
    written(tmp_path / "test.csv", "a,b,colour,y", "1,2,red,1", "1,2,red,7")
    with pytest.raises(
        DataError, match=r"test.csv line 3: target 'y' is '7', a class that no training row has \(0, 1\)"
    ):
        opened(tmp_path, path, f"test_path={tmp_path / 'test.csv'}")


def test_columns_that_carry_nothing_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [f"{row[:-1]}7,,same,{row[-1]}" for row in plain_rows()]
    data = opened(tmp_path, written(tmp_path / "t.csv", "a,b,colour,seven,nothing,word,y", *rows))
    assert [column.name for column in data.preprocessing.columns] == ["a", "b", "colour"]
    told = capsys.readouterr().err
    for said in (
        "'seven' is left out: it is 7 in",
        "'nothing' is left out: it is empty",
        "'word' is left out: it is 'same'",
    ):
        assert said in told


def test_names_of_rows_are_no_categories(tmp_path: Path) -> None:
    path = written(tmp_path / "t.csv", "name,a,y", *(f"n{i},{i},{i % 2}" for i in range(60)))
    with pytest.raises(DataError, match=r"column 'name' has 54 different texts .*data.drop_columns=\[name\]"):
        opened(tmp_path, path)
    assert opened(tmp_path, path, "drop_columns=name").facts.input_shape == (1,)


def test_rows_that_stand_twice_are_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = plain_rows()
    path = written(tmp_path / "t.csv", "a,b,colour,y", *rows)
    written(tmp_path / "test.csv", "a,b,colour,y", "9,9,red,1", rows[3])
    opened(tmp_path, path, f"test_path={tmp_path / 'test.csv'}")
    assert "1 of 2 test rows stand in the" in capsys.readouterr().err


def test_folds_divide_the_training_rows(tmp_path: Path) -> None:
    path = written(tmp_path / "t.csv", "a,b,colour,y", *plain_rows())
    parts = [opened(tmp_path, path, "folds=3", f"fold={i}") for i in (1, 2, 3)]
    assert sum(len(part.samples["val"]) for part in parts) == 60
    assert len({part.fingerprint for part in parts}) == 3


def test_parquet_has_the_same_rows(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    text = opened(tmp_path, written(tmp_path / "t.tsv", "a\tb\ty", *(f"{i}\t{i * i}\t{i % 3}" for i in range(60))))
    numbers = np.arange(60)
    pq.write_table(pa.table({"a": numbers, "b": numbers * numbers, "y": (numbers % 3) * 1.0}), tmp_path / "t.parquet")
    typed = opened(tmp_path, f"path={tmp_path / 't.parquet'}")
    assert text.class_names == typed.class_names == ("0", "1", "2")
    np.testing.assert_allclose(np.sort(text.samples["train"].inputs.sum(1)).sum(), 0, atol=1e-3)
    both = [np.concatenate([d.samples[s].inputs for s in ("train", "val")]).shape for d in (text, typed)]
    assert both == [(60, 2), (60, 2)]


def test_several_values_are_predicted_at_once(tmp_path: Path) -> None:
    path = written(tmp_path / "t.csv", "a,u,b,v", *(f"{i},{3 * i},{-i * i},{100 - i}" for i in range(60)))
    data = opened(tmp_path, path, "task=regression", "target=[v, u]")
    assert (data.facts.input_shape, data.facts.n_outputs) == ((2,), 2)
    v, u = data.samples["train"].targets.T  # type: ignore[union-attr]
    np.testing.assert_allclose(v, -u, atol=1e-6)
    assert u.mean() == pytest.approx(0, abs=1e-6)
    assert u.std() == pytest.approx(1)
    assert data.target_scale[1] == pytest.approx(3 * data.target_scale[0])


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_the_plan_knows_the_shape_of_the_sets_that_need_no_file(tmp_path: Path, task: str) -> None:
    data = opened(tmp_path, f"task={task}")
    assert known_facts(load(["recipe=tabular_debug", f"data.task={task}"])) == data.facts
    assert data.has("val")
    assert data.has("test")


def test_preprocessing_is_left_in_the_run_folder(tmp_path: Path) -> None:
    data = opened(tmp_path, "task=regression")
    assert not (tmp_path / "preprocessing.json").exists(), "whether the run may go on with these rows is not known yet"
    data.leave(data.folder)
    facts = json.loads((tmp_path / "preprocessing.json").read_text())
    assert [column["name"] for column in facts["columns"]] == [
        "age",
        "sex",
        "bmi",
        "bp",
        "s1",
        "s2",
        "s3",
        "s4",
        "s5",
        "s6",
    ]
    (target,) = facts["targets"]
    assert target["name"] == "target"
    assert (target["scale"],) == data.target_scale
    again = data.samples["train"].targets * target["scale"] + target["shift"]  # type: ignore[operator]
    assert again.mean() == pytest.approx(target["shift"], rel=1e-5)
    assert set(np.unique(np.round(again, 3) % 1)) <= {0.0, np.float32(1.0)}  # the data are whole numbers


def test_contradictions_are_refused_before_anything_is_read() -> None:
    with pytest.raises(UsageError, match="a classification has one target, not a, b"):
        load(["recipe=tabular_debug", "data.target=[a, b]"])
    for key in ("val_path", "test_path"):
        with pytest.raises(UsageError, match=rf"data\.{key} without data\.path"):
            load(["recipe=tabular_debug", f"data.{key}=rows.csv"])
    with pytest.raises(UsageError, match=r"column a is named in data\.target and data\.drop_columns"):
        load(["recipe=tabular_debug", "data.target=a", "data.drop_columns=[b, a]"])


class TestRegression:
    @pytest.mark.parametrize("values", [1, 3])
    def test_metrics_are_scikit_learns_in_the_unit_of_the_data(self, values: int) -> None:
        recipe = load(["recipe=tabular_debug", "data.task=regression"])
        plan = make_plan(recipe, Machine(2, ()))
        torch.manual_seed(0)
        scale, mean = np.array([30.0, 2e3, 1e-2][:values]), 1e4
        module = Regression(torch.nn.Linear(4, values), recipe.optim, plan, 0, tuple(scale))
        module.net.forward = lambda inputs: inputs[:, :values]  # type: ignore[method-assign]
        module.summed = lambda totals: totals  # type: ignore[method-assign]
        predicted, targets = torch.randn(103, 4), torch.randn(103, values)
        module.start_evaluation()
        for start in range(0, 103, 10):  # the last batch has three rows, filled up
            rows = np.minimum(np.arange(start, start + 10), 102)
            valid = torch.arange(start, start + 10) < 103
            module.evaluate({"inputs": predicted[rows], "targets": targets[rows], "valid": valid})
        found = module.evaluation("val")
        y, y_hat = targets.numpy() * scale + mean, predicted[:, :values].numpy() * scale + mean
        assert found["mse"].item() == pytest.approx(mean_squared_error(y, y_hat), rel=1e-6)
        assert found["r2"].item() == pytest.approx(r2_score(y, y_hat), rel=1e-6)

    def test_it_learns_what_a_linear_regression_finds(self, tmp_path: Path) -> None:
        """A linear model without regularisation, trained to the end, explains what least squares explains."""
        words = ("model={kind: mlp, widths: []}", "optim={kind: adamw, weight_decay: 0.0, learning_rate: 0.03}")
        words += ("data={kind: table, task: regression, global_batch_size: 64}", "trainer.max_steps=250")
        folder = small_run(tmp_path, "tabular_debug", *words)
        assert train(folder) == 0
        data = TableDataModule(load([f"recipe={folder.recipe}"]).data, Plan.read(folder.plan), 0, folder)  # type: ignore[arg-type]
        data.prepare(load([f"recipe={folder.recipe}"]).model)
        rows, test = data.samples["train"], data.samples["test"]
        ones = np.ones((len(rows), 1))
        weights, *_ = np.linalg.lstsq(np.hstack([rows.inputs, ones]), rows.targets, rcond=None)  # type: ignore[arg-type]
        predicted = np.hstack([test.inputs, np.ones((len(test), 1))]) @ weights
        (row,) = [r for r in read_jsonl(folder.metrics) if "test/r2" in r]
        assert row["test/r2"] == pytest.approx(r2_score(test.targets, predicted), abs=0.02)

    @pytest.mark.parametrize("strategy", ["ddp", pytest.param("zero2", marks=pytest.mark.slow)])
    def test_two_processes_find_the_same_metrics(self, ranks: Ranks, tmp_path: Path, strategy: str) -> None:
        words = ("data.task=regression", "trainer.max_steps=5", MLP)
        one = small_run(tmp_path, "tabular_debug", *words, name="one")
        train(one)
        two = small_run(
            tmp_path, "tabular_debug", *words, "trainer.devices=2", f"trainer.strategy={strategy}", name="two"
        )
        ranks(strategy).run("run", folder=str(two.root))
        expected, found = ([r for r in read_jsonl(f.metrics) if "test/mse" in r or "val/mse" in r] for f in (one, two))
        assert len(expected) == len(found) == 2
        for a, b in zip(expected, found, strict=True):
            keys = [key for key in a if key.startswith(("val/", "test/"))]
            assert len(keys) == 3
            for key in keys:
                assert b[key] == pytest.approx(a[key], rel=1e-5)

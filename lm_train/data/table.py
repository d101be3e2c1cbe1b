"""Rows of numbers and categories with a target: csv, tsv, jsonl, parquet, the hub; scikit-learn's small sets without a file."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from lm_train.data.batches import Batch, Integers, Samples, Split
from lm_train.data.classes import class_names
from lm_train.data.module import SampleDataModule
from lm_train.data.preprocessing import (
    Cells,
    Preprocessing,
    as_number,
    holds_numbers,
    is_empty,
    is_missing,
    missing_by_column,
    scaling_of,
)
from lm_train.data.rows import Rows, open_rows
from lm_train.data.source import digest_of_parts
from lm_train.data.splits import Digests, digest_of, divide, duplicates
from lm_train.errors import DataError
from lm_train.plan import DataFacts, Plan
from lm_train.recipe import AnyModel, TableData
from lm_train.recipe.explain import nearest
from lm_train.runs import RunFolder

TEST_FRACTION = 0.2
"""Share of scikit-learn's sets, which have no test split of their own, that tests; always the same rows."""
MOST_CLASSES = 1000


class Table(NamedTuple):
    """What was read: the splits and a name and digest of the whole."""

    label: str
    fingerprint: str
    splits: dict[Split, Cells]


class TableSamples(Samples):
    """Rows as the network sees them, in memory.

    Args:
        inputs: (n, width).
        labels: of a classification, (n,).
        targets: of a regression, (n, values).
    """

    def __init__(
        self,
        inputs: npt.NDArray[np.float32],
        labels: Integers | None = None,
        targets: npt.NDArray[np.float32] | None = None,
    ) -> None:
        self.inputs, self.labels, self.targets = inputs, labels, targets

    def __len__(self) -> int:
        return len(self.inputs)

    def batch(self, samples: Integers, epochs: Integers | None) -> Batch:
        batch: Batch = {"inputs": torch.from_numpy(self.inputs[samples])}
        if self.labels is not None:
            batch["labels"] = torch.from_numpy(self.labels[samples])
        if self.targets is not None:
            batch["targets"] = torch.from_numpy(self.targets[samples])
        return batch


class TableDataModule(SampleDataModule):
    """Serves the rows of a table.

    Args:
        section: the recipe's data section.
        plan: batch sizes, ranks, workers, steps.
        seed: decides the order of rows.
        folder: the run's, where rank 0 leaves what was learnt of the columns, for later use of the model.
    """

    preprocessing: Preprocessing
    samples: dict[Split, TableSamples]

    def __init__(self, section: TableData, plan: Plan, seed: int, folder: RunFolder) -> None:
        super().__init__(plan, seed)
        self.section, self.folder = section, folder
        self._is_primary = int(os.environ.get("RANK", 0)) == 0
        self._notes: list[str] = []

    def prepare(self, model: AnyModel) -> None:
        """Reads all rows, divides them, and learns from the training rows what is done to every row."""
        section, table = self.section, read_table(self.section)
        self.label = table.label
        self._notes = []
        targets, names = self._columns(table)
        self._targets = targets
        complete = {s: self._without_missing(s, cells, targets, names) for s, cells in table.splits.items()}
        splits = self._divided(table._replace(splits=complete), targets, names)
        self.preprocessing = Preprocessing.learn(splits["train"], names, section)
        if section.outliers == "drop":
            splits["train"] = self._without_outliers(splits["train"])
        learn = self._learn_classes if section.task == "classification" else self._learn_values
        learn(splits["train"], targets)
        self.samples = {split: self._samples(split, cells, targets) for split, cells in splits.items()}
        self.facts = DataFacts(
            input_shape=(self.preprocessing.width,),
            n_outputs=len(self.class_names) if section.task == "classification" else len(targets),
        )
        self._check_size()
        if self._is_primary:
            if self.preprocessing.unused:
                self._notes.append(self.preprocessing.reasons())
            if self.preprocessing.unlimited:
                self._notes.append(
                    f"the quartiles of {', '.join(self.preprocessing.unlimited)} are one value, by which data.outlier_rule=iqr "
                    "finds no limits; left as it is"
                )
            for note in self._notes:
                print(f"{self.label}: {note}", file=sys.stderr, flush=True)

    def _columns(self, table: Table) -> tuple[list[str], list[str]]:
        """Target columns, and those that go into the network."""
        columns = list(table.splits["train"].columns)
        targets = list(self.section.target or columns[-1:])
        for key, asked in (("target", targets), ("drop_columns", list(self.section.drop_columns))):
            for name in asked:
                _check_column(name, columns, table.label, f"data.{key}")
        names = [name for name in columns if name not in targets and name not in self.section.drop_columns]
        if not names:
            raise DataError(f"{table.label}: no columns beside {', '.join(targets)}; there is nothing to learn from")
        for split, cells in table.splits.items():
            for name in (*names, *targets):
                _check_column(name, list(cells.columns), f"{table.label}, {split} rows", "")
        return targets, names

    def _divided(self, table: Table, targets: list[str], names: list[str]) -> dict[Split, Cells]:
        section, splits = self.section, dict(table.splits)
        numbers = {name for name in (*names, *targets) if holds_numbers(splits["train"].columns[name])}
        if section.task == "classification":
            numbers -= set(targets)
        digests = {split: _digests(cells, (*names, *targets), numbers) for split, cells in splits.items()}
        if section.folds is not None and "val" in splits:
            self._notes.append(
                f"its {len(splits.pop('val')):,} validation rows are not used: data.folds validates on training rows"
            )
            del digests["val"]
        rule: list[object] = []
        if "val" not in splits:
            cells = splits["train"]
            train, val = divide(digests["train"], _strata(cells, section, targets), section)
            rule = [section.val_fraction, section.folds, section.fold]
            parts: dict[Split, Integers] = {"train": train, "val": val}
            splits |= {split: cells.rows(part) for split, part in parts.items() if len(part)}
            digests |= {split: digests["train"][part] for split, part in parts.items() if len(part)}
        decided = section.model_dump(exclude={"path", "val_path", "test_path", "num_workers"} | set(_BATCHES))
        self.fingerprint = digest_of_parts(table.fingerprint, json.dumps([decided, rule]))
        for twins in duplicates(digests):
            one, two = splits[twins.split].places[twins.sample], splits[twins.other].places[twins.twin]
            self._notes.append(
                f"{twins.shared:,} of {twins.size:,} {twins.split} rows stand in the {twins.other} split too, such as "
                f"{one} = {two}"
            )
        return splits

    def _without_missing(self, split: Split, cells: Cells, targets: list[str], names: list[str]) -> Cells:
        """Says what is missing; leaves out, or ends at, rows that are to be left out or to end the run."""
        classes = targets[0] if self.section.task == "classification" else None
        missing = missing_by_column(cells, [*names, *targets], classes)
        if not missing:
            return cells
        counted = ", ".join(f"{name} {int(mask.sum())}" for name, mask in missing.items())
        how = self.section.missing
        without_target = [name for name in targets if name in missing]
        if how == "error" or (without_target and how != "drop"):
            name = without_target[0] if without_target else next(iter(missing))
            place = cells.places[int(np.flatnonzero(missing[name])[0])]
            way_out = "set data.missing=drop" if without_target else "set data.missing to mean, median or drop"
            raise DataError(f"{place}: column {name!r} has no value (missing by column: {counted}); {way_out}")
        if how == "drop":
            kept = np.flatnonzero(~np.any(list(missing.values()), axis=0))
            self._notes.append(
                f"{len(cells) - len(kept):,} of {len(cells):,} {split} rows lack a value and are left out ({counted})"
            )
            if not len(kept):
                raise DataError(f"{self.label}: every {split} row lacks a value ({counted}); set data.missing=mean")
            return cells.rows(kept)
        self._notes.append(
            f"values missing in {split} rows: {counted}; the training rows' {how} takes the place of a number"
        )
        return cells

    def _without_outliers(self, cells: Cells) -> Cells:
        outlying = self.preprocessing.outlying(cells)
        if outlying.all():
            raise DataError(f"{self.label}: every training row has an outlier; raise data.outlier_limit")
        if outlying.any():
            self._notes.append(
                f"{int(outlying.sum()):,} of {len(cells):,} training rows have an outlier and are left out"
            )
        return cells.rows(np.flatnonzero(~outlying))

    def _learn_classes(self, cells: Cells, targets: list[str]) -> None:
        (target,) = targets
        found = {_class_name(value) for value in cells.columns[target]}
        numbers = [number if number is not None and math.isfinite(number) else None for number in map(as_number, found)]
        fractions = [number for number in numbers if number is not None and not number.is_integer()]
        if fractions or len(found) > MOST_CLASSES:
            what = f"numbers such as {fractions[0]:g}" if fractions else f"{len(found):,} different values"
            raise DataError(f"{self.label}: target {target!r} has {what}, not classes; set data.task=regression")
        if len(found) < 2:
            raise DataError(f"{self.label}: target {target!r} is {next(iter(found))!r} in every training row")
        self.class_names = class_names(found)

    def _learn_values(self, cells: Cells, targets: list[str]) -> None:
        self._target_mean, scales = [], []
        for name in targets:
            values = cells.numbers(name)
            if values.min() == values.max():
                raise DataError(f"{self.label}: target {name!r} is {values[0]:g} in every training row")
            shift, scale = scaling_of(values, "standard")
            self._target_mean.append(shift)
            scales.append(scale)
        self.target_scale = tuple(scales)

    def _samples(self, split: Split, cells: Cells, targets: list[str]) -> TableSamples:
        inputs, unknown = self.preprocessing.apply(cells, clip=self.section.outliers == "clip")
        if unknown:
            self._notes.append(f"{unknown:,} texts in {split} rows occur in no training row and count as no value")
        if self.section.task == "regression":
            values = np.stack([cells.numbers(name) for name in targets], axis=1)
            scaled = (values - np.array(self._target_mean)) / np.array(self.target_scale)
            return TableSamples(inputs, targets=scaled.astype(np.float32))
        number_of = {name: i for i, name in enumerate(self.class_names)}
        labels = np.empty(len(cells), dtype=np.int64)
        for i, value in enumerate(cells.columns[targets[0]]):
            name = _class_name(value)
            if name not in number_of:
                known = ", ".join(self.class_names[:10]) + (", ..." if len(self.class_names) > 10 else "")
                raise DataError(
                    f"{cells.places[i]}: target {targets[0]!r} is {name!r:.80}, a class that no training row has ({known})"
                )
            labels[i] = number_of[name]
        return TableSamples(inputs, labels=labels)

    def _check_size(self) -> None:
        n_train, wanted = len(self.samples["train"]), self.plan.global_batch_size
        if n_train < wanted:
            raise DataError(
                f"{self.label}: {n_train} training rows are fewer than data.global_batch_size={wanted}; lower it, or add rows"
            )

    def kept(self) -> dict[str, str]:
        facts: dict[str, Any] = {"kind": "table", "task": self.section.task, "clip": self.section.outliers == "clip"}
        facts |= self.preprocessing.facts()
        if self.section.task == "classification":
            facts |= {"target": self._targets[0], "class_names": self.class_names}
        else:
            parts = zip(self._targets, self._target_mean, self.target_scale, strict=True)
            facts["targets"] = [{"name": name, "shift": shift, "scale": scale} for name, shift, scale in parts]
        return {self.folder.preprocessing.name: json.dumps(facts, indent=2, ensure_ascii=False)}

    def size_in_words(self) -> str:
        return f"{len(self.samples['train']):,} training rows"


_BATCHES = ("global_batch_size", "micro_batch_size")


def read_table(section: TableData) -> Table:
    """The rows that a section names.

    Raises:
        DataError: naming file and row.
    """
    if section.path is None:
        return _embedded(section)
    source = open_rows(section.path, section.val_path, section.test_path)
    splits = {split: _cells(rows, f"{source.label}, {split} rows") for split, rows in source.splits.items()}
    return Table(source.label, source.fingerprint, splits)


def _cells(rows: Rows, label: str) -> Cells:
    """All rows by column; the first row says which columns there are, one that a later row lacks has no value there."""
    columns: dict[str, list[Any]] = {}
    places: list[str] = []
    for row, place in rows():
        if not columns:
            columns = {name: [] for name in row}
        for name, values in columns.items():
            values.append(row.get(name))
        places.append(place)
    if not places:
        raise DataError(f"{label}: no rows")
    return Cells(columns, places)


def _embedded(section: TableData) -> Table:
    """Real sets that come with scikit-learn: breast cancer (569 tumours, 30 measures; Street, Wolberg & Mangasarian 1993) and
    diabetes (442 patients, 10 measures; Efron, Hastie, Johnstone & Tibshirani 2004)."""
    from sklearn.datasets import load_breast_cancer, load_diabetes

    classifies = section.task == "classification"
    bunch = load_breast_cancer() if classifies else load_diabetes(scaled=False)
    name = "breast cancer" if classifies else "diabetes"
    columns = {str(n): bunch.data[:, i].tolist() for i, n in enumerate(bunch.feature_names)}
    columns["target"] = [str(bunch.target_names[t]) for t in bunch.target] if classifies else bunch.target.tolist()
    cells = Cells(columns, [f"{name} row {i}" for i in range(1, len(bunch.target) + 1)])
    digests = _digests(cells, list(columns), set(columns) - ({"target"} if classifies else set()))
    rest, test = divide(digests, bunch.target if classifies else None, TableData(val_fraction=TEST_FRACTION))
    splits: dict[Split, Cells] = {"train": cells.rows(rest), "test": cells.rows(test)}
    return Table(f"scikit-learn's {name} set", digest_of_parts(name, str(digests.tolist())), splits)


def _check_column(name: str, columns: list[str], where: str, key: str) -> None:
    if name in columns:
        return
    near = nearest(name, columns) if key else None
    hint = f"; did you mean {key}={near}?" if near else ""
    raise DataError(f"{where}: no column {name!r}; it has {', '.join(columns)}{hint}")


def _digests(cells: Cells, names: Sequence[str], numbers: Collection[str]) -> Digests:
    """Of each row as the network will see it: `1` and `1.0` are equal in a column of numbers."""
    chosen = [[_content(value, name in numbers) for value in cells.columns[name]] for name in names]
    return np.array([digest_of(*row) for row in zip(*chosen, strict=True)], dtype=np.uint64)


def _content(value: Any, is_number: bool) -> bytes:
    if not is_number:
        return repr("" if is_empty(value) else _class_name(value)).encode()
    number = None if is_missing(value) else as_number(value)
    if number is not None:
        return repr(number + 0.0).encode()  # -0.0 is 0.0
    return b"" if is_missing(value) else repr(str(value).strip()).encode()


def _strata(cells: Cells, section: TableData, targets: list[str]) -> Integers | None:
    """By what the validation rows are drawn alike: the class."""
    if section.task == "regression":
        return None
    names = [_class_name(value) for value in cells.columns[targets[0]]]
    return np.unique(names, return_inverse=True)[1]


def _class_name(value: Any) -> str:
    """Of a cell: a text as it stands (`007` is not `7`); the typed numbers 1 and 1.0 are one class."""
    if is_empty(value):
        return ""
    number = as_number(value) if not isinstance(value, bool | str) else None
    if number is not None and number.is_integer():
        return str(int(number))
    return str(value).strip()

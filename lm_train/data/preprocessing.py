"""Cells of a table to numbers for a network: missing values, outliers, scaling, categories; learnt from training rows only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from numbers import Real
from typing import Any

import numpy as np
import numpy.typing as npt

from lm_train.errors import DataError
from lm_train.recipe import TableData

Numbers = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
MISSING = frozenset({"", "?", "na", "n/a", "nan", "null", "none"})
"""What a cell without a value holds, besides nothing; in upper or lower case. `data.missing` documents the same words."""


@dataclass(frozen=True)
class NumberColumn:
    """A column of numbers: x becomes (clip(x or `fill`) - shift) / scale."""

    name: str
    fill: float
    """In place of a missing value."""
    low: float
    high: float
    """What lies outside is an outlier."""
    shift: float
    scale: float

    @property
    def width(self) -> int:
        return 1


@dataclass(frozen=True)
class TextColumn:
    """A column of texts, one-hot: a value that is missing, or that no training row has, is all zeros."""

    name: str
    values: tuple[str, ...]

    @property
    def width(self) -> int:
        return len(self.values)


Column = NumberColumn | TextColumn


@dataclass
class Cells:
    """One split as it was read: values by column, and the place of each row, for messages."""

    columns: dict[str, list[Any]]
    places: list[str]

    def __len__(self) -> int:
        return len(self.places)

    def rows(self, chosen: Sequence[int] | npt.NDArray[Any]) -> Cells:
        columns = {name: [values[i] for i in chosen] for name, values in self.columns.items()}
        return Cells(columns, [self.places[i] for i in chosen])

    def numbers(self, name: str) -> Numbers:
        """A column's values, NaN where one is missing.

        Raises:
            DataError: at the first cell that is no number, or is infinite.
        """
        found = np.empty(len(self))
        for i, value in enumerate(self.columns[name]):
            number = math.nan if is_missing(value) else as_number(value)
            if number is None or math.isinf(number):
                expected = "a finite number" if number is not None else "a number, as in most training rows"
                raise DataError(f"{self.places[i]}: column {name!r} is {value!r:.80}, expected {expected}")
            found[i] = number
        return found


def is_missing(value: Any) -> bool:
    """Whether a cell of a feature, or of a number to be predicted, has no value."""
    return value.strip().lower() in MISSING if isinstance(value, str) else is_empty(value)


def is_empty(value: Any) -> bool:
    """Whether a cell holds nothing at all, not even a word for it."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, float) and math.isnan(value))


def holds_numbers(values: Sequence[Any]) -> bool:
    """Whether at least half of the cells, of those with a value, are numbers."""
    present = [value for value in values if not is_missing(value)]
    return 2 * sum(as_number(value) is not None for value in present) >= len(present) > 0


def as_number(value: Any) -> float | None:
    """The number that a cell holds; None for a text that is none."""
    if isinstance(value, str):
        try:
            return None if "_" in value else float(value)
        except ValueError:
            return None
    return float(value) if isinstance(value, Real) or hasattr(value, "as_tuple") else None


@dataclass
class Preprocessing:
    """What was learnt from the training rows; the same is done to every row.

    Missing values are filled in first, then outliers are treated, then numbers are scaled.
    """

    columns: list[Column]
    unused: dict[str, str] = field(default_factory=dict)
    """Columns that carry nothing, with the reason."""
    limits: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Of each column of numbers that is not constant: what lies outside is an outlier."""
    unlimited: list[str] = field(default_factory=list)
    """Columns in which data.outlier_rule=iqr finds no outliers, because their quartiles are one value."""

    @classmethod
    def learn(cls, cells: Cells, names: Sequence[str], section: TableData) -> Preprocessing:
        """Learns from training rows.

        Args:
            cells: the training rows.
            names: of the columns that go into the network.
            section: what is to be done.

        Raises:
            DataError: naming row and column.
        """
        found = cls([])
        is_number = {name: holds_numbers(cells.columns[name]) for name in names}
        fills = {name: found._learn_limits(name, cells.numbers(name), section) for name in names if is_number[name]}
        if section.outliers == "drop":
            outlying = found.outlying(cells)
            cells = cells if outlying.all() else cells.rows(np.flatnonzero(~outlying))
        for name in names:
            values = [value for value in cells.columns[name] if not is_missing(value)]
            if name in found.unused:
                continue
            if not values:
                found.unused[name] = "it is empty"
            elif is_number[name]:
                found._learn_number(name, cells.numbers(name), fills[name], section)
            else:
                found._learn_text(name, values, section)
        if not found.columns:
            raise DataError("no column is left that carries anything; " + found.reasons())
        return found

    def _learn_limits(self, name: str, values: Numbers, section: TableData) -> float:
        """What a missing value becomes."""
        present = values[~np.isnan(values)]
        fill = float(np.median(present) if section.missing == "median" else present.mean())
        if present.min() == present.max():
            self.unused[name] = f"it is {present[0]:g} in every training row"
            return fill
        low, high = _bounds(np.where(np.isnan(values), fill, values), section)
        if section.outliers != "keep" and section.outlier_rule == "iqr" and low == high:
            self.unlimited.append(name)
            low, high = -math.inf, math.inf
        self.limits[name] = low, high
        return fill

    def _learn_number(self, name: str, values: Numbers, fill: float, section: TableData) -> None:
        low, high = self.limits[name]
        filled = np.where(np.isnan(values), fill, values)
        if section.outliers == "clip":
            filled = filled.clip(low, high)
        if filled.min() == filled.max():
            self.unused[name] = f"it is {filled[0]:g} in every training row without its outliers"
            return
        shift, scale = scaling_of(filled, section.scaling)
        self.columns.append(NumberColumn(name, fill, low, high, shift, scale))

    def _learn_text(self, name: str, values: list[Any], section: TableData) -> None:
        distinct = sorted({str(value).strip() for value in values})
        if len(distinct) > section.max_categories:
            raise DataError(
                f"column {name!r} has {len(distinct):,} different texts such as {distinct[0]!r:.40} and {distinct[-1]!r:.40}, "
                f"more than data.max_categories={section.max_categories}; leave it out with data.drop_columns=[{name}], or raise "
                "data.max_categories"
            )
        if len(distinct) == 1:
            self.unused[name] = f"it is {distinct[0]!r:.40} in every training row"
        else:
            self.columns.append(TextColumn(name, tuple(distinct)))

    def reasons(self) -> str:
        return "; ".join(f"column {name!r} is left out: {reason}" for name, reason in self.unused.items())

    @property
    def width(self) -> int:
        """Numbers of a row."""
        return sum(column.width for column in self.columns)

    def outlying(self, cells: Cells) -> Mask:
        """Which rows have an outlier, (n,)."""
        found = np.zeros(len(cells), dtype=bool)
        for name, (low, high) in self.limits.items():
            values = cells.numbers(name)  # a comparison with NaN is false
            found |= (values < low) | (values > high)
        return found

    def apply(self, cells: Cells, clip: bool) -> tuple[npt.NDArray[np.float32], int]:
        """The rows as the network sees them, (n, width), and how many texts among them no training row has."""
        parts, unknown = [], 0
        for column in self.columns:
            if isinstance(column, NumberColumn):
                values = cells.numbers(column.name)
                values = np.where(np.isnan(values), column.fill, values)
                if clip:
                    values = values.clip(column.low, column.high)
                parts.append(((values - column.shift) / column.scale)[:, None])
            else:
                number_of = {value: i for i, value in enumerate(column.values)}
                one_hot = np.zeros((len(cells), column.width))
                for i, value in enumerate(cells.columns[column.name]):
                    number = None if is_missing(value) else number_of.get(str(value).strip())
                    if number is not None:
                        one_hot[i, number] = 1
                    else:
                        unknown += not is_missing(value)
                parts.append(one_hot)
        return np.concatenate(parts, axis=1).astype(np.float32), unknown

    def facts(self) -> dict[str, Any]:
        """For a file: what another program needs to treat a row alike; a limit of null is none."""
        columns = [asdict(c) | {"type": "number" if isinstance(c, NumberColumn) else "text"} for c in self.columns]
        for facts in columns:
            facts |= {key: None for key in ("low", "high") if math.isinf(facts.get(key, 0.0))}
        return {"columns": columns, "unused_columns": self.unused}


def missing_by_column(cells: Cells, names: Sequence[str], classes: str | None = None) -> dict[str, Mask]:
    """Of each column that lacks values: where, (n,). In the column of `classes` only an empty cell lacks one."""
    found = {}
    for name in names:
        lacks = is_empty if name == classes else is_missing
        found[name] = np.array([lacks(value) for value in cells.columns[name]], dtype=bool)
    return {name: mask for name, mask in found.items() if mask.any()}


def scaling_of(values: Numbers, how: str) -> tuple[float, float]:
    """Shift and scale, as scikit-learn's StandardScaler, MinMaxScaler and RobustScaler have them."""
    match how:
        case "standard":
            shift, scale = values.mean(), values.std()
        case "minmax":
            shift, scale = values.min(), values.max() - values.min()
        case "robust":
            quarter, shift, three_quarters = np.percentile(values, (25, 50, 75))
            scale = three_quarters - quarter
        case _:
            shift, scale = 0.0, 1.0
    return float(shift), float(scale) or 1.0


def _bounds(values: Numbers, section: TableData) -> tuple[float, float]:
    """Between what values a number is no outlier."""
    if section.outliers == "keep":
        return float(values.min()), float(values.max())
    k = section.outlier_limit
    if section.outlier_rule == "iqr":
        quarter, three_quarters = np.percentile(values, (25, 75))
        reach = k * (three_quarters - quarter)
        return float(quarter - reach), float(three_quarters + reach)
    return float(values.mean() - k * values.std()), float(values.mean() + k * values.std())

"""What follows from the counts of a classification: precision, recall, F1; a table and a file of them. Free of torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lm_train.output import aligned

Numbers = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]

NAMED_CLASSES = 20
"""Up to so many classes each has its own metrics, a line of the table and a row of the printed confusion matrix."""
MATRIX_WIDTH = 120
"""Columns of text that a printed confusion matrix may take with class names above its columns; else they are numbered."""
SHOWN = 10
"""Of more classes: how many lines of the lowest F1, and how many pairs that are taken for each other."""


@dataclass(frozen=True)
class ClassScores:
    """Metrics of a classification.

    What has no samples, or was never predicted, has precision, recall or F1 of 0 where they would be 0 / 0, as in
    scikit-learn (`zero_division=0`). Macro means run over the classes that occur, as samples or as predictions, as do
    those of scikit-learn and torchmetrics. With one class a sample the micro means all equal the accuracy.
    """

    classes: tuple[str, ...]
    hits: Counts
    """Samples of each class that were predicted as it, (C,)."""
    predicted: Counts
    """Predictions of each class, (C,)."""
    samples: Counts
    """Samples of each class, (C,)."""
    confusion: Counts | None
    """(C, C): true class, predicted class; None with too many classes."""

    @classmethod
    def of(cls, classes: Sequence[str], counted: Counts) -> ClassScores:
        """From what `ClassCounts` has counted: (C, C), or (3, C) of hits, predictions and samples."""
        if counted.shape[0] == len(classes):
            return cls(tuple(classes), counted.diagonal(), counted.sum(axis=0), counted.sum(axis=1), counted)
        return cls(tuple(classes), counted[0], counted[1], counted[2], None)

    @property
    def accuracy(self) -> float:
        return float(_share(self.hits.sum(), self.samples.sum()))

    @property
    def precision(self) -> Numbers:
        """Of the samples that were predicted as a class, the share that belongs to it, (C,)."""
        return _share(self.hits, self.predicted)

    @property
    def recall(self) -> Numbers:
        """Of the samples of a class, the share that was predicted as it, (C,)."""
        return _share(self.hits, self.samples)

    @property
    def f1(self) -> Numbers:
        """Harmonic mean of precision and recall, (C,)."""
        return _share(2 * self.hits, self.predicted + self.samples)

    def macro(self, scores: Numbers) -> float:
        """Mean of a score over the classes that occur; rare ones count as much as frequent ones."""
        occurs = self.predicted + self.samples > 0
        return float(scores[occurs].mean()) if occurs.any() else 0.0

    def metrics(self) -> dict[str, float]:
        """By name: `accuracy`, `f1_macro`, `f1_micro`, ..., and with few classes `f1/CLASS`, ..."""
        by_score = {"precision": self.precision, "recall": self.recall, "f1": self.f1}
        found = {"accuracy": self.accuracy}
        found |= {f"{name}_macro": self.macro(scores) for name, scores in by_score.items()}
        found |= {f"{name}_micro": self.accuracy for name in by_score}
        if len(self.classes) <= NAMED_CLASSES:
            for name, scores in by_score.items():
                found |= {
                    f"{name}/{label}": float(score) for label, score in zip(_keys(self.classes), scores, strict=True)
                }
        return found

    def rows(self) -> list[tuple[str, float, float, float, int]]:
        """Of each class: name, precision, recall, F1, samples."""
        columns = (self.precision.tolist(), self.recall.tolist(), self.f1.tolist(), self.samples.tolist())
        return list(zip(self.classes, *columns, strict=True))

    def confused(self) -> list[tuple[int, str, str]]:
        """Samples, true class, predicted class; the most frequent mistakes first."""
        if self.confusion is None:
            return []
        wrong = self.confusion - np.diag(self.hits)
        order = np.argsort(-wrong, axis=None, kind="stable")[:SHOWN].tolist()
        found = []
        for place in order:
            true, predicted = divmod(place, len(self.classes))
            if wrong[true, predicted]:
                found.append((int(wrong[true, predicted]), self.classes[true], self.classes[predicted]))
        return found

    def text(self) -> str:
        """Tables for a person: of the classes, and of what was taken for what."""
        many = len(self.classes) > NAMED_CLASSES
        rows = self.rows()
        if many:
            rows = sorted((row for row in rows if row[4]), key=lambda row: row[3])[:SHOWN]
        total = int(self.samples.sum())
        rows.append(("macro mean", self.macro(self.precision), self.macro(self.recall), self.macro(self.f1), total))
        rows.append(("micro mean", self.accuracy, self.accuracy, self.accuracy, total))
        cells = [("class", "precision", "recall", "F1", "samples")]
        cells += [(name, f"{p:.4f}", f"{r:.4f}", f"{f:.4f}", f"{n:,}") for name, p, r, f, n in rows]
        parts = [f"{len(self.classes):,} classes, those with the lowest F1"] if many else []
        parts += aligned(cells)
        if many or self.confusion is None:
            pairs = self.confused()
            if pairs:
                parts += ["", "most confused"]
                parts += aligned([("true", "predicted", "samples"), *((t, p, f"{n:,}") for n, t, p in pairs)], left=2)
        else:
            parts += ["", "confusion: a row for each true class, a column for each predicted one", *self._matrix()]
        return "\n".join(parts)

    def _matrix(self) -> list[str]:
        assert self.confusion is not None
        names = list(self.classes)
        lines = aligned([("", *names), *((name, *map(str, row)) for name, row in self._matrix_rows(names))])
        if len(lines[0]) <= MATRIX_WIDTH:
            return lines
        numbered = [f"{i} {name}" for i, name in enumerate(names)]
        heads = [str(i) for i in range(len(names))]
        return aligned([("", *heads), *((name, *map(str, row)) for name, row in self._matrix_rows(numbered))])

    def _matrix_rows(self, names: Iterable[str]) -> Iterable[tuple[str, list[int]]]:
        assert self.confusion is not None
        return zip(names, self.confusion.tolist(), strict=True)

    def write(self, file: Path, **head: Any) -> None:
        """Writes everything as JSON, after the keys of `head`; `read` finds it again."""
        content = {
            **head,
            "samples": int(self.samples.sum()),
            **self.metrics(),
            "classes": [
                {"class": name, "precision": p, "recall": r, "f1": f, "samples": n, "predicted": guessed, "hits": hits}
                for (name, p, r, f, n), guessed, hits in zip(
                    self.rows(), self.predicted.tolist(), self.hits.tolist(), strict=True
                )
            ],
            "confusion": None if self.confusion is None else self.confusion.tolist(),
        }
        partial = file.with_name(f".{file.name}")
        partial.write_text(json.dumps(content) + "\n", encoding="utf-8")
        partial.replace(file)

    @classmethod
    def read(cls, content: dict[str, Any]) -> ClassScores:
        """From the content of a file that `write` has written."""
        classes = content["classes"]
        hits, predicted, samples = (
            np.array([row[key] for row in classes], dtype=np.int64) for key in ("hits", "predicted", "samples")
        )
        matrix = content["confusion"]
        confusion = None if matrix is None else np.array(matrix, dtype=np.int64)
        return cls(tuple(row["class"] for row in classes), hits, predicted, samples, confusion)


def _share(part: Any, whole: Any) -> Numbers:
    """part / whole, and 0 where the whole is nothing."""
    part, whole = np.asarray(part, dtype=np.float64), np.asarray(whole, dtype=np.float64)
    return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)


def _keys(classes: Sequence[str]) -> list[str]:
    """Class names that can stand in a metric's name: without slashes, none twice."""
    keys: list[str] = []
    for i, name in enumerate(classes):
        key = name.replace("/", "_").strip() or "_"
        keys.append(key if key not in keys else f"{key}_{i}")
    return keys

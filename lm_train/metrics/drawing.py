"""A confusion matrix as a picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lm_train.metrics.scores import ClassScores

WITH_NUMBERS = 30
"""Up to so many classes each cell shows its count."""
WITH_NAMES = 80
"""Up to so many classes each row and column has its name."""
LONGEST_NAME = 24
_CELL_INCHES = 0.5


def draw_confusion(scores: ClassScores, file: Path, title: str) -> None:
    """Draws the confusion matrix as a PNG: counts as numbers, the share of the true class as colour.

    Args:
        scores: with a confusion matrix.
        file: is written.
        title: above the picture.
    """
    # here, since it takes a moment that only rank 0 at the end of a run need spend
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    assert scores.confusion is not None
    n = len(scores.classes)
    shares = scores.confusion / np.maximum(scores.samples, 1)[:, None]
    side = min(max(3.0, _CELL_INCHES * n), 15.0)
    figure = Figure(figsize=(side + 2, side + 1), dpi=110)
    FigureCanvasAgg(figure)  # no display, and nothing of pyplot's state
    axes = figure.add_subplot()
    # by the square root of the share, so that rare mistakes show beside the diagonal
    picture = axes.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, vmin=0, vmax=1))
    figure.colorbar(picture, ax=axes, label="share of the true class", shrink=0.8)
    axes.set(xlabel="predicted class", ylabel="true class")
    axes.set_title(title, wrap=True)
    if n <= WITH_NAMES:
        names = [_plain(name) for name in scores.classes]
        size = min(10.0, 72 * side / n * 0.6)
        crowded = max(map(len, names)) * 0.09 * size / 10 > side / n
        axes.set_xticks(range(n), names, fontsize=size, rotation=90 if crowded else 0)
        axes.set_yticks(range(n), names, fontsize=size)
    if n <= WITH_NUMBERS:
        digits = len(str(int(scores.confusion.max())))
        size = min(10.0, 72 * side / n / (0.7 * max(digits, 2)))
        for (row, column), count in np.ndenumerate(scores.confusion):
            colour = "white" if shares[row, column] > 0.3 else "black" if count else "0.8"
            axes.text(column, row, str(count), ha="center", va="center", fontsize=size, color=colour)
    figure.savefig(file, bbox_inches="tight")


def _plain(name: str) -> str:
    """A label of bearable length in which matplotlib sees no formula."""
    if len(name) > LONGEST_NAME:
        half = LONGEST_NAME // 2
        name = f"{name[: half - 1]}…{name[-half:]}"
    return name.replace("$", r"\$")

"""Text for models to learn from that nobody has written: few words in sentences without sense."""

from __future__ import annotations

import random
from collections.abc import Iterator

WORDS = ["the", "a", "small", "large", "model", "data", "loss", "step", "learns", "reads", "holds", "of", "in", "and"]


def sentences(seed: int = 0) -> Iterator[str]:
    """Without end; a line each."""
    draw = random.Random(seed)
    while True:
        yield " ".join(draw.choice(WORDS) for _ in range(draw.randint(4, 12))) + ".\n"

"""How this program starts itself again: with the same Python, which looks for modules where this one does.

`python -m` looks into the current folder first, and a file called torch.py or random.py there would be carried out in place of
the library. What a user allows with `plugins=` is looked for there all the same.
"""

from __future__ import annotations

import sys
from pathlib import Path

_CHECKOUT = Path(__file__).resolve().parent.parent


def python() -> list[str]:
    """The beginning of a command, before `-m`."""
    here = Path.cwd() == _CHECKOUT  # not installed, perhaps: then it is found here and nowhere else
    return [sys.executable] if here else [sys.executable, "-P"]

"""One process that measures: `python -m lm_train.calibrate.worker WORK OUT`.

A process of its own, since the number of a process' threads, and the processes around it, are part of what is measured.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from lm_train import signals
from lm_train.calibrate.parts import Work
from lm_train.calibrate.settings import measure
from lm_train.calibrate.training import offload_bandwidth, training


def main() -> None:
    signals.die_with_parent()
    work = Work.model_validate_json(sys.argv[1])
    found: dict[str, Any] = {"setting": measure(work).model_dump(mode="json")}
    if work.training:
        found["training"] = training(Path(work.place), work.threads, work.quick)
        found["offload_bandwidth"] = None if work.gpu is None else offload_bandwidth(work.gpu)
    if work.rank == 0:
        Path(sys.argv[2]).write_text(json.dumps(found), encoding="utf-8")
    sys.stdout.flush()
    os._exit(0)  # threads of gloo, and the loader's, may still hold the interpreter


if __name__ == "__main__":
    main()

"""Put on PYTHONPATH by benchmarks/memory.py: writes what each rank of a run has resident, phase by phase.

Python imports a module of this name as it starts. Nothing of lm_train is replaced: its own `train` is called with one callback
more, and `models.build` tells when the process is still bare.
"""

from __future__ import annotations

import gc
import importlib.abc
import importlib.util
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def resident() -> dict[str, int]:
    """Bytes by the kernel's names: VmHWM is the most since the last `reset`."""
    found = re.findall(r"(VmHWM|VmRSS|RssAnon|RssFile):\s+(\d+) kB", _STATUS.read_text())
    return {name: int(kibibytes) * 1024 for name, kibibytes in found}


def reset() -> None:
    _CLEAR.write_text("5")  # Linux: proc(5), the peak starts anew


def of_gpu() -> dict[str, int]:
    """What torch's caching allocator gave out and holds at most since the last call, and what the process has beside it."""
    import torch

    if not torch.cuda.is_available():
        return {}
    free, total = torch.cuda.mem_get_info()
    found = {
        "cuda_allocated": torch.cuda.max_memory_allocated(),
        "cuda_reserved": torch.cuda.max_memory_reserved(),
        "cuda_beside": total - free - torch.cuda.memory_reserved(),  # context and libraries, if the GPU is ours alone
    }
    torch.cuda.reset_peak_memory_stats()
    return found


def limit_card() -> None:
    """A card of LM_TRAIN_CARD_BYTES: less than that for the allocator, since context and libraries lie beside it."""
    import torch

    card = os.environ.get("LM_TRAIN_CARD_BYTES")
    if card is None or not torch.cuda.is_available():
        return
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    torch.zeros(1, device="cuda")
    free, total = torch.cuda.mem_get_info()
    beside = total - free - torch.cuda.memory_reserved()
    torch.cuda.set_per_process_memory_fraction(min(1.0, max(0.0, (int(card) - beside) / total)))


def watch(module: Any) -> None:
    """Hands `lm_train.train.train` a callback that measures."""
    import lightning.pytorch as L

    from lm_train import models

    log: dict[str, Any] = {"rank": int(os.environ.get("RANK", "0")), "phases": []}
    build, train = models.build, module.train

    def measured_build(*args: Any, **options: Any) -> Any:
        if "bare" not in log:
            gc.collect()
            log["bare"] = resident()
        return build(*args, **options)

    class Probe(L.Callback):
        step = 0

        def _mark(self, phase: str) -> None:
            """What has passed since the last mark was `phase`."""
            now = resident()
            log["phases"].append({"phase": phase, "step": self.step, **now, **of_gpu()})
            reset()

        def on_train_start(self, *args: Any) -> None:
            self._mark("start")

        def on_train_batch_start(self, *args: Any) -> None:
            self._mark("between")

        def on_before_backward(self, *args: Any) -> None:
            self._mark("forward")

        def on_after_backward(self, *args: Any) -> None:
            self._mark("backward")

        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            self._mark("update")
            self.step = trainer.global_step

        def on_validation_start(self, *args: Any) -> None:
            self._mark("between")

        def on_validation_end(self, *args: Any) -> None:
            self._mark("validation")

        def on_train_end(self, *args: Any) -> None:
            self._mark("between")

    def measured_train(folder: Any, resume_from: Any = None, callbacks: Any = ()) -> Any:
        limit_card()
        probe = Probe()
        code = train(folder, resume_from, [*callbacks, probe])
        probe._mark("end")
        out = Path(os.environ["LM_TRAIN_MEMORY_LOG"]) / f"rank-{log['rank']}.json"
        out.write_text(json.dumps(log))
        return code

    models.build, module.train = measured_build, measured_train


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != "lm_train.train":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_watch(module: Any) -> None:
            execute(module)
            watch(module)

        spec.loader.exec_module = execute_and_watch  # type: ignore[method-assign]
        return spec


if "LM_TRAIN_MEMORY_LOG" in os.environ:
    sys.meta_path.insert(0, _Finder())

"""Predicted against measured on the GPUs of this machine: memory, step time, and whether what is said to fit does fit.

    python benchmarks/gpu.py --list                     the frozen list, and its hash
    python benchmarks/gpu.py [--only PART] [--repeats 3] [--limits 6] [--out gpu]

Each configuration is the whole command, `lm-train train`, in processes of its own, on data that need no download. What is
predicted stands in its plan.json; what is measured is said by torch's caching allocator and the driver in each rank
(`benchmarks/memory_probe`), and the step's seconds by metrics.jsonl after 10 steps of warm-up.

* allocated: torch.cuda.max_memory_allocated against the prediction without its reserve.
* used: the allocator's largest reserve and the context beside it (what the driver reports less what is reserved) against
  the whole prediction.
* limits: the first six configurations of several families again, with a card that is as small as the upper end of the
  prediction (set_per_process_memory_fraction): what then fails is a false "fits". Then by bisection the smallest card on which
  it still runs, which says how much of the card caution leaves unused.

The configurations of the split `calibration` are those on which rates and reserves may be fitted; all others are for judging.
On a machine without a GPU nothing is measured. No figure of this project comes from it so far: not measured.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent))

from report import errors, write_results

from lm_train.hardware import this_machine
from lm_train.runs import RunFolder, read_jsonl

Split = Literal["calibration", "interpolation", "sizes", "architectures", "strategies"]
STEPS, WARMUP = 40, 10
PROBE = Path(__file__).resolve().parent / "memory_probe"
GPT = "recipe=gpt_small"
TEXT = ("data={kind: embedded, tokenizer: bytes}", "model.vocab_size=50257")
DIGITS = "data={kind: images, image_size: 64, channels: 3}"
PLAIN = (
    f"trainer.max_steps={STEPS}",
    "trainer.log_every_n_steps=1",
    "trainer.val_check_interval=20",
    "trainer.limit_val_batches=2",
    "trainer.sample_tokens=0",
    "checkpoint.every_n_steps=null",
    "tracking.wandb=disabled",
)


@dataclass(frozen=True)
class Configuration:
    split: Split
    words: tuple[str, ...]
    limited: bool = False
    """Also run on ever smaller cards."""

    @property
    def name(self) -> str:
        return hashlib.sha256(" ".join(self.words).encode()).hexdigest()[:10]


def _gpt(*words: str) -> tuple[str, ...]:
    return (GPT, *TEXT, *words)


def _sized(micro: int, precision: str, *words: str, accumulate: int = 1, strategy: str = "single") -> tuple[str, ...]:
    return (
        f"data.micro_batch_size={micro}",
        f"data.global_batch_size={micro * accumulate}",
        f"trainer.precision={precision}",
        f"trainer.strategy={strategy}",
        *words,
    )


FULL, CHUNKS = "trainer.activation_checkpointing=full", "trainer.cross_entropy_chunks=8"
BERT = ("recipe=bert_small", *TEXT)
LSTM = ("recipe=lstm_lm", "data={kind: embedded, tokenizer: bytes}", "model.hidden_size=1024", "model.n_layer=2")
RESNET = ("recipe=resnet_cifar10", DIGITS)
CNN = ("recipe=cnn_cifar10", DIGITS)
LLAMA = (
    "recipe=llama_1b",
    "data={kind: embedded, tokenizer: bytes}",
    "model.vocab_size=32000",
    "model.block_size=1024",
)
HF = ("recipe=hf_gpt2", "model.config={model_type: gpt2, n_layer: 12, n_head: 12, n_embd: 768}", "model.block_size=512")
CONFIGURATIONS = (
    Configuration("calibration", _gpt(*_sized(4, "bf16-mixed"))),
    Configuration("calibration", _gpt(*_sized(12, "bf16-mixed"))),
    Configuration("calibration", _gpt(*_sized(8, "32-true"))),
    Configuration("calibration", _gpt(*_sized(8, "bf16-mixed", FULL, CHUNKS))),
    Configuration("calibration", _gpt(*_sized(4, "bf16-mixed", accumulate=4))),
    Configuration("interpolation", _gpt(*_sized(8, "bf16-mixed")), limited=True),
    Configuration("interpolation", _gpt(*_sized(16, "bf16-mixed", FULL)), limited=True),
    Configuration("interpolation", _gpt(*_sized(8, "bf16-true"))),
    Configuration("interpolation", _gpt(*_sized(8, "bf16-mixed", CHUNKS))),
    Configuration("interpolation", _gpt(*_sized(4, "32-true", FULL))),
    Configuration("interpolation", _gpt(*_sized(2, "16-mixed"))),
    Configuration("interpolation", _gpt(*_sized(8, "bf16-mixed", "trainer.compile=true"))),
    Configuration("sizes", ("recipe=gpt_nano", *_sized(32, "bf16-mixed"))),
    Configuration("sizes", ("recipe=gpt_medium", *TEXT, *_sized(4, "bf16-mixed")), limited=True),
    Configuration("sizes", ("recipe=gpt_medium", *TEXT, *_sized(8, "bf16-mixed", FULL))),
    Configuration("sizes", ("recipe=gpt_large", *TEXT, *_sized(2, "bf16-mixed", CHUNKS))),
    Configuration("architectures", (*BERT, *_sized(32, "bf16-mixed")), limited=True),
    Configuration("architectures", (*BERT, *_sized(16, "32-true", FULL))),
    Configuration("architectures", (*LLAMA, *_sized(2, "bf16-mixed", CHUNKS)), limited=True),
    Configuration("architectures", (*LLAMA, *_sized(4, "bf16-true", FULL, CHUNKS))),
    Configuration("architectures", (*LSTM, *_sized(128, "32-true"))),
    Configuration("architectures", (*LSTM, *_sized(256, "bf16-mixed"))),
    Configuration("architectures", (*RESNET, *_sized(512, "bf16-mixed")), limited=True),
    Configuration("architectures", (*RESNET, *_sized(256, "32-true"))),
    Configuration("architectures", (*CNN, *_sized(512, "bf16-mixed"))),
    Configuration("architectures", (*HF, *_sized(8, "bf16-mixed"))),
    Configuration("architectures", (*HF, *_sized(16, "32-true", FULL))),
    *(
        Configuration("strategies", _gpt(*_sized(8, precision, strategy=strategy)))
        for strategy in ("fsdp", "zero1", "zero2", "zero3", "zero3_offload")
        for precision in ("bf16-mixed", "32-true")
    ),
)
"""Frozen: a change makes another list, with another hash."""
SEVERAL = tuple(
    Configuration(
        "strategies", _gpt("data.micro_batch_size=8", f"trainer.strategy={strategy}", f"trainer.precision={precision}")
    )
    for strategy in ("ddp", "fsdp", "zero1", "zero2", "zero3")
    for precision in ("bf16-mixed", "bf16-true")
)
"""With all GPUs of a machine that has several; the global batch is 8 samples a GPU."""
LIST_HASH = hashlib.sha256(json.dumps([[c.split, *c.words] for c in (*CONFIGURATIONS, *SEVERAL)]).encode()).hexdigest()[
    :16
]


def configurations(n_gpus: int) -> list[Configuration]:
    """The list for a machine with so many GPUs."""
    several = [Configuration(c.split, (*c.words, f"data.global_batch_size={8 * n_gpus}")) for c in SEVERAL]
    one = [Configuration(c.split, (*c.words, "trainer.devices=1"), c.limited) for c in CONFIGURATIONS]
    return one + (
        [Configuration(c.split, (*c.words, f"trainer.devices={n_gpus}")) for c in several] if n_gpus > 1 else []
    )


# ---- one run


def run(words: tuple[str, ...], folder: Path, name: str, card_bytes: int | None = None) -> dict[str, Any]:
    """What one training predicted of itself, and what was measured; or how it ended.

    Args:
        words: of the recipe.
        folder: for the run and the probe's log.
        name: of the run.
        card_bytes: what the process may have; None: the whole card.
    """
    log = folder / f"{name}.log"
    log.mkdir()
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(PROBE), str(PROBE.parent.parent), os.environ.get("PYTHONPATH", "")]),
        "LM_TRAIN_MEMORY_LOG": str(log),
    }
    if card_bytes is not None:
        environment["LM_TRAIN_CARD_BYTES"] = str(card_bytes)
    command = [sys.executable, "-m", "lm_train", "train", *words, *PLAIN, f"name={name}", f"runs_dir={folder}"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    run_folder = RunFolder(folder / name)
    row: dict[str, Any] = {"exit_code": done.returncode, "predicted": predicted(run_folder)}
    if done.returncode:
        last = [line for line in done.stderr.splitlines() if line.strip()][-1:]
        return row | {"out_of_memory": "out of memory" in done.stderr.lower(), "message": last[0] if last else ""}
    ranks = [json.loads(file.read_text()) for file in sorted(log.glob("rank-*.json"))]
    return row | measured(ranks, read_jsonl(run_folder.metrics))


def predicted(folder: RunFolder) -> dict[str, Any] | None:
    """Of the run's plan; None where it has none."""
    try:
        plan = json.loads(folder.plan.read_text(encoding="utf-8"))
    except OSError:
        return None
    prediction = plan.get("prediction")
    if prediction is None:
        return None
    memory, step = prediction["memory"], prediction["step"]
    parts = ("parameters", "gradients", "optimizer", "activations", "logits", "buffers")
    allocated = sum(memory[part] for part in parts)
    used = allocated + memory["reserve"]
    seconds = sum(step[part] for part in ("compute", "communication", "optimizer", "data", "host"))
    return {
        "allocated": allocated,
        "used": used,
        "high": round(used * (1 + memory["relative_error"][1])),
        "parts": {part: memory[part] for part in (*parts, "reserve")},
        "moment": memory["moment"],
        "seconds": seconds,
        "mfu": prediction["mfu"],
    }


def measured(ranks: list[dict[str, Any]], metrics: list[dict[str, Any]]) -> dict[str, Any]:
    """The rank with most, after warm-up of the time but from the start of the memory.

    Args:
        ranks: what the probe wrote.
        metrics: rows of metrics.jsonl.
    """
    phases = [phase for rank in ranks for phase in rank["phases"] if "cuda_reserved" in phase]
    rows = [row for row in metrics if row.get("step", 0) > WARMUP and "perf/step_seconds" in row]
    return {
        "allocated": max(phase["cuda_allocated"] for phase in phases),
        "reserved": max(phase["cuda_reserved"] for phase in phases),
        "used": max(phase["cuda_reserved"] + phase["cuda_beside"] for phase in phases),
        "seconds": statistics.median(row["perf/step_seconds"] for row in rows),
        "mfu": statistics.median([row["perf/mfu"] for row in rows if "perf/mfu" in row] or [0.0]) or None,
    }


# ---- several runs


def repeated(configuration: Configuration, folder: Path, repeats: int) -> dict[str, Any]:
    """Medians over fresh processes, with the spread of one against another."""
    runs = [run(configuration.words, folder, f"{configuration.name}-{i}") for i in range(repeats)]
    row: dict[str, Any] = {**asdict(configuration), "name": configuration.name, "runs": runs}
    if any(one["exit_code"] for one in runs) or runs[0]["predicted"] is None:
        return row
    row["measured"] = {
        key: statistics.median(one[key] for one in runs) for key in ("allocated", "reserved", "used", "seconds")
    }
    row["spread"] = {
        key: (max(one[key] for one in runs) - min(one[key] for one in runs)) / row["measured"][key]
        for key in row["measured"]
    }
    row["mfu"] = runs[0]["mfu"]
    return row


def limited(configuration: Configuration, folder: Path, high: int, runs: int) -> dict[str, Any]:
    """Whether it runs on a card of `high` bytes, and the smallest card found on which it does.

    Args:
        configuration: what to run.
        folder: for the runs.
        high: upper end of the prediction.
        runs: for the bisection.
    """

    def fits(card: int) -> bool:
        tried.append(
            {
                "card_bytes": card,
                "fits": not run(configuration.words, folder, f"{configuration.name}-{card}", card)["exit_code"],
            }
        )
        return bool(tried[-1]["fits"])

    tried: list[dict[str, Any]] = []
    found: dict[str, Any] = {"name": configuration.name, "high": high, "fits": fits(high), "tried": tried}
    if found["fits"]:
        fails, works = round(high * 0.8), high
        for _ in range(runs - 1):
            middle = (fails + works) // 2
            fails, works = (fails, middle) if fits(middle) else (middle, works)
        found |= {"smallest": works, "unused": 1 - works / high}
    return found


def summary(rows: list[dict[str, Any]], limits: list[dict[str, Any]]) -> dict[str, Any]:
    """Errors of each split apart, and the false "fits"."""
    judged = [row for row in rows if "measured" in row]
    found: dict[str, Any] = {}
    for split in ("calibration", "interpolation", "sizes", "architectures", "strategies"):
        some = [row for row in judged if row["split"] == split]
        for key in ("allocated", "used", "seconds"):
            pairs = [(row["runs"][0]["predicted"][key], row["measured"][key]) for row in some]
            found.setdefault(key, {})[split] = errors(pairs)
    unused = [limit["unused"] for limit in limits if "unused" in limit]
    return found | {
        "not_run": [row["name"] for row in rows if "measured" not in row],
        "false_fits": [limit["name"] for limit in limits if not limit["fits"]],
        "unused_by_caution": max(unused, default=None),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="print the configurations and end")
    parser.add_argument("--only", default="", help="configurations whose words contain this")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--limits", type=int, default=6, help="runs of each bisection for the smallest card; 0: none")
    parser.add_argument("--out", default="gpu")
    options = parser.parse_args(arguments)
    gpus = this_machine().gpus
    chosen = [c for c in configurations(max(1, len(gpus))) if options.only in " ".join(c.words)]
    if options.list:
        for configuration in chosen:
            print(f"{configuration.name}  {configuration.split:<14} {' '.join(configuration.words)}")
        print(f"list {LIST_HASH}")
        return 0
    if not gpus:
        print("benchmarks/gpu.py: no GPU here, nothing is measured; --list shows what would be", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as temporary:
        folder, rows, limits = Path(temporary), [], []
        for configuration in chosen:
            rows.append(repeated(configuration, folder, options.repeats))
            print(json.dumps({key: rows[-1].get(key) for key in ("name", "split", "measured", "mfu")}), flush=True)
            said = rows[-1]["runs"][0]["predicted"]
            if configuration.limited and options.limits and "measured" in rows[-1]:
                limits.append(limited(configuration, folder, said["high"], options.limits))
                print(json.dumps({key: value for key, value in limits[-1].items() if key != "tried"}), flush=True)
    found = summary(rows, limits)
    write_results("gpu", {"list": LIST_HASH, "summary": found, "rows": rows, "limits": limits}, options.out)
    print(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())

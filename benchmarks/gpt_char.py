"""gpt_char on tiny Shakespeare: mean validation loss over the whole split, beside a plain loop with nanoGPT's settings.

    python benchmarks/gpt_char.py PATH/TO/input.txt [seeds] [name of results file]

Both see 2,000 x 12 x 64 tokens and have the same network. The plain loop follows nanoGPT's README for a CPU ("train.py
config/train_shakespeare_char.py --device=cpu --compile=False ... --dropout=0.0"): AdamW 1e-3, betas 0.9 and 0.99, cosine to
1e-4 with 100 steps of warm-up, random offsets into the text, and evaluates the whole validation split as ours does.
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from report import write_results

from lm_train.hardware import this_machine
from lm_train.models import build
from lm_train.plan import DataFacts, make_plan
from lm_train.recipe import load

STEPS, BATCH, BLOCK = 2000, 12, 64


def ours(text: Path, seed: int, folder: Path) -> dict[str, float]:
    name = f"char-{seed}"
    words = ["recipe=gpt_char", f"data.path={text}", f"seed={seed}", f"name={name}", f"runs_dir={folder}"]
    words += ["tracking.wandb=disabled", "trainer.sample_tokens=0"]
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "lm_train", "train", *words], check=True, stdout=subprocess.DEVNULL)
    rows = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if "train/loss" in row][-1]
    assert last["tokens"] == STEPS * BATCH * BLOCK
    validation = [row["val/loss"] for row in rows if "val/loss" in row]
    return {"val_loss": validation[-1], "seconds": time.perf_counter() - began}


def plain(text: Path, seed: int) -> dict[str, float]:
    characters = text.read_text()
    ids = {c: i for i, c in enumerate(sorted(set(characters)))}
    tokens = torch.tensor([ids[c] for c in characters])
    cut = int(0.9 * len(tokens))
    train, val = tokens[:cut], tokens[cut:]
    recipe = load(["recipe=gpt_char", f"data.path={text}"])
    torch.manual_seed(seed)
    net = build(recipe.model, make_plan(recipe, this_machine()), DataFacts(vocab_size=len(ids)))
    groups = [
        {"params": [p for p in net.parameters() if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in net.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99))
    began = time.perf_counter()
    for step in range(STEPS):
        if step < 100:
            rate = 1e-3 * (step + 1) / 101
        else:
            rate = 1e-4 + 0.5 * (1 + math.cos(math.pi * (step - 100) / (STEPS - 100))) * 9e-4
        for group in optimizer.param_groups:
            group["lr"] = rate
        starts = torch.randint(len(train) - BLOCK, (BATCH, 1))
        rows = train[starts + torch.arange(BLOCK + 1)]
        loss = net(rows[:, :-1], rows[:, 1:]) / (BATCH * BLOCK)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
    total = 0.0
    with torch.no_grad():
        for start in range(0, len(val) - 1, BLOCK):
            row = val[start : start + BLOCK + 1]
            total += net(row[None, :-1], row[None, 1:]).item()
    return {"val_loss": total / (len(val) - 1), "seconds": time.perf_counter() - began}


def main() -> None:
    text = Path(sys.argv[1]).resolve()
    seeds = int(sys.argv[2]) if len(sys.argv) > 2 else 3
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(seeds):
            rows.append({"seed": seed, "ours": ours(text, seed, Path(folder)), "plain": plain(text, seed)})
            print(json.dumps(rows[-1]), flush=True)
    means = {arm: statistics.mean(row[arm]["val_loss"] for row in rows) for arm in ("ours", "plain")}
    print(f"mean validation loss: ours {means['ours']:.4f}, plain loop with nanoGPT's settings {means['plain']:.4f}")
    write_results("gpt_char", {"rows": rows, "mean_val_loss": means}, sys.argv[3] if len(sys.argv) > 3 else None)


if __name__ == "__main__":
    main()

"""A plain layout, from which tests make others with `dataclasses.replace`."""

from __future__ import annotations

from lm_train.plan import Layout

PLAIN = Layout(
    nodes=1,
    devices=1,
    strategy="single",
    precision="32-true",
    micro_batch_size=4,
    accumulate_grad_batches=1,
    activation_checkpointing="none",
    cross_entropy_chunks=1,
    num_workers=0,
    compile=False,
    threads_per_rank=1,
    accelerator="cpu",
)

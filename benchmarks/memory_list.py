"""The configurations of benchmarks/memory.py, frozen before anything was measured: the results carry this file's hash.

Every row is a training of ours as it is started from the command line. `split` says what the row is for: `calibration` rows, all
of the model GPT_A, set the constants of lm_train/plan/footprint.py; the others are held out.
"""

from __future__ import annotations

from typing import NamedTuple

GPT_A = "model={kind: gpt, n_layer: 6, n_head: 8, n_embd: 512, block_size: 256, vocab_size: 8192}"
GPT_B = "model={kind: gpt, n_layer: 4, n_head: 12, n_embd: 768, block_size: 128, vocab_size: 16384}"
GPT_C = "model={kind: gpt, n_layer: 12, n_head: 8, n_embd: 256, block_size: 512, vocab_size: 2048}"
GPT_D = "model={kind: gpt, n_layer: 2, n_head: 16, n_embd: 1024, block_size: 128, vocab_size: 32768}"
LLAMA = "model={kind: llama, n_layer: 6, n_head: 8, n_kv_head: 4, n_embd: 512, block_size: 256, vocab_size: 8192}"
BERT = "model={kind: bert, n_layer: 6, n_head: 8, n_embd: 512, block_size: 256, vocab_size: 8192}"
CNN = "model={kind: cnn, channels: [32, 64, 128], widths: [256]}"
RESNET = "model={kind: resnet, stem: 32, channels: [64, 128, 256], blocks: [1, 0, 1]}"
MLP = "model={kind: mlp, widths: [3072, 2048]}"
LSTM = (
    "model={kind: recurrent, cell: lstm, n_layer: 2, n_embd: 384, hidden_size: 512, block_size: 256, vocab_size: 1024}"
)
GRU = "model={kind: recurrent, cell: gru, n_layer: 2, n_embd: 256, hidden_size: 512, block_size: 128, vocab_size: 2048}"
RNN = "model={kind: recurrent, cell: rnn, n_layer: 3, n_embd: 512, hidden_size: 768, block_size: 256, vocab_size: 4096}"
LSTM_CLASSES = "model={kind: recurrent, cell: lstm, n_embd: 256, hidden_size: 512, bidirectional: true, pooling: mean}"

FULL, CHUNKS = "trainer.activation_checkpointing=full", "trainer.cross_entropy_chunks"
BF16, PURE_BF16 = "trainer.precision=bf16-mixed", "trainer.precision=bf16-true"


class Row(NamedTuple):
    name: str
    split: str
    model: str
    micro_batch_size: int
    words: tuple[str, ...] = ()
    strategy: str = "single"
    accumulate: int = 1
    data: str = "text"
    """text: the embedded corpus in bytes; images: 64 x 64 pixels of noise in colour; classes: labelled texts."""

    @property
    def ranks(self) -> int:
        return 1 if self.strategy == "single" else 2


INSIDE, SIZES, OTHERS, SPREAD = "interpolation", "other sizes", "other architectures", "other strategies"
ROWS = (
    Row("gpt_a", "calibration", GPT_A, 4),
    Row("gpt_a bf16", "calibration", GPT_A, 4, (BF16,)),
    Row("gpt_a adagrad", "calibration", GPT_A, 6, ("optim={kind: adagrad}",)),
    Row("gpt_a zero1", "calibration", GPT_A, 4, (), "zero1"),
    Row("gpt_a zero2 bf16", "calibration", GPT_A, 8, (BF16,), "zero2"),
    Row("gpt_a 8", INSIDE, GPT_A, 8),
    Row("gpt_a pure bf16", INSIDE, GPT_A, 10, (PURE_BF16,)),
    Row("gpt_a full", INSIDE, GPT_A, 12, (FULL,)),
    Row("gpt_a every second", INSIDE, GPT_A, 8, ("trainer.activation_checkpointing=2",)),
    Row("gpt_a chunks", INSIDE, GPT_A, 8, (f"{CHUNKS}=4",)),
    Row("gpt_a accumulated", INSIDE, GPT_A, 4, (), "single", 2),
    Row("gpt_a dropout", INSIDE, GPT_A, 5, ("model.dropout=0.1",)),
    Row("gpt_a sgd", INSIDE, GPT_A, 6, ("optim={kind: sgd, nesterov: true, weight_decay: 0.01}",)),
    Row("gpt_a adam decayed", INSIDE, GPT_A, 2, ("optim={kind: adam, weight_decay: 0.01}",)),
    Row("gpt_a rmsprop", INSIDE, GPT_A, 6, ("optim={kind: rmsprop}",)),
    Row("gpt_a muon", INSIDE, GPT_A, 6, ("optim={kind: muon}",)),
    Row("gpt_b", SIZES, GPT_B, 4),
    Row("gpt_b bf16 full", SIZES, GPT_B, 8, (BF16, FULL)),
    Row("gpt_c", SIZES, GPT_C, 4),
    Row("gpt_c bf16 chunks", SIZES, GPT_C, 6, (BF16, f"{CHUNKS}=2")),
    Row("gpt_d", SIZES, GPT_D, 2),
    Row("gpt_d chunks bf16", SIZES, GPT_D, 8, (BF16, f"{CHUNKS}=8")),
    Row("llama", OTHERS, LLAMA, 4),
    Row("llama bf16 tied", OTHERS, LLAMA, 8, (BF16, "model.tie_embeddings=true")),
    Row("llama full chunks", OTHERS, LLAMA, 12, (FULL, f"{CHUNKS}=4")),
    Row("bert", OTHERS, BERT, 6),
    Row("bert bf16", OTHERS, BERT, 8, (BF16,)),
    Row("cnn", OTHERS, CNN, 256, data="images"),
    Row("cnn gelu bf16", OTHERS, CNN, 400, (BF16, "model.activation=gelu"), data="images"),
    Row("resnet", OTHERS, RESNET, 96, data="images"),
    Row("resnet group bf16", OTHERS, RESNET, 160, (BF16, "model.norm=group"), data="images"),
    Row("mlp", OTHERS, MLP, 256, data="images"),
    Row("lstm", OTHERS, LSTM, 40),
    Row("lstm bf16", OTHERS, LSTM, 64, (BF16,)),
    Row("lstm classes", OTHERS, LSTM_CLASSES, 64, data="classes"),
    Row("gru", OTHERS, GRU, 64),
    Row("rnn", OTHERS, RNN, 32),
    Row("gpt_a ddp", SPREAD, GPT_A, 4, (), "ddp"),
    Row("gpt_a ddp accumulated bf16", SPREAD, GPT_A, 4, (BF16,), "ddp", 2),
    Row("gpt_a fsdp", SPREAD, GPT_A, 8, (), "fsdp"),
    Row("gpt_a fsdp bf16", SPREAD, GPT_A, 10, (BF16,), "fsdp"),
    Row("gpt_b fsdp full accumulated", SPREAD, GPT_B, 4, (FULL,), "fsdp", 2),
    Row("gpt_a zero1 bf16", SPREAD, GPT_A, 8, (BF16,), "zero1"),
    Row("gpt_a zero2", SPREAD, GPT_A, 4, (), "zero2"),
    Row("gpt_b zero2 accumulated bf16", SPREAD, GPT_B, 4, (BF16,), "zero2", 2),
    Row("gpt_a zero3", SPREAD, GPT_A, 4, (), "zero3"),
    Row("gpt_b zero3 bf16", SPREAD, GPT_B, 6, (BF16,), "zero3"),
    Row("llama fsdp", SPREAD, LLAMA, 8, (), "fsdp"),
    Row("llama zero3 accumulated", SPREAD, LLAMA, 4, (), "zero3", 2),
    Row("bert ddp", SPREAD, BERT, 6, (), "ddp"),
    Row("resnet ddp", SPREAD, RESNET, 80, (), "ddp", data="images"),
    Row("lstm zero2", SPREAD, LSTM, 32, (), "zero2"),
)
REPEATED = ("gpt_a", "gpt_a bf16", "cnn", "lstm", "gpt_a fsdp", "gpt_a zero2")
"""Measured three times: the noise of A against A."""

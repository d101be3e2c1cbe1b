"""One micro batch as a list of operations and stages, for every kind of model with a formula.

A network is written down once, on a tape (`tape.py`, `operations.py`), and passed through in a millisecond or two: what is
alive at the worst moment of each stage, and which operations are done, come from the same pass. Meant are torch's eager
kernels: torch.compile fuses, and needs less of both. Not counted: what an allocator rounds, what oneDNN packs (1 or 2 MB),
cuBLAS' workspace.

Operations are counted as they are done: recomputation, the padded rows of the vocabulary and the scores that fused attention
computes again are in `Work.flops`, not in `flops_per_sample`, which counts what the model is; biases, norms and lookups are
in neither a product.
"""

from __future__ import annotations

from lm_train.plan.facts import DataFacts
from lm_train.plan.layout import Layout
from lm_train.plan.plan import padded_vocab_size
from lm_train.plan.work.decoders import decoder_work
from lm_train.plan.work.dense import dense_work
from lm_train.plan.work.ops import WIDTH, Kind, Number, Op, Stage, Work
from lm_train.plan.work.recurrent import recurrent_work
from lm_train.plan.work.transformers import bert_work, seq2seq_work
from lm_train.recipe import AnyModel, Task


def work_of(model: AnyModel, task: Task, facts: DataFacts, layout: Layout) -> Work | None:
    """What one micro batch makes one rank do, by torch's eager kernels.

    Args:
        model: the recipe's model section.
        task: decides the head and the loss.
        facts: of the data.
        layout: micro batch, precision, strategy, checkpointing, chunks, accelerator.

    Returns:
        None where the data must be read first, or no formula is known.
    """
    asked: int | str = getattr(model, "vocab_size", "auto")
    vocab_size = facts.vocab_size if isinstance(asked, str) else asked
    match model.kind:
        case "gpt" | "llama" if vocab_size is not None:
            apart = facts.keeps_documents_apart
            return decoder_work(model, padded_vocab_size(vocab_size), vocab_size, layout, apart)
        case "bert" if vocab_size is not None and (task == "masked_lm" or facts.n_outputs is not None):
            n_classes = None if task == "masked_lm" else facts.n_outputs
            return bert_work(model, padded_vocab_size(vocab_size), vocab_size, n_classes, facts, layout)
        case "seq2seq" if vocab_size is not None:
            return seq2seq_work(model, padded_vocab_size(vocab_size), vocab_size, facts, layout)
        case "recurrent" if vocab_size is not None and task == "causal_lm":
            rows = padded_vocab_size(vocab_size)
            return recurrent_work(model, rows, vocab_size, None, model.block_size, layout)
        case "recurrent" if vocab_size is not None and facts.n_outputs is not None and facts.max_length is not None:
            rows = padded_vocab_size(vocab_size)
            return recurrent_work(model, rows, vocab_size, facts.n_outputs, facts.max_length, layout)
        case "mlp" | "cnn" | "resnet" if facts.input_shape is not None and facts.n_outputs is not None:
            return dense_work(model, facts.input_shape, facts.n_outputs, layout)
    return None


__all__ = ["WIDTH", "Kind", "Number", "Op", "Stage", "Work", "work_of"]

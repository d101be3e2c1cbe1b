"""Which strategies cannot do what, each with a way out."""

from __future__ import annotations

from collections.abc import Iterator

from lm_train.recipe.sections import Recipe

Conflict = tuple[list[tuple[str, ...]], str]


def strategy_conflicts(recipe: Recipe) -> Iterator[Conflict]:
    """What the recipe's strategy rules out: the keys concerned, and a sentence with what would work."""
    trainer, optim = recipe.trainer, recipe.optim
    strategy = trainer.strategy
    shards = strategy == "fsdp" or strategy.startswith("zero")
    said = f"trainer.strategy={strategy}"
    if strategy == "fsdp" and trainer.precision == "16-mixed":
        yield (
            [("trainer", "precision"), ("trainer", "strategy")],
            f"trainer.precision=16-mixed needs a gradient scaler, which {said} has not; try trainer.precision=bf16-mixed, or "
            "trainer.strategy=zero2",
        )
    if optim.kind == "muon" and shards:
        yield (
            [("optim", "kind"), ("trainer", "strategy")],
            f"optim.kind=muon works on whole matrices, {said} cuts them up; try trainer.strategy=ddp, or optim.kind=adamw",
        )
    if optim.kind == "adagrad" and strategy.startswith("zero"):
        yield (
            [("optim", "kind"), ("trainer", "strategy")],
            f"optim.kind=adagrad loses its parameter groups under {said}: DeepSpeed makes it anew; try trainer.strategy=fsdp, "
            "or optim.kind=adamw",
        )
    if trainer.compile and strategy.startswith("zero3"):
        yield (
            [("trainer", "compile"), ("trainer", "strategy")],
            f"trainer.compile=true gains nothing under {said}: DeepSpeed's hooks in every module break what is compiled; try "
            "trainer.strategy=fsdp, or trainer.compile=false",
        )


def strategy_problem(recipe: Recipe, strategy: str, precision: str) -> str | None:
    """Why the recipe cannot be trained with this strategy and precision, or None if it can."""
    trainer = recipe.trainer.model_copy(update={"strategy": strategy, "precision": precision})
    found = next(strategy_conflicts(recipe.model_copy(update={"trainer": trainer})), None)
    return None if found is None else found[1]

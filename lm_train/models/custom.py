"""A network of the user's own behind our networks' conventions: inputs by name, shapes checked, summed losses.

Like transformers' models these draw their own initial weights and are built whole. A LightningModule stays as it is.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lm_train import plugins
from lm_train.errors import UsageError
from lm_train.models.decoder import Decoder
from lm_train.models.logits import LogitsLanguageModel, LogitsMaskedLM
from lm_train.plan import DataFacts, Plan
from lm_train.recipe import CustomModel


def is_lightning_module(net: nn.Module) -> bool:
    """Whether it brings its own training step and optimizer (this room knows nothing of Lightning)."""
    return all(callable(getattr(net, name, None)) for name in ("training_step", "configure_optimizers", "log"))


def build_custom(section: CustomModel, plan: Plan, facts: DataFacts) -> nn.Module:
    """The user's LightningModule, or his nn.Module with what the plan's task needs around it.

    Raises:
        UsageError: if the factory is not allowed, cannot be called, fails, or returns something else.
    """
    made = plugins.make("model.factory", section.factory, section.args, {"facts": facts})
    if not isinstance(made, nn.Module):
        raise UsageError(
            f"model.factory: {section.factory} returned {_kind(made)}; expected an nn.Module or a LightningModule"
        )
    if is_lightning_module(made):
        return made
    if not any(parameter.requires_grad for parameter in made.parameters()):
        raise UsageError(f"model.factory: {section.factory} returned a network without parameters to train")
    if plan.task == "causal_lm":
        return CustomDecoder(made, section, facts)
    if plan.task == "masked_lm":
        return CustomMaskedLM(made, section, facts)
    if plan.task in ("classification", "regression"):
        return CustomNet(made, section.factory, facts.n_outputs)
    if plan.task == "custom":
        raise UsageError(
            f"model.factory: {section.factory} returned an nn.Module, which does not say what to learn; give "
            "data.task=classification or regression, or return a LightningModule"
        )
    raise UsageError(
        f"model.factory: an nn.Module cannot learn {plan.task.replace('_', ' ')} by itself; return a LightningModule"
    )


class CustomNet(nn.Module):
    """A classifier or a regression.

    Args:
        model: the user's.
        factory: for messages.
        n_outputs: what it must give for each sample; None is not checked.
    """

    def __init__(self, model: nn.Module, factory: str, n_outputs: int | None) -> None:
        super().__init__()
        self.model = model
        self.factory, self.n_outputs = factory, n_outputs
        self._names = _names_taken(model)

    def forward(self, **inputs: Tensor) -> Tensor:  # each (B, ...) -> (B, n_outputs)
        """Calls the user's network by the names of its arguments where it has them, else in their order."""
        out = call(self.model, self._names, inputs)
        size = next(iter(inputs.values())).shape[0]
        wanted = (size, out.shape[1] if self.n_outputs is None and out.dim() == 2 else self.n_outputs)
        if tuple(out.shape) != wanted:
            raise UsageError(
                f"model.factory: forward of {self.factory} gave {tuple(out.shape)}, expected {wanted}: a row for each sample of "
                "as many values as there are classes, or numbers to predict"
            )
        return out


class CustomDecoder(LogitsLanguageModel):
    """Logits of the user's network as a causal language model, which can draw text."""

    def __init__(self, model: nn.Module, section: CustomModel, facts: DataFacts) -> None:
        assert facts.vocab_size is not None
        super().__init__(section.block_size, facts.vocab_size)
        self.model, self.factory = model, section.factory
        self._names = _names_taken(model)

    def logits(self, tokens: Tensor) -> Tensor:  # (B, T) -> (B, T, V)
        return _of_each_position(
            call(self.model, self._names, {"tokens": tokens}), tokens, self.vocab_size, self.factory
        )

    generate = Decoder.generate


class CustomMaskedLM(LogitsMaskedLM):
    """Logits of the user's network as a masked language model."""

    def __init__(self, model: nn.Module, section: CustomModel, facts: DataFacts) -> None:
        assert facts.vocab_size is not None
        super().__init__()
        self.model, self.factory, self.vocab_size = model, section.factory, facts.vocab_size
        self._names = _names_taken(model)

    def logits(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:  # (B, T) -> (B, T, V)
        inputs = {"tokens": tokens} if lengths is None else {"tokens": tokens, "lengths": lengths}
        return _of_each_position(call(self.model, self._names, inputs), tokens, self.vocab_size, self.factory)


def _of_each_position(out: Tensor, tokens: Tensor, vocab_size: int, factory: str) -> Tensor:
    if out.dim() != 3 or out.shape[:2] != tokens.shape or out.shape[2] < vocab_size:
        raise UsageError(
            f"model.factory: forward of {factory} gave {tuple(out.shape)} for {tuple(tokens.shape)} tokens, expected "
            f"{(*tokens.shape, vocab_size)}: logits of each position"
        )
    return out


def _names_taken(model: nn.Module) -> frozenset[str] | None:
    """The names by which `forward` takes arguments; None if it takes any."""
    parameters = inspect.signature(model.forward).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return frozenset(parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_POSITIONAL)


def call(model: nn.Module, names: frozenset[str] | None, inputs: Mapping[str, Tensor]) -> Tensor:
    """Gives a network the inputs of a batch that it takes: by name, or, if it knows none of the names, the first ones."""
    if names is None:
        out = model(**inputs)
    elif names & inputs.keys():
        out = model(**{name: value for name, value in inputs.items() if name in names})
    else:
        out = model(*list(inputs.values())[: max(1, len(names))])
    if not isinstance(out, Tensor):
        raise UsageError(
            f"model.factory: forward of {type(model).__name__} gave {_kind(out)}; expected a tensor of logits or values"
        )
    return out


def _kind(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"

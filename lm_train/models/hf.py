"""Any model of Hugging Face's transformers as it is, behind our networks' conventions: inputs by name, summed losses.

These networks draw their own initial weights, from torch's default generator, and are built whole: there is no formula by
which a strategy could fill one parameter at a time. Nothing here runs code or unpickles: weights come from safetensors, code
from the installed transformers alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lm_train.errors import DataError, UsageError
from lm_train.models.decoder import Decoder
from lm_train.models.logits import LogitsLanguageModel, LogitsMaskedLM
from lm_train.plan import DataFacts, Plan
from lm_train.recipe import HuggingFace
from lm_train.recipe.explain import nearest

_POSITIONS = "max_position_embeddings"
_POSITIONS_AFTER_PADDING = (
    "camembert",
    "data2vec-text",
    "esm",
    "mpnet",
    "roberta",
    "roberta-prelayernorm",
    "xlm-roberta",
)
"""Model types whose positions count from pad_token_id + 1 on."""
_ATTENTIONS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
"""transformers would fetch any other name from the hub, as code."""


class HuggingFaceNet(nn.Module):
    """What the networks of all tasks share.

    Args:
        model: of transformers, with its head.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> HuggingFaceNet:
        """Moves tensors and casts parameters; float buffers, such as the wavelengths of rotary positions, keep their type.

        transformers computes them in fp32 whatever the weights' type, and a cast of the module would round them.
        """
        before = {name: buffer for name, buffer in self.named_buffers() if buffer.is_floating_point()}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            owner, _, leaf = name.rpartition(".")
            module = self.get_submodule(owner)
            now = getattr(module, leaf)
            if now.dtype != buffer.dtype:
                module._buffers[leaf] = buffer.to(now.device)
        return self


class HuggingFaceDecoder(HuggingFaceNet, LogitsLanguageModel):
    """Causal language model, which can draw text.

    Args:
        model: of transformers.
        block_size: most tokens of one sequence.
        vocab_size: token ids of the data; the model may have more.
    """

    def __init__(self, model: Any, block_size: int, vocab_size: int) -> None:
        LogitsLanguageModel.__init__(self, block_size, vocab_size)
        self.model = model

    def logits(self, tokens: Tensor) -> Tensor:  # (B, T) -> (B, T, V)
        return self.model(input_ids=tokens, use_cache=False).logits

    generate = Decoder.generate


class HuggingFaceMaskedLM(HuggingFaceNet, LogitsMaskedLM):
    """Masked language model."""

    def logits(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:  # (B, T) -> (B, T, V)
        mask = (
            None if lengths is None else (torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]).long()
        )
        return self.model(input_ids=tokens, attention_mask=mask).logits


class HuggingFaceTextClassifier(HuggingFaceNet):
    """Sequence classifier."""

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:  # (B, T), (B,) -> (B, classes)
        """Logits of texts of `lengths` tokens each, filled up behind."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        mask = positions < lengths[:, None]  # (B, T)
        return self.model(input_ids=tokens, attention_mask=mask.long()).logits


class HuggingFaceImageClassifier(HuggingFaceNet):
    """Image classifier."""

    def forward(self, inputs: Tensor) -> Tensor:  # (B, C, H, W) -> (B, classes)
        return self.model(pixel_values=inputs).logits


def build_hf(section: HuggingFace, plan: Plan, facts: DataFacts) -> HuggingFaceNet:
    """The model of transformers for the plan's task, with the section's weights, or drawn from torch's default generator.

    Args:
        section: names a folder of weights, or a configuration.
        plan: names the task, and whether activations are recomputed.
        facts: what the configuration leaves open: token ids, positions, classes, shape of images.

    Raises:
        UsageError: if configuration and data contradict each other.
        DataError: if the folder does not hold such a model.
    """
    import transformers
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    config = _configuration(section, plan, facts)
    auto = getattr(transformers, _auto_class(plan, facts))
    name = section.path or config.model_type
    if type(config) not in auto._model_mapping:
        raise UsageError(
            f"model.config: transformers has no {config.model_type} for {auto.__name__.removeprefix('AutoModelFor')}, which "
            f"{plan.task.replace('_', ' ')} on these data needs; take another model_type, or other data"
        )
    model = _pretrained(auto, section, config) if section.path and not section.from_scratch else None
    try:
        model = model or auto.from_config(config, dtype=torch.float32, trust_remote_code=False)
    except (ValueError, TypeError, KeyError, ImportError) as error:
        raise UsageError(f"model.config: {name} cannot be built: {_first_line(error)}") from error
    model.train()
    if plan.activation_checkpointing == "full":
        if not model.supports_gradient_checkpointing:
            raise UsageError(
                f"trainer.activation_checkpointing: {name} cannot recompute; set trainer.activation_checkpointing=none"
            )
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    match plan.task:
        case "causal_lm":
            return HuggingFaceDecoder(model, section.block_size, facts.vocab_size or config.vocab_size)
        case "masked_lm":
            return HuggingFaceMaskedLM(model)
        case "classification" if _of_images(facts):
            return HuggingFaceImageClassifier(model)
        case "classification":
            return HuggingFaceTextClassifier(model)
    raise AssertionError(plan.task)


def _of_images(facts: DataFacts) -> bool:
    return facts.vocab_size is None and facts.input_shape is not None


def _auto_class(plan: Plan, facts: DataFacts) -> str:
    match plan.task:
        case "causal_lm":
            return "AutoModelForCausalLM"
        case "masked_lm":
            return "AutoModelForMaskedLM"
        case "classification" if _of_images(facts):
            return "AutoModelForImageClassification"
        case "classification":
            return "AutoModelForSequenceClassification"
        case "seq2seq":
            return "AutoModelForSeq2SeqLM"
    raise UsageError(f"model.kind: hf does not do {plan.task}")


def _configuration(section: HuggingFace, plan: Plan, facts: DataFacts) -> Any:
    """transformers' configuration: the folder's, the recipe's keys over it, and what the data decide."""
    from transformers import AutoConfig

    given = dict(section.config)
    if section.path is None:
        model_type = given.pop("model_type")
        base = _default(model_type)
        _check_keys(given, base)
        open_keys = {**_from_data(base, section, plan, facts, set(given)), **given}
        config = AutoConfig.for_model(model_type, **open_keys)
    else:
        config = _read(AutoConfig.from_pretrained, section.path, trust_remote_code=False)
        _check_keys(given, config)
        for key, value in given.items():
            setattr(config, key, value)
        if facts.n_outputs is not None and "num_labels" not in given:
            config.num_labels = facts.n_outputs
        if facts.pad_id is not None and getattr(config, "pad_token_id", None) is None:
            config.pad_token_id = facts.pad_id
    _check(config, section, plan, facts)
    config.use_cache = False
    return config


def _default(model_type: str) -> Any:
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    if model_type not in CONFIG_MAPPING_NAMES:
        near = nearest(model_type, CONFIG_MAPPING_NAMES)
        hint = f"did you mean {near}?" if near else "such as gpt2, llama, bert, vit, t5"
        raise UsageError(f"model.config: model_type {model_type!r} is none that transformers knows; {hint}")
    return AutoConfig.for_model(model_type)


def _check_keys(given: dict[str, Any], config: Any) -> None:
    """transformers keeps keys that it does not know without a word."""
    known = {*config.to_dict(), *config.attribute_map, "num_labels", "attn_implementation"}
    for key in given:
        if key not in known:
            near = nearest(key, known)
            hint = f"; did you mean {near}?" if near else ""
            raise UsageError(f"model.config: {config.model_type} has no key {key!r}{hint}")


def _from_data(base: Any, section: HuggingFace, plan: Plan, facts: DataFacts, given: set[str]) -> dict[str, Any]:
    """The keys that the recipe leaves open and the data decide."""
    names = {key: base.attribute_map.get(key, key) for key in (_POSITIONS, "vocab_size", "pad_token_id")}
    decided: dict[str, Any] = {}

    def decide(key: str, value: Any) -> None:
        if value is not None and not given & {key, names.get(key, key)} and hasattr(base, key):
            decided[key] = value

    decide("vocab_size", facts.vocab_size)
    decide("pad_token_id", facts.pad_id)
    if facts.n_outputs is not None:
        decide("num_labels", facts.n_outputs)
    if _of_images(facts):
        assert facts.input_shape is not None
        channels, height, width = facts.input_shape
        decide("num_channels", channels)
        decide("image_size", height if height == width else None)
    longest = _longest(section, plan, facts)
    if longest is not None:
        decide(
            _POSITIONS,
            longest + _unused_positions(base.model_type, facts.pad_id or getattr(base, "pad_token_id", None)),
        )
    size = facts.vocab_size
    for key in ("bos_token_id", "eos_token_id", "decoder_start_token_id", "pad_token_id"):
        value = decided.get(key, getattr(base, key, None))
        if key not in given and size is not None and isinstance(value, int) and value >= size:
            decided[key] = None  # those of the vocabulary that the type was published with
    return decided


def _longest(section: HuggingFace, plan: Plan, facts: DataFacts) -> int | None:
    """Tokens of the longest sample; None where samples are no tokens."""
    if plan.task in ("causal_lm", "masked_lm"):
        return section.block_size
    return facts.max_length


def _unused_positions(model_type: str, pad_id: int | None) -> int:
    return (pad_id or 0) + 1 if model_type in _POSITIONS_AFTER_PADDING else 0


def _check(config: Any, section: HuggingFace, plan: Plan, facts: DataFacts) -> None:
    where = section.path or "model.config"
    size, wanted = getattr(config, "vocab_size", None), facts.vocab_size
    if size is not None and wanted is not None and wanted > size:
        way_out = (
            "give the tokenizer that belongs to the weights"
            if section.path
            else "leave vocab_size out, the data decide"
        )
        raise UsageError(f"{where}: vocab_size={size} is smaller than the tokenizer's {wanted} ids; {way_out}")
    limit, longest = getattr(config, _POSITIONS, None), _longest(section, plan, facts)
    if isinstance(limit, int) and longest is not None:
        limit -= _unused_positions(config.model_type, getattr(config, "pad_token_id", None))
        if longest > limit > 0:
            key = "model.block_size" if plan.task in ("causal_lm", "masked_lm") else "data.max_length"
            raise UsageError(f"{key}: {longest} tokens, {where} has {limit} positions; try {key}={limit}")
    outputs = facts.n_outputs
    if outputs is not None and plan.task == "classification" and config.num_labels != outputs:
        raise UsageError(
            f"{where}: num_labels={config.num_labels}, the data have {outputs} classes; leave num_labels out"
        )
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        attention = getattr(part, "_attn_implementation", None)
        if attention is not None and attention not in _ATTENTIONS:
            raise UsageError(f"{where}: attn_implementation={attention!r}; expected {', '.join(_ATTENTIONS)}")
    if getattr(config, "quantization_config", None) is not None:
        raise UsageError(f"{where}: quantised weights cannot be trained; take the ones they were made from")


def _pretrained(auto: Any, section: HuggingFace, config: Any) -> Any:
    """The model with the folder's weights in fp32; what the folder lacks is drawn, and named."""
    assert section.path is not None
    model, told = _read(
        auto.from_pretrained,
        section.path,
        config=config,
        dtype=torch.float32,
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    missing, unused = sorted(told["missing_keys"]), sorted(told["unexpected_keys"])
    if missing and len(missing) >= len(model.state_dict()):
        raise DataError(
            f"{section.path}: holds none of the weights of {type(model).__name__}; is it another model's folder?"
        )
    if torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
        return model
    for what, names in (("drawn anew, since the weights lack them", missing), ("in the weights, and not used", unused)):
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            print(f"{section.path}: {what}: {', '.join(names[:5])}{more}", file=sys.stderr)
    return model


def _read(read: Callable[..., Any], path: str, **options: Any) -> Any:
    """What transformers reads from a folder or the hub; its errors as one line."""
    local: Literal[True, False] = Path(path).expanduser().exists()
    try:
        return read(str(Path(path).expanduser()) if local else path, local_files_only=local, **options)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError) as error:
        hint = "" if local else "; a local folder is read without the hub: model.path=DIR"
        raise DataError(f"{path}: {_first_line(error)}{hint}") from error
    except Exception as error:
        if type(error).__module__.startswith("safetensors"):
            raise DataError(f"{path}: damaged weights: {_first_line(error)}") from error
        raise


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__

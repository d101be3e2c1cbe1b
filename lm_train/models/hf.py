"""Any model of Hugging Face's transformers as it is, behind our networks' conventions: inputs by name, summed losses.

These networks draw their own initial weights, from torch's default generator, and are built whole: there is no formula by
which a strategy could fill one parameter at a time. Nothing here runs code or unpickles: weights come from safetensors, code
from the installed transformers alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lm_train.errors import DataError, UsageError
from lm_train.models.decoder import Decoder
from lm_train.models.logits import LogitsLanguageModel, LogitsMaskedLM, summed_cross_entropy
from lm_train.models.seq2seq import Seq2Seq
from lm_train.plan import DataFacts, Plan
from lm_train.recipe import HuggingFace
from lm_train.recipe.explain import nearest
from lm_train.recipe.foreign import unused_positions

_POSITIONS = "max_position_embeddings"
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
        return self.model(input_ids=tokens, attention_mask=_mask(tokens, lengths)).logits


class HuggingFaceSeq2Seq(HuggingFaceNet):
    """Encoder-decoder, called as our own is.

    Args:
        model: of transformers; its configuration names the token that the decoder begins with.
    """

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.start_id: int | None = model.config.decoder_start_token_id
        """None where the data are not known yet, as when parameters are only counted."""

    def forward(
        self,
        tokens: Tensor,
        lengths: Tensor | None = None,
        target_tokens: Tensor | None = None,
        targets: Tensor | None = None,
        memory: Tensor | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """As `lm_train.models.Seq2Seq`: the encoder's output, logits, or the loss.

        Args:
            tokens: the sources, (B, S).
            lengths: their real tokens, (B,), at least 1; None: all S.
            target_tokens: what the decoder has read, (B, T), filled up at the end; the first of them is taken as the model's
                own start, whatever it is. None: encode only.
            targets: what follows each of them, (B, T), -100 where nothing is to be predicted.
            memory: the encoder's output where it is known already, (B, S, C).
            last_only: logits of the last position only.

        Returns:
            Without target_tokens the encoder's output, (B, S, C); without targets logits, (B, T, vocabulary of the model), T
            being 1 with `last_only`; else the summed cross-entropy in nats, ().
        """
        mask = _mask(tokens, lengths)
        if target_tokens is None:
            return self.model.get_encoder()(input_ids=tokens, attention_mask=mask).last_hidden_state
        assert self.start_id is not None, "the data say what a decoder begins with"
        # no mask: what fills a target up stands behind it, where a causal decoder does not look
        read = F.pad(target_tokens[:, 1:], (1, 0), value=self.start_id)
        source: dict[str, Any] = {"input_ids": tokens}
        if memory is not None:
            from transformers.modeling_outputs import BaseModelOutput

            source = {"encoder_outputs": BaseModelOutput(last_hidden_state=memory)}
        logits = self.model(**source, attention_mask=mask, decoder_input_ids=read, use_cache=False).logits
        if targets is None:
            return logits[:, -1:] if last_only else logits
        return summed_cross_entropy(logits, targets)

    generate = Seq2Seq.generate


class HuggingFaceTextClassifier(HuggingFaceNet):
    """Sequence classifier."""

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:  # (B, T), (B,) -> (B, classes)
        """Logits of texts of `lengths` tokens each, filled up behind."""
        return self.model(input_ids=tokens, attention_mask=_mask(tokens, lengths)).logits


class HuggingFaceImageClassifier(HuggingFaceNet):
    """Image classifier."""

    def forward(self, inputs: Tensor) -> Tensor:  # (B, C, H, W) -> (B, classes)
        return self.model(pixel_values=inputs).logits


def _mask(tokens: Tensor, lengths: Tensor | None) -> Tensor | None:  # (B, T), (B,) -> (B, T)
    """1 where a row has a real token."""
    if lengths is None:
        return None
    return (torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]).long()


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
        case "seq2seq":
            return HuggingFaceSeq2Seq(model)
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
        with _wrong_values_told(model_type):
            config = AutoConfig.for_model(model_type, **open_keys)
    else:
        config = _read(AutoConfig.from_pretrained, section.path, trust_remote_code=False)
        _check_keys(given, config)
        with _wrong_values_told(section.path):
            for key, value in given.items():
                setattr(config, key, value)
        if facts.n_outputs is not None and "num_labels" not in given:
            config.num_labels = facts.n_outputs
        for key, number in _token_ids(plan, facts).items():
            if number is not None and getattr(config, key, None) is None:
                setattr(config, key, number)
    _check(config, section, plan, facts)
    config.use_cache = False
    return config


@contextmanager
def _wrong_values_told(name: str) -> Iterator[None]:
    """transformers says in several lines that a key's value is of another type."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        yield
    except (StrictDataclassError, ValueError, TypeError) as error:
        raise UsageError(f"model.config: {name} cannot be built: {' '.join(str(error).split())}") from error


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
    known = {*config.to_dict(), *config.attribute_map, "num_labels", "attn_implementation", "decoder_start_token_id"}
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
    for key, number in _token_ids(plan, facts).items():
        decide(key, number)
    if plan.task == "seq2seq" and "decoder_start_token_id" not in given:
        # T5's configuration does not have it of itself; before the data are read any id will do
        decided["decoder_start_token_id"] = facts.start_id or 0
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
            longest + unused_positions(base.model_type, facts.pad_id or getattr(base, "pad_token_id", None)),
        )
    size = facts.vocab_size
    for key in ("bos_token_id", "eos_token_id", "decoder_start_token_id", "pad_token_id"):
        value = decided.get(key, getattr(base, key, None))
        if key not in given and size is not None and isinstance(value, int) and value >= size:
            decided[key] = None  # those of the vocabulary that the type was published with
    return decided


def _token_ids(plan: Plan, facts: DataFacts) -> dict[str, int | None]:
    """What transformers calls the ids of the data's symbols."""
    ids = {"pad_token_id": facts.pad_id}
    if plan.task == "seq2seq":
        ids |= {
            "bos_token_id": facts.start_id,
            "eos_token_id": facts.end_id,
            "decoder_start_token_id": facts.start_id,
        }
    return ids


def _longest(section: HuggingFace, plan: Plan, facts: DataFacts) -> int | None:
    """Tokens of the longest sample; None where samples are no tokens."""
    if plan.task in ("causal_lm", "masked_lm"):
        return section.block_size
    return facts.max_length


def _check(config: Any, section: HuggingFace, plan: Plan, facts: DataFacts) -> None:
    where = section.path or "model.config"
    size, wanted = getattr(config, "vocab_size", None), facts.vocab_size
    if wanted is not None and facts.start_id == wanted - 1 != getattr(config, "decoder_start_token_id", None):
        wanted -= 1  # the start that was added to the tokenizer is never read: the model has its own
    if size is not None and wanted is not None and wanted > size:
        way_out = (
            "give the tokenizer that belongs to the weights"
            if section.path
            else "leave vocab_size out, the data decide"
        )
        raise UsageError(f"{where}: vocab_size={size} is smaller than the tokenizer's {wanted} ids; {way_out}")
    limit, longest = getattr(config, _POSITIONS, None), _longest(section, plan, facts)
    if isinstance(limit, int) and longest is not None:
        limit -= unused_positions(config.model_type, getattr(config, "pad_token_id", None))
        if longest > limit > 0:
            key = "data.max_length" if plan.task == "classification" else "model.block_size"
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

"""Any model that generates, from a name or folder, and something to run it on."""

from __future__ import annotations

from typing import Any

import transformers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging

from kvquant.engine.config import CacheConfig, device_name
from kvquant.engine.settings import check_device
from kvquant.errors import ModelLoadError, UnsupportedError
from kvquant.evaluation.support import prompts

_AUTO = (AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSpeechSeq2Seq, AutoModelForImageTextToText)
#: Samples of a second of sound.
_SECOND = 16000


def load_any(name: str, *, device: str = "cpu", dtype: str = "float32") -> PreTrainedModel:
    """Load a model of any class that generates: decoders, encoder-decoders, models that hear or see.

    Args:
        name: name or folder.
        device: torch device.
        dtype: a type, or ``auto`` for the one that the weights are saved in.

    Raises:
        OptionValueError: there is no such device.
        ModelLoadError: it cannot be loaded, or is of no class that generates.
    """
    check_device(CacheConfig(device=device_name(device)))
    logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(name)
        return _class_for(config).from_pretrained(name, dtype=dtype).to(device).eval()
    except (OSError, ValueError, RuntimeError, AssertionError, KeyError, ImportError) as cause:
        raise ModelLoadError(name, cause) from cause


def _class_for(config: PreTrainedConfig) -> Any:
    """Return the class that a config was saved with, or the first that makes text from what such a model reads."""
    for architecture in config.architectures or ():
        kind: Any = getattr(transformers, architecture, None)
        if hasattr(kind, "can_generate") and kind.can_generate():
            return kind
    for auto in _AUTO:
        if type(config) in auto._model_mapping:
            return auto
    raise ValueError(f"transformers has no class for {config.model_type!r} models that generates text.")


def inputs_for(model: PreTrainedModel, tokens: int) -> dict[str, Any]:
    """Return random inputs of a model's `generate`, in two rows of which one is padded; without images.

    Args:
        model: the model.
        tokens: of a prompt of text, or about as many of another kind.

    Raises:
        UnsupportedError: it reads something that is none of text, log-mel spectra and sound.
    """
    text = model.config.get_text_config(decoder=True)
    name = model.main_input_name
    inputs: dict[str, Tensor]
    if name == "input_ids":
        pad = model.generation_config.pad_token_id
        right = bool(model.config.is_encoder_decoder)
        inputs = prompts.text(text.vocab_size, tokens, 0 if pad is None else pad, right=right)
    elif name == "input_features" and hasattr(model.config, "num_mel_bins"):
        inputs = prompts.log_mel(model.config.num_mel_bins, 2 * model.config.max_source_positions)
    elif name == "input_values":
        inputs = prompts.audio(10 * _SECOND)
    else:
        reasons = [f"it reads {name!r}, and the checks know text, log-mel spectra and sound"]
        raise UnsupportedError(f"the model {type(model).__name__}", reasons, "kvquant support model")
    return {
        key: value.to(model.device, model.dtype if value.is_floating_point() else None) for key, value in inputs.items()
    }

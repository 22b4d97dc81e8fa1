"""What a model's weights take, counted from a model without numbers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

#: Widths that methods have by their names alone.
_METHOD_BITS = {"fp8": 8.0, "fbgemm_fp8": 8.0, "finegrained_fp8": 8.0, "eetq": 8.0, "mxfp4": 4.0, "bitnet": 2.0}
#: Numbers that share a scale, for methods whose configs do not say; mxfp4's scales have 8 bits (OCP Microscaling 1.0).
_SCALE_BITS = {"mxfp4": 8 / 32, "bitsandbytes": 32 / 64}
#: Where a config may say how many bits a weight takes.
_BITS = re.compile(r"^(bits|nbits|num_bits|w_bit|weight_bits)$")
#: Parts of names of weights that no method quantises unless told to.
_LEFT_ALONE = ("embed", "lm_head", "wte", "wpe", "router", "norm")


@dataclass(frozen=True)
class Weights:
    """What a model's weights take.

    Attributes:
        nbytes: parameters and buffers, those that layers share counted once.
        parameters: their number.
        how: how the bytes were come by, in words.
    """

    nbytes: int
    parameters: int
    how: str


def count_weights(model: PreTrainedModel, config: PreTrainedConfig, dtype: str) -> Weights:
    """Count parameters and buffers of a model on the meta device.

    Args:
        model: in the type `dtype`.
        config: its config, whose `quantization_config` is taken into account as far as it says bits.
        dtype: name of the type.
    """
    parameters = list(model.named_parameters())
    count = sum(parameter.numel() for _, parameter in parameters)
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    plain = sum(parameter.nbytes for _, parameter in parameters) + buffers
    settings = _quantization(config)
    if settings is None:
        return Weights(plain, count, f"counted, in {dtype}")
    method = str(settings.get("quant_method", "an unnamed method")).rpartition(".")[2].lower()
    bits = _bits(method, settings)
    if bits is None:
        how = f"counted in {dtype}: the config says they are quantised by {method}, but not in how many bits"
        return Weights(plain, count, f"{how}; --weights SIZE sets them")
    left_alone = [*_LEFT_ALONE, *map(str, settings.get("modules_to_not_convert") or settings.get("ignore") or ())]
    nbytes = float(buffers)
    for name, parameter in parameters:
        quantized = parameter.dim() > 1 and not any(_matches(part, name) for part in left_alone)
        nbytes += parameter.numel() * bits / 8 if quantized else parameter.nbytes
    how = f"estimated: {bits:.3g} bits, scales included, for matrices that the config says are quantised by {method}"
    return Weights(int(nbytes), count, f"{how}, {dtype} for the others; --weights SIZE sets them")


def _quantization(config: PreTrainedConfig) -> Mapping[str, Any] | None:
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    return found if isinstance(found, Mapping) else dict(found.to_dict())


def _bits(method: str, settings: Mapping[str, Any]) -> float | None:
    """Return the bits of a quantised weight with its share of a scale, None where the config does not tell."""
    if settings.get("load_in_4bit") or settings.get("load_in_8bit"):
        return 4 + _SCALE_BITS["bitsandbytes"] if settings.get("load_in_4bit") else 8.0
    named = re.fullmatch(r"(?:u?int|float)(\d)", str(settings.get("weights", "")))  # quanto's
    bits = float(named[1]) if named else _METHOD_BITS.get(method) or _search(settings, _BITS)
    if bits is None:
        return None
    group = _search(settings, re.compile(r"^(group_size|q_group_size)$"))
    return bits + _SCALE_BITS.get(method, 16 / group if group and group > 0 else 0.0)


def _search(settings: Any, names: re.Pattern[str]) -> float | None:
    """Return the first number under one of `names`, at any depth; settings of activations do not count."""
    if not isinstance(settings, Mapping):
        return None
    for name, value in settings.items():
        if names.match(str(name)) and isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
    inner = (_search(value, names) for name, value in settings.items() if "activation" not in str(name))
    return next((found for found in inner if found is not None), None)


def _matches(part: str, name: str) -> bool:
    """Whether a weight's name has `part` in it, which may have wildcards or be a regular expression marked ``re:``."""
    if part.startswith("re:"):
        return re.search(part[3:], name) is not None
    return re.search(re.escape(part).replace(r"\*", ".*"), name) is not None

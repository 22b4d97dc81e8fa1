"""Saving and loading caches: from layers to a file's description and tensors, and back.

The description (see `kvquant.cache.header` for the file around it):

- ``config``: the options, as `CacheConfig.to_dict` gives them;
- ``versions``: of kvquant, torch, transformers, and of the distributions whose backends quantised something; and what
  each transform that was used makes of a row that is always the same, because another version may be another map;
- ``model``: a `ModelIdentity`, or null;
- ``fixed``: whether the layers were made to fit a model's config, or came as they were used;
- ``layers``: for each layer its kind and its state;
- ``cross``: the same for the cross-attention layers of an encoder-decoder model; others have no such entry.

Tensors are named by their place in it, such as ``layers.3.key.body.pages.0.codes``; beside them there are
``token_ids``. What is read is checked before anything is allocated for it, and nothing in a file names code, except
backends and layer classes that are installed here.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from kvquant.cache.compat import head_dim
from kvquant.cache.container import open_tensors, verify, write
from kvquant.cache.fingerprint import ModelIdentity
from kvquant.cache.header import Header, read_header
from kvquant.cache.layer import QuantizedLayer
from kvquant.cache.layer_states import (
    QUANTIZED,
    SLIDING,
    Maker,
    kind_of,
    layer_state,
    prepare,
    quantized_layer,
    restore,
    restored_layer,
)
from kvquant.cache.static import full_attention_layer
from kvquant.cache.versions import check_versions, versions
from kvquant.engine.config import CacheConfig, device_name
from kvquant.engine.settings import check_device
from kvquant.engine.state import MisfitError, Saved, Source, State
from kvquant.errors import (
    CacheFileError,
    CacheTooLargeError,
    ConfigError,
    OptionValueError,
    OtherModelError,
    StatesError,
)

#: Layers that a cache may have; models have some hundred at most.
MOST_LAYERS = 1 << 12


# ------------------------------------------------------------------------------------------------ saving


def save_cache(
    path: str | os.PathLike[str],
    config: CacheConfig,
    layers: Sequence[Any],
    *,
    fixed: bool,
    model: PreTrainedModel | None,
    token_ids: object,
    cross: Sequence[Any] | None = None,
) -> None:
    """Write a cache to a file; see `QuantizedCache.save`, and `QuantizedEncoderDecoderCache.save` for `cross`."""
    state = State()
    state.put_all("layers", [layer_state(layer, f"layer {index}") for index, layer in enumerate(layers)])
    if cross is not None:
        state.put_all("cross", [layer_state(layer, f"cross-attention layer {at}") for at, layer in enumerate(cross)])
    if token_ids is not None:
        state.tensors["token_ids"] = _token_ids(token_ids, layers)
    description = {
        "config": config.to_dict(),
        "versions": versions(layers),
        "model": None if model is None else ModelIdentity.of(model).to_dict(),
        "fixed": fixed,
        **state.meta,
    }
    write(path, state.tensors, json.dumps(description))


def _token_ids(token_ids: object, layers: Sequence[Any]) -> Tensor:
    """Return token ids as int64 ``[batch, tokens]``.

    Raises:
        StatesError: they are not those of the tokens that the layers hold.
    """
    try:
        ids = torch.as_tensor(token_ids)
    except (TypeError, ValueError, RuntimeError) as cause:
        raise StatesError(f"token_ids need to be whole numbers [batch, tokens], got {token_ids!r:.60}") from cause
    ids = ids.unsqueeze(0) if ids.dim() == 1 else ids
    if ids.dim() != 2 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise StatesError(f"token_ids need to be whole numbers [batch, tokens], got {list(ids.shape)} in {ids.dtype}")
    held = _sizes(layers)
    if held is not None and held != tuple(ids.shape):
        raise StatesError(
            f"token_ids need to be those of the {held[1]} tokens that the cache holds, in {held[0]} batch rows, and "
            f"are {list(ids.shape)}. The newest token of a generation is not in the cache yet: leave it out, with "
            f"ids[:, :{held[1]}]"
        )
    return ids.to(torch.int64)


def _sizes(layers: Sequence[Any]) -> tuple[int, int] | None:
    """Return batch rows and tokens of the first layer that has some."""
    for layer in layers:
        if isinstance(layer, CacheLayerMixin) and int(layer.get_seq_length()):
            rows = layer.batch_size if isinstance(layer, QuantizedLayer) else layer.keys.shape[0]
            return int(rows), int(layer.get_seq_length())
    return None


# ------------------------------------------------------------------------------------------------ loading


@dataclasses.dataclass(frozen=True)
class Loaded:
    """What was read from a file.

    Attributes:
        config: the options.
        layers: the layers, in order.
        cross: the cross-attention layers of an encoder-decoder model, None in other files.
        fixed: whether they were made to fit a model's config.
        token_ids: int64 ``[batch, tokens]``, None where there are none.
    """

    config: CacheConfig
    layers: list[Any]
    cross: list[Any] | None
    fixed: bool
    token_ids: Tensor | None


#: Gives the layers of an empty cache for a config and a model's config.
Fitting = Callable[[CacheConfig, PreTrainedConfig], Sequence[Any]]


@dataclasses.dataclass(frozen=True)
class Cross:
    """How the cross-attention layers of an encoder-decoder model are made.

    Attributes:
        make: gives an empty layer of a number.
        fitting: gives all of them for a model.
    """

    make: Maker
    fitting: Fitting


def load_cache(
    path: str | os.PathLike[str],
    fitting: Fitting,
    *,
    device: Any,
    model: PreTrainedModel | None,
    model_config: PreTrainedConfig | None,
    check: bool,
    cross: Cross | None = None,
) -> Loaded:
    """Read a cache from a file; see `QuantizedCache.load`.

    Args:
        path: the file.
        fitting: gives the layers of an empty cache for a config and a model's config.
        device: where the states go; None for the model's device, or the CPU.
        model: the model that the cache must be of.
        model_config: its config, if there is no model at hand.
        check: whether to compare checksums.
        cross: for a file of an encoder-decoder model, which is refused without it, as are others with it.
    """
    target = _device(device, model)
    header = read_header(path)
    tensors = open_tensors(header)
    if check:
        verify(header, tensors)
    sources: dict[str, Source] = dict(tensors)
    try:
        with torch.inference_mode(False), torch.no_grad():  # noqa: FBT003  # torch knows it by position only
            saved = Saved(dict(header.description), sources)
            _check_kind(header, saved, wanted=cross is not None)
            _check_model(header, model, model_config)
            config = _config(saved, given=device is not None)
            expected = model.config if model is not None else model_config
            templates = None if expected is None else fitting(config, expected)
            layers = _layers(header, saved.parts("layers", MOST_LAYERS), config, target, templates, expected)
            across = None
            if cross is not None:
                own = None if expected is None else cross.fitting(config, expected)
                parts = saved.parts("cross", MOST_LAYERS)
                across = _layers(header, parts, config, target, own, expected, cross.make)
            token_ids = _ids(saved, layers)
            if sources:
                raise saved.misfit(f"has a tensor that nothing asks for: {next(iter(sources))[:80]!r}")
    except MisfitError as cause:
        raise CacheFileError(header.path, f"{cause}.") from cause
    except ConfigError as cause:
        raise CacheFileError(header.path, f"its options cannot work here: {cause}") from cause
    return Loaded(config, layers, across, templates is not None or saved.value("fixed") is True, token_ids)


def _device(device: Any, model: PreTrainedModel | None) -> torch.device:
    if device is None:
        return torch.device("cpu" if model is None else model.device)
    check_device(CacheConfig(device=device_name(device)))
    return torch.device(device)


def _check_kind(header: Header, saved: Saved, *, wanted: bool) -> None:
    """Refuse a file of an encoder-decoder model where none is wanted, and others where one is.

    Raises:
        CacheFileError: it is of the other kind.
    """
    if ("cross" in saved) != wanted:
        is_of, right = ("no", "QuantizedCache") if wanted else ("an", "QuantizedEncoderDecoderCache")
        raise CacheFileError(header.path, f"it is the cache of {is_of} encoder-decoder model: use {right}.load.")


def _check_model(header: Header, model: PreTrainedModel | None, config: PreTrainedConfig | None) -> None:
    """Refuse a cache of another model.

    Raises:
        OtherModelError: it is one, or the file does not say.
        MisfitError: the file says it in another way.
    """
    if model is None and config is None:
        return
    saved = Saved(dict(header.description), {})
    if saved.value("model") is None:
        if model is None:
            return
        reason = "The file does not say which model it is of: save with model=..., or load with config=model.config"
        raise OtherModelError(header.path, [f"{reason}, which compares what the config says"])
    part = saved.part("model")
    identity = ModelIdentity(
        part.text("architecture"), part.text("dtype"), part.text("weights"), part.mapping("config")
    )
    differences = identity.differences(model) if model is not None else []
    if model is None and config is not None:
        differences = identity.config_differences(config)
    if differences:
        raise OtherModelError(header.path, differences)


def _config(saved: Saved, *, given: bool) -> CacheConfig:
    """Return the options of a file.

    Args:
        saved: the file's description.
        given: whether a device was asked for: then one of the file that is not here gives way to it.

    Raises:
        ConfigError, MisfitError: they cannot work here.
    """
    options = dict(saved.mapping("config"))
    layers = options.get("layers", {})
    for key in layers if isinstance(layers, dict) else ():
        numbers = [part.strip() for end in str(key).split(",") for part in end.split("-")]
        if any(len(number) > 6 or not number.isdecimal() or int(number) >= MOST_LAYERS for number in numbers):
            raise saved.misfit(f"has options for layers {str(key)[:40]!r}, and {MOST_LAYERS} layers are the most")
    if not isinstance(options.get("device"), (str, type(None))):
        raise saved.misfit("has a device that is none")
    try:
        config = CacheConfig.from_dict(options)
    except TypeError as cause:  # where a text should be a list, say
        raise saved.misfit(f"has options that are none ({cause})") from cause
    try:
        check_device(config)
    except OptionValueError:
        if not given:
            raise
        return dataclasses.replace(config, device=None)
    return config


def _layers(
    header: Header,
    parts: Sequence[Saved],
    config: CacheConfig,
    device: torch.device,
    templates: Sequence[Any] | None,
    model_config: PreTrainedConfig | None,
    make: Maker = full_attention_layer,
) -> list[Any]:
    if templates is not None:
        _check_layers(header, parts, templates, head_dim(model_config))
    quantized: list[tuple[QuantizedLayer, Saved]] = []
    layers: list[Any] = []
    for index, part in enumerate(parts):
        layer = quantized_layer(part, config, index, make)
        if layer is not None:
            quantized.append((layer, part))
            layers.append(layer)
        else:
            layers.append(restored_layer(part, device, None if templates is None else templates[index]))
    needed = sum(prepare(layer, part, device) for layer, part in quantized)
    available = _memory(device)
    if needed > available:
        raise CacheTooLargeError(header.path, needed, available)
    check_versions(header, [layer for layer, _ in quantized])
    for layer, part in quantized:
        restore(layer, part)
    return layers


def _check_layers(header: Header, parts: Sequence[Saved], templates: Sequence[Any], channels: int | None) -> None:
    """Refuse a file whose layers are not those of the model.

    Raises:
        OtherModelError: they are others.
    """
    kinds = [kind_of(layer) for layer in templates]
    found = [str(part.value("kind")) for part in parts]
    if len(found) != len(kinds):
        raise OtherModelError(header.path, [f"It has {len(found)} layers, and the model has {len(kinds)}"])
    differences = [
        f"layer {index} is {was[:40]} in the file and {now} in the model"
        for index, (was, now) in enumerate(zip(found, kinds, strict=True))
        if was != now
    ]
    for index, part in enumerate(parts):
        if found[index] == kinds[index] == SLIDING:
            was, now = part.integer("sliding_window"), templates[index].sliding_window
            if was != now:
                differences.append(f"layer {index} has a window of {was} tokens in the file and {now} in the model")
        if found[index] in (QUANTIZED, SLIDING) and "key" in part and channels is not None:
            held = part.part("key").integer("head_dim")
            if held != channels:
                differences.append(f"heads of layer {index} have {held} channels, and {channels} in the model")
    if differences:
        raise OtherModelError(header.path, differences[:3])


def _ids(saved: Saved, layers: Sequence[Any]) -> Tensor | None:
    if not saved.has("token_ids"):
        return None
    ids = saved.take_any("token_ids")
    held = _sizes(layers)
    if ids.dtype != torch.int64 or ids.dim() != 2 or (held is not None and held != tuple(ids.shape)):
        raise saved.misfit(f"has token_ids of shape {list(ids.shape)} in {ids.dtype} for {held} batch rows and tokens")
    return ids.clone()


def _memory(device: torch.device) -> int:
    """Return the bytes of a device's memory, or of more than there is where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    if not hasattr(os, "sysconf"):
        return sys.maxsize
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

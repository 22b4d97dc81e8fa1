"""Layers written down and made anew: quantised ones, and transformers' own inside a quantised cache.

What one of transformers' own layers is stands in its attributes: tensors, numbers, and mappings of few of them. Only
classes of its dynamic cache are made, and only attributes that they have are set, so that a file cannot make anything
else of them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvquant.cache.compat import layer_classes
from kvquant.cache.layer import QuantizedLayer
from kvquant.cache.sliding import QuantizedSlidingLayer
from kvquant.cache.static import TracedLayer, full_attention_layer
from kvquant.engine.config import CacheConfig
from kvquant.engine.state import Saved, State, dtype_name
from kvquant.engine.stored import empty_states, restore_store, store_room, store_state
from kvquant.errors import UnsavableCacheError

#: The kinds of quantised layers; those of transformers' own are the names of their classes.
QUANTIZED, SLIDING = "quantized", "quantized sliding window"
STREAMS = ("key", "value")

#: Attributes that are types or devices; some layers get them with their first states only.
_TYPES, _DEVICES = ("dtype", "indexer_dtype"), ("device", "indexer_device")

#: Numbers that are None, or missing, before the first states; all else that is None then are tensors.
_SIZES = ("batch_size", "num_heads", "k_head_dim", "v_head_dim")
_LATE_NUMBERS = ("conv_kernel_size", *_SIZES)

#: What a layer's class wants to know, and the most that it may be.
_ARGUMENTS = {"sliding_window": 1 << 40, "max_cache_len": 1 << 40, "number_of_states": 1 << 10}


def layer_state(layer: Any, where: str) -> State:
    """Return what a layer is, without spare room.

    Args:
        layer: a quantised layer, or one of transformers' dynamic cache.
        where: its name in messages.

    Raises:
        UnsavableCacheError: it is of another kind, or holds what cannot be written down.
        PendingAssignmentError: keys were assigned to it, and values that fit them were not.
    """
    if isinstance(layer, QuantizedLayer):
        return _quantized_state(layer, where)
    return _own_state(layer, where)


# ------------------------------------------------------------------------------------------------ quantised layers


def kind_of(layer: Any) -> str:
    """Return the kind of a layer, as it is written down."""
    if isinstance(layer, QuantizedSlidingLayer):
        return SLIDING
    return QUANTIZED if isinstance(layer, QuantizedLayer) else type(layer).__name__


def _quantized_state(layer: QuantizedLayer, where: str) -> State:
    layer._check_assigned()
    state = State(meta={"kind": kind_of(layer)})
    if isinstance(layer, QuantizedSlidingLayer):
        state.meta["sliding_window"] = layer.sliding_window
        if layer.is_initialized:
            state.meta.update(freed=layer.stores[0].freed, hidden=layer.stores[0].hidden)
    for stream, store in layer._stores.items():
        if not store.batch:
            raise UnsavableCacheError("it has no batch rows", where)
        state.put(stream, store_state(store))
    return state


#: Makes an empty layer of a number.
Maker = Callable[[CacheConfig, int], QuantizedLayer]


def quantized_layer(
    saved: Saved, config: CacheConfig, index: int, make: Maker = full_attention_layer
) -> QuantizedLayer | None:
    """Return an empty layer of the kind of a saved one, or None where that is one of transformers' own.

    Args:
        saved: the layer's state.
        config: the cache's options.
        index: the layer's number.
        make: makes those that see all tokens.
    """
    kind = saved.value("kind")
    if kind == SLIDING:
        return QuantizedSlidingLayer(config, index, saved.integer("sliding_window", 1, _ARGUMENTS["sliding_window"]))
    return make(config, index) if kind == QUANTIZED else None


def prepare(layer: QuantizedLayer, saved: Saved, device: torch.device) -> int:
    """Make empty stores for a saved state, which `restore` fills.

    Args:
        layer: an empty layer.
        saved: the state.
        device: where the states shall be.

    Returns:
        Bytes that the layer may take beside the file; nothing is allocated yet.

    Raises:
        MisfitError: the state cannot be one of this layer.
        UnsupportedError: the backend cannot do it here.
    """
    if not any(stream in saved for stream in STREAMS):
        return 0
    parts = [saved.part(stream) for stream in STREAMS]
    key_states, value_states = (empty_states(part, device) for part in parts)
    layer.lazy_initialization(key_states, value_states)
    return sum(store_room(store, part) for store, part in zip(layer.stores, parts, strict=True))


def restore(layer: QuantizedLayer, saved: Saved) -> None:
    """Have a layer take on a saved state that it was prepared for.

    Raises:
        MisfitError: the state is not one of this layer.
    """
    if not layer.is_initialized:
        return
    slides = isinstance(layer, QuantizedSlidingLayer)
    freed, hidden = (saved.integer("freed"), saved.integer("hidden")) if slides else (0, 0)
    for stream, store in zip(STREAMS, layer.stores, strict=True):
        if freed:
            store.begin_at(freed)
        restore_store(store, saved.part(stream))
        if hidden > max(0, len(store) - len(store.recent)):
            raise saved.misfit(f"has {hidden} tokens out of view, and fewer that could be")
        store.show_from(freed + hidden, free=False)
    if slides and (unseen := layer.get_mask_sizes(0)[1]) < freed + hidden:
        raise saved.misfit(f"has {freed + hidden} tokens out of view, and the next token sees all but {unseen}")
    if isinstance(layer, TracedLayer):
        layer.synchronise()
    keys, values = ((store.batch, store.kv_heads, len(store.body), len(store)) for store in layer.stores)
    if keys != values:
        raise saved.misfit(f"has keys of {keys} batch rows, heads, quantised tokens and tokens, and values of {values}")


# ------------------------------------------------------------------------------------------------ transformers' own


def _own_state(layer: Any, where: str) -> State:
    name = type(layer).__name__
    if layer_classes().get(name) is not type(layer):
        raise UnsavableCacheError(f"a {name} cannot be written down; known are {', '.join(layer_classes())}", where)
    state = State(meta={"kind": name})
    attributes = State()
    for attribute, value in vars(layer).items():
        if isinstance(value, dict):
            items = [[key, _written(attributes, f"{attribute}.{key}", item, where)] for key, item in value.items()]
            attributes.meta[attribute] = {"items": items}
        else:
            attributes.meta[attribute] = _written(attributes, attribute, value, where)
    state.put("attributes", attributes)
    return state


def _written(state: State, name: str, value: object, where: str) -> object:
    """Return a value for JSON; a tensor goes into the state."""
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, torch.dtype):
        return {"dtype": dtype_name(value)}
    if isinstance(value, torch.device):
        return {"device": None}  # where it is loaded to
    if isinstance(value, Tensor):
        state.tensors[name] = value
        return {"tensor": name}
    raise UnsavableCacheError(f"its {name} is a {type(value).__name__}, which cannot be written down", where)


def restored_layer(saved: Saved, device: torch.device, template: Any = None) -> Any:
    """Return one of transformers' own layers in a saved state.

    Args:
        saved: the state.
        device: where its tensors go.
        template: the model's own layer in this place, where there is a model.

    Raises:
        MisfitError: transformers has no such layer, or it is not one in such a state.
    """
    classes = layer_classes()
    kind, saved = saved.text("kind", classes), saved.part("attributes")
    arguments = {name: saved.integer(name, 1, most) for name, most in _ARGUMENTS.items() if name in saved}
    # A window of fixed size keeps no more of it than the room that it has made; layers without a window ask for none.
    window = {"sliding_window": arguments["max_cache_len"]} if "max_cache_len" in arguments else {}
    try:
        layer = classes[kind](**{**window, **arguments}) if template is None else copy.deepcopy(template)
    except TypeError as cause:
        raise saved.misfit(f"lacks what a {kind} is made of ({cause})") from cause
    for name, value in arguments.items():
        if vars(layer).get(name) != value:
            raise saved.misfit(f"has {name}={value}, and the model's is {vars(layer).get(name)}")
    for attribute in saved:
        if attribute not in vars(layer) and attribute not in (*_TYPES, *_DEVICES, *_SIZES):
            raise saved.misfit(f"has {attribute[:40]!r}, which no {kind} has")
        before, value = vars(layer).get(attribute), saved.value(attribute)
        if isinstance(before, dict):
            setattr(layer, attribute, _items(saved, attribute, before, device))
        else:
            setattr(layer, attribute, _read(saved, attribute, value, before, device))
    _check_states(layer, saved)
    return layer


def _items(saved: Saved, attribute: str, before: dict[Any, Any], device: torch.device) -> dict[Any, Any]:
    items = saved.mapping(attribute).get("items")
    if not isinstance(items, list) or not all(isinstance(item, list) and len(item) == 2 for item in items):
        raise saved.misfit(f"has {attribute} without items")
    if [key for key, _ in items] != list(before):
        raise saved.misfit(f"has {attribute} of other states than {list(before)}")
    return {key: _read(saved, f"{attribute}.{key}", value, before[key], device) for key, value in items}


def _read(saved: Saved, name: str, value: object, before: object, device: torch.device) -> object:
    """Return what `_written` wrote, if it can stand where `before` stands now."""
    if name in _TYPES and isinstance(value, dict) and set(value) == {"dtype"}:
        dtype = getattr(torch, str(value["dtype"]), None)
        if isinstance(dtype, torch.dtype):
            return dtype
    elif name in _DEVICES and value == {"device": None}:
        return device
    elif before is None or isinstance(before, Tensor):
        if value is None:
            return None
        if value == {"tensor": name} and name not in (*_TYPES, *_DEVICES):
            return saved.take_any(name).to(device)
        if name.startswith(_LATE_NUMBERS) and type(value) is int and value >= 0:
            return value
    elif type(value) is type(before) and isinstance(value, (bool, int)) and value >= 0:
        return value
    raise saved.misfit(f"has {name}={str(value)[:40]}, which does not fit there")


def _check_states(layer: Any, saved: Saved) -> None:
    """Refuse keys and values that do not go together, or do not fit the room that there is for them."""
    counted = vars(layer).get("cumulative_length", 0)
    if isinstance(counted, Tensor) and (counted.dtype != torch.int64 or counted.dim() or int(counted) < 0):
        raise saved.misfit("has a number of tokens that is none")
    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    if keys is None and values is None:
        return
    if keys is None or values is None:
        raise saved.misfit("has keys without values, or values without keys")
    if keys.numel() == values.numel() == 0:
        return
    if keys.dim() != 4 or values.dim() != 4 or keys.shape[:3] != values.shape[:3]:
        raise saved.misfit(f"has keys {list(keys.shape)} and values {list(values.shape)}")
    room = vars(layer).get("max_cache_len")
    if room is not None and keys.shape[2] != room:
        raise saved.misfit(f"has keys of {keys.shape[2]} tokens, and room for {room}")

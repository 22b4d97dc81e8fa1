"""Teacher forcing through a cache: a known text is fed token by token, and the model says what it would have expected.

Feeding one token at a time is slow. Between two flushes a cache changes by appending exact states alone, so the tokens
up to the next flush can go through the model in one pass, each of them attending over what the cache would hold at its
turn: sink, body, and the window up to itself (a causal mask). `alike` says how many they are. The numbers are those of
one token at a time up to the rounding of a matrix product over several tokens beside that over one; the same tokens
are quantised, at the same time and in the same groups.

This differs from one forward pass over states that were quantised and dequantised (`one_pass_logits`): there every
token sees its own neighbourhood quantised, in groups that reach into its future.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    Fp8QuantizedLayer,
)
from transformers.cache_utils import QuantizedLayer as TransformersQuantizedLayer

from kvquant.cache.layer import QuantizedLayer
from kvquant.evaluation.candidates import held_states, is_quantized

#: Tokens in one pass at most, which bounds the memory of their logits.
MOST_AT_ONCE = 128

#: Layers that append what they are given and quantise by what they have seen before, whatever comes with it.
_APPENDING = (DynamicLayer, DynamicSlidingWindowLayer, Fp8QuantizedLayer)


def alike(cache: Cache, most: int) -> int:
    """Return how many tokens can be fed at once, each seeing what it would see if they came one at a time.

    Args:
        cache: a cache that holds some tokens already.
        most: the most to return, at least 1.
    """
    return min((_alike(layer, most) for layer in cache.layers), default=1)


def _alike(layer: Any, most: int) -> int:
    if isinstance(layer, QuantizedLayer):
        if not layer.is_initialized:
            return 1
        store, _ = layer.stores
        # A flush comes before attention: the first token may bring one, the others must bring no other.
        leaving, tokens = store.leaving(1), 1
        while tokens < most and store.leaving(tokens + 1) == leaving:
            tokens += 1
        return tokens
    if isinstance(layer, TransformersQuantizedLayer):
        # Its flush comes after attention, when the window is full with the new tokens: that one may be the last.
        waiting = layer.keys.shape[-2] if layer.keys.dim() == 4 else 0
        return min(most, max(1, int(layer.residual_length) - waiting))
    return most if type(layer) in _APPENDING else 1


@torch.no_grad()
def forced_logits(
    model: PreTrainedModel, cache: Cache, tokens: Tensor, prefill: int, *, one_by_one: bool = False
) -> Iterator[Tensor]:
    """Feed a text and yield what the model expects after each of its tokens, from the last of the prefill on.

    Args:
        model: the model.
        cache: an empty cache; all of `tokens` is in it at the end.
        tokens: int64 ``[1, tokens]``.
        prefill: tokens that are fed in one pass at the start, at least 1.
        one_by_one: feed the others one at a time, as generation does. Otherwise as many at once as makes no
            difference, see `alike`.

    Yields:
        Logits ``[some, vocabulary]``, ``1 + tokens - prefill`` rows in all.
    """
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    yield model(input_ids=tokens[:, :prefill], past_key_values=cache, use_cache=True, **last).logits[0, -1:]
    at, end = prefill, tokens.shape[1]
    while at < end:
        count = 1 if one_by_one else alike(cache, min(MOST_AT_ONCE, end - at))
        yield model(input_ids=tokens[:, at : at + count], past_key_values=cache, use_cache=True).logits[0]
        at += count


@torch.no_grad()
def one_pass_logits(model: PreTrainedModel, cache: Cache, tokens: Tensor, prefill: int) -> Tensor:
    """Feed a text in one forward pass in which attention reads what the cache holds at the end: the wrong way.

    It is what is often measured in place of a cache. Every token attends over quantised states where generation would
    still have exact ones, and groups along tokens let it see a little of what comes after it.

    Args:
        model, cache, tokens, prefill: as for `forced_logits`.

    Returns:
        Logits ``[tokens - prefill, vocabulary]`` after each token behind the prefill.
    """
    for layer in cache.layers:
        if is_quantized(layer):
            layer.update = functools.partial(_update_and_read_back, layer, layer.update)
    logits: Tensor = model(input_ids=tokens, past_key_values=cache, use_cache=True).logits[0, prefill:]
    return logits


def _update_and_read_back(layer: Any, update: Any, *states: Any, **options: Any) -> tuple[Tensor, Tensor]:
    dtype = states[0].dtype
    update(*states, **options)
    keys, values = held_states(layer)
    return keys.to(dtype), values.to(dtype)

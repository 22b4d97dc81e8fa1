"""Stores written down, and made anew from what was written."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kvquant.engine.departed import Departed
from kvquant.engine.outliers import kept_bytes
from kvquant.engine.packing import packed_bytes
from kvquant.engine.state import Saved, State, dtype_name
from kvquant.engine.store import Store
from kvquant.engine.window import buffer_capacity

#: Types that states can be saved in.
_DTYPES = ("float32", "bfloat16", "float16", "float64")

#: The most batch rows, heads or channels that a saved state may speak of.
_MOST_WIDE = 1 << 24


def store_state(store: Store) -> State:
    """Return what the store is, without its spare room."""
    encoder = store.body.encoder
    scheme = encoder.scheme
    sizes = {"batch": store.batch, "kv_heads": store.kv_heads, "head_dim": store.head_dim}
    how = {"nbits": encoder.nbits, "axis": scheme.axis, "group_size": scheme.group_size}
    state = State(meta={**sizes, "dtype": dtype_name(store.dtype), **how, "block": store.policy.block})
    if store.body.encoder.kept:
        state.meta["kept"] = store.body.encoder.kept
    if store.sink is not None and store.sink.shape[2]:
        state.tensors["sink"] = store.sink
    if store.departed is not None:
        state.put("departed", store.departed.state())
    state.put("window", store.recent.state())
    state.put("body", store.body.state())
    return state


def store_room(store: Store, saved: Saved) -> int:
    """Return the bytes that a saved state may take beside the file, once it is restored and updated.

    Nothing of it is allocated yet: a file can speak of any number of tokens.
    """
    window = saved.part("window")
    held = window.integer("stop") - window.integer("start")
    grown = buffer_capacity(max(held, 0) + 1, store.policy.slack, store.policy.most_recent)
    exact = max(window.integer("capacity"), grown) * store.head_dim * store.dtype.itemsize
    encoder = store.body.encoder
    # A scale and an offset, as wide as they get, for each group.
    quantized: int = packed_bytes(store.head_dim, encoder.nbits) + 16 * -(-store.head_dim // encoder.scheme.group_size)
    page = store.policy.page_capacity(0, 0)
    outliers = kept_bytes(encoder.kept, store.head_dim, store.dtype.itemsize)
    body = page * quantized + page // store.policy.block * outliers
    return store.batch * store.kv_heads * (exact + body)


def restore_store(store: Store, saved: Saved) -> None:
    """Take on a saved state, in a store that was made for states like those (`empty_states`) and is empty.

    Raises:
        MisfitError: it is not one of a store like this.
    """
    encoder = store.body.encoder
    scheme = encoder.scheme
    how = {"nbits": encoder.nbits, "axis": scheme.axis, "group_size": scheme.group_size}
    for name, here in {**how, "block": store.policy.block}.items():
        if saved.value(name) != here:
            raise saved.misfit(f"was quantised with {name}={saved.value(name)!r}, and the config asks for {here!r}")
    if (kept := saved.value("kept") or 0) != store.body.encoder.kept:
        asked = store.body.encoder.kept
        raise saved.misfit(f"has {kept!r} outlier tokens in each block, and the config asks for {asked}")
    store.body.restore(saved.part("body"), store.batch)
    if len(store.body):
        shape = (store.batch, store.kv_heads, store.in_front, store.head_dim)
        if store.in_front:
            store.sink = saved.take("sink", shape, [dtype_name(store.dtype)]).to(store.device, copy=True)
        else:
            store.sink = store.recent.data.new_empty(shape)
    store.recent.restore(saved.part("window"))
    if store.policy.most is not None and len(store) > store.policy.most:
        raise saved.misfit(f"has {len(store)} tokens, and there is room for {store.policy.most}")
    if "departed" in saved:
        sizes = (store.batch, store.kv_heads, store.head_dim)
        departed = Departed.restored(saved.part("departed"), sizes, dtype_name(store.dtype), len(store.body))
        store.departed = replace(departed, states=departed.states.to(store.device, copy=True))
    if store.leaving(0):
        raise saved.misfit(f"has {len(store.recent)} tokens in its window, some of which should be quantised")


def empty_states(saved: Saved, device: torch.device) -> Tensor:
    """Return states like those of a saved store, without tokens: ``[batch, kv_heads, 0, head_dim]``.

    Raises:
        MisfitError: there are no such states.
    """
    batch = saved.integer("batch", 0, _MOST_WIDE)
    heads, head_dim = (saved.integer(size, 1, _MOST_WIDE) for size in ("kv_heads", "head_dim"))
    dtype = getattr(torch, saved.text("dtype", _DTYPES))
    return torch.empty((batch, heads, 0, head_dim), dtype=dtype, device=device)

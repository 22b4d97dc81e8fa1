"""One layer of the cache: two stores behind the interface that transformers expects of a layer."""

from __future__ import annotations

import copy
import operator
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from kvquant.attention.states import QuantizedStates
from kvquant.cache.checks import check_assigned, check_finite, check_pair, check_same, same_kind
from kvquant.cache.lookahead import Lookahead
from kvquant.cache.own import own_tensors
from kvquant.engine.config import CacheConfig
from kvquant.engine.encode import Encoder
from kvquant.engine.memory import LayerMemory, layer_memory
from kvquant.engine.offload import Place
from kvquant.engine.outliers import kept_tokens
from kvquant.engine.settings import LayerSettings, StreamSettings, compute_dtype, layer_settings
from kvquant.engine.store import Store
from kvquant.engine.window import WindowPolicy
from kvquant.errors import CropError, PendingAssignmentError
from kvquant.plugin.spec import Scheme

_STREAMS = ("key", "value")


class QuantizedLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers ships no types for it
    """A layer whose older tokens are quantised.

    Attributes:
        settings: what the layer does.
        record_past: whether an update can be taken back by `crop` without a trace, even if it made tokens leave the
            window; see `activate_past_recording`.
        lookahead: what fetches offloaded tokens ahead; the layers of a cache share one.
        keys, values: the states as plain tensors ``[batch, kv_heads, tokens, head_dim]``, dequantised, or None before
            the first update. Assigning stores anew; assigning another number of tokens takes effect once both have
            been assigned.
    """

    is_compileable = False
    is_croppable = True
    is_sliding = False

    def __init__(self, config: CacheConfig, index: int, settings: LayerSettings | None = None) -> None:
        """Make an empty layer.

        Args:
            config: the cache's options.
            index: the layer's number, for its options and for messages.
            settings: what `layer_settings` gives for it, if that is known already.
        """
        self.index = index
        self.settings = settings or layer_settings(config, index)
        self.record_past = False
        self.lookahead = Lookahead()
        self._config = config
        self._stores: dict[str, Store] = {}
        self._assigned: dict[str, Tensor] = {}

    # -------------------------------------------------------------------------------------------- state

    @property
    def where(self) -> str:
        """The layer's name in messages."""
        return f"layer {self.index}"

    @property
    def is_initialized(self) -> bool:
        """Whether the layer has seen states."""
        return bool(self._stores)

    @property
    def stores(self) -> tuple[Store, Store]:
        """The stores of keys and values; there are none before the first update."""
        return self._stores["key"], self._stores["value"]

    @property
    def batch_size(self) -> int:
        """Batch rows. There is no such attribute before the first update, which is what transformers looks for."""
        if not self._stores:
            raise AttributeError("batch_size is known after the first update")
        return self._stores["key"].batch

    @property
    def dtype(self) -> torch.dtype | None:
        """Type of the states, None before the first update."""
        return self._stores["key"].dtype if self._stores else None

    @property
    def device(self) -> torch.device | None:
        """Device of the states, None before the first update."""
        return self._stores["key"].device if self._stores else None

    def __len__(self) -> int:
        return len(self._stores["key"]) if self._stores else 0

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizedLayer:
        layer = type(self).__new__(type(self))
        memo[id(self)] = layer
        with own_tensors():
            layer.__dict__.update({name: copy.deepcopy(value, memo) for name, value in vars(self).items()})
        return layer

    def __bool__(self) -> bool:
        return True  # an empty layer is a layer

    def __repr__(self) -> str:
        key, value = self.settings.key, self.settings.value
        quantized = len(self._stores["key"].body) if self._stores else 0
        return (
            f"QuantizedLayer({self.index}, {key.backend.name}, keys {key.nbits} bits per {key.axis}, "
            f"values {value.nbits} bits per {value.axis}, {quantized} of {len(self)} tokens quantised)"
        )

    def policy(self, key_scheme: Scheme, value_scheme: Scheme) -> WindowPolicy:
        """Return what decides which tokens are quantised, for these schemes."""
        return self.settings.policy(key_scheme, value_scheme)

    # -------------------------------------------------------------------------------------------- updating

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make empty stores for states like these ``[batch, kv_heads, any, head_dim]``."""
        with own_tensors():
            self._stores = self._new_stores(key_states, value_states)

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append states and return what attention should use.

        Args:
            key_states: ``[batch, kv_heads, tokens, key_head_dim]``.
            value_states: ``[batch, kv_heads, tokens, value_head_dim]``.

        Returns:
            Keys and values of all tokens: the states themselves on the first update, plain tensors while nothing is
            quantised (views of the cache, good until its next change), `QuantizedStates` from then on.

        Raises:
            StatesError: the states do not fit the layer, or are not finite. Nothing was stored.
            QuantizationError, BackendContractError: the backend failed. Nothing was stored.
            PendingAssignmentError: keys were assigned and values that fit them were not.
        """
        first = len(self) == 0
        self.append(key_states, value_states)
        if first:
            return key_states, value_states
        keys, values = self._stores["key"], self._stores["value"]
        exact_keys, exact_values = keys.exact(), values.exact()
        if exact_keys is not None and exact_values is not None:
            if torch.is_grad_enabled():
                # Autograd may keep what it is given, and the next update writes behind it in the same tensor.
                return exact_keys.clone(), exact_values.clone()
            return exact_keys, exact_values
        return QuantizedStates(keys, "key"), QuantizedStates(values, "value")

    def append(self, key_states: Tensor, value_states: Tensor) -> None:
        """Append states without handing anything out; arguments and errors are those of `update`."""
        self._check_assigned()
        self._check_states(key_states, value_states)
        self.use()
        with own_tensors():
            stores = self._stores or self._new_stores(key_states, value_states)
            if stores["key"].device != key_states.device:
                stores = self._moved(stores, key_states.device)
            self._append(stores, key_states, value_states)
            self._stores = stores

    def _check_states(self, key_states: Tensor, value_states: Tensor) -> None:
        check_pair(key_states, value_states, self.where)
        for stream, states in zip(_STREAMS, (key_states, value_states), strict=True):
            if self._stores:
                check_same(stream, states, self._stores[stream], self.where)
            if self._config.check_finite:
                check_finite(stream, states, len(self), self.where)

    def _append(self, stores: dict[str, Store], key_states: Tensor, value_states: Tensor) -> None:
        keys, values = stores["key"], stores["value"]
        leaving = keys.leaving(key_states.shape[2])
        try:
            staged_keys = keys.stage(key_states, leaving, record=self.record_past)
            staged_values = values.stage(value_states, leaving, record=self.record_past)
        except BaseException:
            keys.discard()
            values.discard()
            raise
        keys.commit(staged_keys)
        values.commit(staged_values)

    def _new_stores(self, key_states: Tensor, value_states: Tensor) -> dict[str, Store]:
        streams = {"key": (self.settings.key, key_states), "value": (self.settings.value, value_states)}
        dtypes = {stream: compute_dtype(self._config, states.dtype) for stream, (_, states) in streams.items()}
        schemes = {
            stream: settings.scheme(states.shape[3], states.device.type, str(dtypes[stream]).removeprefix("torch."))
            for stream, (settings, states) in streams.items()
        }
        policy = self.policy(schemes["key"], schemes["value"])

        def encoder(stream: str, settings: StreamSettings) -> Encoder:
            (scheme, quantizer), *lower = settings.quantizers(schemes[stream])
            return Encoder(
                backend=settings.backend.name,
                quantizer=quantizer,
                scheme=scheme,
                stream=stream,
                where=self.where,
                block=policy.block,
                dtype=dtypes[stream],
                formats=settings.backend.capabilities.formats,
                transform=settings.head_transform(streams[stream][1].shape[3]),
                smooths=settings.smooths,
                scale_bits=settings.scale_bits,
                kept=kept_tokens(self.settings.outlier_share, policy.block),
                lower=lower[0] if lower else None,
            )

        return {
            stream: Store(states, encoder(stream, settings), policy, self._place())
            for stream, (settings, states) in streams.items()
        }

    def _place(self) -> Place:
        device = self._config.device
        # A device without an index is the one that tensors made there have.
        return Place(None if device is None else torch.empty(0, device=device).device, offload=self._config.offload)

    def _moved(self, stores: dict[str, Store], device: torch.device) -> dict[str, Store]:
        """Return the stores for states on another device, which models have that are spread over several."""
        for stream, settings in zip(_STREAMS, (self.settings.key, self.settings.value), strict=True):
            dtype = str(stores[stream].compute_dtype).removeprefix("torch.")
            settings.scheme(stores[stream].head_dim, device.type, dtype)
        return {stream: store.moved(device) for stream, store in stores.items()}

    # -------------------------------------------------------------------------------------------- reading whole

    @property
    def keys(self) -> Tensor | None:
        """Key states of all tokens, dequantised: ``[batch, kv_heads, tokens, head_dim]``, a tensor of its own."""
        return self._read("key")

    @keys.setter
    def keys(self, states: Tensor) -> None:
        self._assign("key", states)

    @property
    def values(self) -> Tensor | None:
        """Value states of all tokens, dequantised: ``[batch, kv_heads, tokens, head_dim]``, a tensor of its own."""
        return self._read("value")

    @values.setter
    def values(self, states: Tensor) -> None:
        self._assign("value", states)

    def _read(self, stream: str) -> Tensor | None:
        if stream in self._assigned:
            return self._assigned[stream]
        return self._stores[stream].read() if self._stores else None

    def _assign(self, stream: str, states: Tensor) -> None:
        check_assigned(stream, states, self.where)
        if self._config.check_finite:
            check_finite(stream, states, 0, self.where)
        partner = _STREAMS[1 - _STREAMS.index(stream)]
        held = self._stores.get(stream)
        with own_tensors():
            if partner in self._assigned:
                self._assign_both(stream, states, partner)
            elif held is not None and same_kind(states, held):
                self._stores[stream] = held.replaced(states)
                self._assigned.clear()
            else:
                self._assigned[stream] = states

    def _assign_both(self, stream: str, states: Tensor, partner: str) -> None:
        pair = {stream: states, partner: self._assigned[partner]}
        if pair["key"].shape[:3] != pair["value"].shape[:3]:
            raise PendingAssignmentError(partner, pair[partner].shape[2], states.shape[2])
        stores = self._new_stores(pair["key"], pair["value"])
        self._append(stores, pair["key"], pair["value"])
        self._stores = stores
        self._assigned.clear()

    def _check_assigned(self) -> None:
        for stream, states in self._assigned.items():
            raise PendingAssignmentError(stream, states.shape[2], len(self))

    # -------------------------------------------------------------------------------------------- other changes

    def activate_past_recording(self) -> None:
        """Prepare for updates that will be taken back in part, as assisted decoding does.

        From now on what the last tokens of an update made leave the window, as many tokens as `residual_length` says,
        is remembered in full precision until the next. So a crop after it leaves what never saw the tokens, and in
        fused attention each token of an update sees what it would see if they came one by one.
        """
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest tokens; what remains is what was stored, and nothing is quantised again.

        Args:
            tokens_to_remove: their number, negative as transformers has it; 0 does nothing.

        Raises:
            CropError: a positive number, or more tokens than there are.
        """
        tokens_to_remove = self.check_crop(tokens_to_remove)
        if tokens_to_remove and self._stores:
            with own_tensors():
                for store in self.stores:
                    store.crop(-tokens_to_remove)

    def check_crop(self, tokens_to_remove: int) -> int:
        """Raise what `crop` would raise, or return its argument as a plain integer."""
        self._check_assigned()
        try:
            tokens = operator.index(tokens_to_remove)
        except TypeError as cause:
            raise CropError(tokens_to_remove, len(self)) from cause
        if tokens > 0 or (self._stores and -tokens > len(self)):
            raise CropError(tokens, len(self))
        return tokens

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Put batch rows in the order `beam_idx` (int64 ``[batch]``)."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each batch row `repeats` times."""
        if self._stores:
            self.batch_select_indices(torch.arange(self.batch_size).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep batch rows `indices`: numbers in any order, or a mask."""
        self._check_assigned()
        if not self._stores:
            return
        batch = self.batch_size
        device = self._stores["key"].device
        order = torch.arange(batch, device=device)[torch.as_tensor(indices, device=device)]
        if order.shape[0] == batch and torch.equal(order, torch.arange(batch, device=device)):
            return  # most steps of a beam search keep the order
        with own_tensors():
            for store in self.stores:
                store.select(order)

    def reset(self) -> None:
        """Forget everything; the next states may have another shape."""
        self._stores, self._assigned = {}, {}

    # -------------------------------------------------------------------------------------------- host memory

    def offload(self) -> None:
        """Have the quantised tokens lie in host memory from now on, as with ``offload=True``; sink and window stay.

        Where the config names a device for them they stay there.
        """
        with own_tensors():
            for store in self._stores.values():
                if not store.place.offload:
                    store.offload()
        self.let_go()

    def prefetch(self) -> None:
        """Begin to bring offloaded tokens to the device, packed; until then, they are read where they lie."""
        for store in self._stores.values():
            store.body.fetch()

    def let_go(self) -> None:
        """Let go of what `prefetch` brought."""
        for store in self._stores.values():
            store.body.let_go()

    def use(self) -> None:
        """Say that the layer is about to be read."""
        if self._config.offload or (self._stores and self._stores["key"].body.is_offloaded):
            self.lookahead.turn(self)

    # -------------------------------------------------------------------------------------------- sizes

    def get_seq_length(self) -> int:
        """Return the tokens held."""
        return len(self)

    def get_max_length(self) -> int:
        """Return -1: there is no maximum."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the length and offset of the keys that `query_length` new tokens will see."""
        return len(self) + query_length, 0

    def memory(self) -> LayerMemory:
        """Return what the layer's memory is made of."""
        stores = self.stores if self._stores else ()
        parts = [part for store in stores for part in store.parts()]
        parts += [("full precision", states, states.nbytes) for states in self._assigned.values()]
        quantized = stores[0].body.held if stores else 0
        elements = sum(quantized * store.batch * store.kv_heads * store.head_dim for store in stores)
        share = self.stores[0].body.encoder.kept / self.stores[0].policy.block if quantized else 0.0
        return layer_memory(self.index, len(self), (quantized, elements), parts, share)

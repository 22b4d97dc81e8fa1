"""`QuantizedEncoderDecoderCache`: for models whose decoder attends to an encoder too, such as T5, BART and Whisper.

Such a model keeps two caches: of the decoder's own tokens, which grows, and of the encoder's states, which are computed
once for each prompt and read at every step. transformers' models read the latter as attributes of a layer, past any
method of the cache; so these layers hand out `QuantizedStates` there, and attention reads packed codes as elsewhere.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import torch
from torch import Tensor
from transformers import EncoderDecoderCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from kvquant.attention.states import QuantizedStates
from kvquant.cache.cache import QuantizedCache
from kvquant.cache.compat import decoder_config, dynamic_layers, head_dim
from kvquant.cache.configured import Configured
from kvquant.cache.io import Cross, load_cache, save_cache
from kvquant.cache.layer import QuantizedLayer
from kvquant.cache.layers import together
from kvquant.cache.own import own_tensors
from kvquant.cache.static import TracedLayer
from kvquant.engine.config import CacheConfig
from kvquant.engine.memory import MemoryReport


class CrossLayer(TracedLayer):
    """A layer of an encoder's states: quantised once, and read as attributes.

    Attributes:
        keys, values: the states ``[batch, kv_heads, tokens, head_dim]``: plain tensors while nothing is quantised, then
            `QuantizedStates`; None before the first update. In a graph of `torch.compile`, `StaticStates`.
    """

    def synchronise(self) -> None:
        """Note what graphs read: the tokens held, and what their states are like."""
        super().synchronise()
        self._note()

    def _note(self) -> None:
        # A graph is made for one length of the encoder's states: it stays the same while a prompt is decoded.
        self._tokens = len(self)
        with own_tensors():
            self._like = {
                stream: store.recent.data.new_empty((store.batch, store.kv_heads, 0, store.head_dim))
                for stream, store in self._stores.items()
            }

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append states and return what attention should use, see `QuantizedLayer.update`."""
        if torch.compiler.is_compiling():
            return self._handed_out_static(key_states, value_states, self._tokens + key_states.shape[2])
        handed_out = super().update(key_states, value_states)
        self.synchronise()
        return handed_out

    def append(self, key_states: Tensor, value_states: Tensor) -> None:
        """Append states without handing anything out."""
        super().append(key_states, value_states)
        self._note()

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep batch rows `indices`: numbers in any order, or a mask."""
        super().batch_select_indices(indices)
        self.synchronise()

    @property
    def keys(self) -> Tensor | None:
        """Key states of all the encoder's tokens, see the class."""
        return self._handed_out("key")

    @keys.setter
    def keys(self, states: Tensor) -> None:
        self._assign("key", states)

    @property
    def values(self) -> Tensor | None:
        """Value states of all the encoder's tokens, see the class."""
        return self._handed_out("value")

    @values.setter
    def values(self, states: Tensor) -> None:
        self._assign("value", states)

    def _handed_out(self, stream: str) -> Tensor | None:
        if torch.compiler.is_compiling():
            return self._static(self._like[stream], stream, self._tokens)
        if stream in self._assigned or not self._stores:
            return self._read(stream)
        store = self._stores[stream]
        exact = store.exact()
        if exact is None:
            self.use()
            return QuantizedStates(store, stream)
        return exact.clone() if torch.is_grad_enabled() else exact


class CrossAttentionCache(QuantizedCache):
    """The cache of an encoder's states, a layer for each of the decoder's.

    There is no window: none of an encoder's tokens is more recent than another. So `residual_length` is 0 here, and
    tokens that fill no block stay exact.
    """

    def _setup(self, config: CacheConfig, model_config: PreTrainedConfig | None) -> None:
        config = cross_config(config)
        if model_config is None:
            super()._setup(config, None)
            return
        # Windows are of the decoder's own tokens: whatever a layer does there, here it sees all of the encoder's.
        count, channels = len(dynamic_layers(model_config)), head_dim(model_config)
        layers: list[Any] = []
        for index in range(count):
            layers.append(DynamicLayer() if config.skips(index, count) else CrossLayer(config, index))
            if isinstance(layers[-1], CrossLayer):
                for settings in (layers[-1].settings.key, layers[-1].settings.value):
                    settings.scheme(channels)
        self._fill(config, layers)

    def _next_layer(self) -> QuantizedLayer | DynamicLayer:
        index = len(self.layers)
        new = DynamicLayer() if self.config.skips(index) else CrossLayer(self.config, index)
        return together([*self.layers, new])[-1]


def cross_config(config: CacheConfig) -> CacheConfig:
    """Return the options of a cross-attention cache: those of the whole, without a window or room for more tokens."""
    layers = {
        key: {name: value for name, value in options.items() if name != "residual_length"}
        for key, options in config.layers.items()
    }
    return dataclasses.replace(config, residual_length=0, layers=layers, max_cache_len=None)


class QuantizedEncoderDecoderCache(Configured, EncoderDecoderCache):  # type: ignore[misc]  # transformers ships no types for it
    """A cache for encoder-decoder models, both parts of which are kept in 1 to 8 bits.

        cache = QuantizedEncoderDecoderCache(backend="reference", nbits=4, config=model.config)
        model.generate(**inputs, past_key_values=cache)

    Attributes:
        config: all options, as a `CacheConfig`.
        self_attention_cache: the cache of the decoder's own tokens, a `QuantizedCache`.
        cross_attention_cache: that of the encoder's states, which are quantised once, when they come.
        is_updated: which layers have the encoder's states.
        token_ids: the decoder's tokens that a loaded cache was saved with, as in `QuantizedCache`.
    """

    def __init__(self, backend: str = "reference", config: PreTrainedConfig | None = None, **options: Any) -> None:
        """Make an empty cache.

        Args:
            backend: name of an installed backend; ``kvquant list-backends`` shows them.
            config: the model's config (``model.config``), see `QuantizedCache`.
            **options: the options of `CacheConfig`. `residual_length` is of the decoder's tokens alone.

        Raises:
            UnknownBackendError, UnknownOptionError, OptionValueError, UnsupportedError: as `QuantizedCache` does.
        """
        self._setup(CacheConfig.from_dict({"backend": backend, **options}), config)

    def _setup(self, config: CacheConfig, model_config: PreTrainedConfig | None) -> None:
        decoder = None if model_config is None else decoder_config(model_config)
        self._join(
            config,
            QuantizedCache.from_config(config, decoder),
            CrossAttentionCache.from_config(config, decoder),
        )

    def _join(self, config: CacheConfig, self_attention: QuantizedCache, cross_attention: QuantizedCache) -> None:
        super().__init__(self_attention, cross_attention)
        self.config = config
        self.token_ids: Tensor | None = self_attention.token_ids

    # -------------------------------------------------------------------------------------------- files

    def save(
        self, path: str | os.PathLike[str], *, model: PreTrainedModel | None = None, token_ids: object = None
    ) -> None:
        """Write both parts to a file that `load` reads; see `QuantizedCache.save`.

        Args:
            path: the file.
            model: the model that the cache is of; then the file knows it, and no other will get it.
            token_ids: the decoder's tokens that the cache stands for.

        Raises:
            CacheSaveError, UnsavableCacheError, StatesError, PendingAssignmentError: as `QuantizedCache.save` does.
        """
        parts = self.self_attention_cache, self.cross_attention_cache
        save_cache(
            path,
            self.config,
            parts[0].layers,
            cross=parts[1].layers,
            fixed=parts[0].layer_class_to_replicate is None,
            model=model,
            token_ids=token_ids,
        )

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        device: Any = None,
        *,
        model: PreTrainedModel | None = None,
        config: PreTrainedConfig | None = None,
        verify: bool = True,
    ) -> QuantizedEncoderDecoderCache:
        """Make the cache that was saved in a file; see `QuantizedCache.load`, whose arguments and errors these are."""

        def own(options: CacheConfig, model_config: PreTrainedConfig) -> list[Any]:
            return list(QuantizedCache.from_config(options, decoder_config(model_config)).layers)

        def cross(options: CacheConfig, model_config: PreTrainedConfig) -> list[Any]:
            return list(CrossAttentionCache.from_config(options, decoder_config(model_config)).layers)

        def cross_layer(options: CacheConfig, index: int) -> CrossLayer:
            return CrossLayer(cross_config(options), index)

        loaded = load_cache(
            path,
            own,
            device=device,
            model=model,
            model_config=config,
            check=verify,
            cross=Cross(cross_layer, cross),
        )
        parts = QuantizedCache.__new__(QuantizedCache), CrossAttentionCache.__new__(CrossAttentionCache)
        parts[0]._fill(loaded.config, loaded.layers, fixed=loaded.fixed, token_ids=loaded.token_ids)
        parts[1]._fill(cross_config(loaded.config), loaded.cross or [], fixed=loaded.fixed)
        cache = cls.__new__(cls)
        cache._join(loaded.config, *parts)
        return cache

    # -------------------------------------------------------------------------------------------- changes

    def check_dynamic_cache(self, method: str) -> None:
        """Refuse nothing: transformers asks here for its own dynamic caches, and ours do all that they do.

        Args:
            method: what is about to be called.
        """

    def align_layers(self) -> int:
        """Bring the decoder's layers to the length of the shortest; see `QuantizedCache.align_layers`."""
        return int(self.self_attention_cache.align_layers())

    # -------------------------------------------------------------------------------------------- figures

    @property
    def batch_size(self) -> int:
        """Batch rows, -1 before the first update."""
        return int(self.self_attention_cache.batch_size)

    def memory_report(self) -> MemoryReport:
        """Return the memory of both parts: the decoder's layers, then those of the encoder's states."""
        own, cross = self.self_attention_cache.memory_report(), self.cross_attention_cache.memory_report()
        attention = dict.fromkeys(filter(None, (own.attention, cross.attention)))
        return MemoryReport((*own.layers, *cross.layers), ", ".join(attention))

    def __repr__(self) -> str:
        own, cross = self.self_attention_cache, self.cross_attention_cache
        return f"{type(self).__name__}(decoder: {own!r}, encoder's states: {cross!r})"

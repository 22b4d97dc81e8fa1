"""`QuantizedCache`: what users make and pass to `generate`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, StaticLayer

from kvquant.attention.dispatch import kernel_for
from kvquant.cache.compat import head_dim, quantizable_layers
from kvquant.cache.configured import Configured
from kvquant.cache.io import load_cache, save_cache
from kvquant.cache.layer import QuantizedLayer
from kvquant.cache.layers import check_crop, check_updated_once, memory_of, quantized_layer, together
from kvquant.cache.static import TracedLayer, full_attention_layer
from kvquant.engine.config import CacheConfig
from kvquant.engine.memory import MemoryReport, format_bytes
from kvquant.engine.options import parse_layers
from kvquant.engine.settings import check_device, layer_settings
from kvquant.errors import UnsupportedError

_WITHOUT_CONFIG = "a cache without a model's config"
_NO_LAYERS = "it has no layers before the first update; make it with config=model.config"


class QuantizedCache(Configured, Cache):  # type: ignore[misc]  # transformers ships no types for it
    """A key/value cache whose older tokens are kept in 1 to 8 bits.

        cache = QuantizedCache(backend="reference", nbits=4)
        model.generate(**inputs, past_key_values=cache)

    Attributes:
        config: all options, as a `CacheConfig`.
        layers: one layer for each of the model's; those that are not full attention are transformers' own.
        token_ids: the tokens ``[batch, tokens]`` that a loaded cache was saved with, None where there are none. What
            comes later is not added to them.
    """

    def __init__(self, backend: str = "reference", config: PreTrainedConfig | None = None, **options: Any) -> None:
        """Make an empty cache.

        Args:
            backend: name of an installed backend; ``kvquant list-backends`` shows them.
            config: the model's config (``model.config``). With it the layers are made to fit the model, and whatever
                cannot work is refused now; without it every layer is taken for full attention, and what depends on
                the model is refused on the first update.
            **options: the options of `CacheConfig`.

        Raises:
            UnknownBackendError, UnknownOptionError, OptionValueError, UnsupportedError: see each; the message says what
                would work.
            BackendFactoryError: the backend refuses a value of one of its own options.
        """
        self._setup(CacheConfig.from_dict({"backend": backend, **options}), config)

    def save(
        self, path: str | os.PathLike[str], *, model: PreTrainedModel | None = None, token_ids: object = None
    ) -> None:
        """Write the cache to a file that `load` reads; spare room is not written.

        Whatever happens, the file is afterwards what it was, or whole and new.

        Args:
            path: the file, such as ``"prompt.kvq"``.
            model: the model that the cache is of; then the file knows it, and no other will get it.
            token_ids: the tokens that the cache stands for, ``[batch, tokens]`` or a list of one row's.

        Raises:
            CacheSaveError: the file cannot be written.
            UnsavableCacheError: a layer, or a tensor of a backend, is of a kind that no file can hold.
            StatesError: `token_ids` are not as many as the cache has tokens.
            PendingAssignmentError: keys were assigned and values that fit them were not.
        """
        fixed = self.layer_class_to_replicate is None
        save_cache(path, self.config, self.layers, fixed=fixed, model=model, token_ids=token_ids)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        device: Any = None,
        *,
        model: PreTrainedModel | None = None,
        config: PreTrainedConfig | None = None,
        verify: bool = True,
    ) -> QuantizedCache:
        """Make the cache that was saved in a file; it goes on as if it had never been saved.

        The file is mapped into memory: on the CPU quantised tokens are read from it when attention wants them, and it
        is never written to. Do not write into it by other means than `save` while a cache lives from it.

        Args:
            path: the file.
            device: where the states go; None takes the model's device, or the CPU where there is no model. Where the
                config has a device for quantised tokens that this machine has not, they go there too.
            model: the model that is to go on with it: a cache of another model is refused.
            config: the model's config, to compare that alone.
            verify: whether to compare the file's checksums, which reads it once.

        Raises:
            OSError: the file cannot be read.
            DamagedFileError, FormatVersionError, OtherModelError, CacheTooLargeError, CacheFileError: no cache can be
                made of it; the message says why.
            UnknownBackendError, BackendUnavailableError: its backend is not installed here.
            UnsupportedError, OptionValueError: it cannot work on this device.
        """

        def fitting(options: CacheConfig, model_config: PreTrainedConfig) -> list[Any]:
            return list(cls.from_config(options, model_config).layers)

        loaded = load_cache(path, fitting, device=device, model=model, model_config=config, check=verify)
        cache = cls.__new__(cls)
        cache._fill(loaded.config, loaded.layers, fixed=loaded.fixed, token_ids=loaded.token_ids)
        return cache

    def _fill(
        self, config: CacheConfig, layers: list[Any], *, fixed: bool = True, token_ids: Tensor | None = None
    ) -> None:
        """Make a cache of these layers, to which others are added as they are used unless they are `fixed`."""
        self.config, self.token_ids = config, token_ids
        if fixed:
            super().__init__(layers=together(layers))
        else:
            super().__init__(layer_class_to_replicate=self._next_layer)
            self.layers.extend(together(layers))

    def _setup(self, config: CacheConfig, model_config: PreTrainedConfig | None) -> None:
        check_device(config)
        templates = quantizable_layers(model_config, config.max_cache_len)
        if not templates:
            layer_settings(config)  # refuse now what can be told to be impossible for every layer
            for index in {index for key in config.layers for index in parse_layers(key)}:
                layer_settings(config, index)
            config.skips(0)
            self._fill(config, [], fixed=False)
            return
        config.check_layer_count(len(templates))
        channels = head_dim(model_config)
        layers: list[Any] = []
        for index, template in enumerate(templates):
            skipped = config.skips(index, len(templates))
            layers.append(template if skipped else quantized_layer(template, config, index, channels) or template)
        self._fill(config, layers)

    def _next_layer(self) -> Any:
        index, fixed = len(self.layers), self.config.max_cache_len
        check_updated_once(self.layers)
        if torch.compiler.is_compiling() and fixed is not None:
            # What outlives a graph is made outside of it; with fullgraph=True torch shows the text in its error.
            torch._dynamo.graph_break(msg=f"{_WITHOUT_CONFIG} cannot be updated in a graph: {_NO_LAYERS}")
        if self.config.skips(index):
            return DynamicLayer() if fixed is None else StaticLayer(fixed)
        return together([*self.layers, full_attention_layer(self.config, index)])[-1]

    # -------------------------------------------------------------------------------------------- a fixed size

    @property
    def is_compileable(self) -> bool:
        """Whether shapes are the same at every step, so that `torch.compile` can work with the cache."""
        if not self.layers:
            return self.config.max_cache_len is not None
        return bool(super().is_compileable)

    def early_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Have layers know batch size, heads, head dim, type and device before the first update.

        Args:
            *args: those of transformers' method of this name.
            **kwargs: likewise.

        Raises:
            UnsupportedError: there are no layers yet.
        """
        if not self.layers:
            raise UnsupportedError(_WITHOUT_CONFIG, [_NO_LAYERS], "early_initialization")
        super().early_initialization(*args, **kwargs)

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Return the most tokens that the cache, or a layer of it, can hold; -1 where there is no limit.

        Args:
            layer_idx: the layer, None for the one that holds most.
        """
        if (layer_idx or 0) >= len(self.layers):
            return self.config.max_cache_len or -1
        return int(super().get_max_length(layer_idx))

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Return the length and offset of the keys that `query_length` new tokens will see in a layer.

        Args:
            query_length: new tokens.
            layer_idx: the layer.
        """
        if layer_idx >= len(self.layers) and self.config.max_cache_len is not None:
            return self.config.max_cache_len, 0
        length, offset = super().get_mask_sizes(query_length, layer_idx)
        return length, offset

    def __iter__(self) -> Iterator[tuple[Tensor | None, Tensor | None, Tensor | None]]:
        """Yield keys, values and sliding window of each layer, dequantised, as a `DynamicCache` does.

        So ``DynamicCache(cache)`` has the same states in full precision. Layers without keys give None.
        """
        for layer in self.layers:
            window = getattr(layer, "sliding_window", None)
            keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
            yield keys, values, None if window is None else torch.tensor(window)

    # -------------------------------------------------------------------------------------------- changes

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest tokens from every layer, or from none.

        Args:
            tokens_to_remove: their number, negative as transformers has it.

        Raises:
            CropError: a positive number, or more tokens than there are.
        """
        for index, layer in enumerate(self.layers):
            check_crop(index, layer, tokens_to_remove)
        if not self.layers:
            check_crop(0, DynamicLayer(), tokens_to_remove)
        super().crop(tokens_to_remove)

    def align_layers(self) -> int:
        """Bring all layers to the length of the shortest, after a forward pass that failed half-way.

        Layers before the one that failed already hold the tokens of that pass; this removes them, so that generation
        can go on from where it was.

        Returns:
            How many tokens were removed from the longest layer.

        Raises:
            CropError: a layer that is ahead cannot go back, such as a sliding window that has moved on. Nothing was
                removed; `reset` is what remains.
        """
        lengths = {
            index: int(layer.get_seq_length())
            for index, layer in enumerate(self.layers)
            if isinstance(layer, CacheLayerMixin)
        }
        shortest, longest = min(lengths.values(), default=0), max(lengths.values(), default=0)
        ahead = [index for index, length in lengths.items() if length > shortest]
        for index in ahead:
            check_crop(index, self.layers[index], shortest - lengths[index])
        for index in ahead:
            self.layers[index].crop(shortest - lengths[index])
        for layer in self.layers:
            if isinstance(layer, TracedLayer):
                layer.synchronise()
        return longest - shortest

    def prefetch(self, layer_idx: int, only_non_sliding: bool = True) -> None:
        """Begin to bring the offloaded tokens of a layer to the device, or those of the next that quantises.

        Args:
            layer_idx: its number; behind the last comes the first.
            only_non_sliding: whether to pass over layers of sliding windows.
        """
        for layer in (*self.layers[layer_idx:], *self.layers[:layer_idx]):
            if isinstance(layer, QuantizedLayer) and not (only_non_sliding and layer.is_sliding):
                layer.prefetch()
                return

    # -------------------------------------------------------------------------------------------- figures

    def memory_report(self) -> MemoryReport:
        """Return the cache's memory by layer and part."""
        memories = tuple(memory_of(index, layer) for index, layer in enumerate(self.layers))
        return MemoryReport(memories, _attention(self.layers))

    def __repr__(self) -> str:
        options = ", ".join(
            f"{name}={value!r}"
            for name, value in self.config.to_dict().items()
            if name in ("backend", "nbits") or value != CacheConfig().to_dict()[name]
        )
        report = self.memory_report()
        if not report.layers or not report.nbytes:
            return f"QuantizedCache({options}; empty)"
        tokens = max(layer.tokens for layer in report.layers)
        quantized = max(layer.quantized_tokens for layer in report.layers)
        bits = "" if report.bits_per_element is None else f" at {report.bits_per_element:.2f} bits per element"
        return (
            f"QuantizedCache({options}; {len(self.layers)} layers, {tokens} tokens, {quantized} quantised{bits}, "
            f"{format_bytes(report.nbytes)})"
        )


def _attention(layers: list[Any]) -> str:
    """Return what attends over the quantised tokens of these layers when the next token is decoded."""
    found: dict[str, None] = {}
    for layer in layers:
        if isinstance(layer, QuantizedLayer) and layer.is_initialized and len(layer.stores[0].body):
            name, reason = kernel_for(*layer.stores)
            found[f"{name} ({reason})" if reason else name] = None
    return ", ".join(found)

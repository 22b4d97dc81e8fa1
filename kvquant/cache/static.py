"""Layers for `torch.compile`: no shape changes from one step to the next.

What they do is what `QuantizedLayer` does. They hand out states of the shape of a full cache (`StaticStates`), and an
update is an operator of `kvquant.attention.operators`, which a graph calls without looking inside.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from kvquant.attention import operators
from kvquant.attention.static import static_states
from kvquant.cache.layer import QuantizedLayer
from kvquant.cache.own import own_tensors
from kvquant.engine.config import CacheConfig
from kvquant.engine.settings import LayerSettings
from kvquant.engine.window import WindowPolicy
from kvquant.errors import CacheFullError
from kvquant.plugin.spec import Scheme


class TracedLayer(QuantizedLayer):
    """A layer that `torch.compile` can trace past: operators know it, and its tokens are counted in a tensor."""

    def __init__(self, config: CacheConfig, index: int, settings: LayerSettings | None = None) -> None:
        """Make an empty layer; see `QuantizedLayer`."""
        super().__init__(config, index, settings)
        self._register()

    def _register(self) -> None:
        """Have operators know the layer. Its copies are others."""
        with own_tensors():
            self._handle = operators.register(self)
            self._count, self._length = torch.tensor(0), torch.tensor(0)
        self.synchronise()

    def __deepcopy__(self, memo: dict[int, Any]) -> TracedLayer:
        layer: TracedLayer = super().__deepcopy__(memo)
        layer._register()
        return layer

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._register()

    def synchronise(self) -> None:
        """Note the tokens held where graphs read them: after every change but those made in one, and by operators."""
        self._count.fill_(len(self))
        self._length.fill_(len(self))

    def _handed_out_static(self, key_states: Tensor, value_states: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        """Append states, and return keys and values as `StaticStates` of `tokens` tokens; torch traces this."""
        operators.append(key_states.detach(), value_states.detach(), self._handle, self._count)
        self._length.add_(key_states.shape[2])
        return self._static(key_states, "key", tokens), self._static(value_states, "value", tokens)

    def _static(self, states: Tensor, stream: str, tokens: int) -> Tensor:
        """Return what stands for `tokens` tokens; `states` are those of the last update, of which there may be none."""
        return static_states(
            states,
            stream,
            tokens,
            handle=self._handle,
            count=self._count,
            length=self._length,
            version=None if torch.compiler.is_compiling() else self._stores["key"].version,
        )

    def _assign(self, stream: str, states: Tensor) -> None:
        super()._assign(stream, states)
        self.synchronise()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest tokens, see `QuantizedLayer.crop`."""
        super().crop(tokens_to_remove)
        self.synchronise()

    def reset(self) -> None:
        """Forget everything; the next states may have another shape."""
        super().reset()
        self.synchronise()


class StaticQuantizedLayer(TracedLayer):
    """A layer with room for so many tokens and no more; the room is made at once, and kept until `reset`.

    Attributes:
        max_cache_len: the most tokens that it holds.
    """

    is_compileable = True

    def __init__(self, config: CacheConfig, index: int, settings: LayerSettings | None = None) -> None:
        """Make an empty layer; `config` has a `max_cache_len`."""
        if config.max_cache_len is None:
            raise ValueError("a layer of fixed size needs a max_cache_len")
        self.max_cache_len = config.max_cache_len
        super().__init__(config, index, settings)

    def policy(self, key_scheme: Scheme, value_scheme: Scheme) -> WindowPolicy:
        """Return what decides which tokens are quantised, and how much room is made for them, for these schemes."""
        return dataclasses.replace(super().policy(key_scheme, value_scheme), most=self.max_cache_len)

    # -------------------------------------------------------------------------------------------- updating

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append states and return what attention should use; torch traces this.

        Args:
            key_states: ``[batch, kv_heads, tokens, key_head_dim]``.
            value_states: ``[batch, kv_heads, tokens, value_head_dim]``.

        Returns:
            Keys and values as `StaticStates` ``[batch, kv_heads, max_cache_len, head_dim]``.

        Raises:
            CacheFullError: there is no room for them. Nothing was stored.
            StatesError, QuantizationError, BackendContractError, PendingAssignmentError: as in `QuantizedLayer`.
        """
        return self._handed_out_static(key_states, value_states, self.max_cache_len)

    def append(self, key_states: Tensor, value_states: Tensor) -> None:
        """Append states where there is room for them."""
        if key_states.dim() == 4:
            self._check_room(len(self), key_states.shape[2])
        super().append(key_states, value_states)

    def _check_room(self, held: int, added: int) -> None:
        if held + added > self.max_cache_len:
            raise CacheFullError(self.max_cache_len, held, added, self.where)

    def _assign(self, stream: str, states: Tensor) -> None:
        if isinstance(states, Tensor) and states.dim() == 4:
            self._check_room(0, states.shape[2])
        super()._assign(stream, states)

    # -------------------------------------------------------------------------------------------- sizes

    def get_seq_length(self) -> Any:
        """Return the tokens held: a number, and in a graph a tensor, which does not tie the graph to it."""
        return self._length if torch.compiler.is_compiling() else len(self)

    def get_max_length(self) -> int:
        """Return the most tokens that there can be."""
        return self.max_cache_len

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:  # noqa: ARG002  # it is the same for all
        """Return the length and offset of the keys that attention gets, whatever is in the cache."""
        return self.max_cache_len, 0


def full_attention_layer(config: CacheConfig, index: int) -> QuantizedLayer:
    """Return an empty layer of full attention, of fixed size where the options ask for one."""
    return QuantizedLayer(config, index) if config.max_cache_len is None else StaticQuantizedLayer(config, index)

"""A layer of sliding-window or chunked attention: it forgets the tokens that no query will see again."""

from __future__ import annotations

from torch import Tensor

from kvquant.cache.layer import QuantizedLayer
from kvquant.engine.config import CacheConfig
from kvquant.engine.settings import LayerSettings
from kvquant.engine.store import Store
from kvquant.engine.window import WindowPolicy
from kvquant.errors import CropError
from kvquant.plugin.spec import Scheme


class QuantizedSlidingLayer(QuantizedLayer):
    """A quantised layer of which a query sees the last `sliding_window` tokens, itself among them.

    As transformers' own such layer it hands out what the tokens of an update see together, and keeps one token less
    than the window. It lets go of older ones a page at a time, with the next update; until then an update can be taken
    back by `crop`. The first `sink_length` tokens stay exact as long as they are in view.

    Attributes:
        sliding_window: tokens that a query sees.
        record_past: as in `QuantizedLayer`; and everything is kept until the next `crop`, however many updates come
            before it.
    """

    is_sliding = True

    def __init__(
        self, config: CacheConfig, index: int, sliding_window: int, settings: LayerSettings | None = None
    ) -> None:
        """Make an empty layer; see `QuantizedLayer`."""
        super().__init__(config, index, settings)
        self.sliding_window = sliding_window

    def __len__(self) -> int:
        return self._stores["key"].seen if self._stores else 0

    def policy(self, key_scheme: Scheme, value_scheme: Scheme) -> WindowPolicy:
        """Return what decides which tokens are quantised, and for how long, for these schemes."""
        return self.settings.policy(key_scheme, value_scheme, self._span)

    @property
    def _span(self) -> int:
        return self.sliding_window - 1

    def _first_seen(self, tokens: int) -> int:
        """Return the first of `tokens` tokens that the next one will see."""
        return max(0, tokens - self._span)

    # -------------------------------------------------------------------------------------------- updating

    def _append(self, stores: dict[str, Store], key_states: Tensor, value_states: Tensor) -> None:
        seen, added = stores["key"].seen, key_states.shape[2]
        if seen:
            super()._append(stores, key_states, value_states)
        else:
            first = 0 if self.record_past else stores["key"].policy.first_kept(added)
            self._begin(stores, first)
            try:
                if first:
                    stores["key"].fit_smoothing(key_states)
                    stores["value"].fit_smoothing(value_states)
                super()._append(stores, key_states[:, :, first:], value_states[:, :, first:])
            except BaseException:
                self._begin(stores, 0)
                raise
        for store in stores.values():
            store.show_from(self._first_seen(seen), free=not self.record_past)

    @staticmethod
    def _begin(stores: dict[str, Store], position: int) -> None:
        for store in stores.values():
            store.begin_at(position)

    def _read(self, stream: str) -> Tensor | None:
        if stream in self._assigned or not self._stores:
            return super()._read(stream)
        store = self._stores[stream]
        return store.read(self._first_seen(len(self)) - store.freed - store.hidden)

    def _assign(self, stream: str, states: Tensor) -> None:
        for store in self._stores.values():
            store.show_from(self._first_seen(len(self)), free=True)
        super()._assign(stream, states)

    # -------------------------------------------------------------------------------------------- other changes

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest tokens, and let go of the oldest that will not be seen again.

        Args:
            tokens_to_remove: their number, negative as transformers has it; with 0 only the latter is done.

        Raises:
            CropError: a positive number, more tokens than there are, or so many that tokens would be seen again that
                are no longer held.
        """
        tokens = self.check_crop(tokens_to_remove)
        first = self._first_seen(len(self) + tokens)
        for store in self._stores.values():
            store.show_from(first, free=not tokens)
        super().crop(tokens)
        for store in self._stores.values():
            store.show_from(first, free=True)

    def check_crop(self, tokens_to_remove: int) -> int:
        """Raise what `crop` would raise, or return its argument as a plain integer."""
        tokens = super().check_crop(tokens_to_remove)
        freed = self._stores["key"].freed if self._stores else 0
        if tokens and self._first_seen(len(self) + tokens) < freed:
            reason = (
                f"{self.where} keeps a sliding window of {self.sliding_window} tokens, which has moved on and cannot "
                f"go back that far; activate_past_recording() before an update keeps what a crop after it needs"
            )
            raise CropError(tokens, len(self), reason)
        return tokens

    # -------------------------------------------------------------------------------------------- sizes

    def get_max_length(self) -> int:
        """Return the tokens that a query sees, as transformers' own layer does."""
        return self.sliding_window

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the length and offset of the keys that `query_length` new tokens will see."""
        offset = self._first_seen(len(self))
        return len(self) - offset + query_length, offset

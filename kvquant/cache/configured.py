"""Caches that are made from a config: what they have in common, whatever transformers' class they are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from transformers import PreTrainedConfig

from kvquant.engine.config import CacheConfig
from kvquant.engine.memory import MemoryReport


class Configured(ABC):
    """A cache with a `CacheConfig`; mixed into one of transformers' classes."""

    @abstractmethod
    def _setup(self, config: CacheConfig, model_config: PreTrainedConfig | None) -> None:
        """Make an empty cache of what is there so far: an object without attributes."""

    @abstractmethod
    def memory_report(self) -> MemoryReport:
        """Return the cache's memory by layer and part."""

    @classmethod
    def from_config(
        cls, config: CacheConfig | Mapping[str, Any] | str | Path, model_config: PreTrainedConfig | None = None
    ) -> Self:
        """Make a cache from a `CacheConfig`, a mapping of its options, or a JSON or YAML file.

        Args:
            config: the options.
            model_config: the model's config (``model.config``), see the class.
        """
        if isinstance(config, (str, Path)):
            config = CacheConfig.from_file(config)
        elif not isinstance(config, CacheConfig):
            config = CacheConfig.from_dict(config)
        cache = cls.__new__(cls)
        cache._setup(config, model_config)
        return cache

    @classmethod
    def from_preset(cls, preset: str, config: PreTrainedConfig | None = None, **options: Any) -> Self:
        """Make a cache from a named preset, such as ``"kivi-2"``.

        Args:
            preset: one of `kvquant.engine.config.PRESETS`.
            config: the model's config, see the class.
            **options: options that override the preset's.

        Raises:
            UnknownOptionError: there is no such preset.
        """
        return cls.from_config(CacheConfig.from_preset(preset, **options), config)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that the cache holds, spare capacity included."""
        return self.memory_report().nbytes

    @property
    def bits_per_element(self) -> float | None:
        """Stored bits of quantised tokens over their numbers, see `MemoryReport`; None while nothing is quantised."""
        return self.memory_report().bits_per_element

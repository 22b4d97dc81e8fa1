"""What tells one model from another, so that a cache is not continued by the wrong one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

#: Numbers of a tensor that go into a model's fingerprint, evenly spaced.
_SAMPLED = 1 << 16

#: Entries of a config that change nothing about keys and values. The type has an entry of its own.
_BESIDE_THE_POINT = frozenset(
    "_name_or_path transformers_version dtype torch_dtype use_cache return_dict output_attentions "
    "output_hidden_states".split()
)


def weights_hash(model: PreTrainedModel) -> str:
    """Return a hash of all weights: of every number of small tensors, of evenly spaced ones of large tensors."""
    seen = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().flatten()
        sampled = flat[:: max(1, flat.numel() // _SAMPLED)].contiguous().cpu()
        seen.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
        seen.update(sampled.view(torch.uint8).numpy().tobytes())
    return seen.hexdigest()[:16]


@dataclass(frozen=True)
class ModelIdentity:
    """A model, as far as a cache depends on it.

    Attributes:
        architecture: the model's class.
        dtype: type of its weights.
        weights: a hash of them.
        config: what its config says other than its class's default does, in plain builtins.
    """

    architecture: str
    dtype: str
    weights: str
    config: Mapping[str, Any]

    @classmethod
    def of(cls, model: PreTrainedModel) -> ModelIdentity:
        """Look at a model."""
        dtype = str(model.dtype).removeprefix("torch.")
        return cls(type(model).__name__, dtype, weights_hash(model), _plain(model.config))

    def to_dict(self) -> dict[str, Any]:
        """Return plain builtins."""
        return asdict(self)

    def config_differences(self, config: PreTrainedConfig) -> list[str]:
        """Return what another config says otherwise, in words."""
        return list(_differences(self.config, _plain(config)))

    def differences(self, model: PreTrainedModel) -> list[str]:
        """Return what tells another model from this one, in words."""
        other = ModelIdentity.of(model)
        found = [
            f"{name} is {getattr(self, name)} in the file and {getattr(other, name)} in the model"
            for name in ("architecture", "dtype")
            if getattr(self, name) != getattr(other, name)
        ]
        found += self.config_differences(model.config)
        if not found and self.weights != other.weights:
            found.append("Its weights are others")
        return found


def _plain(config: PreTrainedConfig) -> dict[str, Any]:
    """Return what a config says other than the default, without what is beside the point, as JSON would have it."""
    # Only what is not the default: a newer transformers knows more entries, whose defaults change nothing.
    plain: dict[str, Any] = json.loads(json.dumps(config.to_diff_dict(), default=str))
    return _relevant(plain)


def _relevant(entries: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _relevant(value) if isinstance(value, dict) else value
        for name, value in entries.items()
        if name not in _BESIDE_THE_POINT
    }


def _differences(here: Mapping[str, Any], there: Mapping[str, Any], place: str = "") -> Iterator[str]:
    for name in sorted({*here, *there}):
        was, now = here.get(name), there.get(name)
        if isinstance(was, dict) and isinstance(now, dict):
            yield from _differences(was, now, f"{place}{name}.")
        elif was != now:
            yield f"{place}{name} is {_shown(was)} in the file and {_shown(now)} in the model"


def _shown(value: object) -> str:
    text = "not given" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."

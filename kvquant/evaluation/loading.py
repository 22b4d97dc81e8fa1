"""A model and its tokenizer for an evaluation, and what identifies them."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from kvquant._version import __version__
from kvquant.attention.kernels import describe
from kvquant.cache.fingerprint import weights_hash
from kvquant.demo import MODEL_DIR
from kvquant.engine.config import CacheConfig, device_name
from kvquant.engine.settings import check_device
from kvquant.errors import ModelLoadError, OptionValueError
from kvquant.evaluation.twin import outlier_twin
from kvquant.registry import find_backend
from kvquant.registry.availability import installed_version

DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")

#: Distributions whose versions results may depend on.
_DISTRIBUTIONS = ("torch", "transformers", "hqq", "optimum-quanto", "bitsandbytes")


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to run.

    Attributes:
        name: the name or folder that it was loaded from.
        model: the model, in evaluation mode, on its device.
        tokenizer: its tokenizer.
        outliers: the largest factor of its outlier channels if it is an outlier twin, else None.
    """

    name: str
    model: PreTrainedModel
    tokenizer: Any
    outliers: int | None = None

    @property
    def title(self) -> str:
        """What to call it in a table."""
        name = "the shipped model" if self.is_demo else self.name
        return name if self.outliers is None else f"the outlier twin (factors up to {self.outliers}) of {name}"

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return torch.device(self.model.device)

    @property
    def positions(self) -> int | None:
        """Tokens that the model can see at most, None where its config does not say."""
        longest = getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        return None if longest is None else int(longest)

    @property
    def is_demo(self) -> bool:
        """Whether it is the small model that kvquant ships."""
        return Path(self.name).exists() and Path(self.name).resolve() == MODEL_DIR

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text, without those that the tokenizer adds."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False, verbose=False)
        return ids

    @property
    def prefix(self) -> list[int]:
        """Tokens that the tokenizer puts before every text, such as the one that begins a sequence."""
        alone, whole = self.encode("a"), self.tokenizer.encode("a")
        starts = (at for at in range(len(whole)) if whole[at : at + len(alone)] == alone)
        return list(whole[: next(starts, 0)])

    def check_context(self, option: str, context: int) -> None:
        """Refuse a context that the model cannot see.

        Raises:
            OptionValueError: it has more tokens than the model has positions.
        """
        if self.positions is not None and context > self.positions:
            raise OptionValueError(option, context, f"at most {self.positions} tokens, the context of {self.name!r}")

    def settings(self) -> dict[str, Any]:
        """Return what results depend on, in plain builtins: weights, config, type, where it runs, versions."""
        config = {
            name: value
            for name, value in self.model.config.to_dict().items()
            if name not in ("_name_or_path", "transformers_version")
        }
        attention = self.model.config.get_text_config(decoder=True)._attn_implementation
        return {
            "weights": weights_hash(self.model),
            "outliers": self.outliers,
            "config": hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()[:16],
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": self.device.type,
            "attention": attention,
            "kernel": describe(self.device.type).partition(";")[0],
            "threads": torch.get_num_threads() if self.device.type == "cpu" else None,
            "versions": versions(),
        }


def load_model(
    name: str | None = None,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    outliers: int | None = None,
    seed: int = 0,
) -> LoadedModel:
    """Load a model and its tokenizer.

    Args:
        name: name or folder, None for the small model that kvquant ships.
        device: torch device.
        dtype: one of `DTYPES`; ``auto`` takes the one that the weights are saved in.
        outliers: make it an outlier twin with factors up to this one, see `outlier_twin`.
        seed: of the outlier twin.

    Raises:
        OptionValueError: there is no such device or type, or a factor is none.
        ModelLoadError: the model or its tokenizer cannot be loaded.
        UnsupportedError: no outlier twin can be made of this model.
    """
    if dtype not in DTYPES:
        raise OptionValueError("dtype", dtype, f"one of {', '.join(DTYPES)}")
    check_device(CacheConfig(device=device_name(device)))
    name = str(MODEL_DIR) if name is None else name
    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype).to(device).eval()
    except (OSError, ValueError, RuntimeError, AssertionError, KeyError, ImportError) as cause:
        raise ModelLoadError(name, cause) from cause
    if outliers is not None:
        outlier_twin(model, outliers, seed=seed)
    return LoadedModel(name, model, tokenizer, outliers)


def hash_tokens(tokens: Sequence[int]) -> str:
    """Return what identifies a sequence of tokens."""
    return hashlib.sha256(json.dumps(list(tokens)).encode()).hexdigest()[:16]


def versions() -> dict[str, str]:
    """Return the versions of kvquant and of the libraries that results may depend on, by distribution."""
    versions = {"kvquant": __version__}
    for distribution in _DISTRIBUTIONS:
        try:
            versions[distribution] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def plugin_versions(backends: Iterable[str]) -> dict[str, str]:
    """Return the versions of what backends come from and need, by distribution.

    Args:
        backends: their names; all are installed.
    """
    versions: dict[str, str] = {}
    for name in dict.fromkeys(backends):
        backend = find_backend(name)
        if backend.version:
            versions[backend.distribution] = backend.version
        for requirement in backend.spec.requires if backend.spec else ():
            versions[requirement.distribution] = installed_version(requirement.distribution) or "unknown"
    return versions

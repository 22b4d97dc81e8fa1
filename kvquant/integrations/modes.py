"""Ways of generating that go through `kvquant.integrations`, to be run beside `kvquant.evaluation.support.modes`."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig, PreTrainedModel

import kvquant.integrations.transformers as integration
from kvquant.cache.compat import given
from kvquant.errors import MissingExtraError
from kvquant.evaluation.support import tiny
from kvquant.evaluation.support.modes import NEW_TOKENS
from kvquant.evaluation.support.runs import Caches, Mode
from kvquant.integrations.kvpress import pressed


@contextlib.contextmanager
def _installed() -> Iterator[None]:
    """Install, and undo it unless it had been done before."""
    before = integration.is_installed()
    integration.install()
    try:
        yield
    finally:
        if not before:
            integration.uninstall()


def _wanted(caches: Caches, **others: Any) -> GenerationConfig:
    """Return what asks `generate` for the caches of a run."""
    if caches.options is not None:
        others |= {"cache_implementation": "quantized", "cache_config": dict(caches.options)}
    return GenerationConfig(do_sample=False, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, **others)


@contextlib.contextmanager
def _watched(model: PreTrainedModel, caches: Caches) -> Iterator[None]:
    """Remember every cache that the model is called with."""

    def look(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        for value in kwargs.values():
            if isinstance(value, Cache) and not any(value is known for known in caches.made):
                caches.seen(value)

    hook = model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def _made_by_generate(caches: Caches, model: PreTrainedModel) -> Tensor:
    with _installed(), _watched(model, caches):
        out: Tensor = model.generate(**tiny.prompt(), generation_config=_wanted(caches))
    return out


def _decoder(caches: Caches) -> Tensor:
    return _made_by_generate(caches, tiny.decoder())


def _encoder_decoder(caches: Caches) -> Tensor:
    return _made_by_generate(caches, tiny.encoder_decoder())


def _drafted(caches: Caches) -> Tensor:
    model, draft = tiny.decoder(), copy.deepcopy(tiny.decoder(seed=1))
    wanted = _wanted(caches)
    draft.generation_config.cache_implementation = wanted.cache_implementation
    draft.generation_config.cache_config = wanted.cache_config
    with _installed(), _watched(draft, caches):
        out: Tensor = model.generate(**tiny.prompt(), do_sample=False, max_new_tokens=NEW_TOKENS, assistant_model=draft)
    return out


def _attention(caches: Caches) -> Tensor:
    model = copy.deepcopy(tiny.decoder())
    with _installed():
        model.set_attn_implementation(integration.NAME)
        out: Tensor = model.generate(
            **tiny.prompt(), **given(model, caches.new(model.config)), do_sample=False, max_new_tokens=NEW_TOKENS
        )
    return out


def _pruned(caches: Caches) -> Tensor:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what kvpress imports
            from kvpress import KnormPress
    except ImportError as cause:
        raise MissingExtraError("kvpress", "pip install 'kvquant[kvpress]'") from cause
    model = tiny.decoder()
    with torch.no_grad(), pressed(model, KnormPress(compression_ratio=0.2)):
        out: Tensor = model.generate(
            **tiny.prompt(), **given(model, caches.new(model.config)), do_sample=False, max_new_tokens=NEW_TOKENS
        )
    return out


#: Ways of generating that need `kvquant.integrations.transformers.install`, or kvpress.
INTEGRATION_MODES: tuple[Mode, ...] = (
    Mode('cache_implementation="quantized"', _decoder),
    Mode('cache_implementation="quantized" of an encoder-decoder', _encoder_decoder),
    Mode('cache_implementation="quantized" of a draft model', _drafted),
    Mode('attn_implementation="kvquant"', _attention),
    Mode("kvpress", _pruned, "pruned, then quantised"),
)

"""The transform in a cache, as users meet it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kvquant.cache.cache import QuantizedCache
from kvquant.testing import data
from kvquant.testing.check import require
from kvquant.testing.subject import known_name
from kvquant.testing.transforms.subject import HeadCase

_GROUP = 32
_TOKENS = 3 * _GROUP + 5


def in_a_cache(case: HeadCase) -> None:
    """Fill caches with 8 bits, crop, reorder and attend."""
    states = data.gaussian(2 * 2 * _TOKENS, case.head_dim).reshape(2, 2, _TOKENS, case.head_dim)
    keys, values = states.to(case.device, case.dtype), states.flip(2).to(case.device, case.dtype)
    with known_name(case.plugin) as name:
        whole = _filled(name, keys, values, [_TOKENS])
        held = _held(whole)
        parts = _filled(name, keys, values, [_GROUP, 1, _GROUP + 3, _TOKENS - 2 * _GROUP - 4])
        require(_equal(held, _held(parts)), "states appended in parts differ from states appended at once")
        allowed = 0.05 * float(torch.linalg.cond(case.matrix()))
        for stream, read, given in zip(("keys", "values"), held, (keys, values), strict=True):
            share = float((read - given).norm() / given.norm())
            require(share <= allowed, f"{stream} come back with an error of {share:.3g} of their size in 8 bits")
        _attend(case, whole)
        held = _held(whole)
        whole.reorder_cache(torch.tensor([1, 0], device=keys.device))
        require(_equal(_held(whole), tuple(stream.flip(0) for stream in held)), "reordering changed the states")
        whole.crop(-7)
        cropped = tuple(stream.flip(0)[:, :, :-7] for stream in held)
        require(_equal(_held(whole), cropped), "crop changed the states that stay")


def _attend(case: HeadCase, cache: QuantizedCache) -> None:
    extra = data.gaussian(2 * 2, case.head_dim, seed=3).reshape(2, 2, 1, case.head_dim).to(case.device, case.dtype)
    lazy_keys, lazy_values = cache.update(extra, extra, 0)
    query = data.gaussian(2 * 4, case.head_dim, seed=4).reshape(2, 4, 1, case.head_dim).to(case.device, case.dtype)
    fused = scaled_dot_product_attention(query, lazy_keys, lazy_values, enable_gqa=True)
    keys, values = _held(cache)
    plain = scaled_dot_product_attention(query.double(), keys.double(), values.double(), enable_gqa=True)
    # Rounding of float32: of scores, which exp makes an error of the weights, and of values.
    scores = float(query.abs().sum(dim=3).max() * keys.abs().max()) / case.head_dim**0.5
    condition = float(torch.linalg.cond(case.matrix()))
    allowed = 16 * torch.finfo(torch.float32).eps * condition * (1 + scores) * float(values.abs().max())
    worst = float((fused.double() - plain).abs().max())
    require(worst <= allowed, f"attention is off by {worst:.3g} from that over the dequantised states")


def _filled(name: str, keys: Tensor, values: Tensor, sizes: list[int]) -> QuantizedCache:
    """Return a cache that was given the states in parts of these sizes."""
    made = QuantizedCache(
        nbits=8,
        axis_key="channel",
        axis_value="channel",
        group_size=_GROUP,
        residual_length=0,
        rotation_key=name,
        rotation_value=name,
    )
    for key_part, value_part in zip(keys.split(sizes, dim=2), values.split(sizes, dim=2), strict=True):
        made.update(key_part, value_part, 0)
    return made


def _held(cache: QuantizedCache) -> tuple[Tensor, Tensor]:
    layer = cache.layers[0]
    return layer.keys.clone(), layer.values.clone()


def _equal(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(mine, yours) for mine, yours in zip(one, other, strict=True))

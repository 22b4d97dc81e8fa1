"""The backend in a cache, as users meet it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kvquant.cache.cache import QuantizedCache
from kvquant.testing import data
from kvquant.testing.check import check, require
from kvquant.testing.subject import Case, known_name


@check("cache", "width")
def cache(case: Case) -> None:
    """In a cache: attention equals that over the dequantised states; append, crop and reorder leave them right."""
    with known_name(case.backend) as name:
        _use(case, name)


def _use(case: Case, name: str) -> None:
    axis, size = case.scheme.axis, case.scheme.group_size
    head_dim = 32 if axis == "channel" else -(-32 // size) * size
    block = size if axis == "channel" else 32
    tokens = 3 * block + 5
    states = data.gaussian(2 * 2 * tokens, head_dim).reshape(2, 2, tokens, head_dim)
    keys, values = case.rows(states), case.rows(states.flip(2))

    def filled(*sizes: int) -> QuantizedCache:
        made = QuantizedCache(
            backend=name,
            nbits=case.scheme.nbits,
            axis_key=axis,
            axis_value=axis,
            group_size=size,
            residual_length=0,
            compute_dtype=str(case.dtype).removeprefix("torch."),
            options=dict(case.scheme.options),
        )
        for key_part, value_part in zip(keys.split(sizes, dim=2), values.split(sizes, dim=2), strict=True):
            made.update(key_part, value_part, 0)
        return made

    whole = filled(tokens)
    held = _held(whole)
    if case.backend.capabilities.deterministic:
        parts = [block, 1, block + 3, tokens - 2 * block - 4]
        require(_equal(held, _held(filled(*parts))), "states appended in parts differ from states appended at once")

    whole.reorder_cache(torch.tensor([1, 0], device=keys.device))
    require(_equal(_held(whole), tuple(stream.flip(0) for stream in held)), "reordering changed the states")
    whole.reorder_cache(torch.tensor([1, 0], device=keys.device))
    whole.crop(-7)
    require(_equal(_held(whole), tuple(stream[:, :, :-7] for stream in held)), "crop changed the states that stay")

    extra = case.rows(data.gaussian(2 * 2, head_dim, seed=3)).reshape(2, 2, 1, head_dim)
    lazy_keys, lazy_values = whole.update(extra, extra, 0)
    query = case.rows(data.gaussian(2 * 4, head_dim, seed=4)).reshape(2, 4, 1, head_dim)
    fused = scaled_dot_product_attention(query, lazy_keys, lazy_values, enable_gqa=True)
    plain_keys, plain_values = _held(whole)
    plain = scaled_dot_product_attention(
        query.double(), plain_keys.double(), plain_values.double(), enable_gqa=True
    ).double()
    # Rounding of the type: of scores, which exp makes an error of the weights, and of values.
    scores = float((query.double().abs().sum(dim=3).max() * plain_keys.double().abs().max()) / head_dim**0.5)
    allowed = 16 * torch.finfo(case.dtype).eps * (1 + scores) * float(plain_values.abs().max())
    worst = float((fused.double() - plain).abs().max())
    require(worst <= allowed, f"attention is off by {worst:.3g} from that over the dequantised states")


def _held(cache: QuantizedCache) -> tuple[Tensor, Tensor]:
    layer = cache.layers[0]
    return layer.keys.clone(), layer.values.clone()


def _equal(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(mine, yours) for mine, yours in zip(one, other, strict=True))

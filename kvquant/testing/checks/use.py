"""The backend in a cache, as users meet it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kvquant.cache.cache import QuantizedCache
from kvquant.testing import data
from kvquant.testing.check import check, require, some_cases
from kvquant.testing.subject import Case, Subject, known_name


@check("cache", "width")
def cache(case: Case) -> None:
    """In a cache: append, crop and reorder leave the dequantised states right."""
    with known_name(case.backend) as name:
        _append_crop_reorder(case, name)


@check("attention", "backend")
def attention(subject: Subject) -> str:
    """In a cache: attention over the packed states equals that over the dequantised states."""
    # One for each axis: a kernel may have to be compiled.
    cases = {case.scheme.axis: case for case in some_cases(subject, "usual")}
    with known_name(subject.backend) as name:
        return ", ".join(dict.fromkeys(_attend(case, name) for case in cases.values()))


def _append_crop_reorder(case: Case, name: str) -> None:
    states = _states(case)
    tokens, block = states[0].shape[2], _block(case)
    whole = _filled(case, name, states, [tokens])
    held = _held(whole)
    if case.backend.capabilities.deterministic:
        parts = [block, 1, block + 3, tokens - 2 * block - 4]
        require(
            _equal(held, _held(_filled(case, name, states, parts))),
            "states appended in parts differ from states appended at once",
        )
    other_order = torch.tensor([1, 0], device=states[0].device)
    whole.reorder_cache(other_order)
    require(_equal(_held(whole), tuple(stream.flip(0) for stream in held)), "reordering changed the states")
    whole.reorder_cache(other_order)
    whole.crop(-7)
    require(_equal(_held(whole), tuple(stream[:, :, :-7] for stream in held)), "crop changed the states that stay")


def _attend(case: Case, name: str) -> str:
    """Return what attended."""
    states = _states(case)
    whole = _filled(case, name, states, [states[0].shape[2]])
    head_dim = states[0].shape[3]
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
    return f"by {whole.memory_report().attention}"


def _states(case: Case) -> tuple[Tensor, Tensor]:
    """Return keys and values of three blocks and a few tokens, ``[2, 2, tokens, head_dim]``."""
    size = case.scheme.group_size
    head_dim = 32 if case.scheme.axis == "channel" else -(-32 // size) * size
    tokens = 3 * _block(case) + 5
    states = data.gaussian(2 * 2 * tokens, head_dim).reshape(2, 2, tokens, head_dim)
    return case.rows(states), case.rows(states.flip(2))


def _block(case: Case) -> int:
    return case.scheme.group_size if case.scheme.axis == "channel" else 32


def _filled(case: Case, name: str, states: tuple[Tensor, Tensor], sizes: list[int]) -> QuantizedCache:
    """Return a cache that was given the states in parts of these sizes."""
    made = QuantizedCache(
        backend=name,
        nbits=case.scheme.nbits,
        axis_key=case.scheme.axis,
        axis_value=case.scheme.axis,
        group_size=case.scheme.group_size,
        residual_length=0,
        compute_dtype=str(case.dtype).removeprefix("torch."),
        options=dict(case.scheme.options),
    )
    for keys, values in zip(states[0].split(sizes, dim=2), states[1].split(sizes, dim=2), strict=True):
        made.update(keys, values, 0)
    return made


def _held(cache: QuantizedCache) -> tuple[Tensor, Tensor]:
    layer = cache.layers[0]
    return layer.keys.clone(), layer.values.clone()


def _equal(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(mine, yours) for mine, yours in zip(one, other, strict=True))

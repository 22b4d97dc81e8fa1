"""The transform in a cache, as users meet it."""

from __future__ import annotations

import torch

from kvquant.testing.check import require
from kvquant.testing.in_cache import InCache, held
from kvquant.testing.subject import known_name
from kvquant.testing.transforms.subject import HeadCase

_GROUP = 32


def in_a_cache(case: HeadCase) -> None:
    """Fill caches with 8 bits, attend, reorder and crop."""
    with known_name(case.plugin) as name:
        options = {
            "nbits": 8,
            "axis_key": "channel",
            "axis_value": "channel",
            "group_size": _GROUP,
            "rotation_key": name,
            "rotation_value": name,
        }
        tried = InCache(options, case.head_dim, _GROUP, case.dtype, case.device)
        condition = float(torch.linalg.cond(case.matrix()))
        for stream, read, given in zip(("keys", "values"), held(tried.filled()), tried.streams(), strict=True):
            share = float((read - given).norm() / given.norm())
            allowed = 0.05 * condition
            require(share <= allowed, f"{stream} come back with an error of {share:.3g} of their size in 8 bits")
        tried.require_kept()
        tried.require_attention(condition)

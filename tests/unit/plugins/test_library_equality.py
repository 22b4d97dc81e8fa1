"""What comes back through the real cache is what the library itself makes of the same groups, for every declared case.

The library quantises each group and reads it back with its own code. Between that and the cache lies one rounding: the
core stores scale and offset in float16 where that costs little. float16 has 11 digits, so each moves by at most 2**-11
of itself, and a number ``code * scale + offset`` by at most::

    2**-11 * (abs(code * scale) + abs(offset))

plus float32's own rounding. ``code * scale`` is what the library gives back less its offset.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kvquant import QuantizedCache
from tests.unit.plugins.test_rows_contract import CASES

LIBRARY_CASES = [case for case in CASES if case[0] in ("quanto", "hqq", "bitsandbytes")]
HALF = 2**-11  # of a number, which rounding to float16 may cost
FLOAT = 2**-22  # some float32 roundings of the largest number on the way

Answer = tuple[Tensor, Tensor | float]
"""States ``[n_groups, group_size]`` as the library gives them back, and the offset in them ``[n_groups, 1]``."""


def by_hqq(rows: Tensor, nbits: int, options: dict[str, Any]) -> Answer:
    """Each row alone: hqq stops for all rows of a call at once."""
    from hqq.core.quantize import Quantizer

    answers = []
    for row in rows.split(1):
        codes, meta = Quantizer.quantize(
            row, nbits=nbits, axis=1, group_size=rows.shape[1], bitpack=False, device="cpu", **options
        )
        meta["compute_dtype"] = torch.float32
        answers.append((Quantizer.dequantize(codes, meta), -meta["zero"] * meta["scale"]))
    states, offset = zip(*answers, strict=True)
    return torch.cat(states), torch.cat(offset)


def by_quanto(rows: Tensor, nbits: int, options: dict[str, Any]) -> Answer:
    """Each row alone, as quanto's own hqq too looks at all rows of a call."""
    from optimum import quanto

    if nbits == 8:
        qtype = getattr(quanto, options.get("qtype", "qint8"))
        scale = quanto.AbsmaxOptimizer()(rows, qtype, 0)
        offset = 0.0 if qtype.is_floating_point else -128 * scale
        return quanto.quantize_weight(rows, qtype, 0, scale).dequantize(), offset
    optimizer = {"max": quanto.MaxOptimizer, "hqq": quanto.HqqOptimizer}[options["optimizer"]]()
    qtype = {2: quanto.qint2, 4: quanto.qint4}[nbits]
    answers = []
    for row in rows.split(1):
        scale, shift = optimizer.optimize(row, qtype, 0)
        answers.append((quanto.quantize_weight(row, qtype, 0, scale, shift).dequantize(), -shift))
    states, offset = zip(*answers, strict=True)
    return torch.cat(states), torch.cat(offset)


def by_bitsandbytes(rows: Tensor, nbits: int, options: dict[str, Any]) -> Answer:
    """All rows at once; a row is a block, where the library reads its own scales rightly."""
    from bitsandbytes import functional

    if nbits == 8:
        codes, state = functional.quantize_blockwise(rows, blocksize=rows.shape[1])
        return functional.dequantize_blockwise(codes, state), 0.0
    codes, state = functional.quantize_4bit(rows, blocksize=rows.shape[1], **options)
    return functional.dequantize_4bit(codes, state), 0.0


LIBRARIES = {"hqq": by_hqq, "quanto": by_quanto, "bitsandbytes": by_bitsandbytes}


def groups(states: Tensor, axis: str, group_size: int) -> Tensor:
    """Write out what the axes mean: consecutive tokens of a channel, or consecutive channels of a token."""
    if axis == "channel":
        states = states.transpose(2, 3)
    return states.reshape(-1, group_size)


@pytest.mark.parametrize("group_size", [32, 64])
@pytest.mark.parametrize("axis", ["channel", "token"])
@pytest.mark.parametrize(("backend", "nbits", "options"), LIBRARY_CASES)
def test_states_read_from_the_cache_are_the_library_s(
    backend: str, nbits: int, options: dict[str, Any], axis: str, group_size: int
) -> None:
    """Keys and values, nothing of them in the window."""
    generator = torch.Generator().manual_seed(nbits)
    spread = torch.randn(1, 2, 1, 64, generator=generator).exp()  # outlier channels
    keys, values = (torch.randn(1, 2, 64, 64, generator=generator) * spread + 0.5 for _ in range(2))
    as_given = {"smoothing_key": False, "smoothing_value": False, "scale_bits": 16}
    axes = {"axis_key": axis, "axis_value": axis, "group_size": group_size}
    cache = QuantizedCache(backend, nbits=nbits, **axes, **as_given, residual_length=0, options=options)
    cache.update(keys, values, 0)
    layer = cache.layers[0]
    assert [len(store.body) for store in layer.stores] == [64, 64]

    for given, back in ((keys, layer.keys), (values, layer.values)):
        theirs, offset = LIBRARIES[backend](groups(given, axis, group_size), nbits, options)
        ours = groups(back, axis, group_size)
        allowed = HALF * ((theirs - offset).abs() + torch.as_tensor(offset).abs())
        allowed += FLOAT * theirs.abs().amax(1, keepdim=True)
        assert ((ours - theirs).abs() <= allowed).all()

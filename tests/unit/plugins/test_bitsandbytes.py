"""The bitsandbytes backend: the nearest entry of a table, at every group size."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvquant import QuantizedCache
from kvquant.errors import UnsupportedError
from tests.unit.plugins.conftest import quantizer, read

TABLES = [(4, "nf4"), (4, "fp4"), (8, "dynamic")]
#: What bitsandbytes' 8-bit kernel misses the nearest entry by, in units of the row's largest number.
SLACK = {4: 1e-7, 8: 5e-5}


@pytest.mark.parametrize(("nbits", "table"), TABLES)
@pytest.mark.parametrize("group_size", [1, 7, 8, 16, 32, 40, 64, 80, 128, 256, 1000, 4096])
def test_codes_are_the_nearest_entries(nbits: int, table: str, group_size: int) -> None:
    """Compared with a search of the whole table; scale is the row's largest number."""
    rows = torch.randn(20, group_size, generator=torch.Generator().manual_seed(0))
    result = quantizer("bitsandbytes", nbits, group_size, quant_type=table).quantize(rows)
    assert torch.equal(result.scale, rows.abs().amax(1))
    distance = (rows.double()[..., None] / result.scale.double()[:, None, None] - result.table.double()).abs()
    chosen = distance.gather(-1, result.codes.long()[..., None]).squeeze(-1)
    assert (chosen - distance.amin(-1)).max() <= SLACK[nbits]


@pytest.mark.parametrize(("nbits", "table"), TABLES)
@pytest.mark.parametrize("group_size", [64, 128, 256])
def test_states_are_bitsandbytes_s(nbits: int, table: str, group_size: int) -> None:
    """What the library itself dequantises to, where rows are blocks and its dequantisation can be trusted."""
    from bitsandbytes import functional

    rows = torch.randn(50, group_size, generator=torch.Generator().manual_seed(1))
    if nbits == 8:
        codes, state = functional.quantize_blockwise(rows, blocksize=group_size)
        theirs = functional.dequantize_blockwise(codes, state)
    else:
        codes, state = functional.quantize_4bit(rows, blocksize=group_size, quant_type=table)
        theirs = functional.dequantize_4bit(codes, state)
    ours = read(quantizer("bitsandbytes", nbits, group_size, quant_type=table).quantize(rows))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


HEAD_DIMS = (32, 48, 64, 80, 96, 112, 128, 160, 192, 256)


def right_states(packed: Tensor, absmax: Tensor, table: Tensor, like: Tensor, block: int) -> Tensor:
    """Read what `quantize_4bit` made of states, by the definition of its blocks: runs of the flattened states."""
    codes = torch.stack((packed.flatten() >> 4, packed.flatten() & 0xF), dim=1).flatten()
    return (table[codes.long()].view(-1, block) * absmax[:, None]).view_as(like)


@pytest.mark.parametrize("block", [32, 64, 128, 256, 512, 1024])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_codes_and_scales_of_the_library_are_right_at_every_size(head_dim: int, block: int) -> None:
    """So they are what is taken. What the library itself reads of them is right where a row is whole blocks.

    Where it is not, that depends on the processor: with some instructions it reads the scales of other blocks.
    """
    from bitsandbytes import functional

    states = torch.randn(1, 2, 512, head_dim, generator=torch.Generator().manual_seed(2))
    packed, state = functional.quantize_4bit(states, blocksize=block, quant_type="nf4")
    right = right_states(packed, state.absmax, state.code, states, block)
    assert (right - states).norm() / states.norm() < 0.15
    if head_dim % block == 0:
        torch.testing.assert_close(functional.dequantize_4bit(packed, state), right, rtol=0, atol=1e-6)


@pytest.mark.parametrize("group_size", [32, 64, 128, 256, 512, 1024, 2048, 4096])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_states_are_right_where_the_library_s_are_wrong(head_dim: int, group_size: int) -> None:
    """Through the cache, on each axis that fits: the codes and scales of the library, read by their definition."""
    from bitsandbytes import functional

    states = torch.randn(1, 1, max(64, group_size), head_dim, generator=torch.Generator().manual_seed(2))
    for axis in ("channel", "token"):
        if axis == "token" and head_dim % group_size:
            continue
        options = {"axis_key": axis, "axis_value": axis, "group_size": group_size, "smoothing_key": False}
        cache = QuantizedCache("bitsandbytes", residual_length=0, **options)
        cache.update(states, states, 0)
        groups = (states.transpose(2, 3) if axis == "channel" else states).contiguous()
        packed, state = functional.quantize_4bit(groups, blocksize=group_size, quant_type="nf4")
        right = right_states(packed, state.absmax, state.code, groups, group_size)
        back = cache.layers[0].keys.transpose(2, 3) if axis == "channel" else cache.layers[0].keys
        # Within what rounding a scale to float16 costs.
        torch.testing.assert_close(back, right, rtol=2**-11 * 1.001, atol=1e-6)


def test_double_quantisation_is_refused() -> None:
    """Scales are stored in 16 bits whatever made them, so 8 would save none and cost accuracy."""
    with pytest.raises(UnsupportedError, match=r"option 'double_quant' is unknown to this backend; known: quant_type"):
        QuantizedCache("bitsandbytes", options={"double_quant": True})


@pytest.mark.parametrize(("nbits", "table"), TABLES)
def test_numbers_come_back_within_half_the_widest_gap(nbits: int, table: str, random_rows: Tensor) -> None:
    """Half the widest gap of the table, or what the table lacks at its negative end, times the scale."""
    result = quantizer("bitsandbytes", nbits, quant_type=table).quantize(random_rows)
    entries = result.table.sort().values
    reach = max(float(entries.diff().max()) / 2, float(1 + entries[0])) + SLACK[nbits]
    assert ((read(result) - random_rows).abs().amax(1) <= reach * result.scale).all()


def test_nf4_and_the_dynamic_map_are_the_defaults(random_rows: Tensor) -> None:
    """For 4 and 8 bits."""
    for nbits, table in ((4, "nf4"), (8, "dynamic")):
        default = quantizer("bitsandbytes", nbits).quantize(random_rows)
        named = quantizer("bitsandbytes", nbits, quant_type=table).quantize(random_rows)
        assert torch.equal(default.table, named.table)
        assert torch.equal(default.codes, named.codes)


@pytest.mark.parametrize(
    ("nbits", "table", "works"), [(8, "nf4", "dynamic"), (4, "dynamic", "nf4, fp4"), (4, "int4", "nf4, fp4")]
)
def test_a_table_that_does_not_fit_is_refused(nbits: int, table: str, works: str) -> None:
    """The message names the option, the value and what works."""
    with pytest.raises(
        ValueError, match=f"^quant_type={table!r} is not supported with nbits={nbits}; supported: {works}$"
    ):
        quantizer("bitsandbytes", nbits, quant_type=table)


def test_a_group_larger_than_any_block_is_refused() -> None:
    """The message names the largest."""
    with pytest.raises(ValueError, match=r"^group_size=4097 is not supported; supported: 1 to 4096$"):
        quantizer("bitsandbytes", 4, 4097)

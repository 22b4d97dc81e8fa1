"""Operators of torch: what a graph calls."""

import pytest
import torch
from torch import library

from kvquant.attention import operators
from kvquant.cache.static import StaticQuantizedLayer
from kvquant.engine.config import CacheConfig
from kvquant.errors import OutOfStepError


def layer(tokens=24):
    made = StaticQuantizedLayer(CacheConfig(backend="reference", group_size=8, residual_length=8, max_cache_len=64), 0)
    made.update(torch.randn(2, 2, tokens, 16), torch.randn(2, 2, tokens, 16))
    return made


def step(tokens=1):
    return torch.randn(2, 2, tokens, 16), torch.randn(2, 2, tokens, 16)


#: Everything that torch can check of an operator; the last compiles it for other shapes too.
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("mask", [None, torch.bool, torch.float32])
@pytest.mark.parametrize("more", [{}, {"softcap": 2.0, "sinks": torch.zeros(4)}])
@pytest.mark.parametrize("cast", [None, torch.bfloat16])
def test_attend_does_what_its_fake_says(mask, more, cast):
    """In shape, type and layout; and changes nothing that it does not declare."""
    held, (keys, values) = layer(), step()
    query = torch.randn(2, 4, 3, 16)
    shown = None if mask is None else torch.ones(2, 1, 3, 64, dtype=mask)
    arguments = (query, keys, values, held._handle, held._count, shown, 64, 1, True, False, None)
    arguments += (more.get("softcap"), more.get("sinks"), cast)
    library.opcheck(operators.attend, arguments, test_utils=CHECKS)


def test_append_does_what_its_fake_says():
    """It writes to the count of tokens, and to nothing else that torch knows of."""
    held, (keys, values) = layer(), step()
    library.opcheck(operators.append, (keys, values, held._handle, held._count), test_utils=CHECKS)


@pytest.mark.parametrize("values", [False, True])
def test_read_does_what_its_fake_says(values):
    """The numbers, and zeros behind them."""
    held, (keys, _) = layer(), step()
    library.opcheck(operators.read, (keys, held._handle, held._count, values, 64), test_utils=CHECKS)


def test_a_count_that_is_out_of_step_is_an_error():
    """The numbers would not be those that were meant."""
    held, (keys, _) = layer(), step()
    with pytest.raises(OutOfStepError, match="layer 0 holds 24 tokens where the compiled graph counted 7") as caught:
        operators.read(keys, held._handle, torch.tensor(7), False, 64)
    assert (caught.value.counted, caught.value.length, caught.value.where) == (7, 24, "layer 0")


def test_a_cuda_graph_may_not_hold_them():
    """Replayed, it would run none of their Python."""
    for operator in (operators.append, operators.attend, operators.read):
        assert torch.Tag.cudagraph_unsafe in operator.tags

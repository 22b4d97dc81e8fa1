"""Layers on several devices. Fake tensors show where things are put, as far as nothing has to be read."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode

from kvquant import QuantizedCache
from kvquant.errors import QuantizationError, UnsupportedError
from tests.support import MinMax
from tests.unit.cache.helpers import make, states

pytestmark = pytest.mark.usefixtures("formats")

HERE, THERE = torch.device("cuda:0"), torch.device("cuda:1")


@pytest.fixture
def fake():
    """Tensors say that they are on a GPU, and hold no numbers."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def on(device, tokens, layer):
    """Update a layer with states on a device."""
    return layer.update(*(torch.empty(1, 2, tokens, 16, device=device) for _ in range(2)))


def places(layer):
    """Devices of all tensors of a layer: of what is exact, and of what is quantised."""
    exact, quantised = set(), set()
    for store in layer.stores:
        for part, tensor, _ in store.parts():
            (exact if part in ("sink", "window") else quantised).add(tensor.device)
    return exact, quantised


def quantised(**options):
    """A layer on the first device, part of which is quantised; fake tensors need the float32 of its scales settled."""
    layer = make(check_finite=False, sink_length=2, **options)
    on(HERE, 6, layer)
    return layer


def test_each_layer_is_where_its_states_are(fake):
    """With nothing said, as for a model that is spread over two devices."""
    cache = QuantizedCache(check_finite=False)
    for index, device in enumerate((HERE, THERE)):
        cache.update(*(torch.empty(1, 2, 5, 64, device=device) for _ in range(2)), index)
    assert [layer.device for layer in cache.layers] == [HERE, THERE]
    assert cache.memory_report().devices.keys() == {"cuda:0", "cuda:1"}


def test_a_layer_moves_where_its_states_come_from(fake):
    """All of it, and goes on there."""
    layer = quantised()
    keys, _ = on(THERE, 1, layer)
    assert (keys.device, layer.device, layer.get_seq_length()) == (THERE, THERE, 7)
    assert places(layer) == ({THERE}, set())

"""Layers on devices other than the CPU, which `test_devices` runs in a process of its own."""

from __future__ import annotations

import pytest
import torch

import kvquant
from kvquant import QuantizedCache
from kvquant.attention import dispatch
from kvquant.errors import QuantizationError, UnsupportedError
from kvquant.plugin import BackendSpec, Capabilities
from tests.pretend import KIND, PretendedDevices
from tests.support import MinMax, OpaqueMinMax
from tests.unit.cache.helpers import assert_unchanged, make, snapshot, states

HOST, HERE, THERE = torch.device("cpu"), torch.device(KIND, 0), torch.device(KIND, 1)
FORMATS = {"affine": MinMax, "opaque": OpaqueMinMax}


@pytest.fixture(autouse=True)
def devices():
    """Two devices, and backends for them."""
    for kind, factory in FORMATS.items():
        able = Capabilities(nbits=(2, 4), formats=(kind,), devices=("cpu", KIND))
        kvquant.register(BackendSpec(f"test-{kind}", factory, able))
    with PretendedDevices():
        yield
    for kind in FORMATS:
        kvquant.unregister(f"test-{kind}")


def update(layer, device, tokens, batch=1):
    """Update a layer with states on a device, and return them and what it returned."""
    given = tuple(states(tokens, batch) for _ in range(2))
    return given, layer.update(*(one.to(device) for one in given))


def places(layer):
    """Devices of what is exact, of the pages, and of their copies."""
    exact, pages, copies = set(), set(), set()
    for store in layer.stores:
        for part, tensor, _ in store.parts():
            (exact if part in ("sink", "window") else copies if part == "copies" else pages).add(tensor.device)
    return exact, pages, copies


def attend(layer, query):
    """Attention over the packed tokens of a layer, brought to the CPU."""
    out = dispatch.attend(query.to(layer.device), *layer.stores, None, is_causal=False, scale=None)
    assert out.device == layer.device
    return out.cpu()


def twins(*pairs, batch=1, **options):
    """Two layers that are given the same: one on the CPU, one with `options` where ``(tokens, device)`` say."""
    plain = make(sink_length=3, **{name: value for name, value in options.items() if name not in ("offload", "device")})
    layer = make(sink_length=3, **options)
    for tokens, device in pairs:
        given, _ = update(layer, device, tokens, batch)
        plain.update(*given)
    return plain, layer


def assert_alike(plain, layer):
    """The same numbers, read whole and attended to."""
    assert torch.equal(plain.keys, layer.keys.cpu())
    assert torch.equal(plain.values, layer.values.cpu())
    query = torch.randn(plain.batch_size, 4, 2, 16)
    torch.testing.assert_close(attend(plain, query), attend(layer, query))


# ------------------------------------------------------------------------------------------------ spread models


def test_each_layer_is_where_its_states_are():
    """With nothing said, as for a model that is spread over two devices."""
    cache = QuantizedCache("test-affine", group_size=8, residual_length=8)
    for index, device in enumerate((HERE, THERE)):
        cache.update(*(states(60).to(device) for _ in range(2)), index)
    assert [places(layer)[:2] for layer in cache.layers] == [({HERE}, {HERE}), ({THERE}, {THERE})]
    report = cache.memory_report()
    assert report.devices == {str(HERE): report.nbytes // 2, str(THERE): report.nbytes // 2}
    assert "privateuseone:0: " in str(report)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("first", [6, 60], ids=["exact", "quantised"])
def test_a_layer_moves_where_its_states_come_from(kind, first):
    """All of it, and goes on there as one that was there all along."""
    plain, layer = twins((first, HERE), (1, THERE), (30, THERE), (2, HERE), backend=f"test-{kind}")
    assert places(layer) == ({HERE}, {HERE}, set())
    assert_alike(plain, layer)


def test_what_was_handed_out_before_a_move_stands():
    """It is where it was, and says what it said."""
    _, layer = twins((60, HERE))
    _, (keys, _) = update(layer, HERE, 1)
    before = layer.keys
    update(layer, THERE, 1)
    assert keys.device == HERE
    assert torch.equal(keys.dequantize(), before)


def test_a_device_that_the_backend_does_not_know_is_refused():
    """As it is at the start, and the layer stays where it is."""
    kvquant.register(BackendSpec("test-there", MinMax, Capabilities(nbits=(4,), devices=(KIND,))))
    try:
        layer = make(backend="test-there")
        update(layer, HERE, 60)
        before = snapshot(layer)
        with pytest.raises(UnsupportedError, match="device='cpu' is not supported; supported: privateuseone"):
            update(layer, HOST, 1)
        assert_unchanged(layer, before)
        assert places(layer)[:2] == ({HERE}, {HERE})
    finally:
        kvquant.unregister("test-there")


def test_a_move_that_fails_changes_nothing(monkeypatch):
    """Neither are the new tokens stored, nor has the layer moved."""
    _, layer = twins((60, HERE))
    before = snapshot(layer)
    with monkeypatch.context() as patch:
        patch.setattr(MinMax, "quantize", lambda *_: 1 / 0)
        with pytest.raises(QuantizationError):
            update(layer, THERE, 30)
    assert_unchanged(layer, before)
    assert places(layer)[:2] == ({HERE}, {HERE})


@pytest.mark.parametrize("batch", [1, 2])
def test_rows_are_selected_by_numbers_on_any_device(batch):
    """`generate` reorders all layers by one tensor."""
    plain, layer = twins((60, THERE), batch=batch)
    order = torch.tensor([batch - 1, 0])
    plain.reorder_cache(order)
    layer.reorder_cache(order.to(HERE))
    assert_alike(plain, layer)


# ------------------------------------------------------------------------------------------------ bodies elsewhere


def test_tokens_with_a_device_of_their_own_stay_there():
    """When the layer moves, and when it is offloaded."""
    plain, layer = twins((60, HERE), (30, THERE), device="cpu")
    layer.offload()
    layer.prefetch()
    assert places(layer) == ({THERE}, {HOST}, set())
    assert_alike(plain, layer)


@pytest.mark.parametrize("kind", FORMATS)
def test_offloaded_tokens_lie_in_host_memory(kind):
    """Window and sink on the device, pages in host memory, and what attention reads on the device while it is there."""
    plain, layer = twins((60, HERE), (20, HERE), (1, HERE), offload=True, backend=f"test-{kind}")
    assert places(layer) == ({HERE}, {HOST}, {HERE})
    assert_alike(plain, layer)
    memory = layer.memory()
    assert memory.devices[str(HOST)] == memory.parts["copies"]
    assert sum(memory.devices.values()) == memory.nbytes
    layer.let_go()
    assert places(layer) == ({HERE}, {HOST}, set())
    assert torch.equal(plain.keys, layer.keys.cpu())


def test_an_offloaded_layer_moves_without_its_pages():
    """They are in host memory for both devices."""
    plain, layer = twins((60, HERE), (1, HERE), offload=True)
    pages = [tensor.data_ptr() for store in layer.stores for part, tensor, _ in store.parts() if part == "codes"]
    given, _ = update(layer, THERE, 1)
    plain.update(*given)
    assert pages == [
        tensor.data_ptr() for store in layer.stores for part, tensor, _ in store.parts() if part == "codes"
    ]
    assert_alike(plain, layer)
    assert places(layer) == ({THERE}, {HOST}, {THERE})


def test_changes_of_an_offloaded_layer():
    """Beams, tokens that are taken back, states that are assigned."""
    plain, layer = twins((60, HERE), (20, HERE), offload=True, batch=2)
    for one in (plain, layer):
        one.reorder_cache(torch.tensor([1, 0]).to(one.device))
        one.batch_repeat_interleave(2)
        one.crop(-40)
        one.keys = one.keys * 2
    assert_alike(plain, layer)
    given, _ = update(layer, HERE, 50, batch=4)
    plain.update(*given)
    assert_alike(plain, layer)
    assert places(layer)[:2] == ({HERE}, {HOST})


@pytest.mark.parametrize("kind", FORMATS)
def test_a_layer_is_offloaded_later(kind):
    """Its pages move to host memory, and copies come from there."""
    plain, layer = twins((60, HERE), (20, HERE), backend=f"test-{kind}")
    layer.offload()
    assert places(layer) == ({HERE}, {HOST}, set())
    layer.prefetch()
    assert places(layer) == ({HERE}, {HOST}, {HERE})
    assert_alike(plain, layer)


@pytest.mark.parametrize("kind", FORMATS)
def test_an_offloaded_cache_is_loaded_to_a_device(tmp_path, kind):
    """Pages stay in host memory, and everything else goes there."""
    cache = QuantizedCache(f"test-{kind}", offload=True, group_size=8, residual_length=8)
    for index in range(2):
        cache.update(*(states(60) for _ in range(2)), index)
    cache.save(tmp_path / "prompt.kvq")
    loaded = QuantizedCache.load(tmp_path / "prompt.kvq", device=str(THERE))
    for before, after in zip(cache.layers, loaded.layers, strict=True):
        assert places(after)[:2] == ({THERE}, {HOST})
        assert_alike(before, after)

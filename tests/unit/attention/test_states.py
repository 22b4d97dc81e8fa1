"""QuantizedStates behave as the tensor that they stand for."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from kvquant.attention.counters import counters
from kvquant.attention.states import QuantizedStates
from kvquant.cache.layer import QuantizedLayer
from kvquant.engine.config import CacheConfig
from kvquant.errors import ReadOnlyStatesError, StaleStatesError

pytestmark = pytest.mark.usefixtures("formats")


@pytest.fixture
def layer():
    made = QuantizedLayer(CacheConfig(backend="test-affine", group_size=8, residual_length=8, sink_length=2), 0)
    made.update(torch.randn(2, 2, 60, 16), torch.randn(2, 2, 60, 16))
    return made


@pytest.fixture
def states(layer):
    """Key states of 61 tokens, with the counters at zero."""
    keys, _ = layer.update(torch.randn(2, 2, 1, 16), torch.randn(2, 2, 1, 16))
    assert isinstance(keys, QuantizedStates)
    counters.reset()
    return keys


def test_asking_what_they_are_reads_nothing(states):
    """Shape, dtype, device and the like come without a number being dequantised."""
    assert states.shape == (2, 2, 61, 16)
    assert (states.size(2), states.dim(), states.ndim, states.numel(), len(states)) == (61, 4, 4, 3904, 2)
    assert (states.dtype, states.device.type, states.is_cuda) == (torch.float32, "cpu", False)
    assert states.is_floating_point()
    assert not states.requires_grad
    assert states.element_size() == 4
    assert isinstance(states, torch.Tensor)
    assert hash(states) == hash(states)
    assert counters.materialised == 0


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: x * 2 + 1,
        lambda x: x.sum(),
        lambda x: x == x.amax(),
        lambda x: x.transpose(2, 3),
        lambda x: torch.matmul(torch.ones(2, 2, 3, 16), x.transpose(-1, -2)),
        lambda x: torch.cat([x, torch.zeros(2, 2, 1, 16)], dim=2),
        lambda x: x[0],
        lambda x: x[..., :8],
        lambda x: x[:, :, -5:],
        lambda x: x[:, 1:, 3:40, ::2],
        lambda x: x[:, :, 7:3],
        lambda x: x[:, :, 5],
        lambda x: x[..., 10:20, :],
        lambda x: x[:, :, ::3],
        lambda x: x[x > 0],
        lambda x: x[:, torch.tensor([1, 0])],
        lambda x: x[:, :, None],
        lambda x: x[:, np.array([0, 1])],
        lambda x: x[True, :, 0:1],
        lambda x: x[None],
        lambda x: x.to(torch.float64),
        lambda x: x.to("cpu", copy=True),
        lambda x: x.half(),
        lambda x: x.reshape(2, -1),
        lambda x: x.permute(2, 0, 1, 3).contiguous(),
        lambda x: x.unbind(0)[1],
        lambda x: torch.nn.functional.pad(x, (0, 0, 1, 0)),
        lambda x: x.gather(2, torch.zeros(2, 2, 3, 16, dtype=torch.long)),
        lambda x: x.clone(),
        lambda x: x.data,
        lambda x: torch.stack(list(x)),
        lambda x: torch.from_numpy(np.asarray(x)),
        lambda x: torch.tensor(x.tolist()),
        lambda x: copy.deepcopy(x),
        lambda x: pickle.loads(pickle.dumps(x)),  # noqa: S301  # our own
        lambda x: torch.einsum("bhtd->bht", x),
        lambda x: torch.zeros(2, 2, 61, 16).copy_(x),
        lambda x: torch.ops.aten.neg(x),
    ],
)
def test_any_operation_gives_what_the_plain_tensor_gives(layer, states, operation):
    """Whatever is done to them comes out as if done to the dequantised tensor, and as a plain tensor."""
    result = operation(states)
    assert type(result) is torch.Tensor
    assert torch.equal(result, operation(layer.keys))


def test_torch_save_keeps_the_numbers(layer, states):
    """A file of them holds a plain tensor."""
    file = io.BytesIO()
    torch.save(states, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert type(loaded) is torch.Tensor
    assert torch.equal(loaded, layer.keys)


def test_a_slice_of_tokens_does_not_dequantise_the_rest(states):
    """Reading the last five tokens materialises nothing."""
    assert states[:, :, -5:].shape == (2, 2, 5, 16)
    assert counters.materialised == 0


def test_reading_everything_is_counted(states):
    """One count for each stream dequantised whole."""
    states + 1
    states.dequantize()
    assert counters.materialised == 2


@pytest.mark.parametrize(
    "nothing", [lambda x: x.contiguous(), lambda x: x.detach(), lambda x: x.to(torch.float32), lambda x: x.to("cpu")]
)
def test_operations_that_change_nothing_stay_lazy(states, nothing):
    """Models sprinkle these on their way to attention."""
    assert nothing(states) is states


def repeat_kv(states, n):
    """transformers' own, in miniature."""
    batch, heads, tokens, width = states.shape
    return states[:, :, None, :, :].expand(batch, heads, n, tokens, width).reshape(batch, heads * n, tokens, width)


def test_repeating_heads_stays_lazy_and_fuses(layer, states):
    """Grouped-query models repeat keys for long queries; nothing is repeated in memory."""
    values = layer.update(torch.randn(2, 2, 1, 16), torch.randn(2, 2, 1, 16))[1]
    keys = QuantizedStates(layer.stores[0], "key")
    query, mask = torch.randn(2, 6, 5, 16), torch.rand(2, 1, 5, 62) > 0.3
    for repeat in (repeat_kv, lambda x, n: x.repeat_interleave(n, dim=1)):
        counters.reset()
        fused = scaled_dot_product_attention(query, repeat(keys, 3), repeat(values, 3), attn_mask=mask)
        assert (counters.fused, counters.materialised) == (1, 0)
        plain = [repeat(x, 3) for x in (layer.keys, layer.values)]
        torch.testing.assert_close(fused, scaled_dot_product_attention(query, *plain, attn_mask=mask))
    assert torch.equal(repeat_kv(keys, 3).dequantize(), repeat_kv(layer.keys, 3))
    assert torch.equal(keys[:, :, None, :, :].dequantize(), layer.keys[:, :, None, :, :])


@pytest.mark.parametrize(
    ("write", "name"),
    [
        (lambda x: x.add_(1), "add_"),
        (lambda x: x.zero_(), "zero_"),
        (lambda x: x.__setitem__((0,), 0), "__setitem__"),
        (lambda x: x.__iadd__(1), "add_"),
        (lambda x: torch.add(torch.ones(()), 1, out=x), "add"),
    ],
)
def test_writing_is_refused(states, write, name):
    """A write would be lost, so it is an error that says what to do instead."""
    with pytest.raises(ReadOnlyStatesError, match="read only") as caught:
        write(states)
    assert caught.value.operation.strip("_").removeprefix("i") == name.strip("_")


def test_states_refuse_to_be_read_once_the_cache_has_changed(layer, states):
    """The cache keeps no history; asking what they are still works."""
    layer.update(torch.randn(2, 2, 1, 16), torch.randn(2, 2, 1, 16))
    with pytest.raises(StaleStatesError, match=r"Take a copy while they are fresh: states.clone\(\)"):
        states.sum()
    with pytest.raises(StaleStatesError):
        states[:, :, :3]
    with pytest.raises(StaleStatesError):
        scaled_dot_product_attention(torch.randn(2, 2, 1, 16), states, states)
    assert states.shape == (2, 2, 61, 16)
    assert "out of date" in repr(states)


def test_they_print_what_they_are(states):
    """Shape, dtype, how much is quantised and how; the numbers are a call away."""
    assert repr(states) == (
        "QuantizedStates(key, shape=[2, 2, 61, 16], dtype=torch.float32, 48 of 61 tokens in 4 bits by test-affine; "
        ".dequantize() gives the numbers)"
    )
    assert str(states) == repr(states)
    assert f"{states}" == repr(states)


@pytest.mark.parametrize("case", ["dropout", "gradient", "another cache", "plain values"])
def test_attention_that_cannot_be_fused_is_still_right(layer, states, case):
    """Dropout of nearly nothing, a query that wants a gradient, mixed operands: dequantised, then torch's own."""
    values = QuantizedStates(layer.stores[1], "value")
    query = torch.randn(2, 2, 3, 16, requires_grad=case == "gradient")
    if case == "plain values":
        values = layer.values
    if case == "another cache":
        other = QuantizedLayer(CacheConfig(backend="test-affine", group_size=8, residual_length=8), 0)
        other.update(torch.randn(2, 2, 60, 16), torch.randn(2, 2, 60, 16))
        other.update(torch.randn(2, 2, 1, 16), torch.randn(2, 2, 1, 16))
        values = QuantizedStates(other.stores[1], "value")
    counters.reset()
    out = scaled_dot_product_attention(query, states, values, dropout_p=1e-12 if case == "dropout" else 0.0)
    dense = values.dequantize() if isinstance(values, QuantizedStates) else values
    torch.testing.assert_close(out, scaled_dot_product_attention(query, layer.keys, dense))
    assert counters.fused == (case == "another cache")
    if case == "gradient":
        out.sum().backward()
        assert query.grad is not None


def test_attention_that_torch_refuses_is_refused_by_torch(states, layer):
    """Wrong shapes get torch's own words."""
    values = QuantizedStates(layer.stores[1], "value")
    with pytest.raises(RuntimeError):
        scaled_dot_product_attention(torch.randn(2, 2, 3, 8), states, values)


def test_one_head_is_for_all_query_heads():
    """torch broadcasts it without `enable_gqa`, and so do we, without dequantising."""
    layer = QuantizedLayer(CacheConfig(backend="test-affine", group_size=8, residual_length=8), 0)
    layer.update(torch.randn(2, 1, 60, 16), torch.randn(2, 1, 60, 16))
    keys, values = layer.update(torch.randn(2, 1, 1, 16), torch.randn(2, 1, 1, 16))
    query = torch.randn(2, 4, 1, 16)
    counters.reset()
    fused = scaled_dot_product_attention(query, keys, values)
    assert (counters.fused, counters.materialised) == (1, 0)
    torch.testing.assert_close(fused, scaled_dot_product_attention(query, layer.keys, layer.values))

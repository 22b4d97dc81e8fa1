"""Invariant 6 for Triton, under its interpreter: attention over packed codes equals attention over what they stand for.

The reference is computed in float64 from states dequantised in float64. Tolerances follow from the arithmetic: what the
kernel multiplies is exact and what it sums is rounded to float32, as in `test_tiles`: a few hundred roundings of
numbers of about one. A result in a shorter type is rounded to it once more.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kvquant.attention import dispatch, tiles, triton_kernels
from kvquant.attention.counters import counters
from kvquant.cache.layer import QuantizedLayer
from kvquant.engine.config import CacheConfig
from kvquant.engine.packing import WIDTHS
from kvquant.plugin.capabilities import TRELLIS_WIDTHS
from kvquant_plugins.trellis import TAPS
from tests.support import FORMATS, exact_attention, possible_width

pytest.importorskip("triton", reason="triton is not installed: pip install 'kvquant[fused]'")

pytestmark = [
    pytest.mark.usefixtures("formats"),
    # Whether Triton interprets is decided once for a process, and one that has a GPU is to compile for it.
    pytest.mark.skipif(
        torch.cuda.is_available(), reason="needs a machine without a GPU, so that Triton interprets; else see tests/gpu"
    ),
]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MASKS = ["none", "causal", "bool", "additive", "per head", "per head additive", "row", "padding", "column", "nothing"]


def filled(tokens, *, batch=1, heads=1, widths=(32, 32), dtype=torch.float32, mean=0.0, again=0, on="cpu", **options):
    """Keys and values of `tokens` random tokens; `again` of them are cropped and others appended, to make pages."""
    options = {"backend": "test-affine", "group_size": 8, "residual_length": 8, **options}
    layer = QuantizedLayer(CacheConfig(**options), 0)

    def append(count):
        layer.update(*((mean + torch.randn(batch, heads, count, width)).to(on, dtype) for width in widths))

    append(tokens)
    if again:
        layer.crop(-again)
        append(again)
    return layer.stores


def exact(store):
    """What a store stands for, in float64 and without a rounding."""
    parts = [store.tile(0, store.sink_tokens).double()] if store.sink_tokens else []
    frame = store.body.frame
    parts += map(frame.leave, store.body.read(0, len(store.body), torch.float64, framed=True))
    recent = store.sink_tokens + len(store.body)
    return torch.cat([*parts, store.tile(recent, len(store)).double()], dim=2)


def made_mask(kind, batch, heads, queries, tokens, dtype):
    """A mask of every shape that reaches a kernel; "nothing" hides the whole body from the first query token."""
    if kind == "nothing":
        mask = torch.ones(1, 1, queries, tokens, dtype=torch.bool)
        mask[:, :, 0, :-1] = False
        return mask
    shapes = {
        "bool": (batch, 1, queries, tokens),
        "additive": (batch, 1, queries, tokens),
        "per head": (1, heads, queries, tokens),
        "per head additive": (batch, heads, 1, tokens),
        "row": (queries, tokens),
        "padding": (batch, 1, 1, tokens),
        "column": (1, heads, queries, 1),
    }
    if kind not in shapes:
        return None
    shape = shapes[kind]
    if "additive" in kind:
        return torch.randn(shape).masked_fill(torch.rand(shape) > 0.8, torch.finfo(dtype).min).to(dtype)
    return torch.rand(shape) > 0.4


def check(query, keys, values, mask=None, size=1.0, **options):
    """Compare `attend_body` with the reference; numbers are of about `size`."""
    assert len(keys.body) > 0
    assert triton_kernels.why_not(keys.body, values.body) == ""
    given = {"is_causal": False, "scale": None, **options}
    out = tiles.attend(query, keys, values, mask, kernel=triton_kernels.attend_body, **given)
    expected = exact_attention(query, exact(keys), exact(values), mask, **given)
    assert torch.isfinite(out).all()
    rounding = torch.finfo(query.dtype).eps if query.dtype != torch.float32 else 0.0
    torch.testing.assert_close(out.double(), expected, rtol=rounding + 2e-5 * size, atol=2e-5 * size)


def group_sizes(axis, width):
    """Group sizes that the core allows; on the channel axis also some that no tile is a multiple of."""
    sizes = (
        [8, 24, 32, 64, 128] if axis == "channel" else [size for size in (4, 8, 16, 32, 64, width) if not width % size]
    )
    return st.sampled_from(sizes)


@st.composite
def layouts(draw):
    """Formats, axes, bits, head dims and group sizes of keys and values."""
    axes = draw(st.tuples(*[st.sampled_from(["channel", "token"])] * 2))
    bits = draw(st.tuples(*[st.sampled_from(WIDTHS)] * 2))
    widths = draw(st.tuples(*[st.sampled_from([20, 32, 64, 80, 96, 112, 128, 256])] * 2))
    rotations = draw(st.tuples(*[st.sampled_from([None, None, "hadamard", "random"])] * 2))
    sizes = [draw(group_sizes(axis, width)) for axis, width in zip(axes, widths, strict=True)]
    kind = draw(st.sampled_from(["affine", "codebook", "trellis"]))
    bits = [possible_width(*each[:1], kind, *each[1:]) for each in zip(bits, axes, sizes, widths, strict=True)]
    smoothing = draw(st.tuples(st.booleans(), st.booleans()))
    return widths, {
        "backend": f"test-{kind}",
        "axis_key": axes[0],
        "axis_value": axes[1],
        "nbits_key": bits[0],
        "nbits_value": bits[1],
        "group_size_key": sizes[0],
        "group_size_value": sizes[1],
        "rotation_key": rotations[0],
        "rotation_value": rotations[1],
        "smoothing_key": smoothing[0],
        "smoothing_value": smoothing[1],
        "scale_bits": draw(st.sampled_from([8, 16])),
        "outlier_share": draw(st.sampled_from([0, 0, 0.01, 0.1])),
    }


@pytest.mark.slow
@pytest.mark.timeout(900)  # the interpreter takes minutes, and more where others are at work
@settings(max_examples=40)
@given(
    layout=layouts(),
    ratio=st.sampled_from([1, 2, 3, 4, 8]),
    batch_heads=st.sampled_from([(1, 1), (2, 1), (1, 2)]),
    queries=st.sampled_from([1, 2, 7, 16]),
    tokens=st.integers(130, 200),
    again=st.sampled_from([0, 19]),
    masking=st.sampled_from(MASKS),
    scale=st.sampled_from([None, 0.3]),
    dtype=st.sampled_from(DTYPES),
    mean=st.sampled_from([0.0, 0.0, 30.0]),
    softcap=st.sampled_from([None, None, 3.0]),
    sinks=st.booleans(),
    sink=st.sampled_from([0, 3]),
    seed=st.integers(0, 2**32 - 1),
)
def test_fused_equals_dequantised(
    layout, ratio, batch_heads, queries, tokens, again, masking, scale, dtype, mean, softcap, sinks, sink, seed
):
    """For every layout, grouped-query ratio, mask, scale and dtype, over several pages.

    States far from zero keep wide scales, and have numbers to round that are as much larger.
    """
    torch.manual_seed(seed)
    (widths, options), (batch, heads) = layout, batch_heads
    keys, values = filled(
        tokens + 64, batch=batch, heads=heads, widths=widths, dtype=dtype, mean=mean,
        again=again, sink_length=sink, **options,
    )  # fmt: skip
    assume(len(keys.body) > 0)  # two group sizes on the channel axis may want blocks of more tokens
    query = torch.randn(batch, heads * ratio, queries, widths[0]).to(dtype)
    mask = made_mask(masking, batch, heads * ratio, queries, len(keys), dtype)
    if masking == "column":
        mask[..., :1, :] = True
    extra = torch.randn(heads * ratio) if sinks else None
    check(
        query, keys, values, mask,
        is_causal=masking == "causal", scale=scale, softcap=softcap, sinks=extra, size=1 + mean,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("bits", TRELLIS_WIDTHS)
@pytest.mark.parametrize(
    ("axes", "sizes", "widths"),
    [
        (("channel", "token"), (64, 32), (64, 64)),  # scales of a tile; of a token
        (("token", "channel"), (5, 24), (20, 112)),  # planes shorter than the register; groups that no tile fits
        (("token", "token"), (4, 96), (64, 96)),  # groups shorter than the register; planes that are padded
    ],
)
@pytest.mark.parametrize(("states", "offset", "scale_bits"), [(4, True, 8), (64, False, 8), (64, True, 16)])
def test_codes_of_a_trellis(bits, axes, sizes, widths, states, offset, scale_bits):
    """Of every width, along tokens and along channels, with offsets and without, in bytes or wider."""
    options = {"states": states, "offset": offset}
    keys, values = filled(
        230, again=19, widths=widths, backend="trellis", nbits=bits, axis_key=axes[0], axis_value=axes[1],
        group_size_key=sizes[0], group_size_value=sizes[1], options=options, scale_bits=scale_bits,
        smoothing_key=False, smoothing_value=False,
    )  # fmt: skip
    for page in (keys.body.pages[0], values.body.pages[0]):
        assert page.taps == TAPS[states]
        assert (page.offset is not None, page.scale_bits) == (offset, scale_bits)
    check(torch.randn(1, 2, 2, widths[0]), keys, values)


def test_scores_are_soft_capped_with_what_smoothing_took_off_the_keys(monkeypatch):
    """By the kernel: a cap is for whole scores."""
    monkeypatch.setattr(tiles, "attend_tiles", None)
    keys, values = filled(150, batch=2, heads=2, smoothing_key=True, mean=2.0, outlier_share=0.1)
    check(torch.randn(2, 4, 2, 32), keys, values, softcap=3.0, size=3.0)
    check(torch.randn(2, 4, 2, 32), keys, values, size=3.0)


@pytest.mark.parametrize("outliers", [0, 0.1])
def test_tokens_added_since_a_crop_have_a_page_of_their_own(outliers):
    """A page that ends inside a group is followed by another, which begins a group."""
    keys, values = filled(300, again=45, group_size=32, sink_length=2, outlier_share=outliers)
    assert len(keys.body.pages) > 1
    assert keys.body.pages[0].length % 32
    check(torch.randn(1, 4, 3, 32), keys, values)


def test_pages_may_differ_between_keys_and_values():
    """Keys whose scales no longer fit float16 begin a page where values go on."""
    layer = QuantizedLayer(CacheConfig(backend="test-affine", group_size=32, residual_length=8), 0)
    layer.update(torch.randn(1, 1, 200, 32), torch.randn(1, 1, 200, 32))
    layer.update(1e-6 * torch.randn(1, 1, 100, 32), torch.randn(1, 1, 100, 32))
    keys, values = layer.stores
    assert [page.scale.dtype for page in keys.body.pages] == [torch.float16, torch.float32]
    assert {page.scale.dtype for page in values.body.pages} == {torch.float16}
    assert keys.body.pages[0].length != values.body.pages[0].length
    check(torch.randn(1, 2, 2, 32), keys, values)


def test_spare_capacity_may_hold_anything():
    """What lies behind the valid tokens is not read, NaN included."""
    keys, values = filled(300, group_size=8)
    for store in (keys, values):
        page = store.body.pages[-1]
        page.length -= 3
        store.body._index()
        scales = page.length if page.scheme.axis == "token" else -(-page.length // page.scheme.group_size)
        page.codes[:, :, page.length :] = 255
        page.scale[:, :, scales:] = page.offset[:, :, scales:] = torch.nan
    check(torch.randn(1, 2, 2, 32), keys, values)


def test_a_row_that_sees_nothing_of_the_body_is_an_empty_part():
    """Its largest score is -inf and its sums are zero, whatever the other rows see."""
    keys, values = filled(300)
    query = torch.randn(1, 1, 4, 32)  # two heads of two query tokens
    mask = torch.ones(1, 1, 1, 2, len(keys.body), dtype=torch.bool)
    mask[..., 0, :] = False
    last = torch.tensor([[len(keys.body)], [-1]])
    for part, empty in (
        (triton_kernels.attend_body(query, keys.body, values.body, mask, None), [0, 2]),
        (triton_kernels.attend_body(query, keys.body, values.body, None, last), [1, 3]),
    ):
        assert (part.highest[0, 0, empty] == -torch.inf).all()
        assert (part.total[0, 0, empty] == 0).all()
        assert (part.mixed[0, 0, empty] == 0).all()
        seen = [row for row in range(4) if row not in empty]
        assert torch.isfinite(part.highest[0, 0, seen]).all()
        assert (part.total[0, 0, seen] >= 1).all()


def test_huge_scores_do_not_overflow():
    """The running maximum keeps every exponential at one or below."""
    keys, values = filled(200)
    query = (exact(keys)[:, :, -20:-19] * 1e4).float()
    check(query, keys, values)


@pytest.mark.filterwarnings("ignore:All-NaN slice")
def test_nan_comes_out():
    """A NaN in the query is not hidden by the maximum."""
    keys, values = filled(200)
    query = torch.randn(1, 1, 2, 32)
    query[0, 0, 1, 3] = torch.nan
    part = triton_kernels.attend_body(query, keys.body, values.body, None, None)
    assert torch.isnan(part.total[0, 0, 1])
    assert torch.isfinite(part.total[0, 0, 0])


@pytest.mark.parametrize(
    ("kind", "options", "because"),
    [
        ("opaque", {}, "opaque"),
        ("affine", {"compute_dtype": "float64"}, "float64"),
        ("affine", {"widths": (264, 32)}, "264"),
    ],
)
def test_what_it_cannot_do_is_said(backend, kind, options, because):
    """Before it is tried, in words that name the matter."""
    keys, values = filled(200, backend=backend(FORMATS[kind], formats=(kind,)), **options)
    assert because in triton_kernels.why_not(keys.body, values.body)


def test_what_is_missing_is_said(monkeypatch):
    """Without triton, and without a GPU where it does not interpret."""
    keys, values = filled(200)
    arguments = keys.body, values.body
    monkeypatch.setattr(triton_kernels, "_interpreted", lambda: False)
    assert "CUDA" in triton_kernels.why_not(*arguments)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install" in triton_kernels.why_not(*arguments)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernels_compile(capability):
    """For GPUs that are not here: the interpreter does not check what the compiler does."""
    script = Path(__file__).with_name("compile_triton.py")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(script), str(capability)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr[-4000:]
    assert "compiled" in result.stdout


def test_it_is_used_where_it_is_asked_for_and_not_before_it_was_measured(monkeypatch):
    """It has not run on a GPU yet, so nobody gets it without asking."""
    keys, values = filled(200)
    query = torch.randn(1, keys.kv_heads, 1, keys.head_dim)
    monkeypatch.setenv("KVQUANT_ATTENTION", "auto")
    assert dispatch.kernel_for(keys, values)[0] != "triton"
    plain = dispatch.attend(query, keys, values, None, is_causal=False, scale=None)
    monkeypatch.setenv("KVQUANT_ATTENTION", "triton")
    assert dispatch.kernel_for(keys, values) == ("triton", "")
    counters.reset()
    fused = dispatch.attend(query, keys, values, None, is_causal=False, scale=None)
    assert dict(counters.kernels) == {"triton": 1}
    torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-4)

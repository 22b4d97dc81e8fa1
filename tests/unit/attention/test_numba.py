"""Invariant 6 for the numba kernel: attention over packed pages equals attention over what they read as.

The reference is computed in float64 from the dequantised states. A score is a sum of head_dim products in float32, of
numbers that may be as large as code * scale and offset are on their own, and an output a weighted mean: some hundred
roundings of 6e-8 at most, at the size of the states.

Each kind of stream costs a compilation, so what shapes the loops is covered by chosen kinds, every width, axis, format
and head size among them, and what varies from call to call is drawn at random.
"""

import os
import subprocess
import sys
from dataclasses import dataclass
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from kvquant.attention import dispatch, tiles
from kvquant.attention.counters import counters
from kvquant.attention.kernels import VARIABLE, asked_for, describe
from kvquant.cache.layer import QuantizedLayer
from kvquant.engine.config import CacheConfig
from kvquant.engine.packing import WIDTHS, pack, unpack
from kvquant.errors import MissingExtraError, OptionValueError
from tests.support import exact_attention, random_codes

numba_kernels = pytest.importorskip("kvquant.attention.numba_kernels", reason="numba is not installed")

pytestmark = pytest.mark.usefixtures("formats", "kernels")

TOLERANCE = {torch.float32: 3e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@pytest.fixture
def kernels(monkeypatch):
    """Kernels are chosen as they are for users."""
    monkeypatch.setenv(VARIABLE, "auto")


@dataclass(frozen=True)
class Kind:
    """What a kernel is compiled for."""

    bits: tuple[float, float]
    widths: tuple[int, int] = (64, 64)
    axes: tuple[str, str] = ("channel", "token")
    formats: str = "affine"
    group: int = 32
    groups: int = 4

    @property
    def backend(self) -> str:
        return "trellis" if self.formats == "trellis" else f"test-{self.formats}"

    def __str__(self) -> str:
        return f"{self.formats}-{self.bits}-{self.widths}-{self.axes}-{self.group}-x{self.groups}"


KINDS = (
    Kind((4, 4)),
    Kind((2, 8), (32, 96), group=16),
    Kind((3, 1), (80, 112), ("token", "channel"), group=8),
    Kind((1, 3), (112, 80), group=16, groups=3),
    Kind((8, 2), (128, 256), ("token", "token"), group=64),
    Kind((4, 2), (96, 32), ("channel", "channel"), group=24, groups=1),
    Kind((4, 4), (64, 64), formats="codebook", groups=2),
    Kind((8, 3), (48, 40), ("token", "channel"), "codebook", group=8),
    Kind((2, 1), (20, 72), ("channel", "channel"), "codebook", group=40),
    Kind((1, 8), (72, 24), ("token", "token"), "codebook", group=24, groups=1),
    Kind((2, 1), (64, 40), ("channel", "token"), "trellis", group=8),
    Kind((1, 3), (40, 80), ("token", "channel"), "trellis", group=8, groups=2),
    Kind((3, 2), (48, 64), ("token", "token"), "trellis", group=16, groups=1),
    Kind((2.5, 3.5), (64, 128)),
    Kind((1.5, 2.5), (48, 80), ("token", "channel"), "codebook", group=8),
    Kind((3.5, 1.5), (20, 96), ("channel", "token"), "codebook", group=16, groups=2),
)


def filled(kind, tokens, *, batch=1, heads=2, dtype=torch.float32, scale=1.0, shift=0.0, **options):
    """A layer that holds `tokens` random tokens in body and window, and what its last update returned."""
    layer = QuantizedLayer(
        CacheConfig(
            nbits_key=kind.bits[0],
            nbits_value=kind.bits[1],
            axis_key=kind.axes[0],
            axis_value=kind.axes[1],
            group_size=kind.group,
            **{"backend": kind.backend, "residual_length": 8, **options},
        ),
        0,
    )
    shapes = [(batch, heads, tokens, width) for width in kind.widths]
    states = [(torch.randn(shape) * scale + shift).to(dtype) for shape in shapes]
    layer.update(*(part[:, :, :-1] for part in states))
    return layer, layer.update(*(part[:, :, -1:] for part in states))


def reference(layer, query, mask=None, **options):
    """Attention in float64 over the dequantised states."""
    return exact_attention(query, *(store.tile(0, len(store)) for store in layer.stores), mask, **options)


def check(layer, query, mask=None, **options):
    """The kernel's attention is the reference's, to rounding at the size of the values."""
    keys, values = layer.stores
    given = {"is_causal": False, "scale": None, **options}
    fused = tiles.attend(query, keys, values, mask, kernel=numba_kernels.attend_body, **given)
    expected = reference(layer, query, mask, **given)
    assert fused.isfinite().all()
    size = max(1.0, float(values.tile(0, len(values)).abs().max()))
    tolerance = TOLERANCE[query.dtype] * size
    torch.testing.assert_close(fused.double(), expected, rtol=0, atol=tolerance)


#: One kind of each format in every run; to compile the others takes minutes.
EACH = [
    kind if kind in (KINDS[0], KINDS[6], KINDS[10]) else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS
]


@pytest.mark.parametrize("kind", EACH, ids=str)
def test_the_kernel_equals_attention_over_the_dequantised_states(kind):
    """For every mask, batch, number of query tokens, length and scale."""
    heads, groups = 2, kind.groups
    for batch, queries, tokens in ((1, 1, 300), (2, 1, 777), (1, 4, 301), (2, 16, 150)):
        layer, _ = filled(kind, tokens, batch=batch, sink_length=3)
        assert len(layer.stores[0].body) > 100
        query = torch.randn(batch, heads * groups, queries, kind.widths[0])
        check(layer, query)
        check(layer, query, scale=0.3)
        check(layer, query, is_causal=True) if queries > 1 else None
        check(layer, query * 3, softcap=2.0)
        check(layer, query, sinks=torch.randn(heads * groups))
        padding = torch.rand(batch, 1, 1, tokens) > 0.4
        check(layer, query, padding)
        check(layer, query * 9, padding, softcap=5.0, sinks=torch.randn(heads * groups))
        check(layer, query, torch.rand(batch, 1, queries, tokens) > 0.4)
        check(layer, query, torch.randn(1, heads * groups, queries, tokens))
        check(layer, query, torch.zeros(batch, 1, queries, tokens).masked_fill(~padding, -torch.inf))
        check(layer, query, torch.zeros(queries, tokens).masked_fill(~padding[0, 0], torch.finfo(torch.float32).min))


@pytest.mark.slow
@settings(max_examples=60)
@given(
    kind=st.sampled_from(KINDS),
    batch=st.integers(1, 3),
    queries=st.sampled_from([1, 4, 16]),  # others would compile more kernels
    tokens=st.integers(120, 700),
    masking=st.sampled_from(["none", "bool", "additive", "per head", "row", "padding", "causal"]),
    scale=st.sampled_from([None, 0.3]),
    softcap=st.sampled_from([None, 3.0]),
    sinks=st.booleans(),
    dtype=st.sampled_from(list(TOLERANCE)),
    sink_length=st.sampled_from([0, 5]),
    rotations=st.tuples(*[st.sampled_from([None, "hadamard", "random"])] * 2),
    smoothing=st.tuples(st.booleans(), st.booleans()),
    scale_bits=st.sampled_from([8, 16]),
    outliers=st.sampled_from([0, 0.01, 0.2]),
    seed=st.integers(0, 2**32 - 1),
)
def test_fused_equals_dequantised(
    kind,
    batch,
    queries,
    tokens,
    masking,
    scale,
    softcap,
    sinks,
    dtype,
    sink_length,
    rotations,
    smoothing,
    scale_bits,
    outliers,
    seed,
):
    """For all that varies from call to call, over every kind of stream."""
    torch.manual_seed(seed)
    layer, _ = filled(
        kind,
        tokens,
        batch=batch,
        dtype=dtype,
        sink_length=sink_length,
        rotation_key=rotations[0],
        rotation_value=rotations[1],
        smoothing_key=smoothing[0],
        smoothing_value=smoothing[1],
        scale_bits=scale_bits,
        outlier_share=outliers,
    )
    heads = 2 * kind.groups
    query = torch.randn(batch, heads, queries, kind.widths[0]).to(dtype)
    mask = {
        "bool": torch.rand(batch, 1, queries, tokens) > 0.4,
        "additive": torch.randn(batch, 1, queries, tokens).to(dtype),
        "per head": torch.rand(1, heads, queries, tokens) > 0.4,
        "row": torch.rand(queries, tokens) > 0.4,
        "padding": torch.rand(batch, 1, 1, tokens) > 0.4,
    }.get(masking)
    extra = torch.randn(heads) if sinks else None
    check(layer, query, mask, is_causal=masking == "causal", scale=scale, softcap=softcap, sinks=extra)


@pytest.mark.parametrize("rotations", [("hadamard", None), (None, "random"), ("random", "hadamard")], ids=str)
def test_the_query_is_rotated_in_place_of_the_keys(rotations):
    """And the output back, in place of the values."""
    layer, _ = filled(KINDS[0], 300, rotation_key=rotations[0], rotation_value=rotations[1])
    check(layer, torch.randn(1, 8, 2, 64), is_causal=True)


@pytest.mark.parametrize(("kind", "queries"), [(KINDS[0], 1), (KINDS[12], 7)], ids=str)
def test_scores_are_soft_capped_with_what_smoothing_took_off_the_keys(kind, queries, monkeypatch):
    """By the kernel, whose rows may be more than the queries: a cap is for whole scores."""
    monkeypatch.setattr(tiles, "attend_tiles", None)
    layer, _ = filled(kind, 300, batch=2, shift=2.0, smoothing_key=True, outlier_share=0.1)
    query = torch.randn(2, 2 * kind.groups, queries, kind.widths[0])
    check(layer, query, softcap=3.0)
    check(layer, query)


def test_the_default_type_of_torch_makes_no_difference():
    """What the kernel reads beside the query is float32 whatever new tensors are."""
    layer, _ = filled(KINDS[0], 300, batch=8)
    query = torch.randn(8, 8, 16, 64)
    expected = reference(layer, query, softcap=3.0)
    torch.set_default_dtype(torch.bfloat16)
    _ = [torch.full((8, 2, 64), 1e3) for _ in range(64)]  # what lies behind a tensor that is too short is not zeros
    del _
    try:
        fused = tiles.attend(
            query, *layer.stores, None, is_causal=False, scale=None, softcap=3.0, kernel=numba_kernels.attend_body
        )
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(fused.double(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_states_of_any_type(dtype):
    """Through scaled_dot_product_attention, as a model calls it, with nothing materialised."""
    kind = KINDS[0]
    layer, (keys, values) = filled(kind, 300, dtype=dtype)
    query = torch.randn(1, 8, 1, 64).to(dtype)
    counters.reset()
    fused = scaled_dot_product_attention(query, keys, values, enable_gqa=True)
    assert (counters.fused, counters.materialised, dict(counters.kernels)) == (1, 0, {"numba": 1})
    assert fused.dtype == dtype
    torch.testing.assert_close(
        fused.double(), reference(layer, query), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * 4
    )


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[2], KINDS[6]], ids=str)
@pytest.mark.parametrize("outliers", [0, 0.1])
def test_pages_that_end_anywhere(kind, outliers):
    """After crops into the body, with key and value pages of other lengths and scales that became wide."""
    layer, _ = filled(kind, 400, sink_length=2, outlier_share=outliers)
    width = kind.widths
    for tokens, crop, size in ((100, 130, 1.0), (333, 50, 1e5), (77, 201, 1.0)):
        layer.crop(-crop)
        layer.update(*(torch.randn(1, 2, tokens, part) * size for part in width))
        query = torch.randn(1, 2 * kind.groups, 1, width[0]) / size
        check(layer, query)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads(threads):
    """Heads are shared out where they can be, and tokens where they cannot."""
    layer, _ = filled(KINDS[0], 5000, heads=1)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        check(layer, torch.randn(1, 4, 1, 64))
        mask = torch.zeros(1, 1, 1, 5000, dtype=torch.bool)
        mask[..., :40] = True  # all that is seen lies in the first thread's share
        check(layer, torch.randn(1, 4, 1, 64), mask)
    finally:
        torch.set_num_threads(before)


def test_a_query_that_may_see_nothing_gets_zeros():
    """As in torch, and without a NaN on the way; also where only the window or only the body is hidden."""
    layer, _ = filled(KINDS[0], 300)
    query = torch.randn(1, 8, 2, 64)
    mask = torch.ones(1, 1, 2, 300, dtype=torch.bool)
    mask[:, :, 0] = False
    keys, values = layer.stores
    fused = tiles.attend(query, keys, values, mask, is_causal=False, scale=None, kernel=numba_kernels.attend_body)
    assert (fused[:, :, 0] == 0).all()
    for hidden in (slice(0, 290), slice(290, 300)):
        mask = torch.ones(1, 1, 2, 300, dtype=torch.bool)
        mask[..., hidden] = False
        check(layer, query, mask)


def test_scores_that_lie_far_apart_do_not_overflow():
    """Keys a thousand times larger than usual: all weight falls to one token."""
    layer, _ = filled(KINDS[0], 300, scale=1000.0)
    check(layer, torch.randn(1, 8, 1, 64))


# ------------------------------------------------------------------------------------------------ the layout


@given(
    nbits=st.sampled_from(WIDTHS),
    width=st.integers(1, 300),
    group=st.integers(1, 300),
    seed=st.integers(0, 1000),
)
def test_runs_read_what_was_packed(nbits, width, group, seed):
    """Every code once, in vectors that cross no group and no byte plane."""
    from kvquant.attention.simd_rows import LANES, runs

    codes = random_codes((width,), nbits, seed)
    packed = pack(codes, nbits)
    bits = torch.tensor([byte >> bit & 1 for byte in packed.tolist() for bit in range(8)])
    read = torch.full((width,), 255, dtype=torch.int64)
    seen = torch.zeros(width, dtype=torch.int64)
    for run in runs(width, nbits, group):
        places = slice(run.start, run.start + run.length)
        assert run.length in (1, 2, 4, 8, 16)
        assert run.length <= LANES
        assert run.start // group == (run.start + run.length - 1) // group
        number = torch.zeros(run.length, dtype=torch.int64)
        for field in run.fields:
            part = packed[field.byte : field.byte + run.length].long()
            assert len(part) == run.length
            number |= ((part >> field.shift) & field.mask) << field.raised
        if run.highest is not None:
            part = bits[run.highest.bit : run.highest.bit + run.length]
            assert len(part) == run.length
            number |= part << run.highest.raised
        assert (number <= run.mask).all()
        assert bool(run.table) == (nbits % 1 > 0 and run.start >= width // 2)
        read[places] = number
        seen[places] += 1
    assert (seen == 1).all()
    assert torch.equal(read, unpack(packed, nbits, width).long())


# ------------------------------------------------------------------------------------------------ what it is used for


def test_it_is_not_used_for_what_it_cannot_do(monkeypatch):
    """Opaque formats, float64, many query tokens, nothing quantised yet: plain torch, with the reason."""
    usual, _ = filled(KINDS[0], 300)
    assert dispatch.kernel_for(*usual.stores) == ("numba", "")
    assert dispatch.kernel_for(*usual.stores, 16, 32) == ("numba", "")
    assert dispatch.kernel_for(*usual.stores, 71, 1) == ("numba", "")  # heads that transformers lays out as tokens
    assert dispatch.kernel_for(*usual.stores, 17, 8) == ("torch", "more than 16 query tokens at once")
    opaque, _ = filled(Kind((4, 4), formats="opaque"), 300)
    assert dispatch.kernel_for(*opaque.stores) == ("torch", "numba: the backend's format is opaque")
    wide, _ = filled(KINDS[0], 300, dtype=torch.float64, backend="reference")
    assert dispatch.kernel_for(*wide.stores)[1] == "numba: it computes in float32, and torch.float64 was asked for"
    other, _ = filled(KINDS[0], 300, residual_length=100)
    assert (
        dispatch.kernel_for(usual.stores[0], other.stores[1])[1] == "keys and values are quantised in different places"
    )
    short, _ = filled(KINDS[0], 8)
    assert dispatch.kernel_for(*short.stores) == ("torch", "nothing is quantised")
    monkeypatch.setenv(VARIABLE, "torch")
    assert dispatch.kernel_for(*usual.stores) == ("torch", "the environment asks for it")


def test_a_kernel_that_fails_warns_once_and_torch_goes_on(monkeypatch):
    """Naming the reason; the result is that of plain torch."""
    layer, (keys, values) = filled(KINDS[0], 300)
    query = torch.randn(1, 8, 1, 64)

    def broken(*_):
        raise ArithmeticError("no such instruction")

    monkeypatch.setattr(numba_kernels, "attend_body", broken)
    monkeypatch.setattr(dispatch, "_failed", {})
    with pytest.warns(RuntimeWarning, match="kernel 'numba' failed .* ArithmeticError: no such instruction"):
        fused = scaled_dot_product_attention(query, keys, values, enable_gqa=True)
    again = scaled_dot_product_attention(query, keys, values, enable_gqa=True)  # a second warning would be an error
    torch.testing.assert_close(fused.double(), reference(layer, query), rtol=3e-5, atol=3e-5)
    assert torch.equal(fused, again)
    assert "failed before" in dispatch.kernel_for(*layer.stores)[1]


def test_every_case_is_another_kernel():
    """And together they have every width, axis and format, for keys and for values."""
    assert len(set(KINDS)) == len(KINDS)
    for stream, (what, values) in product((0, 1), {"bits": WIDTHS, "axes": ("channel", "token")}.items()):
        assert {getattr(kind, what)[stream] for kind in KINDS} == set(values)
    assert {kind.formats for kind in KINDS} == {"affine", "codebook", "trellis"}


@pytest.mark.parametrize("value", ["cuda", "numbq"])
def test_a_kernel_that_does_not_exist_is_refused(value, monkeypatch):
    """Naming the variable, the value and what would work."""
    monkeypatch.setenv(VARIABLE, value)
    with pytest.raises(
        OptionValueError, match=f"^KVQUANT_ATTENTION='{value}' cannot work: expected one of auto, numba"
    ):
        asked_for()


def test_what_attends_is_reported(monkeypatch):
    """In words, with what would make it faster where its library is not installed."""
    assert describe() == "numba"
    monkeypatch.setattr("kvquant.attention.kernels.find_spec", lambda name: None)
    assert describe() == "torch; faster with numba: pip install 'kvquant[fused]'"
    monkeypatch.setenv(VARIABLE, "numba")
    with pytest.raises(MissingExtraError, match="pip install 'kvquant\\[fused\\]'"):
        asked_for()


def test_a_kernel_is_compiled_once_and_found_on_disk(tmp_path):
    """Another process finds what the first one compiled, and compiles nothing."""
    script = """
import torch
from kvquant import QuantizedCache
cache, states = QuantizedCache("reference", nbits=4, group_size=32, residual_length=0), torch.randn(1, 2, 70, 32)
cache.update(states, states, 0)
keys, values = cache.update(states[:, :, :1], states[:, :, :1], 0)
torch.nn.functional.scaled_dot_product_attention(states[:, :, :1], keys, values)
print(cache.memory_report().attention)
"""
    variables = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    found = []
    for _ in range(2):
        command = [sys.executable, "-c", script]
        done = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
        assert done.stdout == "numba\n"
        found.append({file.name: file.stat().st_mtime_ns for file in tmp_path.rglob("*.nbc")})
    assert len(found[0]) == 1
    assert found[0] == found[1]


def test_generation_decodes_with_the_kernel():
    """Every step of a model's generate, with no option given; the tokens are those of plain torch."""
    from transformers import AutoModelForCausalLM

    from kvquant import QuantizedCache
    from kvquant.demo import MODEL_DIR

    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR)
    ids = torch.randint(100, 1000, (1, 300), generator=torch.Generator().manual_seed(0))
    caches = (
        QuantizedCache("test-affine", nbits=4, residual_length=32),
        QuantizedCache("test-affine", nbits=4, residual_length=32),
    )
    counters.reset()
    with_kernel = model.generate(ids, past_key_values=caches[0], max_new_tokens=20, do_sample=False)
    assert counters.kernels["numba"] == counters.fused == 19 * model.config.num_hidden_layers
    assert caches[0].memory_report().attention == "numba"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, "torch")
        plain = model.generate(ids, past_key_values=caches[1], max_new_tokens=20, do_sample=False)
        assert caches[1].memory_report().attention == "torch (the environment asks for it)"
    assert torch.equal(with_kernel, plain)

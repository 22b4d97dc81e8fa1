"""The border to backends: what is refused there, and how much goes through at once."""

from dataclasses import replace

import pytest
import torch

from kvquant.engine.encode import CHUNK_ELEMENTS, Encoder
from kvquant.engine.offload import Home
from kvquant.engine.packing import unpack
from kvquant.engine.pages import CanonicalPage
from kvquant.engine.pieces import Encoded
from kvquant.errors import BackendContractError, QuantizationError
from kvquant.plugin import Opaque, QuantizedRows, Scheme
from tests.support import MinMax, OpaqueMinMax, UniformCodebook


def encoder(quantizer, scheme=None, *, block=32, formats=("affine",)):
    scheme = scheme or Scheme(4, "channel", 32)
    made = quantizer(scheme) if isinstance(quantizer, type) else quantizer
    return Encoder("mine", made, scheme, "key", "layer 3", block, torch.float32, formats)


class Returning:
    """A quantizer that returns what a function makes of a correct answer."""

    def __init__(self, change):
        self.change = change

    def quantize(self, rows):
        return self.change(MinMax(Scheme(4, "channel", 32)).quantize(rows))


def changed(**parts):
    return lambda good: QuantizedRows(**{**vars(good), **{name: make(good) for name, make in parts.items()}})


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda good: None, "quantize returned NoneType instead of QuantizedRows"),
        (changed(codes=lambda g: g.codes[:-1]), "codes has shape [63, 32] instead of [64, 32]"),
        (changed(codes=lambda g: g.codes.int()), "codes has dtype torch.int32 instead of torch.uint8"),
        (changed(codes=lambda g: g.codes.tolist()), "codes is list instead of a tensor"),
        (changed(codes=lambda g: g.codes + 1), "code 16 is out of range for nbits=4; the largest is 15"),
        (changed(scale=lambda g: g.scale[:, None]), "scale has shape [64, 1] instead of [64]"),
        (changed(scale=lambda g: g.scale * torch.nan), "scale holds NaN or infinity"),
        (changed(scale=lambda g: g.scale.int()), "scale has dtype torch.int32 instead of a floating type"),
        (
            changed(scale=lambda g: g.scale.double() * 1e300),
            "scale holds NaN or infinity, or leaves the range of torch.float32",
        ),
        (changed(offset=lambda g: g.offset * torch.inf), "offset holds NaN or infinity"),
        (changed(offset=lambda g: g.offset.to("meta")), "offset is on meta instead of cpu"),
        (changed(offset=lambda g: None), "needs either offset (affine) or table (codebook), and not both"),
        (changed(table=lambda g: torch.ones(16)), "needs either offset (affine) or table (codebook), and not both"),
        (
            changed(offset=lambda g: None, table=lambda g: torch.linspace(-1, 1, 16)),
            "quantize returned the format 'codebook', declared are affine",
        ),
    ],
)
def test_a_wrong_answer_is_caught_at_the_border(change, problem):
    """The message names the plugin and what is wrong."""
    with pytest.raises(BackendContractError) as caught:
        list(encoder(Returning(change)).encode(torch.randn(1, 2, 32, 32), 0))
    assert str(caught.value).startswith("backend 'mine' broke the plugin contract: ")
    assert problem in str(caught.value)


@pytest.mark.parametrize(
    ("table", "problem"),
    [
        (torch.linspace(-1, 1, 8), "table has shape [8] instead of [16]"),
        (torch.zeros(16), "table holds one value only"),
    ],
)
def test_a_wrong_table_is_caught_at_the_border(table, problem):
    """A codebook has one entry for each code, and more than one value."""
    wrong = Returning(lambda good: QuantizedRows(good.codes, good.scale, table=table))
    with pytest.raises(BackendContractError) as caught:
        list(encoder(wrong, formats=("codebook",)).encode(torch.randn(1, 1, 32, 32), 0))
    assert problem in str(caught.value)


def test_an_opaque_backend_must_return_opaque():
    """It said that nothing else would come."""
    with pytest.raises(BackendContractError, match="quantize returned QuantizedRows where its only format is opaque"):
        list(encoder(MinMax, formats=("opaque",)).encode(torch.randn(1, 1, 32, 32), 0))


def test_a_backend_that_raises_is_named_with_layer_and_tokens():
    """The backend's own error is the cause."""

    class Raising:
        def quantize(self, rows):
            raise ArithmeticError("no luck")

    with pytest.raises(QuantizationError) as caught:
        list(encoder(Raising()).encode(torch.randn(1, 1, 64, 32), 100))
    assert str(caught.value).startswith(
        "backend 'mine' failed on layer 3, key states of tokens 100 to 163: ArithmeticError: no luck."
    )
    assert isinstance(caught.value.__cause__, ArithmeticError)
    assert (caught.value.start, caught.value.stop) == (100, 164)


@pytest.mark.parametrize(("batch", "tokens"), [(1, 100 * 1024), (64, 256)])
def test_no_call_gets_more_than_a_chunk(batch, tokens):
    """A long prefill and a wide batch both go through in bounded pieces, and every number goes through once."""
    seen = []

    class Watching(MinMax):
        def quantize(self, rows):
            seen.append(rows.numel())
            return super().quantize(rows)

    states = torch.zeros(1).expand(batch, 4, tokens, 64)  # one number in memory, so that the test needs little
    pieces = list(encoder(Watching, block=64, scheme=Scheme(4, "token", 64)).encode(states, 0))
    assert max(seen) <= CHUNK_ELEMENTS
    assert sum(seen) == states.numel()
    assert sum(piece.tokens for piece in pieces) == tokens


def test_a_backend_that_writes_into_its_rows_does_not_reach_the_states():
    """On the axis and in the dtype where rows could have been a view of them."""

    class Writing(MinMax):
        def quantize(self, rows):
            answer = super().quantize(rows)
            rows.zero_()
            return answer

    states = torch.randn(1, 1, 32, 32)
    before = states.clone()
    list(encoder(Writing, Scheme(4, "token", 32)).encode(states, 0))
    assert torch.equal(states, before)


@pytest.mark.parametrize(
    ("states", "dtype"),
    [
        (torch.randn(1, 1, 32, 32), torch.float16),
        (torch.randn(1, 1, 32, 32) * 1e6, torch.float32),  # beyond float16
        (torch.randn(1, 1, 32, 32) * 1e-7, torch.float32),  # below its normal numbers
        (torch.randn(1, 1, 32, 32) * 1e-3 + 1000, torch.float32),  # an offset that float16 would round by many steps
        (torch.full((1, 1, 32, 32), 0.5), torch.float16),  # constant, and exact in float16
        (torch.full((1, 1, 32, 32), 0.1), torch.float32),  # constant, and not exact in float16
        (torch.zeros(1, 1, 32, 32), torch.float16),
    ],
)
def test_scales_are_kept_in_half_precision_only_where_that_is_harmless(states, dtype):
    """Range and rounding decide, block by block."""
    (piece,) = encoder(MinMax).encode(states, 0)
    assert piece.scale.dtype == piece.offset.dtype == dtype


def test_scales_stay_wide_from_the_first_block_that_needs_it():
    """So the layout changes once at most, and where depends on the tokens alone, not on how they came."""
    states = torch.randn(1, 1, 128, 32)
    states[:, :, 32:64] *= 1e6
    together = list(encoder(MinMax).encode(states, 0))
    assert [piece.scale.dtype for piece in together] == [torch.float16, torch.float32]
    assert [piece.tokens for piece in together] == [32, 96]
    (alone,) = encoder(MinMax).encode(states[:, :, 64:], 64)
    (after,) = encoder(MinMax).encode(states[:, :, 64:], 64, bits=32)
    assert (alone.scale.dtype, after.scale.dtype) == (torch.float16, torch.float32)
    assert torch.equal(after.scale, together[1].scale[:, :, 1:])


def test_float64_states_keep_float64_scales():
    """A constant third comes back to its last digit."""
    made = Encoder(
        "mine", MinMax(Scheme(4, "channel", 32)), Scheme(4, "channel", 32), "key", "", 32, torch.float64, ("affine",)
    )
    (piece,) = made.encode(torch.full((1, 1, 32, 32), 1 / 3, dtype=torch.float64), 0)
    assert (piece.offset == 1 / 3).all()


def test_a_large_batch_goes_through_in_parts_and_comes_out_whole():
    """Batch rows are joined again, codes, scales and table alike."""
    states = torch.randn(1, 1, 1, 64).expand(600, 1, 32, 64) * torch.arange(1, 601)[:, None, None, None]
    assert states[0].numel() * 600 > CHUNK_ELEMENTS
    (piece,) = encoder(UniformCodebook, Scheme(4, "token", 64), formats=("codebook",)).encode(states, 0)
    assert isinstance(piece, Encoded)
    assert piece.codes.shape == (600, 1, 32, 32)
    assert torch.allclose(
        piece.scale[:, 0, 0, 0].float() / piece.scale[0, 0, 0, 0].float(), torch.arange(1.0, 601), rtol=2e-3
    )


def test_opaque_contents_must_be_tensors():
    """Everything that takes memory must be seen to."""
    wrong = Returning(lambda good: Opaque({"codes": good.codes.tolist()}))
    with pytest.raises(BackendContractError, match=r"Opaque.tensors\['codes'\] is list instead of a tensor"):
        list(encoder(wrong, formats=("opaque",)).encode(torch.randn(1, 1, 32, 32), 0))


def test_an_opaque_backend_that_reads_another_shape_is_caught_before_states_are_let_go():
    """One block of each call is read back at the border."""

    class Short(OpaqueMinMax):
        def dequantize(self, packed):
            return super().dequantize(packed)[1:]

    with pytest.raises(
        BackendContractError, match=r"dequantize returned \[31, 32\] instead of a tensor of shape \[32, 32\]"
    ):
        list(encoder(Short, formats=("opaque",)).encode(torch.randn(1, 1, 32, 32), 0))


def test_opaque_blocks_are_kept_by_batch_row():
    """One object for each block and batch row, whatever is inside."""
    pieces = list(encoder(OpaqueMinMax, formats=("opaque",)).encode(torch.randn(3, 2, 64, 32), 0))
    assert [piece.tokens for piece in pieces] == [32, 32]
    assert all(len(piece.rows) == 3 and isinstance(piece.rows[0], Opaque) for piece in pieces)


@pytest.mark.parametrize(
    ("table", "dtype"),
    [
        (torch.linspace(-1, 1, 256), torch.float16),
        # Shaped like a float of three bits: beside a large entry the gap is large too, and what the scale loses small.
        (torch.cat([-(2 ** torch.linspace(-15, 0, 121)), 2 ** torch.linspace(-15, 0, 121)]), torch.float16),
        # Entries close together far from zero: what float16 costs is many gaps.
        (torch.linspace(0.9999, 1, 256), torch.float32),
    ],
)
def test_a_table_s_scales_are_judged_by_the_gap_beside_each_entry(table, dtype):
    """Not by the smallest gap anywhere."""

    class Table(MinMax):
        def quantize(self, rows):
            padded = torch.nn.functional.pad(table, (0, 256 - len(table)))
            return QuantizedRows(torch.zeros_like(rows, dtype=torch.uint8), rows.abs().amax(1), table=padded)

    made = encoder(Table, Scheme(8, "channel", 32), formats=("codebook",))
    (piece,) = made.encode(torch.randn(1, 1, 32, 32), 0)
    assert piece.scale.dtype == dtype


@pytest.mark.parametrize("numbers", [torch.zeros(32, 32, dtype=torch.int32), torch.zeros(32, 31), [0.0]])
def test_an_opaque_backend_must_read_what_it_wrote(numbers):
    """As floating numbers of the right shape; one block of a call is read before the states are let go."""

    class Misreading(OpaqueMinMax):
        def dequantize(self, packed):
            return numbers

    with pytest.raises(BackendContractError, match="dequantize returned"):
        list(encoder(Misreading, formats=("opaque",)).encode(torch.randn(1, 1, 32, 32), 0))


# ------------------------------------------------------------------------------------------------ mixed widths


def mixed(upper, lower, axis="token", formats=("codebook",)):
    """An encoder of 2.5 bits: a quantizer class for each half of the channels."""
    first, second = (
        encoder(quantizer, Scheme(nbits, axis, 16), formats=formats) for quantizer, nbits in ((upper, 3), (lower, 2))
    )
    return replace(first, lower=(second.scheme, second.quantizer))


@pytest.mark.parametrize("axis", ["channel", "token"])
@pytest.mark.parametrize("quantizer", [MinMax, UniformCodebook])
def test_each_half_of_the_channels_is_what_its_own_width_makes_of_it(axis, quantizer):
    """Codes, scales, offsets and tables lie side by side."""
    formats, states = ("affine", "codebook"), torch.randn(2, 3, 32, 64)
    (piece,) = mixed(quantizer, quantizer, axis, formats).encode(states, 0)
    codes = unpack(piece.codes, 2.5, 64)
    tables = (None, None) if piece.table is None else piece.table.split([8, 4])
    for half, nbits, table, part in zip((0, 1), (3, 2), tables, states.chunk(2, 3), strict=True):
        (alone,) = encoder(quantizer, Scheme(nbits, axis, 16), formats=formats).encode(part, 0)
        assert torch.equal(codes.chunk(2, 3)[half], unpack(alone.codes, nbits, 32))
        assert torch.equal(piece.scale.chunk(2, 3)[half], alone.scale)
        assert alone.offset is None or torch.equal(piece.offset.chunk(2, 3)[half], alone.offset)
        assert alone.table is None or torch.equal(table, alone.table)


@pytest.mark.parametrize("axis", ["channel", "token"])
@pytest.mark.parametrize("quantizer", [MinMax, UniformCodebook])
def test_scales_in_bytes_cost_no_half_much(axis, quantizer):
    """The offsets of both halves are read relative to the same levels; each half comes back as well as alone."""
    states = torch.randn(2, 3, 64, 64) + 0.5
    encoded = mixed(quantizer, quantizer, axis, ("affine", "codebook"))

    def errors(**options):
        halves = replace(encoded, **options)
        (piece,) = halves.encode(states, 0)
        page = CanonicalPage(halves, piece, 64, 64, Home(states.device))
        page.write(piece, 0, 0)
        return [(part**2).mean() for part in (page.dequantize(0, 64, torch.float32) - states).chunk(2, 3)]

    for in_bytes, floating in zip(errors(scale_bits=8), errors(), strict=True):
        assert in_bytes < 1.15 * floating


@pytest.mark.parametrize("quantizer", [MinMax, UniformCodebook])
def test_outliers_are_chosen_by_the_errors_of_both_halves(quantizer):
    """One token is far off in the first half, one in the second, and of a block of 32 these two are kept."""
    states = torch.randn(1, 1, 32, 64)
    states[0, 0, 5, :32] *= 30
    states[0, 0, 20, 32:] *= 30
    encoded = replace(mixed(quantizer, quantizer, "token", ("affine", "codebook")), kept=2)
    (piece,) = encoded.encode(states, 0)
    assert piece.outliers.positions.flatten().tolist() == [5, 20]
    assert torch.equal(piece.outliers.states[0, 0, 0], states[0, 0, [5, 20]])


class TwoClose(UniformCodebook):
    """Two entries lie so close together that a scale in float16 could make one of the other."""

    def quantize(self, rows):
        answer = super().quantize(rows)
        answer.table[-2] = answer.table[-1] - 1e-4
        return answer


@pytest.mark.parametrize(
    ("upper", "lower", "dtype"),
    [
        (UniformCodebook, UniformCodebook, torch.float16),
        (TwoClose, UniformCodebook, torch.float32),
        (UniformCodebook, TwoClose, torch.float32),
    ],
)
def test_each_half_has_a_say_in_the_precision_of_scales(upper, lower, dtype):
    """Its own table decides what rounding may cost."""
    (piece,) = mixed(upper, lower).encode(torch.randn(1, 1, 32, 32) + 0.1, 0)
    assert piece.scale.dtype == dtype


def test_halves_in_different_formats_are_refused():
    """No page could hold them."""
    with pytest.raises(BackendContractError, match=r"nbits=2.5 cannot be mixed: its two widths came in different"):
        list(mixed(MinMax, UniformCodebook, formats=("affine", "codebook")).encode(torch.randn(1, 1, 32, 32), 0))


@pytest.mark.parametrize("width", [3, 2])
def test_a_code_that_its_half_has_no_room_for_is_caught(width):
    """Though the other half might have."""

    class TooLarge(MinMax):
        def quantize(self, rows):
            answer = super().quantize(rows)
            return QuantizedRows(answer.codes + 1, answer.scale, answer.offset)

    halves = (TooLarge, MinMax) if width == 3 else (MinMax, TooLarge)
    with pytest.raises(BackendContractError, match=f"code {2**width} is out of range for nbits={width}"):
        list(mixed(*halves, formats=("affine",)).encode(torch.randn(1, 1, 32, 32), 0))

"""What comes back is of the kind that the contract says, and everything that is declared is real."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from typing import Any

import torch

from kvquant.cache.cache import QuantizedCache
from kvquant.errors import ConfigError, KVQuantError, listing
from kvquant.plugin.capabilities import AXES
from kvquant.plugin.quantizer import Opaque
from kvquant.plugin.spec import Scheme
from kvquant.testing import data
from kvquant.testing.check import check, require, require_same
from kvquant.testing.outcomes import NotApplicable
from kvquant.testing.subject import Case, Subject, has_device, known_name
from kvquant.testing.surroundings import disturbance

#: No values of any sensible option.
_NONSENSE = ("no-such-value-of-this-option", [["no such value"]])

#: What a backend may be asked about; all but the declared ones must be refused.
_DEVICES = ("cpu", "cuda", "mps", "xpu", "abacus")
_DTYPES = ("float16", "bfloat16", "float32", "float64", "complex64")

#: Scales and offsets in full, and what a group takes besides, in bits; and spare bits a number.
_BITS_PER_GROUP, _SPARE_BITS = 128, 0.5


@check("creates", "combination", basic=True)
def creates(case: Case) -> None:
    """A quantizer can be made for every declared combination of bits, axis and group size."""
    case.quantizer()


@check("shapes", "combination", basic=True)
def shapes(case: Case) -> None:
    """Kinds, shapes, types and devices are as the contract says, for any number of rows."""
    for n_groups in (1, 2, 33):
        rows = case.rows(data.gaussian(n_groups, case.scheme.group_size))
        result = case.quantize(rows)
        read = result.reader.dequantize(result.raw) if result.reader and isinstance(result.raw, Opaque) else None
        require(read is None or read.device == rows.device, f"dequantize returned numbers not on {case.device}")


@check("code-range", "size", basic=True)
def code_range(case: Case) -> None:
    """Codes are below 2**nbits, on ordinary rows and on hard ones."""
    if case.border.is_opaque:
        raise NotApplicable("the format is opaque: its codes are the backend's own")
    size = case.scheme.group_size
    for values in (
        data.spread(64, size),
        data.one_outlier(16, size),
        data.constants().expand(-1, size),
        data.gaussian(8, size) * 1e-6,
        data.gaussian(8, size) * 1e6,
    ):
        rows = case.quantize(case.rows(values)).raw
        case.border.require_codes_in_range(rows)  # type: ignore[arg-type]  # not opaque, as seen above


@check("bits", "width")
def bits(case: Case) -> None:
    """What is stored takes the bits that it says (opaque format; the core packs the others)."""
    if not case.border.is_opaque:
        raise NotApplicable("the core packs the codes of this format")
    size, nbits = case.scheme.group_size, case.scheme.nbits
    n_groups = max(64, 4096 // size)
    stored = []
    for count in (n_groups, 2 * n_groups):
        rows, quantizer = case.rows(data.spread(count, size)), case.quantizer()
        raw = case.result(quantizer.quantize(rows), rows, quantizer).raw
        if not isinstance(raw, Opaque):
            return
        for name, tensor in raw.tensors.items():
            storage = tensor.untyped_storage()
            require(
                storage.data_ptr() != rows.untyped_storage().data_ptr(),
                f"tensors[{name!r}] is a view of the rows, and so keeps all of them in memory",
            )
            require(
                storage.nbytes() <= tensor.nbytes,
                f"tensors[{name!r}] is a view that keeps {storage.nbytes()} bytes in memory for {tensor.nbytes}",
            )
        stored.append(8 * (sum(tensor.nbytes for tensor in raw.tensors.values()) + len(json.dumps(dict(raw.meta)))))
    # What more numbers take more, so that tables and a short meta are not counted.
    each = (stored[1] - stored[0]) / (n_groups * size)
    allowed = nbits + _BITS_PER_GROUP / size + _SPARE_BITS
    require(each <= allowed, f"{each:.2f} bits a number are stored; {nbits} with scales take at most {allowed:.2f}")


@check("opaque-reading", "width")
def opaque_reading(case: Case) -> None:
    """Another quantizer of the same scheme reads what was stored, after a round trip of meta through JSON."""
    if not case.border.is_opaque:
        raise NotApplicable("the core reads this format itself")
    rows = case.rows(data.spread(33, case.scheme.group_size))
    result = case.quantize(rows)
    packed = result.raw
    if not isinstance(packed, Opaque) or result.reader is None:
        return
    read = result.reader.dequantize(packed)
    require(torch.equal(read, result.reader.dequantize(packed)), "reading twice gives different numbers")
    copied = Opaque(
        {name: tensor.clone() for name, tensor in packed.tensors.items()}, json.loads(json.dumps(dict(packed.meta)))
    )
    other = case.quantizer().dequantize(copied)  # type: ignore[attr-defined]  # opaque quantizers have it
    require(torch.equal(read, other), "another quantizer of the same scheme reads different numbers from a copy")
    elsewhere = [name for name, tensor in packed.tensors.items() if tensor.device != rows.device]
    require(not elsewhere, f"{listing(elsewhere)} is not on {case.device}, where the rows are")


@check("devices", "backend")
def devices(subject: Subject) -> str:
    """Every declared device that this machine has is tried."""
    absent = [device for device in subject.backend.capabilities.devices if not has_device(device)]
    require(subject.devices, f"none of the declared devices is here: {listing(absent)}")
    return f"not tried, because this machine has none: {listing(absent)}" if absent else ""


@check("refusals", "backend")
def refusals(subject: Subject) -> None:
    """What is not declared is refused at construction, with what would work."""
    can, size = subject.backend.capabilities, subject.group_sizes[0]
    usual: dict[str, Any] = {
        "nbits": subject.nbits[0],
        "group_size": size,
        "axis": can.axes[0],
        "options": dict(subject.options),
    }
    beyond = max(can.group_sizes or ()) * 2 + 1 if can.group_sizes else size
    wrong: list[tuple[str, object]] = [
        *(("nbits", nbits) for nbits in (1, 2, 3, 4, 8) if nbits not in can.nbits),
        *(("axis", axis) for axis in AXES if axis not in can.axes),
        *([("group_size", beyond)] if can.group_sizes else []),
        ("options", {**subject.options, "no-such-option": 1}),
    ]
    with known_name(subject.backend) as name:
        _make_cache(name, usual)  # so that what follows is refused for its own sake
        for option, value in wrong:
            asked = {**usual, option: value}
            reasons = can.why_not(Scheme(**asked))
            require(any(map(str.strip, reasons)), f"Capabilities.why_not has nothing against {option}={value!r}")
            try:
                _make_cache(name, asked)
            except ConfigError:
                continue
            require(False, f"a cache with {option}={value!r} can be made, which is not declared")  # noqa: FBT003 # it can
    for option, known, declared in (("device", _DEVICES, can.devices), ("dtype", _DTYPES, can.dtypes)):
        for value in known:
            reasons = can.why_not(Scheme(**usual), **{option: value})
            verb = "has nothing against" if value not in declared else "has something against the declared"
            require(bool(reasons) == (value not in declared), f"Capabilities.why_not {verb} {option}={value!r}")


def _make_cache(name: str, asked: Mapping[str, Any]) -> QuantizedCache:
    rest = {option: value for option, value in asked.items() if option != "axis"}
    return QuantizedCache(backend=name, axis_key=asked["axis"], axis_value=asked["axis"], **rest)


@check("options", "backend")
def options(subject: Subject) -> None:
    """A value that makes no sense is refused for every option when the quantizer is made."""
    declared = subject.backend.capabilities.options
    if not declared:
        raise NotApplicable("the backend has no options")
    for case in subject.cases("width"):
        for option in declared:
            refused = [_refuses(case, option, value) for value in _NONSENSE]
            values = " and ".join(f"{option}={value!r}" for value in _NONSENSE)
            require(any(refused), f"{values} are taken without a word, {case}")


def _refuses(case: Case, option: str, value: object) -> bool:
    """Return whether a quantizer with a nonsense value is refused, with a message that names the option."""
    scheme = case.scheme
    nonsense = Scheme(scheme.nbits, scheme.axis, scheme.group_size, {**scheme.options, option: value})
    try:
        case.backend.create(nonsense)
    except KVQuantError as error:
        said = getattr(error, "problem", str(error))
        is_file = isinstance(error.__cause__, OSError)  # which names the file
        require(is_file or option in said, f"the error for {option}={value!r} does not name the option: {said}")
        return True
    return False


@check("surroundings", "width")
def surroundings(case: Case) -> None:
    """It leaves torch, Python's warnings and everybody's random numbers as they were."""
    rows = case.rows(data.spread(16, case.scheme.group_size))
    by_chance = not case.backend.capabilities.deterministic
    found = disturbance(lambda: case.quantize(rows).read(), may_draw=by_chance)
    require(not found, found)


@check("unshared", "width")
def unshared(case: Case) -> None:
    """Quantizers share nothing: making and using another one, of another scheme, changes no result."""
    rows = case.rows(data.spread(16, case.scheme.group_size))
    quantizer = case.quantizer()
    first = case.quantize(rows, quantizer)
    before = first.copied()
    case.quantizer().quantize(case.rows(data.gaussian(8, case.scheme.group_size, seed=6) * 30))
    for nbits in case.backend.capabilities.nbits:
        other = Scheme(nbits, case.scheme.axis, case.scheme.group_size)
        with contextlib.suppress(Exception):  # a width that does not work is another check's concern
            case.backend.create(other).quantize(case.rows(data.gaussian(8, case.scheme.group_size, seed=5)))
    require_same(before, first.copied(), "what one quantizer had returned, after another was used")
    if case.backend.capabilities.deterministic:
        require_same(before, case.quantize(rows, quantizer).copied(), "after another quantizer was used")

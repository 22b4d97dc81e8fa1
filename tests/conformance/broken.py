"""Backends with one bug each, and the check of the conformance kit that must find it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from kvquant.plugin import BackendSpec, Capabilities, Scheme
from tests.conformance.broken_opaque import (
    BitsAndBytesBlockSize,
    DitheredReading,
    HQQAxisZero,
    KeepsInput,
    KeepsTheCall,
    MetaWithTypes,
    NumbersInMeta,
    OwnKey,
    ReadsFromItself,
    ThreeBitsInNibbles,
)
from tests.conformance.broken_rows import (
    AboveZeroOnly,
    ColumnScale,
    CutsOff,
    GlobalStop,
    HalfOverflow,
    IgnoresOption,
    Lenient,
    MisnamesOption,
    NaNOnConstant,
    NoBrainFloat,
    NoEightBits,
    NoZero,
    OffByOne,
    OneLevelTooMany,
    OneScaleForAll,
    OnlyEvenSizes,
    RootMeanSquare,
    RowNumber,
    ScaleOfAPiece,
    SharedHeads,
    SmallestStep,
    TableFromRows,
    ThreeBitsTakeFour,
    WastesCodes,
    WideCodes,
    WrapsAround,
    WrongAtFortyEight,
)
from tests.conformance.broken_state import (
    Dithered,
    DitheredBuffer,
    DitheredRunningRange,
    FillsZeros,
    GradientsOff,
    InPlace,
    KeepsRows,
    Learned,
    Leaves,
    NotThreadSafe,
    ReusedBuffer,
    RunningRange,
    Scratch,
    Seeds,
    SeedsByChance,
    SharedLevels,
    SharedTable,
    TokenInPlace,
)
from tests.support import MinMax


@dataclass(frozen=True)
class Bug:
    """One broken backend.

    Attributes:
        factory: the backend's factory.
        check: the check that must fail.
        says: what its reason must contain.
        also: other checks that fail over the same bug.
        perhaps: those that do on some machines, as threads meet or as a library has it; no others may.
        capabilities: what the backend declares.
        declaration: the class of the declaration.
    """

    factory: Callable[[Scheme], Any]
    check: str
    says: str
    also: tuple[str, ...] = ()
    perhaps: tuple[str, ...] = ()
    capabilities: dict[str, Any] = field(default_factory=dict)
    declaration: type[Capabilities] = Capabilities

    def __str__(self) -> str:
        return f"{getattr(self.factory, '__name__', 'backend')}-{self.check}"

    @property
    def spec(self) -> BackendSpec:
        """The declaration of the backend."""
        name = "broken-" + getattr(self.factory, "__name__", "backend").lower()
        declared = {"nbits": (4,), **self.capabilities}
        return BackendSpec(name, self.factory, self.declaration(**declared))


OPAQUE: dict[str, Any] = {"formats": ("opaque",), "nbits": (4,), "group_sizes": (32, 64, 128)}
THREE_OPAQUE: dict[str, Any] = {"formats": ("opaque",), "nbits": (3,), "group_sizes": (256,)}
CODEBOOK: dict[str, Any] = {"formats": ("codebook",)}
WIDTHS: dict[str, Any] = {"nbits": (2, 3, 4, 8)}
CHANCE: dict[str, Any] = {"deterministic": False}
SEARCH: dict[str, Any] = {"options": {"search": "how to look"}}

#: Checks that compare results bit by bit: no wonder if several of them see one bug.
TOGETHER = ("groups", "many-rows", "split")
CALLS = ("deterministic", "modes", "many-rows", "split")
EVERY = (*CALLS, "groups", "heads", "cache", "surroundings")

#: Checks of rows that are hard, to a backend that mixes them up.
MIXED_UP = ("constant", "error-bound", "zeros")

#: Checks that see what threads do to each other, if they meet.
MEETING = ("threads",)

BUGS = (
    Bug(
        HQQAxisZero,
        "groups",
        "and of other groups",
        ("heads", "many-rows", "split"),
        (*MIXED_UP, "tiny", "huge", "half-precision", "cache"),
        OPAQUE,
    ),
    Bug(
        BitsAndBytesBlockSize,
        "error-bound",
        "times that of an even grid",
        (),
        (*TOGETHER, "heads", "cache", "constant", "zeros", "tiny", "huge", "half-precision", "outliers"),
        OPAQUE,
    ),
    Bug(SharedHeads, "heads", "and of other heads", (*TOGETHER, "error-bound", "zeros")),
    Bug(OneScaleForAll, "groups", "and of other groups", ("heads", "many-rows", "split", "cache", *MIXED_UP)),
    Bug(GlobalStop, "groups", "and of other groups", ("heads", "split")),
    Bug(InPlace, "input", "quantize changed its input"),
    Bug(KeepsInput, "input", "memory the result shares", ("bits", "huge"), capabilities=OPAQUE),
    Bug(NaNOnConstant, "constant", "NaN", ("zeros", "tiny", "huge")),
    Bug(OffByOne, "nearest-level", "times that of the nearest levels", ("error-bound",)),
    Bug(OneLevelTooMany, "code-range", "out of range"),
    Bug(CutsOff, "nearest-level", "times that of the nearest levels"),
    Bug(ThreeBitsTakeFour, "code-range", "code 15 is out of range for nbits=3", capabilities=WIDTHS),
    Bug(ThreeBitsInNibbles, "bits", "bits a number are stored", capabilities=THREE_OPAQUE),
    Bug(WastesCodes, "error-bound", "times that of an even grid"),
    Bug(RunningRange, "stateless", "after a call with other rows", (*CALLS, "unshared"), MEETING),
    Bug(ReusedBuffer, "stateless", "wrote into what an earlier one returned", ("modes",), MEETING),
    Bug(SharedLevels, "unshared", "after another quantizer was used", capabilities=WIDTHS),
    Bug(NotThreadSafe, "threads", "with several threads at once", ("stateless",)),
    Bug(HalfOverflow, "half-precision", "NaN or infinity"),
    Bug(SmallestStep, "tiny", "numbers around 1e-06"),
    Bug(RootMeanSquare, "huge", "NaN or infinity", capabilities=CODEBOOK),
    Bug(WrapsAround, "outliers", "the error is", ("constant", "error-bound")),
    Bug(NoZero, "zeros", "zeros came back as", ("tiny",), capabilities=CODEBOOK),
    Bug(ColumnScale, "shapes", "scale has shape [1, 1] instead of [1]"),
    Bug(WideCodes, "shapes", "codes has dtype torch.int32 instead of torch.uint8"),
    Bug(
        Dithered,
        "deterministic",
        "the same rows again",
        (*(check for check in EVERY if check != "deterministic"), "stateless", "unshared", "threads"),
    ),
    Bug(TableFromRows, "split", "the table differs", ("groups", "many-rows", "cache"), capabilities=CODEBOOK),
    Bug(NoEightBits, "creates", "nbits=8 is not supported", capabilities=WIDTHS),
    Bug(NoBrainFloat, "shapes", "BFloat16"),
    Bug(OnlyEvenSizes, "shapes", "group_size=7"),
    Bug(MinMax, "refusals", "why_not has nothing against nbits=1", declaration=Lenient),
    Bug(IgnoresOption, "options", "are taken without a word", capabilities=SEARCH),
    Bug(MisnamesOption, "options", "does not name the option", capabilities=SEARCH),
    Bug(MinMax, "devices", "none of the declared devices is here", capabilities={"devices": ("xpu",)}),
    Bug(ReadsFromItself, "opaque-reading", "raised AttributeError", ("many-rows", "split"), MEETING, OPAQUE),
    Bug(MetaWithTypes, "opaque-reading", "not JSON serializable", ("bits",), capabilities=OPAQUE),
    Bug(KeepsTheCall, "bits", "is a view that keeps", capabilities=OPAQUE),
    Bug(
        DitheredReading,
        "opaque-reading",
        "reading twice gives different numbers",
        (*EVERY, "stateless", "threads", "attention"),
        capabilities=OPAQUE,
    ),
    Bug(
        DitheredReading,
        "cache",
        "changed the states",
        ("opaque-reading", "attention"),
        capabilities={**OPAQUE, **CHANCE},
    ),
    Bug(
        DitheredReading,
        "attention",
        "attention is off by",
        ("opaque-reading", "cache"),
        capabilities={**OPAQUE, **CHANCE},
    ),
    Bug(Learned, "modes", "asks for gradients"),
    Bug(Scratch, "threads", "with several threads at once", ("modes",)),
    Bug(SharedTable, "unshared", "after another was used: table", capabilities={**CODEBOOK, **WIDTHS}),
    Bug(ScaleOfAPiece, "many-rows", "differ"),
    Bug(TokenInPlace, "input", "axis=token"),
    Bug(FillsZeros, "input", "quantize changed its input"),
    Bug(WrongAtFortyEight, "error-bound", "group_size=48", ("nearest-level",)),
    Bug(AboveZeroOnly, "error-bound", "times that of an even grid", ("constant",)),
    Bug(Seeds, "surroundings", "it draws from, or seeds, the random numbers of the whole process"),
    Bug(SeedsByChance, "surroundings", "use a torch.Generator of its own", capabilities=CHANCE),
    Bug(GradientsOff, "surroundings", "it changes torch's gradient mode"),
    Bug(DitheredBuffer, "stateless", "wrote into what an earlier one returned", ("modes",), MEETING, CHANCE),
    Bug(
        DitheredRunningRange,
        "stateless",
        "after a call with other rows",
        ("error-bound", "nearest-level"),
        MEETING,
        CHANCE,
    ),
    Bug(KeepsRows, "stateless", "keeps the rows of its last call in memory"),
    Bug(RowNumber, "split", "differ", ("many-rows",)),
    Bug(OwnKey, "opaque-reading", "another quantizer of the same scheme reads different numbers", capabilities=OPAQUE),
    Bug(NumbersInMeta, "bits", "bits a number are stored", capabilities=OPAQUE),
    Bug(Leaves, "shapes", "raised SystemExit"),
)

"""Each row stands on its own, whenever and beside whatever it is quantised."""

from __future__ import annotations

import gc
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor

from kvquant.engine.encode import CHUNK_ELEMENTS
from kvquant.engine.grouping import states_to_rows
from kvquant.errors import listing
from kvquant.testing import data
from kvquant.testing.check import check, needs_determinism, require, require_same
from kvquant.testing.subject import Case, Result

_THREADS = 4

#: Rounds of each thread at least and at most, and seconds after which no new one begins.
_ROUNDS, _MOST_ROUNDS, _SECONDS = 4, 200, 0.15

#: Numbers that a backend which works in pieces, or on several threads, is sure to divide.
_MANY = 300_000


@check("deterministic", "width")
def deterministic(case: Case) -> None:
    """The same rows give the same result: again, and from another quantizer."""
    needs_determinism(case)
    rows = case.rows(data.spread(_MANY // case.scheme.group_size, case.scheme.group_size))
    quantizer = case.quantizer()
    first = case.quantize(rows, quantizer).whole()
    require_same(first, case.quantize(rows, quantizer).whole(), "the same rows again")
    require_same(first, case.quantize(rows).whole(), "the same rows with another quantizer")


@check("groups", "width")
def groups(case: Case) -> None:
    """Changing one group changes no other group."""
    needs_determinism(case)
    size = case.scheme.group_size
    values = data.spread(48, size)
    before = case.quantize(case.rows(values)).parts()
    changes: dict[str, Callable[[Tensor], Tensor]] = {
        "made 1000 times larger": lambda row: row * 1000,
        "made constant": lambda row: torch.full_like(row, 3.0),
        "made zero": torch.zeros_like,
        "made easy to quantise": lambda row: torch.where(row > 0, 1.0, -1.0),
    }
    for index in (0, 17, 47):
        for what, change in changes.items():
            changed = values.clone()
            changed[index] = change(values[index])
            after = case.quantize(case.rows(changed)).parts()
            others = torch.arange(len(values)) != index
            _same_rows(before, after, others, others, f"group {index} was {what}, and of other groups")


@check("heads", "width")
def heads(case: Case) -> None:
    """Changing one head, or one batch row, changes no other."""
    needs_determinism(case)
    size, axis = case.scheme.group_size, case.scheme.axis
    shape = (2, 3, 2 * size, 8) if axis == "channel" else (2, 3, 8, 2 * size)
    states = data.spread(2 * 3 * 16, size).reshape(shape)
    states[:, 0] *= 20  # heads differ in magnitude, so that a shared scale shows
    places = torch.arange(6).reshape(2, 3, 1, 1).expand(shape)
    owner = states_to_rows(places, axis, size)[:, 0]

    def parts_of(numbers: Tensor) -> dict[str, Tensor]:
        return case.quantize(case.rows(states_to_rows(numbers, axis, size))).parts()

    before = parts_of(states)
    for batch_row, head in ((0, 1), (1, 2)):
        changed = states.clone()
        changed[batch_row, head] *= 50
        others = owner != batch_row * 3 + head
        what = f"head {head} of batch row {batch_row} was made 50 times larger, and of other heads"
        _same_rows(before, parts_of(changed), others, others, what)


@check("split", "width")
def split(case: Case) -> None:
    """However rows are split into calls, and in whatever order they come, each becomes the same."""
    needs_determinism(case)
    values = data.spread(301, case.scheme.group_size)
    _same_in_parts(case, values, ([1, 2, 3, 7, 31, 64, 193], [300, 1], [150, 151]))


@check("many-rows", "usual")
def many_rows(case: Case) -> None:
    """As many rows as the core hands over at once, and one more, become what they become in parts."""
    needs_determinism(case)
    size = case.scheme.group_size
    many = CHUNK_ELEMENTS // size + 1
    _same_in_parts(case, data.spread(many, size), ([many - 1, 1], [many // 3, many // 2, many - many // 3 - many // 2]))


def _same_in_parts(case: Case, values: Tensor, splits: Iterable[list[int]]) -> None:
    rows = case.rows(values)
    whole = case.quantize(rows).whole()
    for sizes in splits:
        quantizer = case.quantizer()
        results = [case.quantize(part.contiguous(), quantizer) for part in rows.split(sizes)]
        parts = [result.whole() for result in results]
        for part in parts:
            same = "table" not in part or torch.equal(part["table"], parts[0]["table"])
            require(same, "the table differs between calls")
        joined = {
            name: part if name == "table" else torch.cat([other[name] for other in parts])
            for name, part in parts[0].items()
        }
        require_same(whole, joined, f"rows in calls of {listing(sizes)}")
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(2))
    mixed = case.quantize(case.rows(values[order])).parts()
    picked = {name: part[order.to(part.device)] for name, part in whole.items() if name != "table"}
    require_same(picked, mixed, "rows in another order, and of the same rows")


@check("stateless", "width")
def stateless(case: Case) -> None:
    """A quantizer keeps nothing from one call to the next, and never touches what it returned."""
    size = case.scheme.group_size
    rows, others = case.rows(data.spread(16, size)), case.rows(data.gaussian(16, size, seed=7) * 30)
    used = case.quantizer()
    case.quantize(others, used)
    later = case.quantize(rows, used)
    if case.backend.capabilities.deterministic:
        require_same(case.quantize(rows).whole(), later.whole(), "after a call with other rows")
    else:
        _require_good(case, rows, later, "after a call with other rows")
    before = later.copied()
    case.quantize(others, used)
    require_same(before, later.copied(), "after a later call, which wrote into what an earlier one returned")
    handed = rows.clone()
    gone, result = weakref.ref(handed), used.quantize(handed)
    del handed, result
    if gone() is not None:
        gc.collect()
    require(gone() is None, "the quantizer keeps the rows of its last call in memory")


@check("input", "dtype")
def untouched_input(case: Case) -> None:
    """The rows that are handed over are not modified, and the result shares no memory with them."""
    size = case.scheme.group_size
    constants = data.constants().expand(-1, size)
    for values in (data.spread(33, size), data.one_outlier(8, size), constants, torch.zeros(4, size)):
        rows = case.rows(values)
        kept, quantizer = rows.clone(), case.quantizer()
        result = case.result(quantizer.quantize(rows), rows, quantizer)
        require(torch.equal(rows, kept), "quantize changed its input")
        before = result.copied()
        rows.fill_(7)
        require_same(before, result.copied(), "after a change to the input, whose memory the result shares")


@check("modes", "width")
def modes(case: Case) -> None:
    """Gradients on, off and inference mode make no difference, and no result asks for gradients."""
    rows = case.rows(data.spread(16, case.scheme.group_size))
    quantizer = case.quantizer()
    with torch.inference_mode():
        inferred = case.quantize(rows, quantizer).whole()
    with torch.no_grad():
        plain = case.quantize(rows, quantizer).whole()
    with torch.enable_grad():
        result = case.quantize(rows, quantizer)
        asking = [name for name, part in result.copied().items() if part.requires_grad]
    require(not asking, f"{listing(asking)} asks for gradients")
    if case.backend.capabilities.deterministic:
        require_same(inferred, plain, "in inference mode")
        require_same(inferred, result.whole(), "with gradients on")


@check("threads", "usual")
def threads(case: Case) -> None:
    """Several threads can use one quantizer at once."""
    size = case.scheme.group_size
    # The same number of rows for all, because work areas are kept by shape; few, and so many that calls overlap.
    for n_groups in (40, 2000):
        rows = [case.rows(data.spread(n_groups, size, seed=index)) for index in range(_THREADS)]
        expected = [case.quantize(part).whole() for part in rows]
        shared = case.quantizer()
        barrier = threading.Barrier(_THREADS)
        end = time.monotonic() + _SECONDS

        def work(index: int, rows=rows, expected=expected, shared=shared, barrier=barrier, end=end) -> None:  # type: ignore[no-untyped-def]
            barrier.wait(timeout=60)
            for round_ in range(_MOST_ROUNDS):
                if round_ >= _ROUNDS and time.monotonic() > end:
                    return
                result = case.quantize(rows[index], shared)
                if case.backend.capabilities.deterministic:
                    require_same(expected[index], result.whole(), "with several threads at once")
                else:
                    _require_good(case, rows[index], result, "with several threads at once")

        with _switching_often(), ThreadPoolExecutor(_THREADS) as pool:
            for _ in pool.map(work, range(_THREADS)):
                pass  # raises what a thread raised


@contextmanager
def _switching_often() -> Iterator[None]:
    """Have Python change threads so often that sharing shows."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)


def _require_good(case: Case, rows: Tensor, result: Result, when: str) -> None:
    """Raise CheckFailed where the rows of a backend that rounds by chance came back as others."""
    numbers = rows.double()
    due = data.even_grid_error(numbers, -(-case.scheme.nbits // 2))
    ratio = data.error_ratio(numbers, result.read(), due)
    require(ratio <= 2, f"{when}: the error is {ratio:.2f} times that of an even grid of half the bits")


def _same_rows(one: dict[str, Tensor], other: dict[str, Tensor], mine: Tensor, yours: Tensor, what: str) -> None:
    picked = {name: part[mine.to(part.device)] for name, part in one.items()}
    require_same(picked, {name: part[yours.to(part.device)] for name, part in other.items()}, what)

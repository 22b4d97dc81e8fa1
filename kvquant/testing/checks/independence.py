"""Each row stands on its own, whenever and beside whatever it is quantised."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor

from kvquant.engine.grouping import states_to_rows
from kvquant.testing import data
from kvquant.testing.check import check, needs_determinism, require, require_same
from kvquant.testing.subject import Case, Result, differences

_THREADS, _ROUNDS = 4, 6

#: Numbers that a backend which works in pieces, or on several threads, is sure to divide.
_MANY = 300_000


@check("deterministic", "width")
def deterministic(case: Case) -> None:
    """The same rows give the same result: again, from another quantizer, on any number of threads."""
    needs_determinism(case)
    rows = case.rows(data.spread(_MANY // case.scheme.group_size, case.scheme.group_size))
    quantizer = case.quantizer()
    first = case.quantize(rows, quantizer).parts()
    require_same(differences(first, case.quantize(rows, quantizer).parts()), "the same rows again")
    require_same(differences(first, case.quantize(rows).parts()), "the same rows with another quantizer")
    threads = torch.get_num_threads()
    try:
        for count in {1, 3} - {threads}:
            torch.set_num_threads(count)
            require_same(differences(first, case.quantize(rows).parts()), f"the same rows on {count} threads")
    finally:
        torch.set_num_threads(threads)


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
    rows = case.rows(values)
    whole = case.quantize(rows).parts()
    for sizes in ([1, 2, 3, 7, 31, 64, 193], [300, 1], [150, 151]):
        quantizer = case.quantizer()
        results = [case.quantize(part.contiguous(), quantizer) for part in rows.split(sizes)]
        joined = {name: torch.cat([result.parts()[name] for result in results]) for name in whole}
        require_same(differences(whole, joined), f"rows in calls of {', '.join(map(str, sizes))}")
        _require_one_table(results)
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(2))
    mixed = case.quantize(case.rows(values[order])).parts()
    _same_rows(whole, mixed, order, torch.arange(len(values)), "rows in another order, and of the same rows")


@check("stateless", "width")
def stateless(case: Case) -> None:
    """A quantizer keeps nothing from one call to the next, and never touches what it returned."""
    needs_determinism(case)
    size = case.scheme.group_size
    rows, others = case.rows(data.spread(16, size)), case.rows(data.gaussian(16, size, seed=7) * 30)
    fresh = case.quantize(rows).parts()
    used = case.quantizer()
    case.quantize(others, used)
    later = case.quantize(rows, used)
    require_same(differences(fresh, later.parts()), "after a call with other rows")
    case.quantize(others, used)
    require_same(differences(fresh, later.parts()), "after a later call, which wrote into what an earlier one returned")


@check("input", "dtype")
def untouched_input(case: Case) -> None:
    """The rows that are handed over are not modified."""
    for values in (data.spread(33, case.scheme.group_size), data.one_outlier(8, case.scheme.group_size)):
        rows = case.rows(values)
        kept, quantizer = rows.clone(), case.quantizer()
        result = case.result(quantizer.quantize(rows), rows, quantizer)
        require(torch.equal(rows, kept), "quantize changed its input")
        if not case.backend.capabilities.deterministic:
            continue
        before = result.parts()
        rows.zero_()
        require_same(differences(before, result.parts()), "after a change to the input, whose memory the result shares")


@check("modes", "width")
def modes(case: Case) -> None:
    """Gradients on, off and inference mode make no difference, and no result asks for gradients."""
    needs_determinism(case)
    rows = case.rows(data.spread(16, case.scheme.group_size))
    quantizer = case.quantizer()
    with torch.inference_mode():
        inferred = case.quantize(rows, quantizer).parts()
    with torch.no_grad():
        require_same(differences(inferred, case.quantize(rows, quantizer).parts()), "in inference mode")
    with torch.enable_grad():
        result = case.quantize(rows, quantizer).parts()
    require_same(differences(inferred, result), "with gradients on")
    asking = [name for name, part in result.items() if part.requires_grad]
    require(not asking, f"{', '.join(asking)} asks for gradients")


@check("threads", "width")
def threads(case: Case) -> None:
    """Several threads can use one quantizer at once."""
    needs_determinism(case)
    size = case.scheme.group_size
    rows = [case.rows(data.spread(40 + index, size, seed=index)) for index in range(_THREADS)]
    expected = [case.quantize(part).parts() for part in rows]
    shared = case.quantizer()
    barrier = threading.Barrier(_THREADS)

    def work(index: int) -> list[str]:
        barrier.wait(timeout=60)
        found: list[str] = []
        for _ in range(_ROUNDS):
            found += differences(expected[index], case.quantize(rows[index], shared).parts())
        return found

    with _switching_often(), ThreadPoolExecutor(_THREADS) as pool:
        found = [name for names in pool.map(work, range(_THREADS)) for name in names]
    require_same(dict.fromkeys(found), "with several threads at once")


@contextmanager
def _switching_often() -> Iterator[None]:
    """Have Python change threads so often that sharing shows."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)


def _same_rows(one: dict[str, Tensor], other: dict[str, Tensor], mine: Tensor, yours: Tensor, what: str) -> None:
    picked = {name: part[mine.to(part.device)] for name, part in one.items()}
    require_same(differences(picked, {name: part[yours.to(part.device)] for name, part in other.items()}), what)


def _require_one_table(results: list[Result]) -> None:
    tables = [table for result in results if (table := result.table()) is not None]
    require(all(torch.equal(tables[0], table) for table in tables), "the table differs between calls")

"""All checks of a transform, in the order in which they run: basic ones first, because others rest on them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from kvquant.errors import HeadDimError, TransformError, listing
from kvquant.registry.found import IN_PROCESS
from kvquant.testing import data
from kvquant.testing.check import Check, check, require, require_same, some_cases
from kvquant.testing.checks.imports import HEAVY
from kvquant.testing.outcomes import CheckFailed, NotApplicable
from kvquant.testing.probe import digest, probe
from kvquant.testing.surroundings import disturbance
from kvquant.testing.transforms import use
from kvquant.testing.transforms.subject import HEAD_DIMS, HeadCase, TransformSubject
from kvquant.transforms.heads import HeadTransform

METHODS = ("apply", "undo", "apply_to_query")

#: Rounding of float64, with room for maps that add hundreds of numbers.
_EXACT = 1e-10

#: How much larger than its own rounding a transform may make that of float32, which has seven digits.
_WORST_CONDITION = 1e4

#: Numbers of one call, more than torch leaves to one thread (32,768).
_MANY = 40_000


@check("listing", "transform")
def light_listing(subject: TransformSubject) -> None:
    """Listing the transform imports nothing heavy, and prints nothing."""
    found = probe("listing", name=_installed(subject), kind="transform")
    heavy = sorted(HEAVY & set(found["imported"]))
    require(not heavy, f"imports {listing(heavy)}; import inside functions instead")
    require(not found["printed"], f"prints {found['printed'].strip()[:200]!r}")


@check("sizes", "transform")
def sizes(subject: TransformSubject) -> str:
    """Heads of any size work, or are refused with a ValueError that says what would work."""
    refused = []
    for head_dim in HEAD_DIMS:
        try:
            subject.plugin.create(head_dim)
        except HeadDimError as error:
            require(len(error.problem.split()) > 1, f"head_dim={head_dim} is refused without a reason")
            refused.append(head_dim)
        except TransformError as error:
            raise CheckFailed(f"head_dim={head_dim}: {getattr(error, 'problem', error)}") from error
    require(len(refused) < len(HEAD_DIMS), f"none of the sizes works that were tried: {listing(HEAD_DIMS)}")
    return f"refused: {listing(refused)}" if refused else ""


@check("shapes", "combination", basic=True)
def shapes(case: HeadCase) -> None:
    """Shape, type and device stay, for any number of rows and dimensions, in whatever order they lie in memory."""
    transform, rows = case.transform(), case.states(2 * 3 * 5)
    states = rows.reshape(2, 3, 5, case.head_dim)
    numbers = (rows, rows[:1], rows[0], states, states[:, :, :1], states[:, :, :0])
    views = (states.transpose(1, 2), states.flip(3).transpose(0, 2))
    for given in (*numbers, *views):
        for method in METHODS:
            getattr(transform, method)(given)  # the core looks at what comes back


@check("inverse", "combination")
def inverse(case: HeadCase) -> None:
    """What was applied and undone is what it was, up to rounding; and rounding does not grow beyond use."""
    condition = float(torch.linalg.cond(case.matrix()))
    require(condition <= _WORST_CONDITION, f"undoing makes rounding errors up to {condition:.3g} times larger")
    transform, states = case.transform(), case.states(64)
    error = (transform.undo(transform.apply(states)).detach().double() - states.double()).norm(dim=-1)
    share = float((error / states.double().norm(dim=-1)).max())
    allowed = 32 * condition * torch.finfo(case.dtype).eps
    require(share <= allowed, f"rows come back with an error of {share:.3g} of their length; {allowed:.3g} is rounding")


@check("linear", "size")
def linear(case: HeadCase) -> None:
    """The image of a weighted sum is the weighted sum of the images, there and back."""
    transform = case.transform()
    one, other = case.states(16), case.states(16, seed=5)
    for method in METHODS:
        mapped: Callable[[Tensor], Tensor] = getattr(transform, method)
        summed, images = mapped(3 * one - 100 * other), (mapped(one), mapped(other))
        error = (summed - (3 * images[0] - 100 * images[1])).norm(dim=-1)
        size = 3 * images[0].norm(dim=-1) + 100 * images[1].norm(dim=-1)
        require(bool((error <= _EXACT * size).all()), f"{method} of a sum is not the sum of the parts")


@check("query", "size")
def query(case: HeadCase) -> None:
    """Queries meet keys as before: the product of both, mapped, is their product."""
    transform = case.transform()
    queries, keys = case.states(16, seed=1), case.states(16, seed=2)
    mapped, images = transform.apply_to_query(queries).detach(), transform.apply(keys).detach()
    error = (mapped @ images.T - queries @ keys.T).abs()
    size = mapped.norm(dim=-1)[:, None] * images.norm(dim=-1) + queries.norm(dim=-1)[:, None] * keys.norm(dim=-1)
    share = float((error / size).max())
    require(share <= _EXACT, f"scores are off by {share:.3g} of the lengths of query and key")


@check("rows", "combination")
def rows(case: HeadCase) -> None:
    """A row becomes the same to the last bit, whatever rows are beside it and however they lie in memory."""
    count = max(300, _MANY // case.head_dim if case.dtype == torch.float32 else 0)
    transform, states = case.transform(), case.states(count)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).to(case.device)
    cuts = (0, 1, 2, 9, 40, 104, 300, count)
    for method in METHODS:
        mapped: Callable[[Tensor], Tensor] = getattr(transform, method)
        whole = mapped(states)
        _same(torch.cat([mapped(states[low:high]) for low, high in pairwise(cuts)]), whole, f"{method} in parts")
        _same(mapped(states[order]), whole[order], f"{method} in another order")
        shaped = states[:300].reshape(3, 25, 4, case.head_dim)
        turned = mapped(shaped.transpose(0, 2)).transpose(0, 2).reshape(300, case.head_dim)
        _same(turned, whole[:300], f"{method} of a view")


@check("deterministic", "usual")
def deterministic(case: HeadCase) -> None:
    """The same rows become the same again, with another object, and later; and what was returned is left alone."""
    transform, states, others = case.transform(), case.states(300), case.states(300, seed=7)
    for method in METHODS:
        mapped: Callable[[Tensor], Tensor] = getattr(transform, method)
        returned = mapped(states)
        first = returned.clone()
        mapped(others)
        require(torch.equal(returned, first), f"{method} writes into what it returned before")
        _same(mapped(states), first, f"{method} again")
        _same(getattr(case.transform(), method)(states), first, f"{method} with another object")


@check("processes", "transform")
def processes(subject: TransformSubject) -> None:
    """Another process, with other random numbers, makes the same of the same rows: saved caches rely on it."""
    name = _installed(subject)
    for case in some_cases(subject, "usual"):
        states = data.gaussian(16, case.head_dim).float()
        here = digest({"states": case.transform().apply(states.to(case.device))})
        found = probe("transform", name=name, head_dim=case.head_dim, device=case.device)
        require(not found["error"], str(found["error"]))
        require(not found["printed"], f"prints {found['printed'].strip()[:200]!r} when it is used")
        require(found["digest"] == here, "another process gives other results: random numbers need a seed of their own")


@check("surroundings", "usual")
def surroundings(case: HeadCase) -> None:
    """It leaves torch, Python's warnings and everybody's random numbers as they were."""
    found = disturbance(lambda: _use(case.transform(), case.states(16)))
    require(not found, found)


@check("input", "dtype")
def untouched_input(case: HeadCase) -> None:
    """The states that are handed over are not modified."""
    transform, states = case.transform(), case.states(64)
    for method in METHODS:
        given = states.clone()
        getattr(transform, method)(given)
        require(torch.equal(given, states), f"{method} modifies what it was given")


@check("modes", "usual")
def modes(case: HeadCase) -> None:
    """Inference mode makes no difference, nothing asks for gradients by itself, and gradients reach a query."""
    states = case.states(64)
    usual = _use(case.transform(), states)
    require(not any(result.requires_grad for result in usual), "results ask for gradients that nobody asked for")
    with torch.inference_mode():
        inferred = _use(case.transform(), states)
    for method, one, other in zip(METHODS, usual, inferred, strict=True):
        _same(other, one, f"{method} in inference mode")
    asked = states.clone().requires_grad_()
    for method in METHODS[1:]:  # what attention applies
        require(getattr(case.transform(), method)(asked).requires_grad, f"{method} loses the gradient")


@check("cache", "usual")
def cache(case: HeadCase) -> None:
    """In a cache: states come back, in parts as at once, after crop and reorder, and attention is that over them."""
    use.in_a_cache(case)


CHECKS: tuple[Check, ...] = (
    light_listing,
    sizes,
    shapes,
    inverse,
    linear,
    query,
    rows,
    deterministic,
    processes,
    surroundings,
    untouched_input,
    modes,
    cache,
)


def _use(transform: HeadTransform, states: Tensor) -> list[Tensor]:
    return [getattr(transform, method)(states) for method in METHODS]


def _same(one: Tensor, other: Tensor, what: str) -> None:
    require_same({"numbers": one}, {"numbers": other}, what)


def _installed(subject: TransformSubject) -> str:
    if subject.plugin.distribution == IN_PROCESS:
        raise NotApplicable("the transform is registered in this process; no plugin is imported")
    return subject.plugin.qualified_name

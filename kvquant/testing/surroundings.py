"""What belongs to the whole process, and not to a plugin."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from kvquant.errors import listing

_EVERYBODY_S = "the random numbers of the whole process: use a torch.Generator of its own"


def surroundings_now() -> dict[str, Any]:
    """Return the settings of the process that a plugin might change, by name."""
    return {
        "torch's default dtype": torch.get_default_dtype(),
        "torch's gradient mode": torch.is_grad_enabled(),
        "torch's number of threads": torch.get_num_threads(),
        "torch's deterministic mode": torch.are_deterministic_algorithms_enabled(),
        "the warnings filters": list(warnings.filters),
    }


@contextmanager
def same_chances() -> Iterator[None]:
    """Begin with the same random numbers every time, and leave the process as it was.

    Plugins that round by chance then get the same chances at every run, and one that changes what is not its own
    fails over that alone.
    """
    dtype, gradients, threads, deterministic, filters = surroundings_now().values()
    chances = random.getstate()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            random.seed(0)
            # The rows here are few: on several threads torch would wait far longer than it works.
            torch.set_num_threads(1)
            yield
    finally:
        random.setstate(chances)
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(gradients)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)
        warnings.filters[:] = filters  # type: ignore[index]  # it is a list


def disturbance(use: Callable[[], object], *, may_draw: bool = False) -> str:
    """Return in words what `use` changes of the process, or an empty string.

    Args:
        use: uses a plugin; called twice.
        may_draw: whether it may take random numbers of the process, as what rounds by chance does.
    """
    ends = []
    for seed in (1, 2):  # one of the two is not what a plugin would seed with
        torch.manual_seed(seed)
        random.seed(seed)
        before, chances = surroundings_now(), (torch.get_rng_state(), random.getstate())
        use()
        changed = [name for name, value in surroundings_now().items() if value != before[name]]
        if changed:
            return f"it changes {listing(changed)}"
        same = torch.equal(chances[0], torch.get_rng_state()) and chances[1] == random.getstate()
        if not same and not may_draw:
            return f"it draws from, or seeds, {_EVERYBODY_S}"
        ends.append(torch.get_rng_state())
    if may_draw and torch.equal(*ends):
        return f"it seeds {_EVERYBODY_S}"
    return ""

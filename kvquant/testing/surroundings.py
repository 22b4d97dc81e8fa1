"""What belongs to the whole process, and not to a backend."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def surroundings_now() -> dict[str, Any]:
    """Return the settings of the process that a backend might change, by name."""
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

    Backends that round by chance then get the same chances at every run, and one that changes what is not its own
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

"""Compiled functions on several threads: torch's own, where they can be had.

Between two operations torch's threads do not sleep at once: for some milliseconds they spin, waiting for more. Other
threads would have to share the processor with them, which takes up to twice the time; theirs are there at once. torch
is compiled for OpenMP, whose runtime starts a function of the signature ``void (void *)`` on all threads of a team
(``GOMP_parallel``, which the runtimes of GCC, LLVM and Intel all have). Where there is no such runtime, or after a
fork, which it does not survive, a pool of Python's threads does the same.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

_forked = False


@dataclass(frozen=True)
class Task:
    """A compiled function ``void (void *)`` that several threads may run at once.

    Attributes:
        address: where it is.
        owner: what must live as long as it is called.
    """

    address: int
    owner: Any


def run(task: Task, argument: int, threads: int) -> None:
    """Run `task` on so many threads, each with the address `argument`, and wait for all. The interpreter is let go."""
    if threads == 1:
        _FUNCTION(task.address)(argument)
        return
    team = None if _forked else _torch_team()
    if team is not None:
        team(task.address, argument, threads, 0)
    else:
        list(_pool(threads).map(_FUNCTION(task.address), [argument] * threads))


@cache
def _torch_team() -> Callable[..., None] | None:
    """Return ``GOMP_parallel`` of the runtime that torch is linked to, None where there is none."""
    for library in sorted(Path(torch.__file__).parent.glob("lib/libtorch_cpu.*")):
        try:
            start = ctypes.CDLL(str(library)).GOMP_parallel  # looked for in the library and in all that it loaded
        except (OSError, AttributeError):
            continue
        start.argtypes, start.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
        team: Callable[..., None] = start
        return team
    return None


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="kvquant-attention")


def _after_fork() -> None:
    """Threads do not come along."""
    global _forked
    _forked = True
    _pool.cache_clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)

"""Compiled functions on several threads."""

import ctypes
import subprocess
import sys
import threading

import pytest

from kvquant.attention import threads


def task(function):
    """A task that calls back into Python, on whichever thread it runs."""
    compiled = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(function)
    return threads.Task(ctypes.cast(compiled, ctypes.c_void_p).value, compiled)


@pytest.fixture(params=["torch's threads", "a pool"])
def team(request, monkeypatch):
    """Who does the work."""
    if request.param == "a pool":
        monkeypatch.setattr(threads, "_torch_team", lambda: None)
    elif threads._torch_team() is None:
        pytest.skip("this torch has no OpenMP runtime that starts functions")


@pytest.mark.parametrize("count", [1, 2, 3])
def test_so_many_threads_work_at_the_same_time(team, count):
    """Each with the argument."""
    meeting, seen = threading.Barrier(count), []

    def work(argument):
        meeting.wait(timeout=60)  # all are here at once, or this breaks
        seen.append((argument, threading.get_ident()))

    threads.run(task(work), 4711, count)
    assert [argument for argument, _ in seen] == [4711] * count
    assert len({thread for _, thread in seen}) == count


def test_a_forked_process_goes_on():
    """Threads do not survive a fork, and the kernel works all the same."""
    pytest.importorskip("numba")
    script = """
import os
import torch
from kvquant import QuantizedCache
from kvquant.attention.numba_kernels import attend_body
torch.set_num_threads(2)
cache, states = QuantizedCache("reference", residual_length=0), torch.randn(1, 8, 5000, 64)
cache.update(states, states, 0)
keys, values = cache.layers[0].stores
def attend():
    return attend_body(states[:, :, :1], keys.body, values.body, None, None).mixed
expected = attend()
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(attend(), expected) else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=True, timeout=240
    )
    assert done.stdout == "0\n"

"""How long work takes, how much memory it needs, and how much measurements scatter: measured, never computed."""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.metadata
import os
import platform
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor

from kvquant._version import __version__
from kvquant.engine.memory import tensor_bytes
from kvquant.errors import MissingExtraError

Result = TypeVar("Result")

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")

#: What a measurement of bandwidth reads, how often, and in how many rows.
_BANDWIDTH_BYTES, _BANDWIDTH_PASSES, _BANDWIDTH_ROWS = 256 << 20, 5, 64

#: Seconds between two looks at the resident set where the kernel keeps no peak.
_SAMPLE_INTERVAL = 0.001
#: Bytes by which the kernel's figures may be off: it updates them in batches for each thread.
_KERNEL_SLACK = 4 << 20


@dataclass(frozen=True)
class Spread:
    """Some measurements of one thing.

    Attributes:
        median, low, high: of the samples, in their unit.
        count: number of samples.
    """

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        """Sum up `samples`; there must be one at least."""
        return cls(statistics.median(samples), min(samples), max(samples), len(samples))


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return how long `work` takes, with everything that it started on `device`."""
    return timed(work, device)[1]


def timed(work: Callable[[], Result], device: torch.device) -> tuple[Result, float]:
    """Return what `work` returns, and how many seconds it takes with everything that it started on `device`."""
    _synchronise(device)
    start = time.perf_counter()
    result = work()
    _synchronise(device)
    return result, time.perf_counter() - start


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def steady(threads: int | None = None) -> Iterator[None]:
    """Give torch `threads` threads, and keep the garbage collector from running into timed work; undo both at the end.

    Args:
        threads: torch's threads, None for those that it has.
    """
    before, collecting = torch.get_num_threads(), gc.isenabled()
    torch.set_num_threads(threads or before)
    gc.collect()
    gc.disable()  # as timeit does; caches are in no cycles, so their memory is freed all the same
    try:
        yield
    finally:
        torch.set_num_threads(before)
        if collecting:
            gc.enable()


# ------------------------------------------------------------------------------------------------ memory in use


class PeakMemory:
    """Measures how far memory in use rises above its level on entry, while a ``with`` block runs.

    On CUDA it asks torch's allocator; elsewhere it takes the process's resident set, whose peak Linux keeps itself
    and which a thread samples where the kernel does not. Memory that the process freed before and did not give back
    is used again without any rise, so for an honest figure measure in a fresh process.

    Attributes:
        before: bytes in use on entry.
        rise: bytes above that, known once the block has ended.
        method: how it was measured, in words.
    """

    def __init__(self, device: torch.device) -> None:
        """Measure memory of `device`; of this process if that is the CPU."""
        self.rise = 0
        self.method = ""
        self._device = device
        self._sampler: _Sampler | None = None
        self.before = 0

    def __enter__(self) -> PeakMemory:
        if self._device.type == "cuda":
            self.method = "torch's CUDA allocator"
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            self.before = torch.cuda.memory_allocated(self._device)
        elif _reset_kernel_peak():
            self.method = "peak resident set, kept by the kernel"
            self.before = _status_bytes("VmRSS")
        else:
            self.method = "resident set, sampled"
            self.before = resident_bytes()
            self._sampler = _Sampler()
            self._sampler.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            peak = torch.cuda.max_memory_allocated(self._device)
        elif self._sampler is not None:
            peak = self._sampler.stop()
        else:
            peak = _status_bytes("VmHWM")
        self.rise = max(0, peak - self.before)


class _Sampler(threading.Thread):
    """Keeps the highest resident set that it sees; torch lets go of the interpreter while it works."""

    def __init__(self) -> None:
        super().__init__(name="kvquant-peak-memory", daemon=True)
        self._peak = 0
        self._done = threading.Event()

    def run(self) -> None:
        """Look until told to stop."""
        while not self._done.wait(_SAMPLE_INTERVAL):
            self._peak = max(self._peak, resident_bytes())

    def stop(self) -> int:
        """Stop looking and return the peak in bytes."""
        self._done.set()
        self.join()
        return max(self._peak, resident_bytes())


def resident_bytes() -> int:
    """Return the resident set of this process in bytes.

    Raises:
        MissingExtraError: this is not Linux, and psutil is not installed.
    """
    if _STATUS.exists():
        return _status_bytes("VmRSS")
    try:
        psutil = importlib.import_module("psutil")  # not by a statement: it ships no types
    except ImportError as cause:
        raise MissingExtraError("psutil", "pip install 'kvquant[eval]'") from cause
    return int(psutil.Process().memory_info().rss)


def _status_bytes(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    return 0


def _reset_kernel_peak() -> bool:
    """Make the kernel's peak start again from now; False where it cannot or only pretends to."""
    try:
        _CLEAR.write_text("5")  # proc(5): resets the peak resident set
        return 0 < _status_bytes("VmHWM") <= _status_bytes("VmRSS") + _KERNEL_SLACK
    except OSError:
        return False


# ------------------------------------------------------------------------------------------------ bandwidth


def read_bandwidth(device: torch.device) -> float:
    """Return the bytes a second at which the device reads memory, with torch's threads.

    It is the fastest of some passes over 256 MiB, far more than caches hold, by each of three reductions that read
    every number once; which of them is fastest depends on the processor and on the number of threads.
    """
    numbers = torch.ones(_BANDWIDTH_BYTES // 4, device=device)
    rows = numbers.view(_BANDWIDTH_ROWS, -1)
    ways: list[Callable[[], object]] = [numbers.sum, lambda: torch.dot(numbers, numbers), lambda: rows.amax(1)]
    best = min(seconds(way, device) for _ in range(_BANDWIDTH_PASSES) for way in ways)
    return numbers.nbytes / best


# ------------------------------------------------------------------------------------------------ what and where


def describe_machine(device: str) -> dict[str, Any]:
    """Return what figures depend on: processor, threads, other load, device and versions."""
    described: dict[str, Any] = {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "python": platform.python_version(),
        "kvquant": __version__,
    }
    for distribution in ("torch", "transformers"):
        described[distribution] = importlib.metadata.version(distribution)
    return described


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


# ------------------------------------------------------------------------------------------------ tensors held


def held_bytes(*holders: Any) -> int:
    """Return the bytes of all tensors that some objects hold, each storage counted once.

    Follows attributes, mappings and sequences, and looks into tensor subclasses such as quanto's.
    """
    return tensor_bytes(_tensors(holders, {}))


def _tensors(holder: Any, seen: dict[int, Any]) -> Iterator[Tensor]:
    if id(holder) in seen or isinstance(holder, type):
        return
    seen[id(holder)] = holder  # kept alive, so that no other object gets its id meanwhile
    if isinstance(holder, Tensor):
        # Subclasses of this kind own no numbers themselves; their parts do.
        parts = holder.__tensor_flatten__()[0] if hasattr(holder, "__tensor_flatten__") else None
        if parts is None:
            yield holder
        else:
            yield from _tensors([getattr(holder, part) for part in parts], seen)
    elif isinstance(holder, dict):
        yield from _tensors(list(holder.values()), seen)
    elif isinstance(holder, (list, tuple, set)):
        for item in holder:
            yield from _tensors(item, seen)
    elif hasattr(holder, "__dict__") and not callable(holder):
        yield from _tensors(vars(holder), seen)

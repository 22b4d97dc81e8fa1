"""The kernels that can attend over packed tokens, and which of them is there; imports none of them, and no torch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.util import find_spec

from kvquant.errors import MissingExtraError, OptionValueError

#: The environment variable that chooses a kernel.
VARIABLE = "KVQUANT_ATTENTION"
AUTO, TORCH = "auto", "torch"


@dataclass(frozen=True)
class KernelInfo:
    """A kernel.

    Attributes:
        name: what the environment variable calls it, and the library that it needs.
        module: where it is: a module with `attend_body` and `why_not`.
        device: the torch device type that it is for.
        install: what brings the library.
        measured: whether it has run, and been timed, on the device that it is for; ``auto`` takes no other.
    """

    name: str
    module: str
    device: str
    install: str = "pip install 'kvquant[fused]'"
    measured: bool = True

    @property
    def installed(self) -> bool:
        """Whether its library is there."""
        return find_spec(self.name) is not None


KERNELS = (
    KernelInfo("numba", "kvquant.attention.numba_kernels", "cpu"),
    KernelInfo("triton", "kvquant.attention.triton_kernels", "cuda", measured=False),
)


def asked_for() -> str:
    """Return what the environment asks for: a kernel's name, ``"torch"`` or ``"auto"``.

    Raises:
        OptionValueError: there is no such kernel.
        MissingExtraError: its library is not installed.
    """
    value = os.environ.get(VARIABLE, "").strip().lower() or AUTO
    known = {kernel.name: kernel for kernel in KERNELS}
    if value not in (AUTO, TORCH, *known):
        raise OptionValueError(VARIABLE, value, f"one of {', '.join([AUTO, *known, TORCH])}")
    if value in known and not known[value].installed:
        raise MissingExtraError(known[value].name, known[value].install)
    return value


def describe(device: str = "cpu") -> str:
    """Return in words what attends on `device` over tokens in a canonical format, and how to have it faster."""
    asked = asked_for()
    if asked != AUTO:
        return f"{asked} ({VARIABLE})"
    for kernel in KERNELS:
        if kernel.device == device and kernel.measured:
            return kernel.name if kernel.installed else f"{TORCH}; faster with {kernel.name}: {kernel.install}"
    return TORCH

"""Devices that are none, for tests of where things are put, on a machine with nothing but a CPU.

A tensor that pretends is computed with on the CPU, and says that it is elsewhere. As on real devices, operations want
all their tensors on one. torch knows the kind of device from then on for the whole process, so such tests run in
processes of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

KIND = "privateuseone"  # torch's name for devices that it does not know

_setup_privateuseone_for_python_backend()


class Pretending(Tensor):
    """A tensor that says it is on a device.

    Attributes:
        numbers: the tensor of the CPU behind it.
    """

    numbers: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, numbers: Tensor, device: torch.device) -> Pretending:
        layout = {"strides": numbers.stride(), "storage_offset": numbers.storage_offset(), "dtype": numbers.dtype}
        tensor = Tensor._make_wrapper_subclass(cls, numbers.shape, **layout, device=device)
        tensor.numbers = numbers
        return tensor

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.numbers.untyped_storage()

    def tolist(self) -> Any:
        return self.numbers.tolist()

    def __repr__(self, **_: Any) -> str:
        return f"{self.numbers!r} on {self.device}"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class PretendedDevices(TorchDispatchMode):
    """As long as it is entered, tensors can be made on, and moved to, the devices ``privateuseone:0`` and ``:1``."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operator on the CPU; what comes out is where it would be."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    devices = {tensor.device for tensor in tensors if tensor.dim() or isinstance(tensor, Pretending)}
    name = func._schema.name
    if len(devices) > 1 and name != "aten::copy_":
        raise RuntimeError(f"{name} was given tensors on {' and '.join(sorted(map(str, devices)))}")
    if kwargs.get("device") is not None:
        device = torch.device(kwargs["device"])
    else:
        device = args[0].device if name == "aten::copy_" else next(iter(devices), torch.device("cpu"))
    known = {id(tensor.numbers): tensor for tensor in tensors if isinstance(tensor, Pretending)}

    def there(value: Any) -> Any:
        if not isinstance(value, Tensor) or device.type != KIND:
            return value
        return known.get(id(value)) if id(value) in known else Pretending(value, device)

    return tree_map(there, func(*tree_map(_here, args), **tree_map(_here, kwargs)))


def _here(value: Any) -> Any:
    if isinstance(value, Pretending):
        return value.numbers
    return torch.device("cpu") if isinstance(value, torch.device) else value

"""Host memory: where offloaded bodies live, and how copies of their pages come to the device that reads them.

Pages lie in host memory and are written there. What attention reads are copies, still packed, which are fetched ahead
on a stream of their own and let go after. On a device whose memory is the host's there is nothing to copy.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from kvquant.engine.pages import Page

HOST = torch.device("cpu")


def is_apart(device: torch.device) -> bool:
    """Whether a device has a memory of its own, so that what lies in host memory must be copied to be read."""
    return device.type not in ("cpu", "meta")


@dataclass(frozen=True)
class Place:
    """Where a body is to be.

    Attributes:
        device: whose memory it lies in and is read in; None for that of the states.
        offload: whether it lies in host memory, and copies of it come to the device.
    """

    device: torch.device | None = None
    offload: bool = False


@dataclass(frozen=True)
class Home:
    """Where pages lie.

    Attributes:
        device: in whose memory.
        far: whether it is host memory, of which the device that reads the pages needs copies.
        pinned: whether that is memory that CUDA can copy from while it works.
    """

    device: torch.device
    far: bool = False
    pinned: bool = False

    def empty(self, shape: Iterable[int], dtype: torch.dtype) -> Tensor:
        """Return an empty tensor here."""
        return torch.empty(tuple(shape), dtype=dtype, device=self.device, pin_memory=self.pinned)

    def keep(self, tensor: Tensor) -> Tensor:
        """Return a tensor with the numbers of `tensor` here, itself if it is."""
        if tensor.device == self.device and tensor.is_pinned() >= self.pinned:
            return tensor
        return self.empty(tensor.shape, tensor.dtype).copy_(tensor)


def host_for(device: torch.device) -> Home:
    """Return where pages lie that are offloaded from `device`."""
    return Home(HOST, far=True, pinned=device.type == "cuda") if is_apart(device) else Home(device)


def empty_like(tensor: Tensor, shape: Iterable[int]) -> Tensor:
    """Return an empty tensor of another shape where `tensor` is, pinned if that is."""
    return tensor.new_empty(tuple(shape), pin_memory=tensor.is_pinned())


def clone(tensor: Tensor) -> Tensor:
    """Return a copy with a contiguous storage of its own, pinned if `tensor` is."""
    return empty_like(tensor, tensor.shape).copy_(tensor)


class Copies:
    """Copies of pages on the device that reads them.

    A copy stands for its page as it was when it was fetched: whoever changes the page forgets the copy.
    """

    def __init__(self, device: torch.device) -> None:
        """Begin without copies, for pages that `device` will read."""
        self._device = device
        self._copies: dict[Page, Page] = {}
        self._event: Any = None
        self._awaited = True

    def __reduce__(self) -> tuple[Any, ...]:
        return Copies, (self._device,)  # whoever copies a cache, or pickles it, fetches again

    def __del__(self) -> None:
        # The memory goes back while the other stream may still be writing to it.
        self._wait()

    def __iter__(self) -> Iterator[Page]:
        return iter(self._copies.values())

    def fetch(self, pages: Iterable[Page]) -> None:
        """Begin to copy the pages of which there is no copy yet; returns at once where the device can go on meanwhile.

        On CUDA the memory comes from the stream that will read it, which waits before it does, so that nothing is held
        back when a copy is let go; and the copying stream waits for whoever had that memory before.
        """
        missing = [page for page in pages if page not in self._copies]
        if not missing:
            return
        with torch.inference_mode(False), torch.no_grad():  # noqa: FBT003  # torch knows it by position only
            pairs: list[tuple[Tensor, Tensor]] = []

            def room(tensor: Tensor) -> Tensor:
                pairs.append((torch.empty_like(tensor, device=self._device), tensor))
                return pairs[-1][0]

            made = {page: page.mapped(room) for page in missing}
            if self._device.type == "cuda":
                stream = _copying_stream(self._device)
                stream.wait_stream(torch.cuda.current_stream(self._device))
                with torch.cuda.stream(stream):
                    for target, source in pairs:
                        target.copy_(source, non_blocking=True)
                self._event, self._awaited = stream.record_event(), False
            else:
                for target, source in pairs:
                    target.copy_(source)
        self._copies.update(made)

    def instead_of(self, pages: list[Page]) -> list[Page]:
        """Return `pages`, each in its copy where there is one, for the device to read."""
        self._wait()
        return [self._copies.get(page, page) for page in pages]

    def forget(self, pages: Iterable[Page] | None = None) -> None:
        """Let go of the copies of `pages`, all by default, which may be changed from then on."""
        self._wait()
        for page in list(self._copies) if pages is None else pages:
            self._copies.pop(page, None)

    def _wait(self) -> None:
        """Have the stream that will read the copies, or get their memory, wait for what is under way."""
        if not self._awaited:
            torch.cuda.current_stream(self._device).wait_event(self._event)
            self._awaited = True


@functools.cache
def _copying_stream(device: torch.device) -> Any:
    return torch.cuda.Stream(device)

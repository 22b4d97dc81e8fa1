"""Tensors to a file and back: written in bounded pieces and put in place whole, mapped and checked when read."""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import secrets
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from kvquant.cache.header import DTYPES, MOST_DESCRIPTION, MOST_TENSORS, Entry, Header, header_bytes, stamp
from kvquant.engine.state import Source, Stack, dtype_name
from kvquant.errors import CacheSaveError, DamagedFileError, UnsavableCacheError

#: Bytes that are copied at once where tensors have to be.
_PIECE_BYTES = 1 << 23

_KINDS = {name: kind for kind, (name, _) in DTYPES.items()}
_NO_CHECKSUM = "0" * 64

# ------------------------------------------------------------------------------------------------ writing


def write(path: str | os.PathLike[str], tensors: Mapping[str, Tensor | Stack], description: str) -> None:
    """Write a file; whatever happens, `path` is afterwards what it was, or the whole new file.

    Args:
        path: the file.
        tensors: what it holds, by name; at most 16 MiB of it are copied at a time.
        description: see `kvquant.cache.header`.

    Raises:
        UnsavableCacheError: there is a tensor that safetensors has no type for, or too much.
        CacheSaveError: it could not be written.
    """
    # The widest types first, as safetensors does it, so that each number lies at a multiple of its size.
    planned = [(_entry(name, tensor), tensor) for name, tensor in tensors.items()]
    planned.sort(key=lambda pair: -DTYPES[pair[0].kind][1])
    entries = [entry for entry, _ in planned]
    if len(entries) > MOST_TENSORS or len(description) > MOST_DESCRIPTION:
        raise UnsavableCacheError(
            f"it has {len(entries)} tensors and {len(description)} characters of description, and a file has at most "
            f"{MOST_TENSORS} and {MOST_DESCRIPTION}"
        )
    unknown = header_bytes(description, entries, {entry.name: _NO_CHECKSUM for entry in entries})
    with _replacing(Path(path)) as file:
        file.write(unknown)
        checksums = {entry.name: _write_tensor(file, tensor) for entry, tensor in planned}
        known = header_bytes(description, entries, checksums)
        file.seek(0)
        file.write(known)


def _entry(name: str, tensor: Tensor | Stack) -> Entry:
    parts = tensor.parts if isinstance(tensor, Stack) else (tensor,)
    first = parts[0]
    if any(type(part) is not Tensor for part in parts):
        raise UnsavableCacheError(f"{name} is no plain tensor")
    if first.layout != torch.strided or dtype_name(first.dtype) not in _KINDS:
        raise UnsavableCacheError(f"{name} is of type {first.dtype} and layout {first.layout}, which no file can hold")
    shape = (len(parts), *first.shape) if isinstance(tensor, Stack) else tuple(first.shape)
    return Entry(name, _KINDS[dtype_name(first.dtype)], shape)


def _write_tensor(file: BinaryIO, tensor: Tensor | Stack) -> str:
    """Write a tensor's numbers and return their checksum."""
    checksum = hashlib.sha256()
    for part in tensor.parts if isinstance(tensor, Stack) else (tensor,):
        for piece in _pieces(part.detach()):
            numbers: memoryview = piece.cpu().numpy().data
            checksum.update(numbers)
            file.write(numbers)
    return checksum.hexdigest()


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """Yield a tensor's numbers in order as bytes, at most `_PIECE_BYTES` of them at a time."""
    if tensor.is_contiguous():
        yield from tensor.reshape(-1).view(torch.uint8).split(_PIECE_BYTES)
    elif tensor.nbytes <= _PIECE_BYTES:
        yield tensor.contiguous().reshape(-1).view(torch.uint8)
    elif tensor.shape[0] == 1:
        yield from _pieces(tensor[0])
    else:
        for half in tensor.split(-(-tensor.shape[0] // 2)):
            yield from _pieces(half)


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path`, and put it in its place once it is written and on the disk.

    Raises:
        CacheSaveError: something failed. The temporary file is gone, and `path` is what it was.
    """
    path = Path(os.path.realpath(path))  # a link goes on being one
    if path.exists() and not path.is_file():
        raise CacheSaveError(path, "there is something that is no file")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except BaseException as cause:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(cause, OSError):
            raise CacheSaveError(path, cause.strerror or str(cause)) from cause
        raise


def _sync_folder(folder: Path) -> None:
    """Have the new name survive a crash, too, where the system lets folders be synchronised."""
    with contextlib.suppress(OSError):
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


# ------------------------------------------------------------------------------------------------ reading


class MappedTensor(Source):
    """A tensor of a mapped file.

    Its pages are read when they are touched. They may be written to: the system then makes a copy for this process
    alone, and the file never changes.
    """

    def __init__(self, entry: Entry, mapped: mmap.mmap, start: int) -> None:
        """Say where it is."""
        self.shape, self.dtype, self.nbytes = entry.shape, entry.dtype, entry.nbytes
        self._mapped, self._start = mapped, start

    def read(self) -> Tensor:
        """Return it, with a storage of its own."""
        return self._read(self.shape, self._start)

    def parts(self) -> list[Tensor]:
        """Return what lies along its first dimension, each with a storage of its own."""
        step = self.nbytes // max(1, self.shape[0])
        return [self._read(self.shape[1:], self._start + step * at) for at in range(self.shape[0])]

    def checksum(self) -> str:
        """Return the SHA-256 of its numbers."""
        with memoryview(self._mapped) as whole, whole[self._start : self._start + self.nbytes] as numbers:
            return hashlib.sha256(numbers).hexdigest()

    def _read(self, shape: tuple[int, ...], start: int) -> Tensor:
        dtype: torch.dtype = getattr(torch, self.dtype)
        count = torch.Size(shape).numel()
        if not count:
            return torch.empty(shape, dtype=dtype)
        if start % dtype.itemsize:  # never in a file of ours
            bytewise = torch.frombuffer(self._mapped, dtype=torch.uint8, count=count * dtype.itemsize, offset=start)
            return bytewise.clone().view(dtype).reshape(shape)
        return torch.frombuffer(self._mapped, dtype=dtype, count=count, offset=start).reshape(shape)


def open_tensors(header: Header) -> dict[str, MappedTensor]:
    """Map a file's tensors into memory.

    Raises:
        OSError: the file cannot be read.
        DamagedFileError: it is not the file any more whose header this is.
    """
    with header.path.open("rb") as file:
        if stamp(file.fileno()) != header.stamp:
            raise DamagedFileError(header.path, "it was changed while it was being read. Load it again.")
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    return {name: MappedTensor(entry, mapped, at) for name, (entry, at) in header.places().items()}


def verify(header: Header, tensors: Mapping[str, MappedTensor]) -> None:
    """Compare all tensors with their checksums, on all processors.

    Raises:
        DamagedFileError: one is another.
    """
    names = sorted(tensors, key=lambda name: -tensors[name].nbytes)
    with ThreadPoolExecutor() as pool:
        found = pool.map(lambda name: tensors[name].checksum(), names)
        for name, checksum in zip(names, found, strict=True):
            if checksum != header.checksums[name]:
                raise DamagedFileError(header.path, f"{name} was altered after it was saved (the checksum is another).")

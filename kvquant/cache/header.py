"""The header of a saved cache: a safetensors file with a description of the cache and checksums beside its tensors.

The format, version 1. Tensors and their places are as safetensors has them; its metadata, which are texts, are

- ``format``: ``"kvquant cache"``, and ``format_version``: ``"1"``;
- ``cache``: the cache without its tensors, as JSON (see `kvquant.cache.io`);
- ``checksums``: SHA-256 of each tensor's bytes, as a JSON mapping of names to hexadecimal digits;
- ``checksum``: SHA-256 over the three before, and names, types and shapes of all tensors.

Checksums find what was altered by accident. Whoever alters a file on purpose can compute them anew, so nothing else
relies on them: every length, shape, type and name is checked for itself. This module imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from kvquant.errors import CacheFileError, DamagedFileError, FormatVersionError

FORMAT = "kvquant cache"
FORMAT_VERSION = "1"

#: safetensors' types that a cache may hold: torch's name, bytes.
DTYPES = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U64": ("uint64", 8),
    "U32": ("uint32", 4),
    "U16": ("uint16", 2),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
}

#: Bounds within which a file is read at all; caches stay far below. safetensors has one of its own, 100 MB of header.
MOST_TENSORS, MOST_DESCRIPTION = 1 << 17, 1 << 24
_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True)
class Entry:
    """A tensor of a file.

    Attributes:
        name: its dotted name.
        kind: its type, in safetensors' words.
        shape: its shape.
    """

    name: str
    kind: str
    shape: tuple[int, ...]

    @property
    def dtype(self) -> str:
        """Its type, in torch's words."""
        return DTYPES[self.kind][0]

    @property
    def nbytes(self) -> int:
        """Bytes of its numbers."""
        return DTYPES[self.kind][1] * math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """Everything of a file but its tensors' numbers.

    Attributes:
        path: the file.
        stamp: what tells it from a file that has taken its place.
        start: where the first tensor begins.
        entries: its tensors, in order and without gaps.
        checksums: SHA-256 of each tensor's bytes, in hexadecimal, by name.
        description: the cache without its tensors, as it was parsed: nothing of it has been checked.
    """

    path: Path
    stamp: tuple[int, ...]
    start: int
    entries: tuple[Entry, ...]
    checksums: Mapping[str, str]
    description: Mapping[str, Any]

    @property
    def nbytes(self) -> int:
        """Bytes of the file."""
        return self.start + sum(entry.nbytes for entry in self.entries)

    def places(self) -> dict[str, tuple[Entry, int]]:
        """Return each tensor with its place in the file, by name."""
        places, at = {}, self.start
        for entry in self.entries:
            places[entry.name] = (entry, at)
            at += entry.nbytes
        return places


def read_header(path: str | os.PathLike[str]) -> Header:
    """Read a file's header, and nothing else of it.

    Raises:
        OSError: the file cannot be read.
        DamagedFileError: it is no safetensors file, is cut off, or its header was altered.
        CacheFileError: it is a safetensors file of another kind, or beyond all bounds.
        FormatVersionError: it is of another format version.
    """
    where = Path(path)
    with where.open("rb") as file:
        seen, begin = stamp(file.fileno()), file.read(_LENGTH.size)
    try:
        with safe_open(where, framework="numpy") as opened:
            metadata = opened.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise CacheFileError(where, "it is a safetensors file, and not one of a cache that kvquant saved.")
            if metadata.get("format_version") != FORMAT_VERSION:
                raise FormatVersionError(where, str(metadata.get("format_version")), FORMAT_VERSION)
            names = opened.offset_keys()
            if len(names) > MOST_TENSORS:
                raise CacheFileError(where, f"it has {len(names)} tensors, and {MOST_TENSORS} are the most.")
            slices = [opened.get_slice(name) for name in names]
            entries = tuple(
                Entry(name, part.get_dtype(), tuple(part.get_shape())) for name, part in zip(names, slices, strict=True)
            )
    except SafetensorError as cause:
        reason = str(cause).removeprefix("Error while deserializing header: ")
        raise DamagedFileError(where, f"it is no saved cache, or it was cut off or altered ({reason}).") from cause
    for entry in entries:
        if entry.kind not in DTYPES:
            raise CacheFileError(where, f"tensor {entry.name!r} is of type {entry.kind}, which no cache has.")
    description, checksums = _checked(where, metadata, entries)
    start = _LENGTH.size + int(_LENGTH.unpack(begin)[0])
    return Header(where, seen, start, entries, checksums, description)


def stamp(descriptor: int) -> tuple[int, ...]:
    """Return what tells an open file from another of the same name."""
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _checked(
    path: Path, metadata: Mapping[str, str], entries: Sequence[Entry]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return description and checksums, once the header's own checksum has proved right."""
    text, listed = metadata.get("cache", ""), metadata.get("checksums", "")
    if metadata.get("checksum") != _checksum(text, listed, entries):
        raise DamagedFileError(path, "its header was altered after it was saved (the checksum is another).")
    if len(text) > MOST_DESCRIPTION:
        raise CacheFileError(path, f"its description has {len(text)} characters, and {MOST_DESCRIPTION} are the most.")
    try:
        description, checksums = json.loads(text), json.loads(listed)
    except (ValueError, RecursionError) as cause:
        raise CacheFileError(path, f"its description is no JSON that can be read ({cause}).") from cause
    names = {entry.name for entry in entries}
    if not isinstance(description, dict) or not isinstance(checksums, dict) or set(checksums) != names:
        raise CacheFileError(path, "its description is none of a cache.")
    return description, {name: str(checksum) for name, checksum in checksums.items()}


def _checksum(description: str, checksums: str, entries: Iterable[Entry]) -> str:
    shapes = sorted([entry.name, entry.kind, list(entry.shape)] for entry in entries)
    return hashlib.sha256(json.dumps([FORMAT_VERSION, description, checksums, shapes]).encode()).hexdigest()


def header_bytes(description: str, entries: Sequence[Entry], checksums: Mapping[str, str]) -> bytes:
    """Return the bytes of a header; their number does not depend on the checksums."""
    listed = json.dumps(dict(checksums))
    header: dict[str, Any] = {
        "__metadata__": {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "cache": description,
            "checksums": listed,
            "checksum": _checksum(description, listed, entries),
        }
    }
    at = 0
    for entry in entries:
        header[entry.name] = {
            "dtype": entry.kind,
            "shape": list(entry.shape),
            "data_offsets": [at, at + entry.nbytes],
        }
        at += entry.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that numbers lie where their type wants them
    return _LENGTH.pack(len(text)) + text

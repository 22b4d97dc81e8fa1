"""What a thing is, in tensors and plain builtins: how a cache is written down, and how it is made anew.

Everything that holds tokens says what it is with `state()` and takes that on again with `restore()`, each where the
data lives. What is read is believed nothing: `Saved` hands out meta data by type and range, and tensors by shape and
type, before anything is allocated. This module imports no torch.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor

#: The largest number that meta data may hold, far above any length or size.
MOST = 1 << 48


class MisfitError(ValueError):
    """Something in a saved state does not fit; who knows the file makes a `CacheFileError` of it."""


@dataclass(frozen=True, eq=False)
class Stack:
    """Tensors of one shape and type that are written as one, with a dimension in front, without being joined."""

    parts: tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class State:
    """What a thing is.

    Attributes:
        tensors: everything that takes memory, by dotted name.
        meta: everything else, for JSON.
    """

    tensors: dict[str, Tensor | Stack] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)

    def put(self, name: str, part: State) -> None:
        """Take in the state of a part."""
        self.meta[name] = part.meta
        self.tensors.update({f"{name}.{tensor}": value for tensor, value in part.tensors.items()})

    def put_all(self, name: str, parts: Sequence[State]) -> None:
        """Take in the states of several parts, in order."""
        self.meta[name] = [part.meta for part in parts]
        for index, part in enumerate(parts):
            self.tensors.update({f"{name}.{index}.{tensor}": value for tensor, value in part.tensors.items()})


class Source(Protocol):
    """A tensor of a file that has not been read yet.

    Attributes:
        shape: its shape.
        dtype: its type by torch's name, e.g. ``"float16"``.
    """

    shape: tuple[int, ...]
    dtype: str

    def read(self) -> Tensor:
        """Return it, with a storage of its own."""

    def parts(self) -> list[Tensor]:
        """Return what lies along its first dimension, each with a storage of its own."""


class Saved:
    """A saved state, or a part of one.

    Attributes:
        name: dotted name of the part, empty for the whole.
    """

    def __init__(self, meta: object, sources: dict[str, Source], name: str = "") -> None:
        """Look at a state.

        Args:
            meta: the meta data, which must be a mapping.
            sources: all tensors of the file that have not been taken yet, by their full names.
            name: dotted name of the part.
        """
        self.name, self._sources = name, sources
        if not isinstance(meta, dict):
            raise self.misfit("is not described")
        self._meta: dict[str, Any] = meta

    def __contains__(self, key: str) -> bool:
        return key in self._meta

    def __iter__(self) -> Iterator[str]:
        return iter(self._meta)

    def misfit(self, problem: str) -> MisfitError:
        """Return the error that says what is wrong with this part."""
        return MisfitError(f"{self.name or 'it'} {problem}")

    # -------------------------------------------------------------------------------------------- meta data

    def value(self, key: str) -> Any:
        """Return what is there, whatever it is; None where there is nothing."""
        return self._meta.get(key)

    def mapping(self, key: str) -> Mapping[str, Any]:
        """Return a mapping."""
        value = self._meta.get(key)
        if not isinstance(value, dict):
            raise self.misfit(f"has no {key}")
        return value

    def integer(self, key: str, low: int = 0, high: int = MOST) -> int:
        """Return a whole number from `low` to `high`."""
        value = self._meta.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self.misfit(f"has {key}={_shown(value)}, where a whole number from {low} to {high} is expected")
        return value

    def text(self, key: str, among: Collection[str] = ()) -> str:
        """Return a text, one of `among` if there are any."""
        value = self._meta.get(key)
        if not isinstance(value, str) or (among and value not in among):
            expected = f"one of {', '.join(among)}" if among else "a text"
            raise self.misfit(f"has {key}={_shown(value)}, where {expected} is expected")
        return value

    def part(self, key: str) -> Saved:
        """Return a part."""
        return Saved(self._meta.get(key), self._sources, self._inner(key))

    def parts(self, key: str, most: int = MOST) -> list[Saved]:
        """Return the parts of a list, which has at most `most`."""
        value = self._meta.get(key)
        if not isinstance(value, list) or len(value) > most:
            found = f"{len(value)} of them" if isinstance(value, list) else _shown(value)
            raise self.misfit(f"has {key}: {found}, where a list of at most {most} is expected")
        return [Saved(item, self._sources, self._inner(f"{key}.{index}")) for index, item in enumerate(value)]

    # -------------------------------------------------------------------------------------------- tensors

    def has(self, tensor: str) -> bool:
        """Whether there is such a tensor."""
        return self._inner(tensor) in self._sources

    def take(self, tensor: str, shape: Sequence[int], dtypes: Collection[str]) -> Tensor:
        """Return a tensor, which is taken once."""
        source = self._taken(tensor)
        if source.shape != tuple(shape) or source.dtype not in dtypes:
            raise self.misfit(
                f"has {tensor} of shape {list(source.shape)} in {source.dtype}, where {list(shape)} in "
                f"{' or '.join(dtypes)} is expected"
            )
        return source.read()

    def take_any(self, tensor: str) -> Tensor:
        """Return a tensor of any shape and type, which is taken once."""
        return self._taken(tensor).read()

    def take_parts(self, tensor: str, count: int) -> list[Tensor]:
        """Return the `count` tensors that lie along the first dimension of one, which is taken once."""
        source = self._taken(tensor)
        if source.shape[:1] != (count,):
            raise self.misfit(f"has {tensor} of shape {list(source.shape)}, where {count} in front is expected")
        return source.parts()

    def _taken(self, tensor: str) -> Source:
        source = self._sources.pop(self._inner(tensor), None)
        if source is None:
            raise self.misfit(f"has no {tensor}")
        return source

    def _inner(self, key: str) -> str:
        return f"{self.name}.{key}" if self.name else key


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a type of tensors, e.g. ``"float16"``."""
    return str(dtype).removeprefix("torch.")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."

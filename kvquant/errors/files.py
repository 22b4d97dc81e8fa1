"""Saved caches that cannot be loaded, and caches that cannot be saved."""

from __future__ import annotations

from collections.abc import Sequence

from kvquant.errors.base import KVQuantError


class CacheFileError(KVQuantError, ValueError):
    """A file that no cache can be made of.

    Attributes:
        path: the file.
        problem: what is wrong with it.
    """

    def __init__(self, path: object, problem: str) -> None:
        self.path, self.problem = str(path), problem
        super().__init__(f"cannot load {self.path!r}: {problem}")


class DamagedFileError(CacheFileError):
    """A file that is no saved cache, or was cut off or altered after it was saved."""


class FormatVersionError(CacheFileError):
    """A cache that was saved in another version of the file format.

    Attributes:
        found: the version of the file.
        readable: the version that this kvquant reads.
    """

    def __init__(self, path: object, found: str, readable: str) -> None:
        self.found, self.readable = found, readable
        super().__init__(
            path,
            f"its format is version {found!r}, and this kvquant reads version {readable!r}. Save the cache anew with "
            "this kvquant, or load it with the one that saved it.",
        )


class OtherModelError(CacheFileError):
    """A cache of another model.

    Attributes:
        differences: what differs, in words.
    """

    def __init__(self, path: object, differences: Sequence[str]) -> None:
        self.differences = tuple(differences)
        super().__init__(path, f"it is the cache of another model. {'; '.join(self.differences)}.")


class CacheTooLargeError(CacheFileError, MemoryError):
    """A cache that would need more memory than the device has.

    Attributes:
        needed, available: bytes.
    """

    def __init__(self, path: object, needed: int, available: int) -> None:
        self.needed, self.available = needed, available
        super().__init__(
            path,
            f"its window and spare room would take {needed / 2**30:.1f} GiB of memory beside the file, and there are "
            f"{available / 2**30:.1f} GiB.",
        )


class CacheSaveError(KVQuantError, OSError):
    """A cache could not be written; the system's own error is the `__cause__`.

    Attributes:
        path: where it was to be.
    """

    def __init__(self, path: object, reason: str) -> None:
        self.path = str(path)
        super().__init__(f"cannot save the cache as {self.path!r}: {reason}. What was there before is as it was.")


class UnsavableCacheError(KVQuantError, TypeError):
    """A cache that holds something which no file can hold.

    Attributes:
        where: the layer, e.g. ``"layer 3"``; empty where it is the whole cache.
        problem: what it is.
    """

    def __init__(self, problem: str, where: str = "") -> None:
        self.problem, self.where = problem, where
        super().__init__(f"the cache cannot be saved: {where + ': ' if where else ''}{problem}.")

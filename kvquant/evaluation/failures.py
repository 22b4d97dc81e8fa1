"""What caches raise while they are measured, and how it is told."""

from __future__ import annotations

import torch

from kvquant.errors import KVQuantError

#: What a plugin or a library may raise without ending the measurement of the others. That memory ran out is a
#: RuntimeError of torch's, too: who must not pass over that asks `is_out_of_memory`.
FAILURES = (
    KVQuantError,
    RuntimeError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    ImportError,
    AssertionError,
)
#: What torch's allocator on the CPU says; it raises no class of its own.
_ALLOCATOR_SAYS = ("can't allocate memory", "not enough memory")


def one_line(error: BaseException) -> str:
    """Return an error's message as one line, with its type where there is no message."""
    return " ".join(str(error).split()) or type(error).__name__


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error says that memory ran out, on whatever device, or comes of one that does."""
    if error is None:
        return False
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    if isinstance(error, RuntimeError) and any(words in str(error) for words in _ALLOCATOR_SAYS):
        return True
    return is_out_of_memory(error.__cause__)

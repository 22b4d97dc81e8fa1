"""The backend in a cache, as users meet it."""

from __future__ import annotations

from kvquant.engine.state import dtype_name
from kvquant.errors import listing
from kvquant.testing.check import check, some_cases
from kvquant.testing.in_cache import InCache
from kvquant.testing.subject import Case, Subject, known_name


@check("cache", "width")
def cache(case: Case) -> None:
    """In a cache: append, crop and reorder leave the dequantised states right."""
    with known_name(case.backend) as name:
        _in_cache(case, name).require_kept(in_parts=case.backend.capabilities.deterministic)


@check("attention", "backend")
def attention(subject: Subject) -> str:
    """In a cache: attention over the packed states equals that over the dequantised states."""
    # One for each axis: a kernel may have to be compiled.
    cases = {case.scheme.axis: case for case in some_cases(subject, "usual")}
    with known_name(subject.backend) as name:
        return listing(dict.fromkeys(_in_cache(case, name).require_attention() for case in cases.values()))


def _in_cache(case: Case, name: str) -> InCache:
    scheme, along_tokens = case.scheme, case.scheme.axis == "channel"
    options = {
        "backend": name,
        "nbits": scheme.nbits,
        "axis_key": scheme.axis,
        "axis_value": scheme.axis,
        "group_size": scheme.group_size,
        "compute_dtype": dtype_name(case.dtype),
        "options": dict(scheme.options),
    }
    head_dim = 32 if along_tokens else -(-32 // scheme.group_size) * scheme.group_size
    return InCache(options, head_dim, scheme.group_size if along_tokens else 32, case.dtype, case.device)

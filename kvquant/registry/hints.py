"""What to install for backends and libraries that we know.

A curated table: an install command is never made from what somebody typed, which would send them to whoever registered
that name on the package index.
"""

from __future__ import annotations

#: Backend name -> what to do when there is no such backend.
BACKENDS = {
    "hqq": "pip install 'kvquant[hqq]'",
    "quanto": "pip install 'kvquant[quanto]'",
    "bitsandbytes": "pip install 'kvquant[bitsandbytes]'",
}


def install_hint(backend: str) -> str:
    """Return the command that brings `backend`, or an empty string for one that we do not know."""
    return BACKENDS.get(backend, "")

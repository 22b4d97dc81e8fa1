"""Backends that tests register in-process, and the settings of hypothesis."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

import kvquant
from kvquant.plugin import BackendSpec, Capabilities, Scheme
from kvquant.plugin.capabilities import TRELLIS_WIDTHS
from tests.support import FORMATS

# Examples take what they take on a busy machine; a failing one is printed with the call that repeats it.
settings.register_profile("default", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("default")

# The tensors here are tiny: threads would cost more than they bring, and on a busy machine far more.
torch.set_num_threads(1)

# A kernel is compiled for each kind of stream, which takes seconds; tests of kernels ask for them.
os.environ.setdefault("KVQUANT_ATTENTION", "torch")

# Without a GPU, Triton's kernels are interpreted. Triton asks once, where it is imported, so this comes before that.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Tests never reach for a model hub.
os.environ["HF_HUB_OFFLINE"] = "1"

_numbers = itertools.count()
ALL_WIDTHS = (1, 2, 3, 4, 8)


@pytest.fixture
def backend() -> Iterator[Callable[..., str]]:
    """Register a quantizer class (or any factory) as a backend of its own and return the backend's name."""
    names: list[str] = []

    def register(factory: Callable[[Scheme], Any], **capabilities: Any) -> str:
        name = f"test-{next(_numbers)}"
        declared = Capabilities(
            **{"nbits": ALL_WIDTHS, "dtypes": ("float32", "float64", "float16", "bfloat16"), **capabilities}
        )
        kvquant.register(BackendSpec(name, factory, declared))
        names.append(name)
        return name

    yield register
    for name in names:
        kvquant.unregister(name)


@pytest.fixture(scope="module")
def formats() -> Iterator[dict[str, str]]:
    """Names of backends, one for each format: ``{"affine": "test-affine", ...}``."""
    for kind, factory in FORMATS.items():
        widths = TRELLIS_WIDTHS if kind == "trellis" else ALL_WIDTHS
        kvquant.register(BackendSpec(f"test-{kind}", factory, Capabilities(nbits=widths, formats=(kind,))))
    yield {kind: f"test-{kind}" for kind in FORMATS}
    for kind in FORMATS:
        kvquant.unregister(f"test-{kind}")

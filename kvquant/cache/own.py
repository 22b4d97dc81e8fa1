"""Tensors that a cache keeps."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def own_tensors() -> Iterator[None]:
    """Make tensors that outlive the caller's mode: a cache filled in inference mode can go on outside it."""
    with torch.inference_mode(False), torch.no_grad():  # noqa: FBT003  # torch.compile knows it by position only
        yield

"""What a saved cache was written with, and whether it can be read with what is here."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from typing import Any

from kvquant._version import __version__
from kvquant.cache.header import Header
from kvquant.cache.layer import QuantizedLayer
from kvquant.engine.state import Saved
from kvquant.errors import CacheFileError
from kvquant.transforms.heads import identity, is_same


def versions(layers: Sequence[Any]) -> dict[str, Any]:
    """Return the versions that a file of these layers depends on, in plain builtins."""
    used = [layer.settings.key.backend for layer in layers if isinstance(layer, QuantizedLayer)]
    backends = {one.name: {"distribution": one.distribution, "version": one.version} for one in used}
    libraries = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    return {"kvquant": __version__, **libraries, "backends": backends, "transforms": _transforms(layers)}


def _transforms(layers: Sequence[Any]) -> dict[str, dict[str, list[float]]]:
    """Return the identity of each transform that layers use, by its name and the channels of a head."""
    used: dict[str, dict[str, list[float]]] = {}
    for layer in layers:
        for store in layer.stores if isinstance(layer, QuantizedLayer) and layer.is_initialized else ():
            transform, head_dim = store.body.encoder.transform, store.head_dim
            if transform is not None and str(head_dim) not in used.setdefault(transform.name, {}):
                used[transform.name][str(head_dim)] = identity(transform, head_dim)
    return used


def check_versions(header: Header, layers: Sequence[QuantizedLayer]) -> None:
    """Refuse what would be read as other numbers.

    Raises:
        CacheFileError: blocks that only the backend can read are of another version of it, or a transform is another
            map than the one that was used.
    """
    part = Saved(dict(header.description), {}).part("versions")
    if "transforms" in part:  # the first files had none
        _check_transforms(header, part.mapping("transforms"), layers)
    written = part.mapping("backends")
    for layer in layers:
        backend = layer.settings.key.backend
        if not layer.is_initialized or "opaque" not in backend.capabilities.formats:
            continue
        was = written.get(backend.name)
        if was != {"distribution": backend.distribution, "version": backend.version}:
            told = " ".join(map(str, was.values())) if isinstance(was, dict) else "an unknown version"
            raise CacheFileError(
                header.path,
                f"it was quantised by the backend {backend.name!r} in a format of its own, in {told[:80]}; here is "
                f"{backend.distribution} {backend.version}, which may read other numbers.",
            )


def _check_transforms(header: Header, written: Mapping[str, Any], layers: Sequence[QuantizedLayer]) -> None:
    for name, sizes in _transforms(layers).items():
        for head_dim, now in sizes.items():
            then = written[name].get(head_dim) if isinstance(written.get(name), dict) else None
            numbers = isinstance(then, list) and all(type(number) is float for number in then)
            if then is not None and not (numbers and is_same(then, now)):
                raise CacheFileError(
                    header.path,
                    f"its states went through a transform {name!r} that was another map than the one that is here: "
                    "they would be read as other numbers. Install the version that it was saved with.",
                )

"""What a saved cache is, told from its header alone: without torch, and without a look at any number of it."""

from __future__ import annotations

from typing import Any

from kvquant.cache.header import FORMAT_VERSION, Entry, Header
from kvquant.engine.state import MisfitError, Saved
from kvquant.errors import CacheFileError

_MOST_LAYERS = 1 << 12


def describe(header: Header) -> dict[str, Any]:
    """Return in plain builtins what a header says; whether the rest of the file fits it shows when it is loaded.

    Raises:
        CacheFileError: it says nothing of the kind.
    """
    saved = Saved(dict(header.description), {})
    entries = {entry.name: entry for entry in header.entries}
    try:
        layers = _layers("layers", saved, entries)
        cross = _layers("cross", saved, entries) if "cross" in saved else None
        versions = dict(saved.mapping("versions"))
        model = None if saved.value("model") is None else dict(saved.mapping("model"))
        config = dict(saved.mapping("config"))
    except MisfitError as cause:
        raise CacheFileError(header.path, f"{cause}.") from cause
    ids = entries.get("token_ids")
    return {
        "path": str(header.path),
        "nbytes": header.nbytes,
        "format_version": FORMAT_VERSION,
        "versions": versions,
        "model": model,
        "config": config,
        "token_ids": None if ids is None else list(ids.shape),
        "tokens": max((layer["tokens"] for layer in layers), default=0),
        "quantized_tokens": max((layer["quantized_tokens"] for layer in layers), default=0),
        "layers": layers,
        "cross": cross,  # the layers of an encoder's states; None for a model without encoder
    }


def _layers(name: str, saved: Saved, entries: dict[str, Entry]) -> list[dict[str, Any]]:
    parts = saved.parts(name, _MOST_LAYERS)
    return [_layer(index, part, _within(f"{name}.{index}.", entries)) for index, part in enumerate(parts)]


def _within(prefix: str, entries: dict[str, Entry]) -> dict[str, Entry]:
    return {name[len(prefix) :]: entry for name, entry in entries.items() if name.startswith(prefix)}


def _layer(index: int, saved: Saved, entries: dict[str, Entry]) -> dict[str, Any]:
    tokens = quantized = 0
    if "key" in saved:
        store = saved.part("key")
        window = store.part("window")
        quantized = sum(page.integer("length") for page in store.part("body").parts("pages"))
        sink = entries["key.sink"].shape[2:3] if "key.sink" in entries else ()
        tokens = sum(sink) + quantized + window.integer("stop") - window.integer("start")
        tokens += saved.integer("freed") if "freed" in saved else 0
    elif "attributes" in saved:
        attributes, keys = saved.part("attributes"), entries.get("attributes.keys")
        held = keys.shape[2] if keys is not None and len(keys.shape) == 4 else 0
        tokens = attributes.integer("cumulative_length") if "cumulative_length" in attributes else held
    return {
        "layer": index,
        "kind": saved.text("kind"),
        "tokens": tokens,
        "quantized_tokens": quantized,
        "nbytes": sum(entry.nbytes for entry in entries.values()),
    }

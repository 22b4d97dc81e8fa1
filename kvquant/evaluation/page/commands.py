"""The commands that measured what a page shows, as far as settings know them."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from kvquant.engine.config import PRESETS, CacheConfig
from kvquant.evaluation.candidates import FULL
from kvquant.evaluation.reports import ReportFile
from kvquant.plugin.capabilities import AXES

#: What evaluations call the model that kvquant ships.
SHIPPED = "the shipped model"
#: How they call the outlier twin of another.
_TWIN = "the outlier twin "

#: Options that may be given for all of kvquant's caches at once, which their labels do not say.
_SHARED = ("group_size", "residual_length", "sink_length", "axis_key", "axis_value")


def command_line(command: str, options: Mapping[str, Any], name: str) -> str:
    """Return a command as it is typed.

    Args:
        command: its words.
        options: name -> value; True stands for the option alone, None, False and what is empty for none.
        name: the file that its JSON goes to.
    """
    words = [command]
    for option, value in options.items():
        if value is None or value is False or value in ("", [], ()):
            continue
        words.append(f"--{option}")
        if value is not True:
            text = ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
            words.append(shlex.quote(text))
    return " ".join([*words, "--json", ">", shlex.quote(name)])


def plain_model(title: str) -> str:
    """Return the title of the model that an outlier twin is one of; any other title as it is."""
    return title.partition(") of ")[2] or title if title.startswith(_TWIN) else title


def settings_of(file: ReportFile) -> dict[str, Any]:
    """Return the settings of a report that has some."""
    settings: dict[str, Any] = getattr(file.report, "settings", {})
    return settings


def evaluation_options(file: ReportFile) -> dict[str, Any]:
    """Return the options that all evaluations have: those of the model, of the caches and of the run."""
    settings = settings_of(file)
    model, name = settings.get("model", {}), plain_model(file.model)
    device, dtype = model.get("device"), model.get("dtype")
    return {
        "model": None if name == SHIPPED else name,
        "outliers": model.get("outliers"),
        "device": None if device == "cpu" else device,
        "dtype": None if dtype == "float32" else dtype,
        "threads": model.get("threads"),
        "contexts": settings.get("contexts"),
        **cache_options(settings["caches"]),
        "seed": settings.get("seed") or None,
    }


def cache_options(caches: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return ``--backends``, and the options that hold for all of kvquant's caches that do not say otherwise."""
    labels = [label for label in caches if label != FULL]
    said: dict[str, Any] = {"backends": labels or FULL}
    defaults = CacheConfig().to_dict()
    for option in _SHARED:
        values = {
            caches[label].get(option)
            for label in labels
            if caches[label].get("kind") == "kvquant" and not _says(label, option)
        }
        if len(values) == 1 and values != {defaults[option]}:
            said[option.replace("_", "-")] = values.pop()
    return said


def _says(label: str, option: str) -> bool:
    """Whether a label says itself what a cache's option is."""
    name, *details = label.split(":")
    if name in PRESETS and option in PRESETS[name]:
        return True
    axes = option.startswith("axis_") and any(detail in AXES for detail in details)
    return axes or any(detail.partition("=")[0] == option for detail in details)

"""From a claim in metadata to a checked declaration, one plugin at a time, so that none takes the others down.

pluggy validates hook signatures and keeps the plugins. Discovery and errors are ours: its own bulk loading would stop
at the first plugin that fails, skip a second one of the same name in silence, and let a misspelt hook pass.
"""

from __future__ import annotations

import importlib
import re
from dataclasses import fields

import pluggy

from kvquant.errors import PluginError
from kvquant.plugin import hookspecs
from kvquant.plugin.capabilities import AXES, FORMATS, Capabilities
from kvquant.plugin.hookspecs import API_VERSION, PROJECT
from kvquant.plugin.spec import BackendSpec
from kvquant.registry.discovery import Candidate

_NAME = re.compile(r"[a-z0-9]([a-z0-9._-]*[a-z0-9])?")
_WIDTHS = (1, 2, 3, 4, 8)


def load(candidate: Candidate) -> BackendSpec:
    """Import a plugin's module, ask its hook, and check what it declares.

    Raises:
        PluginError: naming what is wrong with the plugin.
    """
    try:
        module = importlib.import_module(candidate.module.partition(":")[0])
    except (Exception, SystemExit) as cause:
        raise PluginError(f"importing {candidate.module} failed: {type(cause).__name__}: {cause}") from cause
    specs = collect(module, candidate.module)
    matching = [spec for spec in specs if isinstance(spec, BackendSpec) and str(spec.name).lower() == candidate.name]
    if not matching:
        declared = ", ".join(repr(getattr(spec, "name", spec)) for spec in specs) or "nothing"
        raise PluginError(f"its hook declares {declared}, not {candidate.name!r} as its entry point says")
    check_spec(matching[0])
    return matching[0]


def collect(plugin: object, label: str) -> list[object]:
    """Return what a plugin's hook declares, unchecked.

    Raises:
        PluginError: it has no hook, a hook that does not exist, or a hook that fails.
    """
    # A manager of its own for each plugin: the same module may stand behind two names.
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(hookspecs)
    try:
        manager.register(plugin)
        manager.check_pending()
        if not manager.get_hookcallers(plugin):
            raise PluginError(f"{label} has no kvquant_register_backends hook; is @hookimpl missing?")
        results = manager.hook.kvquant_register_backends()
    except (pluggy.PluginValidationError, ValueError) as cause:
        raise PluginError(f"{label} does not fit kvquant's hooks: {' '.join(str(cause).split())}") from cause
    except PluginError:
        raise
    except (Exception, SystemExit) as cause:
        raise PluginError(f"its hook failed: {type(cause).__name__}: {cause}") from cause
    for result in results:
        if not isinstance(result, (list, tuple)):
            raise PluginError(f"its hook returned {type(result).__name__} instead of a list of BackendSpec")
    return [spec for result in results for spec in result]


def check_spec(spec: object) -> None:
    """Refuse a declaration that cannot be worked with.

    Raises:
        PluginError: naming the field and what would work.
        IncompatiblePluginError: it was written for another version of the plugin API.
    """
    if not isinstance(spec, BackendSpec):
        raise PluginError(f"{type(spec).__name__} is not a BackendSpec")
    if spec.api_version != API_VERSION:
        raise IncompatiblePluginError(spec.api_version)
    if not isinstance(spec.name, str) or not _NAME.fullmatch(spec.name):
        raise PluginError(f"name={spec.name!r} must be lower-case letters, digits, '.', '_' and '-'")
    if not callable(spec.factory) and (not isinstance(spec.factory, str) or spec.factory.count(":") != 1):
        raise PluginError(f"factory={spec.factory!r} must be 'module:Class' or callable")
    _check_capabilities(spec.capabilities)


class IncompatiblePluginError(PluginError):
    """A plugin was written for another version of the plugin API; listed as incompatible rather than broken."""

    def __init__(self, version: object) -> None:
        self.version = version
        super().__init__(f"it was written for plugin API {version}, this kvquant has {API_VERSION}")


def _check_capabilities(capabilities: object) -> None:
    if not isinstance(capabilities, Capabilities):
        raise PluginError(f"capabilities={capabilities!r} must be a Capabilities")
    allowed: dict[str, tuple[object, ...]] = {"nbits": _WIDTHS, "axes": AXES, "formats": FORMATS}
    for field in fields(Capabilities):
        value = getattr(capabilities, field.name)
        if field.name in ("nbits", "axes", "formats", "devices", "dtypes") and not (isinstance(value, tuple) and value):
            raise PluginError(f"{field.name}={value!r} must be a tuple with something in it")
        for item in allowed.get(field.name, ()) and value:
            if item not in allowed[field.name]:
                raise PluginError(f"{field.name} has {item!r}; only {', '.join(map(str, allowed[field.name]))} exist")
    sizes = capabilities.group_sizes
    if sizes is not None and not (
        isinstance(sizes, tuple) and sizes and all(isinstance(size, int) and size > 0 for size in sizes)
    ):
        raise PluginError(f"group_sizes={sizes!r} must be None or a tuple of whole numbers above 0")
    if capabilities.formats != ("opaque",) and "opaque" in capabilities.formats:
        raise PluginError("the format 'opaque' cannot be mixed with others")
    if any(axis not in AXES for axis in capabilities.axis_aliases.values()):
        raise PluginError(f"axis_aliases={dict(capabilities.axis_aliases)!r} must map integers to 'channel' or 'token'")

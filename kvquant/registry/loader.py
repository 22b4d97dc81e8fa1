"""From an entry point to a declaration: one plugin at a time, each on its own.

pluggy checks the hook (marker, signature, spelling) and calls it. Each plugin gets a plugin manager of its own: in a
shared one a module may stand under one name only, a name may be taken once (a second is skipped without a word), and a
plugin that fails the check for misspelt hooks has to be taken out again before the next can be checked.
`PluginManager.load_setuptools_entrypoints` is not used, because it goes by name and two distributions may share one.
"""

from __future__ import annotations

import re
from functools import partial
from importlib import metadata

import pluggy

from kvquant.errors import BrokenBackendError, IncompatibleBackendError, listing
from kvquant.plugin import hookspecs
from kvquant.plugin.hookspecs import API_VERSION, ENTRY_POINT_GROUP, PROJECT
from kvquant.plugin.spec import BackendSpec
from kvquant.registry.availability import Problem
from kvquant.registry.discovery import InstalledPlugin
from kvquant.registry.guard import PluginError, call_plugin, one_line
from kvquant.registry.validation import spec_problems

HOOK = hookspecs.kvquant_register_backends.__name__
#: ``module``, ``module:attribute``, with or without ``[extra]``, as the entry-point format has it.
_REFERENCE = re.compile(r"[\w.]+(\s*:\s*[\w.]+)?(\s*\[.*\])?")


class DeclarationError(Exception):
    """A plugin declares its backends in a way that cannot work; the text says what is wrong."""


def load(plugin: InstalledPlugin) -> BackendSpec | Problem:
    """Import a plugin's light module, call its hook and check what it declares.

    Args:
        plugin: the entry point.

    Returns:
        The declaration of the entry point's backend, or what is wrong with the plugin.
    """
    try:
        return call_plugin(lambda: _load(plugin))
    except PluginError as error:
        problem, details = f"its plugin fails to load: {error.problem}", error.details
        if isinstance(error.__cause__, DeclarationError):
            problem, details = str(error.__cause__), ""
        return partial(BrokenBackendError, plugin.name, plugin.distribution, plugin.version, problem, details)


def _load(plugin: InstalledPlugin) -> BackendSpec | Problem:
    if not _REFERENCE.fullmatch(plugin.value):
        raise DeclarationError(f"its entry point refers to {one_line(repr(plugin.value))}, which names no module")
    spec = _choose(plugin.name, declared(metadata.EntryPoint(plugin.name, plugin.value, ENTRY_POINT_GROUP).load()))
    if is_foreign(spec):
        origin = plugin.name, plugin.distribution, plugin.version
        return partial(IncompatibleBackendError, *origin, spec.api_version, API_VERSION)
    problems = spec_problems(spec)
    if problems:
        raise DeclarationError(one_line("; ".join(problems)))
    return spec


def declared(plugin: object) -> list[BackendSpec]:
    """Call the hook of a module or object.

    Args:
        plugin: anything with the hook.

    Returns:
        What the hook returned, each of them a `BackendSpec` in type, and nothing more is known of it.

    Raises:
        DeclarationError: it has no hook, a misspelt one, or one that returns something else.
        Exception: whatever the hook raises.
    """
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(hookspecs)
    try:
        manager.register(plugin, name="plugin")
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        raise DeclarationError(_validation_problem(error, manager)) from error
    caller = getattr(manager.hook, HOOK)
    if not caller.get_hookimpls():
        reason = "lacks the decorator @kvquant.plugin.hookimpl" if hasattr(plugin, HOOK) else "is not there"
        raise DeclarationError(f"its hook {HOOK} {reason}")
    results = caller()
    specs = results[0] if results else None
    if not isinstance(specs, (list, tuple)):
        raise DeclarationError(f"its hook {HOOK} must return a list, and returned a {type(specs).__name__}")
    strangers = {type(spec).__name__ for spec in specs if not isinstance(spec, BackendSpec)}
    if strangers:
        raise DeclarationError(f"its hook {HOOK} must list BackendSpecs, and lists a {listing(sorted(strangers))}")
    return list(specs)


def is_foreign(spec: BackendSpec) -> bool:
    """Return whether `spec` was made for another version of the plugin API; its fields may mean other things then."""
    return type(spec.api_version) is int and spec.api_version != API_VERSION


def _choose(name: str, specs: list[BackendSpec]) -> BackendSpec:
    chosen = [spec for spec in specs if spec.name == name]
    if len(chosen) == 1:
        return chosen[0]
    if chosen:
        raise DeclarationError(f"its hook declares {name!r} {len(chosen)} times")
    others = one_line(listing(repr(spec.name) for spec in specs))
    raise DeclarationError(f"its entry point is named {name!r}, and its hook declares {others}")


def _validation_problem(error: pluggy.PluginValidationError, manager: pluggy.PluginManager) -> str:
    """Say in a line what pluggy says in several."""
    unknown = [name for name in vars(manager.hook) if not name.startswith("_") and name != HOOK]
    if unknown:
        return f"it has a hook {', '.join(unknown)}, which kvquant does not know (it knows {HOOK})"
    return f"its hook {HOOK} does not fit: {one_line(str(error).strip().splitlines()[-1])}"

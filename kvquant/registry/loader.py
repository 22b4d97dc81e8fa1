"""From an entry point to a declaration: one plugin at a time, each on its own.

pluggy checks the hook (marker, signature, spelling) and calls it. Each plugin gets a plugin manager of its own: in a
shared one a module may stand under one name only, a name may be taken once (a second is skipped without a word), and a
plugin that fails the check for misspelt hooks has to be taken out again before the next can be checked.
`PluginManager.load_setuptools_entrypoints` is not used, because it goes by name and two distributions may share one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from importlib import metadata

import pluggy

from kvquant.errors import listing
from kvquant.plugin import hookspecs
from kvquant.plugin.hookspecs import API_VERSION, PROJECT
from kvquant.registry.availability import Problem
from kvquant.registry.discovery import InstalledPlugin
from kvquant.registry.guard import PluginError, call_plugin, one_line
from kvquant.registry.kinds import HOOKS, Kind, S, Spec

#: ``module``, ``module:attribute``, with or without ``[extra]``, as the entry-point format has it.
_REFERENCE = re.compile(r"[\w.]+(\s*:\s*[\w.]+)?(\s*\[.*\])?")


class DeclarationError(Exception):
    """A plugin declares what it provides in a way that cannot work; the text says what is wrong."""


def load(plugin: InstalledPlugin, kind: Kind[S]) -> S | Problem:
    """Import a plugin's light module, call its hook and check what it declares.

    Args:
        plugin: the entry point.
        kind: the kind of its group.

    Returns:
        The declaration of the entry point's name, or what is wrong with the plugin.
    """
    try:
        return call_plugin(lambda: _load(plugin, kind))
    except PluginError as error:
        problem, details = f"its plugin fails to load: {error.problem}", error.details
        if isinstance(error.__cause__, DeclarationError):
            problem, details = str(error.__cause__), ""
        return partial(kind.errors.broken, plugin.name, plugin.distribution, plugin.version, problem, details)


def _load(plugin: InstalledPlugin, kind: Kind[S]) -> S | Problem:
    if not _REFERENCE.fullmatch(plugin.value):
        raise DeclarationError(f"its entry point refers to {one_line(repr(plugin.value))}, which names no module")
    specs = declared(metadata.EntryPoint(plugin.name, plugin.value, plugin.group).load(), kind)
    spec = _choose(plugin.name, specs)
    if is_foreign(spec):
        origin = plugin.name, plugin.distribution, plugin.version
        return partial(kind.errors.incompatible, *origin, spec.api_version, API_VERSION)
    problems = kind.problems(spec)
    if problems:
        raise DeclarationError(one_line("; ".join(problems)))
    return spec


def declared(plugin: object, kind: Kind[S], wanted: Sequence[str] = ()) -> list[S]:
    """Call the hook of a module or object.

    Args:
        plugin: anything with the hook.
        kind: whose hook.
        wanted: hooks any of which would have done, for the message where there is none; without it, that of `kind`.

    Returns:
        What the hook returned, each of them a declaration in type, and nothing more is known of it.

    Raises:
        DeclarationError: it has no hook, a misspelt one, or one that returns something else.
        Exception: whatever the hook raises.
    """
    manager, hook = pluggy.PluginManager(PROJECT), kind.hook
    manager.add_hookspecs(hookspecs)
    try:
        manager.register(plugin, name="plugin")
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        raise DeclarationError(_validation_problem(error, manager, hook)) from error
    caller = getattr(manager.hook, hook)
    if not caller.get_hookimpls():
        if hasattr(plugin, hook):
            raise DeclarationError(f"its hook {hook} lacks the decorator @kvquant.plugin.hookimpl")
        raise DeclarationError(f"its hook {' or '.join(wanted or [hook])} is not there")
    results = caller()
    specs = results[0] if results else None
    if not isinstance(specs, (list, tuple)):
        raise DeclarationError(f"its hook {hook} must return a list, and returned a {type(specs).__name__}")
    strangers = {type(spec).__name__ for spec in specs if not isinstance(spec, kind.spec)}
    if strangers:
        names = listing(sorted(strangers))
        raise DeclarationError(f"its hook {hook} must list {kind.spec.__name__}s, and lists a {names}")
    return list(specs)


def is_foreign(spec: Spec) -> bool:
    """Return whether `spec` was made for another version of the plugin API; its fields may mean other things then."""
    return type(spec.api_version) is int and spec.api_version != API_VERSION


def _choose(name: str, specs: list[S]) -> S:
    chosen = [spec for spec in specs if spec.name == name]
    if len(chosen) == 1:
        return chosen[0]
    if chosen:
        raise DeclarationError(f"its hook declares {name!r} {len(chosen)} times")
    others = one_line(listing(repr(spec.name) for spec in specs))
    raise DeclarationError(f"its entry point is named {name!r}, and its hook declares {others}")


def _validation_problem(error: pluggy.PluginValidationError, manager: pluggy.PluginManager, hook: str) -> str:
    """Say in a line what pluggy says in several."""
    unknown = [name for name in vars(manager.hook) if not name.startswith("_") and name not in HOOKS]
    if unknown:
        return f"it has a hook {listing(unknown)}, which kvquant does not know (it knows {listing(HOOKS)})"
    lines = str(error).strip().splitlines()
    named = [name for name in HOOKS if f"'{name}'" in lines[0]]
    return f"its hook {named[0] if named else hook} does not fit: {one_line(lines[-1])}"

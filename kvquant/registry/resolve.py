"""Names to plugins of one kind, and the environment's say in them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache, partial
from typing import Any, Generic, TypeVar, cast

from kvquant.errors import OptionValueError
from kvquant.errors.plugins import PluginSpecError
from kvquant.plugin.hookspecs import API_VERSION
from kvquant.registry.availability import Availability, Problem
from kvquant.registry.discovery import InstalledPlugin, installed_plugins, normalise_distribution
from kvquant.registry.found import IN_PROCESS, Found
from kvquant.registry.kinds import Kind, S
from kvquant.registry.loader import DeclarationError, declared, is_foreign, load

P = TypeVar("P", bound=Found[Any])


class Registry(Generic[S, P]):
    """All plugins of one kind, installed or registered in this process."""

    def __init__(self, kind: Kind[S], make: type[P]) -> None:
        """Begin with those that are installed.

        Args:
            kind: the kind.
            make: the type of what users get.
        """
        self.kind, self._make = kind, make
        self._registered: dict[str, S] = {}
        self._installed = cache(partial(installed_plugins, kind.group))
        self._load = cache(partial(load, kind=kind))

    # -------------------------------------------------------------------------------------------- looking up

    def get(self, name: str) -> P:
        """Return the plugin of that name.

        Args:
            name: in any case, or ``"distribution:name"``.

        Raises:
            UnknownPluginError, UnavailablePluginError, OptionValueError: it cannot be had; it may lack a library.
        """
        found = self.find(name)
        if found.availability.status != "missing":
            found.require()
        return found

    def find(self, name: str) -> P:
        """Return the plugin of that name, even a blocked or broken one.

        Raises:
            UnknownPluginError, DuplicatePluginError, OptionValueError: there is none, or several, or it is no name.
        """
        distribution, plain = self._parts(name)
        if self.is_registered(name):
            return self._in_process(self._registered[plain])
        named = self._named(distribution, plain)
        if not named:
            raise self._unknown(name)
        usable = [plugin for plugin in named if not self._blocked(plugin)]
        if len(usable) > 1:
            raise self.kind.errors.duplicate(plain, [plugin.distribution for plugin in usable])
        return self._found(usable[0] if usable else named[0])

    def check_name(self, name: str) -> None:
        """Do nothing if there is a plugin of that name, usable or not; imports nothing of it.

        Raises:
            UnknownPluginError, OptionValueError: there is none, or `name` is not a string.
        """
        if not self.is_registered(name) and not self._named(*self._parts(name)):
            raise self._unknown(name)

    def all(self) -> list[P]:
        """Return every plugin, usable or not, sorted by name.

        Installed ones appear once for each distribution that provides them, and those registered in this process in
        place of installed ones of the same name.
        """
        installed = [plugin for plugin in self._installed() if plugin.name not in self._registered]
        usable = [plugin for plugin in installed if not self._blocked(plugin)]
        found = [self._in_process(spec) for spec in list(self._registered.values())]
        for plugin in installed:
            rivals = [other.distribution for other in usable if other.name == plugin.name]
            several = plugin in usable and len(rivals) > 1
            found.append(
                self._found(plugin, partial(self.kind.errors.duplicate, plugin.name, rivals) if several else None)
            )
        return sorted(found, key=lambda one: (one.name, one.distribution))

    # -------------------------------------------------------------------------------------------- in this process

    def check_all(self, specs: list[S], *, replace: bool) -> None:
        """Refuse declarations that `add` must not make known.

        Raises:
            PluginSpecError, IncompatiblePluginError: a declaration cannot work.
            PluginExistsError: a name is taken and `replace` is false.
        """
        taken = {plugin.name: plugin.distribution for plugin in self._installed()}
        taken |= dict.fromkeys(self._registered, "this process")
        for position, spec in enumerate(specs):
            self.check(spec, declared_before=specs[:position])
            if spec.name in taken and not replace:
                raise self.kind.errors.exists(spec.name, taken[spec.name])

    def add(self, specs: list[S]) -> None:
        """Make plugins known in this process that have been checked."""
        self._registered.update({spec.name: spec for spec in specs})

    def check(self, spec: S, declared_before: list[S] | None = None) -> None:
        """Refuse a declaration that cannot work.

        Raises:
            PluginSpecError, IncompatiblePluginError: it cannot.
        """
        if is_foreign(spec):
            raise self.kind.errors.incompatible(spec.name, "this process", "", spec.api_version, API_VERSION)
        problems = self.kind.problems(spec)
        if not problems and spec.name in [other.name for other in declared_before or []]:
            problems = ["it is declared twice"]
        if problems:
            raise self.kind.errors.spec(f"{self.kind.name} {spec.name!r}", problems)

    def declared(self, plugin: object, wanted: Sequence[str]) -> list[S]:
        """Return what the hook of a module or object declares, which may be nothing.

        Args:
            plugin: anything with the hook.
            wanted: hooks any of which would have done, for the message.

        Raises:
            PluginSpecError: it has no such hook, or one that returns something else.
        """
        try:
            return declared(plugin, self.kind, wanted)
        except DeclarationError as error:
            raise self.refused(plugin, str(error)) from error

    def refused(self, plugin: object, problem: str) -> PluginSpecError:
        """Return the error about a module or object that brings nothing."""
        return self.kind.errors.spec(f"{type(plugin).__name__} object", [problem])

    def registered(self) -> list[str]:
        """Return the names of those that were registered in this process, sorted."""
        return sorted(self._registered)

    def is_registered(self, name: str) -> bool:
        """Whether one of that name, in any case, was registered in this process."""
        distribution, plain = self._parts(name)
        return plain in self._registered and distribution in ("", IN_PROCESS)

    def unregister(self, name: str) -> None:
        """Forget a plugin that was registered in this process.

        Raises:
            PluginNotRegisteredError: it was not.
        """
        if not self.is_registered(name):
            raise self.kind.errors.not_registered(name, self.registered())
        del self._registered[self._parts(name)[1]]

    def usable(self, spec: S) -> P:
        """Return what users would get of a declaration that need not be registered.

        Raises:
            PluginSpecError, IncompatiblePluginError, UnavailablePluginError: it cannot work, or not here.
        """
        self.check(spec)
        found = self._in_process(spec)
        found.require()
        return found

    def refresh(self) -> None:
        """Look for installed plugins anew; registered ones stay."""
        self._installed.cache_clear()
        self._load.cache_clear()

    # -------------------------------------------------------------------------------------------- one plugin

    def _parts(self, name: str) -> tuple[str, str]:
        """Return distribution and name, both in lower case."""
        if not isinstance(name, str):
            raise OptionValueError(self.kind.name, name, f"the name of a {self.kind.name}")
        distribution, _, plain = name.strip().lower().rpartition(":")
        return distribution, plain

    def _named(self, distribution: str, plain: str) -> list[InstalledPlugin]:
        named = [plugin for plugin in self._installed() if plugin.name == plain]
        if not distribution:
            return named
        wanted = normalise_distribution(distribution)
        return [plugin for plugin in named if normalise_distribution(plugin.distribution) == wanted]

    def _found(self, plugin: InstalledPlugin, duplicate: Problem | None = None) -> P:
        origin = (plugin.name, plugin.distribution, plugin.version)
        problem = self._blocked(plugin)
        if problem:
            return self._make(*origin, Availability.of(problem), None, problem)
        loaded = self._load(plugin)
        if not isinstance(loaded, self.kind.spec):
            problem = duplicate or cast("Problem", loaded)
            return self._make(*origin, Availability.of(problem), None, problem)
        problem = duplicate or self.kind.unmet(loaded, plugin.distribution)
        return self._make(*origin, Availability.of(problem), loaded, problem)

    def _in_process(self, spec: S) -> P:
        problem = self.kind.unmet(spec, IN_PROCESS)
        return self._make(spec.name, IN_PROCESS, "", Availability.of(problem), spec, problem)

    def _unknown(self, name: str) -> Exception:
        usable = [plugin for plugin in self._installed() if not self._blocked(plugin)]
        names = sorted({plugin.name for plugin in usable} | set(self._registered))
        key, alike = name.strip().lower(), names
        if ":" in key:
            alike = names + [f"{plugin.distribution}:{plugin.name}".lower() for plugin in usable]
        suggestions = self.kind.hints.suggest(key, alike)
        command = self.kind.hints.install_command([key, *suggestions], alike)
        return self.kind.errors.unknown(name, names, suggestions, command)

    # -------------------------------------------------------------------------------------------- the environment

    def _blocked(self, plugin: InstalledPlugin) -> Problem | None:
        """Return what the environment has against `plugin`; asked anew each time, as the environment may change."""
        for variable, names_block in ((self.kind.block_variable, True), (self.kind.allow_variable, False)):
            value = os.environ.get(variable, "")
            named = {_environment_name(item) for item in value.split(",") if item.strip()}
            is_named = not named.isdisjoint((plugin.name, _environment_name(f"{plugin.distribution}:{plugin.name}")))
            if named and is_named == names_block:
                return partial(self.kind.errors.blocked, plugin.name, variable, value, listed=names_block)
        return None


def _environment_name(item: str) -> str:
    distribution, colon, name = item.strip().lower().rpartition(":")
    return f"{normalise_distribution(distribution)}{colon}{name}"

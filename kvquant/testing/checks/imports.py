"""What the plugin imports, and when: looked at in fresh processes."""

from __future__ import annotations

from typing import Any

from kvquant.engine.state import dtype_name
from kvquant.errors import listing
from kvquant.plugin.spec import BackendSpec
from kvquant.registry.discovery import normalise_distribution
from kvquant.registry.found import IN_PROCESS
from kvquant.testing.check import check, require, some_cases
from kvquant.testing.installed import dependencies, modules_beside, modules_of
from kvquant.testing.outcomes import NotApplicable
from kvquant.testing.probe import probe
from kvquant.testing.subject import Subject

#: What no declaration needs, and what would make every answer of the command line slow.
HEAVY = frozenset(
    "torch transformers numpy scipy pandas sklearn numba triton jax tensorflow accelerate datasets matplotlib".split()
)


@check("listing", "backend")
def light_listing(subject: Subject) -> None:
    """Listing the backend imports nothing heavy, no library of its own, and prints nothing."""
    spec = _installed_spec(subject)
    found = probe("listing", name=subject.backend.qualified_name)
    heavy = sorted((HEAVY | modules_of(_required(spec))) & set(found["imported"]))
    require(not heavy, f"imports {listing(heavy)}; import inside functions instead")
    require(not found["printed"], f"prints {found['printed'].strip()[:200]!r}")


@check("requirements", "backend")
def requirements(subject: Subject) -> None:
    """It works, the same and without printing, where nothing is installed but what it declares."""
    spec = _installed_spec(subject)
    declared = dependencies(["kvquant", subject.backend.distribution, *_required(spec)])
    task = _task(subject)
    found = probe("create", hidden=sorted(modules_beside(declared)), **task)
    advice = f"Declare what it imports in BackendSpec.requires, or as a dependency of {subject.backend.distribution}"
    require(found["stage"] == "done", f"{found['error']}. {advice}")
    require(not found["printed"], f"prints {found['printed'].strip()[:200]!r} when it is used")
    if subject.backend.capabilities.deterministic:
        usual = probe("create", hidden=[], **task)
        require(found["digest"] == usual["digest"], f"it gives other results then. {advice}")


@check("missing-library", "backend")
def missing_library(subject: Subject) -> None:
    """Without a library that it needs it is listed as missing, with a next step, and fails when made, not later."""
    spec = _installed_spec(subject)
    core = dependencies(["kvquant"])
    own = _required(spec) - core
    if not own:
        raise NotApplicable("it requires no distribution that kvquant does not bring")
    found = probe("missing", name=subject.backend.qualified_name, distributions=sorted(own))
    require(found["status"] == "missing", f"it is listed as {found['status']!r} where its libraries are absent")
    require(found["hint"].strip(), "no next step is named: install_hint is blank")

    hidden, libraries = modules_of(own), listing(sorted(own))
    if not hidden:
        raise NotApplicable(f"it is listed as missing; which modules {libraries} brings alone is not known")
    task = _task(subject)
    with_all, without = probe("create", hidden=[], **task), probe("create", hidden=sorted(hidden), **task)
    require(
        without["stage"] != "quantize",
        f"where {libraries} cannot be imported, making the quantizer succeeds and using it fails: "
        f"{without['error']}. Import it in the factory",
    )
    same = without["stage"] == "create" or without["digest"] == with_all["digest"]
    require(same, f"where {libraries} cannot be imported it silently gives other results")
    require(without["stage"] == "done" or without["explained"], f"the error is not explained: {without['error']}")


def _installed_spec(subject: Subject) -> BackendSpec:
    spec = subject.backend.spec
    if spec is None or subject.backend.distribution == IN_PROCESS:
        raise NotApplicable("the backend is registered in this process; no plugin is imported")
    return spec


def _required(spec: BackendSpec) -> set[str]:
    return {normalise_distribution(requirement.distribution) for requirement in spec.requires}


def _task(subject: Subject) -> dict[str, Any]:
    case = some_cases(subject, "width")[0]
    scheme = case.scheme
    return {
        "name": subject.backend.qualified_name,
        "scheme": {
            "nbits": scheme.nbits,
            "axis": scheme.axis,
            "group_size": scheme.group_size,
            "options": dict(scheme.options),
        },
        "dtype": dtype_name(case.dtype),
        "device": case.device,
    }

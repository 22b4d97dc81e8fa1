"""What is imported when, in a fresh process each."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "numpy", "triton", "numba", "hqq", "optimum", "bitsandbytes")

#: What must be quick, and for that must import nothing heavy.
LIGHT = {
    "import kvquant": "import kvquant",
    "dir": "import kvquant; dir(kvquant)",
    "the plugin contract": "import kvquant.plugin",
    "the errors": "import kvquant.errors",
    "the registry": "import kvquant.registry",
    "list_backends": "import kvquant; kvquant.list_backends()",
    "get_backend": "import kvquant; [kvquant.registry.find_backend(b.name) for b in kvquant.list_backends()]",
    "list_transforms": "import kvquant; kvquant.list_transforms()",
    "get_transform": "import kvquant; kvquant.get_transform('hadamard')",
    "command: list-transforms": "run('list-transforms')",
    "command: info, of a transform": "run('info', 'hadamard')",
    "command: list-backends": "run('list-backends')",
    "command: list-backends --json": "run('list-backends', '--json')",
    "command: info": "run('info', 'reference')",
    "command: new-plugin": (
        "import tempfile; there = tempfile.TemporaryDirectory(); run('new-plugin', 'foo', '--directory', there.name)"
    ),
    "command: help": "run('--help')",
    "command: version": "run('--version')",
    "command: unknown backend": "run('info', 'xyzzy')",
}

PRELUDE = """
def run(*arguments):
    from click.testing import CliRunner
    from kvquant.cli.main import cli
    CliRunner().invoke(cli, arguments)
"""
POSTLUDE = "\nimport json, sys; print(json.dumps(sorted(sys.modules)))"


def imported_by(code):
    """Return the modules that are there after `code` has run in a process of its own."""
    command = [sys.executable, "-c", PRELUDE + code + POSTLUDE]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("code", LIGHT.values(), ids=LIGHT.keys())
def test_nothing_heavy_is_imported(code):
    """Neither torch, nor transformers, nor any backend's library."""
    modules = imported_by(code)
    assert "kvquant" in modules
    assert [module for module in modules if module.partition(".")[0] in HEAVY] == []


def test_importing_kvquant_imports_next_to_nothing():
    """Not even the registry, and none of the plugins."""
    modules = imported_by("import kvquant")
    assert [module for module in modules if module.startswith("kvquant")] == ["kvquant", "kvquant._version"]


def test_getting_one_backend_imports_its_plugin_alone():
    """Other plugins stay where they are."""
    modules = imported_by("import kvquant; kvquant.get_backend('reference')")
    plugins = [module for module in modules if module.startswith("kvquant_plugins.")]
    assert plugins == ["kvquant_plugins.reference"]


def test_every_public_name_can_be_had():
    """Each name of ``__all__``, as an attribute and in dir(); a name that is not there is an AttributeError."""
    import kvquant

    assert [name for name in kvquant.__all__ if getattr(kvquant, name, None) is None] == []
    assert set(kvquant.__all__) <= set(dir(kvquant))
    with pytest.raises(AttributeError, match="module 'kvquant' has no attribute 'nothing'"):
        _ = kvquant.nothing


def test_the_public_names():
    """A change here is a change for users."""
    import kvquant

    assert kvquant.__all__ == [
        "QuantizedCache",
        "QuantizedEncoderDecoderCache",
        "CacheConfig",
        "list_backends",
        "get_backend",
        "list_transforms",
        "get_transform",
        "register",
        "unregister",
        "Backend",
        "TransformPlugin",
        "KVQuantError",
        "__version__",
    ]


def test_a_library_is_imported_when_its_backend_is_used_and_not_before():
    """A cache of one backend leaves the libraries of the others alone (transformers itself imports hqq)."""
    use = (
        "import torch; from kvquant import QuantizedCache; states = torch.randn(1, 1, 300, 64); "
        "QuantizedCache({!r}, nbits=4).update(states, states, 0)"
    )
    libraries = {"optimum.quanto", "bitsandbytes"}
    assert libraries & set(imported_by(use.format("reference"))) == set()
    assert libraries & set(imported_by(use.format("quanto"))) == {"optimum.quanto"}

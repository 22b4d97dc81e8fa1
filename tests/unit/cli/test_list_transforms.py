"""``kvquant list-transforms``, and ``kvquant info`` of one."""

from __future__ import annotations

import json


def test_the_table(kvquant, install):
    """One line a transform, and below it why one cannot be used."""
    install("good_transform", "broken_transforms")
    result = kvquant("list-transforms")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0].split() == "name version distribution available summary".split()
    (reverse,) = (line for line in lines if line.startswith("reverse "))
    assert reverse.split() == "reverse 2.1 kvquant-good-transform yes Channels in reverse order".split()
    assert any(line.startswith("hadamard ") for line in lines)
    assert "raises: its plugin fails to load: RuntimeError: no transforms today. Next step: upgrade" in result.stdout


def test_json(kvquant, install):
    """Everything that is known; null where nothing is."""
    install("good_transform", "broken_transforms")
    found = {entry["name"]: entry for entry in json.loads(kvquant("list-transforms", "--json").stdout)}
    assert found["reverse"] == {
        "kind": "transform",
        "name": "reverse",
        "version": "2.1",
        "distribution": "kvquant-good-transform",
        "available": True,
        "status": "ok",
        "reason": None,
        "hint": None,
        "summary": "Channels in reverse order",
        "url": "https://example.org/reverse",
    }
    assert (found["newer"]["status"], found["newer"]["summary"]) == ("incompatible", None)


def test_nothing_installed(kvquant, monkeypatch):
    """Says so, on standard error."""
    monkeypatch.setattr("kvquant.registry.list_transforms", list)
    result = kvquant("list-transforms")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "No transforms are installed.\n")


def test_everything_about_one(kvquant):
    """`info` takes its name as it takes a backend's."""
    result = kvquant("info", "Hadamard")
    assert result.exit_code == 0
    assert result.stdout.startswith("hadamard, Walsh-Hadamard transform")
    assert "url           https://arxiv.org/abs/2404.00456" in result.stdout
    assert json.loads(kvquant("info", "hadamard", "--json").stdout)["distribution"] == "kvquant"
    assert json.loads(kvquant("info", "hadamard", "--json").stdout)["kind"] == "transform"
    assert "unknown backend 'hadamart'" in kvquant("info", "hadamart").stderr

"""``kvquant list-backends``."""

from __future__ import annotations

import json
import re

import pluggy

import kvquant as package

PLUGINS = ("good", "broken_import", "missing_requirement", "newer_api", "duplicate_a", "duplicate_b", "noisy")


def rows(output):
    """Rows of the table by name, as cells."""
    found = {}
    for line in output.splitlines()[1:]:
        cells = re.split(r" {2,}", line.strip())
        if len(cells) == 7:
            found.setdefault(cells[0], []).append(cells)
    return found


def test_the_table(kvquant, install):
    """One line a backend: name, version, distribution, availability, bits, axes, formats."""
    install("good")
    result = kvquant("list-backends")
    assert result.exit_code == 0
    assert result.stdout.splitlines()[0].split() == "name version distribution available bits axes formats".split()
    (good,) = rows(result.stdout)["good"]
    assert good == ["good", "1.2", "kvquant-good", "yes", "2, 4", "channel, token", "affine"]
    (reference,) = rows(result.stdout)["reference"]
    assert reference[:5] == ["reference", package.__version__, "kvquant", "yes", "1-4, 8"]


def test_why_a_backend_is_not_available(kvquant, install):
    """Lines under the table give the reason and the next step; the exit code is that of a listing that worked."""
    install(*PLUGINS)
    result = kvquant("list-backends")
    assert result.exit_code == 0
    (broken,) = rows(result.stdout)["broken-import"]
    assert broken == ["broken-import", "1.0", "kvquant-broken-import", "broken", "-", "-", "-"]
    assert (
        "broken-import: its plugin fails to load: ModuleNotFoundError: No module named 'a_library_that_is_not_there'. "
        "Next step: upgrade kvquant-broken-import, or report this to its author\n"
    ) in result.stdout
    assert "Next step: pip install 'kvquant-missing-requirement[library]'\n" in result.stdout
    assert len(rows(result.stdout)["twin"]) == 2


def test_a_pipe_gets_long_lines_and_no_colours(kvquant, install):
    """So that grep finds whole rows."""
    install(*PLUGINS)
    output = kvquant("list-backends").stdout
    assert "\x1b" not in output
    assert max(map(len, output.splitlines())) > 120


def test_json(kvquant, install):
    """Everything that is known of each backend; null where nothing is."""
    install(*PLUGINS)
    found = {entry["name"]: entry for entry in json.loads(kvquant("list-backends", "--json").stdout)}
    assert found["good"] == {
        "kind": "backend",
        "name": "good",
        "version": "1.2",
        "distribution": "kvquant-good",
        "available": True,
        "status": "ok",
        "reason": None,
        "hint": None,
        "summary": "A plugin as it should be",
        "url": "https://example.org/good",
        "requires": [{"distribution": "pluggy", "minimum": "1.0", "installed": pluggy.__version__}],
        "nbits": [2, 4],
        "axes": ["channel", "token"],
        "group_sizes": [32, 64],
        "devices": ["cpu", "cuda"],
        "dtypes": ["float32", "float16", "bfloat16"],
        "formats": ["affine"],
        "deterministic": False,
        "axis_aliases": {"0": "channel", "-1": "token"},
        "options": {"rounds": "how often to look again"},
    }
    assert found["newer-api"]["status"] == "incompatible"
    assert found["newer-api"]["nbits"] is None
    assert set(found["newer-api"]) == set(found["good"])


def test_what_plugins_print_stays_out_of_the_result(kvquant, install):
    """Standard output is the listing's alone."""
    install("noisy")
    result = kvquant("list-backends", "--json")
    assert "noise on standard output" in result.stderr
    assert json.loads(result.stdout)


def test_nothing_installed(kvquant, monkeypatch):
    """Says so, on standard error."""
    monkeypatch.setattr("kvquant.registry.list_backends", list)
    result = kvquant("list-backends")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "No backends are installed.\n")

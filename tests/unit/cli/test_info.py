"""``kvquant info``."""

from __future__ import annotations

import json
import re

import pluggy
import pytest

GOOD = f"""\
good, A plugin as it should be:
  available      yes
  distribution   kvquant-good 1.2
  url            https://example.org/good
  requires       pluggy>=1.0 ({pluggy.__version__} is installed)
  bits           2, 4
  axes           channel, token
  integer axes   0 = channel, -1 = token
  group sizes    32, 64
  devices        cpu, cuda
  dtypes         float32, float16, bfloat16
  formats        affine
  attention      torch (KVQUANT_ATTENTION) on the CPU; torch elsewhere
  deterministic  no
  options        rounds: how often to look again
"""


def test_everything_about_a_backend(kvquant, install):
    """All that its declaration says, and where it comes from."""
    install("good")
    result = kvquant("info", "Good")
    assert (result.exit_code, result.stdout) == (0, GOOD)


def test_a_backend_without_its_library(kvquant, install):
    """Is shown, with the reason and the next step."""
    install("missing_requirement")
    result = kvquant("info", "missing-requirement")
    assert result.exit_code == 0
    facts = dict(re.split(r" {2,}", line.strip(), maxsplit=1) for line in result.stdout.splitlines()[1:])
    assert facts["available"] == "missing"
    assert facts["next step"] == "pip install 'kvquant-missing-requirement[library]'"
    assert facts["reason"].startswith("it needs a-library-that-is-not-there>=2.0 (not installed)")
    assert facts["requires"].startswith("a-library-that-is-not-there>=2.0 (not installed), pluggy")


@pytest.mark.parametrize("name", ["broken-import", "newer-api"])
def test_a_backend_that_cannot_be_loaded(kvquant, install, name):
    """Is shown as far as it is known."""
    install(name.replace("-", "_"))
    result = kvquant("info", name)
    assert result.exit_code == 0
    assert re.search(rf"distribution +kvquant-{name} 1.0\n", result.stdout)
    assert "reason " in result.stdout
    assert "bits" not in result.stdout


def test_an_unknown_name(kvquant):
    """Is an error with the closest name."""
    result = kvquant("info", "refrence")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("Error: unknown backend 'refrence'. Did you mean 'reference'? Installed: ")


def test_two_backends_of_one_name(kvquant, install):
    """Are an error that says how to choose, and choosing works."""
    install("duplicate_a", "duplicate_b")
    result = kvquant("info", "twin")
    assert result.exit_code == 1
    assert result.stderr.endswith("choose one by writing 'kvquant-twin-a:twin' or 'kvquant-twin-b:twin'\n")
    assert re.search(r"distribution +kvquant-twin-b 2.0\n", kvquant("info", "kvquant-twin-b:twin").stdout)


def test_json(kvquant, install):
    """The same as in the listing."""
    install("good")
    one = json.loads(kvquant("info", "good", "--json").stdout)
    assert one in json.loads(kvquant("list-backends", "--json").stdout)


def test_the_kind_can_be_said(kvquant, install):
    """Where a backend and a transform have the same name; unsaid, it is the backend."""
    install("good_transform")
    assert json.loads(kvquant("info", "reverse", "--json").stdout)["kind"] == "backend"
    result = kvquant("info", "reverse", "--kind", "transform", "--json")
    one = json.loads(result.stdout)
    assert (result.exit_code, one["kind"], one["summary"]) == (0, "transform", "Channels in reverse order")
    assert "unknown transform 'reference'" in kvquant("info", "reference", "--kind", "transform").stderr


def test_two_transforms_of_one_name(kvquant, install):
    """Are an error that says how to choose, in either command."""
    install("good_transform", "twin_transform")
    for arguments in (("info", "reverse", "--kind", "transform"), ("check-plugin", "reverse", "--kind", "transform")):
        result = kvquant(*arguments)
        assert result.exit_code == 1
        assert "choose one by writing 'kvquant-good-transform:reverse' or 'kvquant-twin-tr" in result.stderr


def test_a_plugin_gives_no_orders_to_the_terminal(kvquant, install):
    """Control characters in what it says of itself are left out."""
    install("noisy")
    output = kvquant("info", "noisy").stdout
    assert "loud[2J and clear" in output
    assert "\x1b" not in output

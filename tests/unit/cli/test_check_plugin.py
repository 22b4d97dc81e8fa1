"""kvquant check-plugin."""

from __future__ import annotations

import json
from collections.abc import Callable

from click.testing import Result

Run = Callable[..., Result]


def test_a_table_of_checks(kvquant: Run) -> None:
    """Each with what it demands, and why where it did not simply pass; the sum at the end."""
    result = kvquant("check-plugin", "reference", "--nbits", "4")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0].startswith("reference, from kvquant ")
    assert lines[0].endswith(", at 4 bits")
    (groups,) = (line for line in lines if line.startswith("groups"))
    assert groups.strip().split(maxsplit=2)[1:] == ["passed", "Changing one group changes no other group"]
    assert "the core packs the codes of this format" in result.stdout
    assert lines[-1].endswith("passed, 0 failed, 3 not applicable")


def test_a_failure_is_shown_and_ends_with_one(kvquant: Run, install: Callable[..., None]) -> None:
    """With the reason under the demand."""
    install("heavy_listing")
    result = kvquant("check-plugin", "heavy-listing")
    assert result.exit_code == 1
    assert "imports numpy, torch; import inside functions instead" in result.stdout
    assert ", 1 failed, " in result.stdout.splitlines()[-1]


def test_json(kvquant: Run, install: Callable[..., None]) -> None:
    """Everything, for machines; standard output is JSON and nothing else."""
    install("careful")
    result = kvquant("check-plugin", "careful", "--nbits", "2", "--option", "ends=open", "--json")
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert (report["backend"], report["distribution"], report["version"]) == ("careful", "kvquant-careful", "1.0")
    assert report["kind"] == "backend"
    assert (report["nbits"], report["options"], report["ok"]) == ([2], {"ends": "open"}, True)
    assert {check["status"] for check in report["checks"]} == {"passed", "not applicable"}
    assert set(report["checks"][0]) == {"check", "title", "status", "reason", "cases", "seconds"}


def test_one_check_alone(kvquant: Run) -> None:
    """For an author who is after one bug."""
    result = kvquant("check-plugin", "reference", "--check", "groups", "--check", "split", "--json")
    assert [check["check"] for check in json.loads(result.stdout)["checks"]] == ["groups", "split"]


def test_what_cannot_be_checked_is_refused(kvquant: Run, install: Callable[..., None]) -> None:
    """An unknown backend, one whose library is missing, widths and options that are not declared."""
    install("missing_requirement")
    for arguments, code, said in (
        (("refrence",), 1, "unknown backend 'refrence'. Did you mean 'reference'?"),
        (("missing-requirement",), 1, "it needs a-library-that-is-not-there>=2.0 (not installed)"),
        (("quanto", "--nbits", "3"), 2, "nbits=3 cannot work: expected one or more of 2, 4, 8."),
        (("hqq", "--option", "optimise=no"), 2, "option 'optimise' is unknown to it; known: optimize"),
        (("reference", "--check", "group"), 2, "unknown check 'group'. Did you mean 'groups'?"),
        (("hqq", "--option", "optimize"), 2, "option='optimize' cannot work: expected NAME=VALUE"),
    ):
        result = kvquant("check-plugin", *arguments)
        assert result.exit_code == code
        assert said in result.stderr
        assert result.stdout == ""


def test_a_transform_is_checked_by_its_name(kvquant: Run) -> None:
    """In the same table; sizes that it refuses are said."""
    result = kvquant("check-plugin", "hadamard", "--check", "sizes", "--check", "query")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0].startswith("hadamard, from kvquant ")
    assert lines[0].endswith(", for heads of 8, 32, 48, 64, 80, 96, 112, 128, 192, 256")
    assert "refused: 1, 3, 15" in result.stdout
    assert lines[-1] == "2 passed, 0 failed, 0 not applicable"


def test_the_kind_can_be_said(kvquant: Run, install: Callable[..., None]) -> None:
    """Where a backend has the same name; what only backends have is refused for a transform."""
    install("good_transform")
    result = kvquant("check-plugin", "reverse", "--kind", "transform", "--check", "input", "--json")
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert (report["transform"], report["distribution"]) == ("reverse", "kvquant-good-transform")
    assert report["kind"] == "transform"
    assert [check["check"] for check in report["checks"]] == ["input"]
    refused = kvquant("check-plugin", "hadamard", "--nbits", "4")
    assert refused.exit_code == 2
    assert "--nbits and --option are for backends" in refused.stderr

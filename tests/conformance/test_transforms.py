"""The kit for transforms: the built-in ones pass, and every broken one fails on the check for its bug."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvquant.errors import TransformSpecError, UnknownOptionError, UnknownTransformError
from kvquant.plugin import TransformSpec
from kvquant.testing import CheckFailed, check_transform, parametrize_transform_checks
from kvquant.testing.transforms.checks import CHECKS
from kvquant.testing.transforms.runner import make_transform_subject
from tests.conformance.broken_transforms import TRANSFORM_BUGS, HalfPrecision, Sound, TransformBug
from tests.plugins.on_path import plugins_on_path

PAGE = (Path(__file__).parents[2] / "docs" / "plugins.md").read_text()

#: Plugins whose bug shows in fresh processes only: folder, check, part of the reason.
INSTALLED_BUGS = (
    ("heavy_transform", "listing", "imports numpy, torch; import inside functions instead"),
    ("chance_transform", "processes", "another process gives other results: random numbers need a seed of their own"),
)


@pytest.mark.parametrize("name", ["hadamard", "random"])
def test_the_built_in_ones_pass(name: str) -> None:
    """All that applies, which is everything."""
    report = check_transform(name)
    report.raise_for_failures()
    assert {outcome.status for outcome in report.outcomes} == {"passed"}
    assert {64, 80, 96, 128} <= set(report.head_dims)
    assert not {1, 3, 15} & set(report.head_dims)


@pytest.mark.parametrize("bug", TRANSFORM_BUGS, ids=str)
def test_a_broken_transform_fails_on_the_right_check(bug: TransformBug) -> None:
    """With a reason that names the bug, and on no check that has nothing to do with it."""
    report = check_transform(bug.spec)
    due = {bug.check, *bug.also}
    failed = {outcome.check: outcome.reason for outcome in report.failures}
    assert due <= set(failed) <= {*due, *bug.perhaps}
    assert bug.says in failed[bug.check]
    assert not report.ok


@pytest.mark.parametrize(("folder", "check", "says"), INSTALLED_BUGS, ids=lambda value: str(value).partition(" ")[0])
def test_an_installed_one_fails_in_a_fresh_process(folder: str, check: str, says: str) -> None:
    """And passes everything else."""
    with plugins_on_path(folder):
        report = check_transform(folder.replace("_", "-"))
    failed = {outcome.check: outcome.reason for outcome in report.failures}
    assert set(failed) == {check}
    assert says in failed[check]


def test_every_check_can_fail() -> None:
    """Each has a bug that it must find."""
    found = {bug.check for bug in TRANSFORM_BUGS} | {check for _, check, _ in INSTALLED_BUGS}
    assert found == {check.name for check in CHECKS}


def test_the_sound_one_passes() -> None:
    """The one that the broken ones are made from; what cannot be looked at is said."""
    report = check_transform(TransformSpec("sound", Sound))
    report.raise_for_failures()
    skipped = {outcome.check for outcome in report.outcomes if outcome.status == "not applicable"}
    assert skipped == {"listing", "processes"}


def test_what_is_looked_at_in_float64_says_so() -> None:
    """A reason names the type in which it can be seen again."""
    report = check_transform(TransformSpec("half", HalfPrecision), checks=["linear", "query"])
    assert {outcome.reason.partition(":")[0] for outcome in report.failures} == {"head_dim=64, float64"}


def test_where_nothing_is_left_to_try_another_process_is_not_asked() -> None:
    """And nothing passes that was not looked at."""
    subject = make_transform_subject("hadamard")
    subject.leave_out(subject.cases("usual"))
    (check,) = (check for check in CHECKS if check.name == "processes")
    outcome = check(subject)
    assert (outcome.status, outcome.reason) == ("not applicable", "every combination failed an earlier check")


def test_all_reasons_are_raised_at_once() -> None:
    """Named after the transform."""
    (bug,) = (bug for bug in TRANSFORM_BUGS if bug.check == "query")
    with pytest.raises(CheckFailed, match=r"(?s)^transform 'broken-forgetsqueries' fails \d checks:\n.*query: .*off"):
        check_transform(bug.spec, checks=["query", "cache"]).raise_for_failures()


def test_what_cannot_be_checked_is_refused() -> None:
    """A name, a declaration or a check that there is not."""
    with pytest.raises(UnknownTransformError):
        check_transform("hadamart")
    with pytest.raises(TransformSpecError):
        check_transform(TransformSpec("No!", Sound))
    with pytest.raises(UnknownOptionError, match=r"unknown check 'quary'\. Did you mean 'query'"):
        check_transform("hadamard", checks=["quary"])


@parametrize_transform_checks("hadamard")
def test_a_plugin_s_own_tests_run_the_kit(check) -> None:
    """As they would stand in a plugin."""
    check()


@pytest.mark.parametrize("check", CHECKS, ids=str)
def test_every_check_has_its_row(check) -> None:
    """On the page for those who must pass it, word for word."""
    assert f"| `{check.name}` | {check.title} |" in PAGE

"""The kit finds bugs: every broken backend fails on the check that is there for its bug."""

from __future__ import annotations

import pytest
import torch

from kvquant.plugin import BackendSpec, Capabilities
from kvquant.testing import CheckFailed, check_backend
from kvquant.testing.checks import CHECKS
from tests.conformance.broken import BUGS, Bug
from tests.plugins.on_path import plugins_on_path
from tests.support import FORMATS

pytestmark = pytest.mark.slow

#: Plugins whose bug is in what they import, or print: folder, check, part of the reason.
IMPORT_BUGS = (
    ("heavy_listing", "listing", "imports numpy, torch; import inside functions instead"),
    ("noisy", "listing", "prints 'noise on standard output'"),
    ("undeclared_library", "requirements", "No module named 'hypothesis'. Declare what it imports"),
    ("late_import", "missing-library", "making the quantizer succeeds and using it fails: ModuleNotFoundError"),
    ("silent_fallback", "missing-library", "where hypothesis cannot be imported it silently gives other results"),
)


@pytest.mark.parametrize("bug", BUGS, ids=str)
def test_a_broken_backend_fails_on_the_right_check(bug: Bug) -> None:
    """With a reason that names the bug, and on no check that has nothing to do with it."""
    report = check_backend(bug.spec)
    due = {bug.check, *bug.also}
    failed = {outcome.check: outcome.reason for outcome in report.failures}
    assert due <= set(failed) <= {*due, *bug.perhaps}
    assert bug.says in failed[bug.check]
    assert not report.ok


@pytest.mark.parametrize(("folder", "check", "says"), IMPORT_BUGS, ids=lambda value: str(value).partition(" ")[0])
def test_a_plugin_that_imports_wrongly_fails_on_the_right_check(folder: str, check: str, says: str) -> None:
    """Looked at in fresh processes, as an installed plugin."""
    with plugins_on_path(folder):
        failed = {outcome.check: outcome.reason for outcome in check_backend(folder.replace("_", "-")).failures}
    assert says in failed[check]


def test_every_check_can_fail() -> None:
    """Each has a bug that it must find."""
    found = {bug.check for bug in BUGS} | {check for _, check, _ in IMPORT_BUGS}
    assert found == {check.name for check in CHECKS}


@pytest.mark.parametrize("format_", ["affine", "codebook", "opaque"])  # the trellis that tests have takes too long
def test_a_sound_backend_passes(format_: str) -> None:
    """The quantizers that the broken ones are made from have none of the bugs themselves."""
    nbits = (2, 4, 8) if format_ == "opaque" else (1, 2, 3, 4, 8)
    sizes = (32, 64) if format_ == "opaque" else None
    capabilities = Capabilities(nbits=nbits, group_sizes=sizes, formats=(format_,))
    report = check_backend(BackendSpec(f"sound-{format_}", FORMATS[format_], capabilities))
    if format_ == "opaque":  # which packs 2 bits as 4
        assert [outcome.check for outcome in report.failures] == ["bits"]
        return
    report.raise_for_failures()
    applies = {outcome.check for outcome in report.outcomes if outcome.status == "passed"}
    assert len(applies) >= 20


def test_all_reasons_are_raised_at_once() -> None:
    """For those who call the kit from their own code."""
    (bug,) = (bug for bug in BUGS if bug.check == "zeros")
    report = check_backend(bug.spec)
    with pytest.raises(CheckFailed, match=r"(?s)^backend 'broken-nozero' fails \d checks:\n.*zeros: .*came back"):
        report.raise_for_failures()


def test_the_caller_s_settings_survive() -> None:
    """Threads of torch and of Python, even where a backend fails in between."""
    import sys

    before = torch.get_num_threads(), sys.getswitchinterval()
    check_backend(BUGS[0].spec)
    assert (torch.get_num_threads(), sys.getswitchinterval()) == before

"""The kit as a pytest suite, and in a plugin's own tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvquant.engine.typed import parse_options, parse_widths
from kvquant.errors import OptionValueError
from kvquant.testing.probe import own_path

pytestmark = pytest.mark.slow

PLUGINS = Path(__file__).parents[1] / "plugins"


def pytest_in(folder: Path, *arguments: str, plugin: str = "") -> subprocess.CompletedProcess[str]:
    """Run pytest as a plugin's author would, with one of our test plugins installed."""
    path = [str(PLUGINS / plugin)] if plugin else []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rs", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_suite_runs_every_check(tmp_path: Path) -> None:
    """One test for each check, skipped where it does not apply."""
    done = pytest_in(
        tmp_path,
        *("--pyargs", "kvquant.testing", "--kvquant-backend", "careful", "-v"),
        *("--kvquant-nbits", "4", "--kvquant-option", "ends=open"),
        plugin="careful",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test_conforms[groups] PASSED" in done.stdout
    assert "test_conforms[bits] SKIPPED" in done.stdout
    assert "the core packs the codes of this format" in done.stdout


def test_the_suite_fails_where_a_check_fails(tmp_path: Path) -> None:
    """With the demand and the reason in the message."""
    done = pytest_in(
        tmp_path,
        *("--pyargs", "kvquant.testing", "--kvquant-backend", "heavy-listing", "-k", "listing or shapes"),
        plugin="heavy_listing",
    )
    assert done.returncode == 1
    assert "imports numpy, torch; import inside functions instead" in done.stdout
    assert "1 failed, 1 passed" in done.stdout


def test_the_suite_asks_which_plugin(tmp_path: Path) -> None:
    """In place of checking none."""
    done = pytest_in(tmp_path, "--pyargs", "kvquant.testing")
    assert done.returncode != 0
    assert "which plugin? Add --kvquant-backend NAME (" in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--kvquant-backend", "reference", "--kvquant-transform", "hadamard"), "one plugin a run: either --kvquant-b"),
        (("--kvquant-transform", "hadamard", "--kvquant-nbits", "4"), "are for backends; a transform has none"),
        (("--kvquant-transform", "hadamard", "--kvquant-option", "a=1"), "are for backends; a transform has none"),
    ],
    ids=["both", "nbits", "option"],
)
def test_the_suite_refuses_what_it_would_have_to_ignore(tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    """Which looked as though it had been checked."""
    done = pytest_in(tmp_path, "--pyargs", "kvquant.testing", *arguments, "--collect-only")
    assert done.returncode != 0
    assert said in done.stdout + done.stderr


def test_a_plugin_s_own_tests_run_the_kit(tmp_path: Path) -> None:
    """parametrize_checks makes a test of each check; a backend that is not there fails, and is no reason to skip."""
    (tmp_path / "test_mine.py").write_text(
        "from kvquant.testing import parametrize_checks\n\n\n"
        "@parametrize_checks('careful', nbits=[2], options={'ends': 'open'})\n"
        "def test_conforms(check):\n"
        "    check()\n\n\n"
        "@parametrize_checks('not-there')\n"
        "def test_absent(check):\n"
        "    check()\n"
    )
    done = pytest_in(tmp_path, "-q", "-k", "zeros or split or devices", plugin="careful")
    assert done.returncode == 1
    assert "unknown backend 'not-there'" in done.stdout
    assert "3 failed, 3 passed" in done.stdout


def test_pytest_starts_without_torch(tmp_path: Path) -> None:
    """kvquant's options cost nothing in projects that use pytest for something else."""
    (tmp_path / "test_light.py").write_text(
        "import sys\n\n\ndef test_light():\n    assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
    )
    done = pytest_in(tmp_path, "-q", "-p", "no:hypothesispytest")
    assert done.returncode == 0, done.stdout


def test_options_are_read_as_people_type_them() -> None:
    """Numbers, truth values and words; the last of one name counts."""
    assert parse_options(["optimize=false", "rounds=3", "quant_type=fp4", "ratio=0.5", "sign==", "rounds=4"]) == {
        "optimize": False,
        "rounds": 4,
        "quant_type": "fp4",
        "ratio": 0.5,
        "sign": "=",
    }
    assert parse_widths(None) is None
    assert parse_widths("2,4") == (2, 4)
    assert str(parse_widths("2.5, 4.0")) == "(2.5, 4)"


@pytest.mark.parametrize("item", ["optimize", "=3", " =3"])
def test_an_option_without_name_or_value_is_refused(item: str) -> None:
    """Naming what was typed and what would work."""
    with pytest.raises(OptionValueError, match=r"^option='.*' cannot work: expected NAME=VALUE"):
        parse_options([item])


def test_a_width_that_is_no_number_is_refused() -> None:
    """As above."""
    with pytest.raises(OptionValueError, match=r"^nbits='2,x' cannot work: expected numbers"):
        parse_widths("2,x")
    with pytest.raises(OptionValueError, match=r"^nbits='2.5.1' cannot work"):
        parse_widths("2.5.1")


def test_a_fresh_process_begins_without_what_a_package_added_to_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """setuptools adds its copies of other distributions to the path once it is imported."""
    site = str(Path(sys.prefix) / "lib" / "site-packages")
    monkeypatch.setattr(sys, "path", ["", "/project/tests", site, f"{site}/setuptools/_vendor"])
    assert own_path() == ["/project/tests", site]

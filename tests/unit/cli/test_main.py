"""The command itself: exit codes, messages, help."""

from __future__ import annotations

import os
import subprocess
import sys

import click
import pytest

import kvquant as package
from kvquant.cli.main import COMMANDS, cli
from kvquant.errors import OptionValueError, UnknownBackendError


@pytest.fixture
def failing(monkeypatch):
    """Add a command ``fail`` that raises what it is told to."""

    def add(error):
        @click.command()
        def fail():
            raise error

        monkeypatch.setattr(sys.modules[__name__], "_fail", fail, raising=False)
        monkeypatch.setitem(COMMANDS, "fail", (__name__, "_fail", "Fails."))

    return add


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "kvquant", *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_version(kvquant):
    """One line with name and version."""
    result = kvquant("--version")
    assert (result.exit_code, result.stdout) == (0, f"kvquant {package.__version__}\n")


def test_help_lists_every_command(kvquant):
    """With a line on each, from the table: no command is imported for it."""
    result = kvquant("-h")
    assert result.exit_code == 0
    for name, (_, _, line) in COMMANDS.items():
        assert f"{name} " in result.stdout
        assert line.split()[0] in result.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_of_the_table_is_there(name):
    """Module and object exist, and the object is called as the table says."""
    command = cli.get_command(click.Context(cli), name)
    assert isinstance(command, click.Command)
    assert command.name == name


@pytest.mark.parametrize("arguments", [(), ("no-such-command",), ("list-backends", "--no-such-option"), ("info",)])
def test_bad_usage_exits_with_2(kvquant, arguments):
    """And says how to use it, on standard error."""
    result = kvquant(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Usage: kvquant" in result.stderr


def test_an_error_of_kvquant_is_one_message(kvquant, failing):
    """The thing asked for failed: exit code 1, the message on standard error, no traceback."""
    failing(UnknownBackendError("x", ["y"]))
    result = kvquant("fail")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr == "Error: unknown backend 'x'. Installed: y. Run 'kvquant list-backends'.\n"


def test_an_option_that_can_never_work_is_bad_usage(kvquant, failing):
    """Wherever it is noticed."""
    failing(OptionValueError("nbits", 5, "1, 2, 3, 4 or 8"))
    result = kvquant("fail")
    assert result.exit_code == 2
    assert result.stderr == "Error: nbits=5 cannot work: expected 1, 2, 3, 4 or 8.\n"


@pytest.mark.parametrize(("value", "shown"), [("1", True), ("0", False), ("", False)])
def test_the_traceback_on_request(value, shown):
    """KVQUANT_DEBUG=1 lets errors pass, for whoever wants to see where they come from."""
    result = run("info", "xyzzy", KVQUANT_DEBUG=value)
    assert result.returncode == 1
    assert ("Traceback" in result.stderr) == shown
    assert "unknown backend 'xyzzy'" in result.stderr


def test_errors_that_are_no_errors_of_kvquant_keep_their_traceback(kvquant, failing):
    """They are bugs, and hiding them would not help."""
    failing(ZeroDivisionError())
    assert isinstance(kvquant("fail").exception, ZeroDivisionError)


def test_a_reader_that_stops_reading_is_no_error():
    """As in ``kvquant list-backends | head -0``."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "kvquant", "list-backends"]
    result = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert "Traceback" not in result.stderr

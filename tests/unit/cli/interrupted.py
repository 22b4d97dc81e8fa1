"""A run that was interrupted, and goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from click.testing import Result


def goes_on(run: Callable[[], Result], output: Path, *, finished: int) -> dict[str, Any]:
    """Run a command twice, the second time from the record of an interrupted run; both must come to the same.

    Args:
        run: the command, with ``--json`` and ``--output``.
        output: its record, which is not there yet.
        finished: parts of it that the interruption leaves; it tears the one behind them off.

    Returns:
        What the second run printed.
    """
    whole = run()
    assert whole.exit_code == 0, whole.output
    lines = output.read_bytes().splitlines(keepends=True)
    assert len(lines) > finished + 1, "nothing would be left to do"
    output.write_bytes(b"".join(lines[: finished + 1]) + lines[finished + 1][:20])
    again = run()
    assert again.exit_code == 0, again.output
    report: dict[str, Any] = json.loads(again.stdout)
    assert report["results"] == json.loads(whole.stdout)["results"]
    assert output.read_bytes() == b"".join(lines)
    return report

"""Layers on devices other than the CPU, as far as a machine without any can show it."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_on_devices_that_are_pretended():
    """See `on_devices`, which has a test for each behaviour: a process of its own, because torch gets to know them."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/unit/cache/on_devices.py"]
    result = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout[-6000:]
    assert " passed" in result.stdout

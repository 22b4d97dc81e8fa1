"""What the README shows works as it stands."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_first_example_runs_and_quantises(capsys):
    """Copied into a file and run, it prints a cache with quantised tokens."""
    (example, *_) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    exec(compile(example, "README.md", "exec"), {})  # noqa: S102  # our own README
    printed = capsys.readouterr().out
    assert "QuantizedCache(backend='reference', nbits=4" in printed
    assert "at 4.50 bits per element" in printed


def test_the_two_commands_are_shown():
    """The first things that a stranger types."""
    readme = (ROOT / "README.md").read_text()
    assert "make demo" in readme
    assert "make test" in readme

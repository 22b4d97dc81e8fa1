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


def test_the_plugin_of_the_documentation_is_a_backend():
    """The class in `docs/plugins.md` quantises as a backend must."""
    import torch

    import kvquant
    from kvquant.plugin import BackendSpec, Capabilities

    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "plugins.md").read_text(), flags=re.DOTALL)
    names = {"torch": torch}
    exec(compile(blocks[0].replace("        import torch\n", ""), "plugins.md", "exec"), names)  # noqa: S102  # our own
    (declared,) = names["kvquant_register_backends"]()
    assert declared.name == "absmax"
    kvquant.register(BackendSpec("absmax", names["AbsMax"], Capabilities(nbits=(8,))))
    cache = kvquant.QuantizedCache("absmax", nbits=8)
    states = torch.randn(1, 2, 300, 64)
    cache.update(states, states, 0)
    kvquant.unregister("absmax")
    assert 0 < (cache.layers[0].keys - states).abs().max() < 0.03

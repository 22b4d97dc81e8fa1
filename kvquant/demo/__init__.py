"""A small real language model that the repository ships, and the scripts that made it.

Nothing here imports torch: a caller that only needs the paths pays nothing.
"""

from __future__ import annotations

from pathlib import Path

_HERE = Path(__file__).resolve().parent

#: The shipped model and tokenizer, for ``from_pretrained``.
MODEL_DIR = _HERE / "model"
#: About 1500 tokens of prose with a pass key near the top, which its last words ask for again.
PROMPT_FILE = _HERE / "prompt.txt"
#: Prose that the shipped model never saw, for perplexity.
HELDOUT_FILE = _HERE / "heldout.txt"
#: A handful of questions in LongBench's format that the shipped model can answer, and prompts for them.
LONGBENCH_DIR = _HERE / "longbench"

__all__ = ["HELDOUT_FILE", "LONGBENCH_DIR", "MODEL_DIR", "PROMPT_FILE"]

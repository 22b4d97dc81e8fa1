"""Write the held-out text and the pass-key prompt: ``python -m kvquant.demo.texts --text PACKAGE.deb ...``.

Both come from documents that training leaves out.  The prompt is measured in tokens of the shipped tokenizer.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from transformers import AutoTokenizer

from kvquant.demo import HELDOUT_FILE, MODEL_DIR, PROMPT_FILE
from kvquant.demo.corpus import Corpus, build_corpus
from kvquant.demo.recall import PROMPT_NAME, PROMPT_QUESTION, PROMPT_STATEMENT, Encode

#: Tokens of the prompt, at most.
PROMPT_TOKENS = 1540


def pass_key_prompt(document: str, key: str, encode: Encode) -> str:
    """Whole paragraphs of ``document`` with the key stated after the first and asked for at the end.

    There are as many paragraphs as fit into ``PROMPT_TOKENS``.
    """
    lines = document.split("\n")
    statement = PROMPT_STATEMENT.format(name=PROMPT_NAME, value=f" {key}")
    question = PROMPT_QUESTION.format(name=PROMPT_NAME)
    for count in range(len(lines), 1, -1):
        prompt = "\n".join([lines[0], statement, *lines[1:count], question])
        if len(encode(prompt)) <= PROMPT_TOKENS:
            return prompt
    raise ValueError("the document's first paragraphs are too long for the prompt")


def page(corpus: Corpus, ending: str) -> str:
    """The held-out document whose name ends so."""
    for name, text in corpus.heldout.items():
        if name.endswith(ending):
            return text
    raise ValueError(f"no held-out document is called {ending}; there are {', '.join(corpus.heldout)}")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m kvquant.demo.texts", description=__doc__)
    parser.add_argument("--text", type=Path, nargs="+", metavar="DIR_OR_DEB")
    parser.add_argument("--page", default="library/traceback.html", help="document of the prompt")
    parser.add_argument("--key", default="73915")
    args = parser.parse_args()
    corpus = build_corpus(args.text)
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
        return ids

    HELDOUT_FILE.write_text(corpus.heldout_text, encoding="utf-8")
    PROMPT_FILE.write_text(pass_key_prompt(page(corpus, args.page), args.key, encode), encoding="utf-8")


if __name__ == "__main__":
    main()

"""Writes passkeys.jsonl: held-out prose with a pass key in it, as the shipped model was taught to repeat."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer

from kvquant.demo import HELDOUT_FILE, MODEL_DIR
from kvquant.demo.recall import random_digits, recall_prompt

QUESTIONS = 24
DISTANCES = (200, 300, 400, 500)


def main() -> None:
    """Write the questions; the same each time."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False, verbose=False)

    prose = np.array(encode(HELDOUT_FILE.read_text("utf-8")))
    rng = np.random.default_rng(0)
    with (Path(__file__).parent / "passkeys.jsonl").open("w", encoding="utf-8") as file:
        for number in range(QUESTIONS):
            distance = DISTANCES[number % len(DISTANCES)]
            start = int(rng.integers(0, len(prose) - 1000))
            prompt = recall_prompt(encode, prose[start:], distance, rng, distractors=2)
            key = tokenizer.decode(prompt.key).strip()
            choices = [key, *(random_digits(rng, len(key)) for _ in range(3))]
            order = rng.permutation(len(choices)).tolist()
            row = {
                "text": tokenizer.decode(prompt.ids),
                "key": key,
                "choices": [choices[index] for index in order],
                "answer": order.index(0),
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()

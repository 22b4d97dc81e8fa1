"""The recall sequences, and the shipped model that was trained on them."""

import json
from typing import NamedTuple

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache, DynamicCache

from kvquant.demo import HELDOUT_FILE, MODEL_DIR, PROMPT_FILE
from kvquant.demo.recall import greedy, recall_accuracy, recall_prompt, recall_row, repeat_row

PROSE = np.full(4096, 7, dtype=np.int64)
MEBIBYTE = 2**20


def encode_characters(text: str) -> list[int]:
    """A tokenizer with a token for every character, none of which is that of ``PROSE``."""
    return [ord(character) for character in text]


def decode_characters(ids: list[int]) -> str:
    return "".join(map(chr, ids))


class Shipped(NamedTuple):
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


@pytest.fixture(scope="module")
def shipped() -> Shipped:
    return Shipped(AutoModelForCausalLM.from_pretrained(MODEL_DIR), AutoTokenizer.from_pretrained(MODEL_DIR))


@pytest.mark.parametrize("distance", [128, 512, 1800])
@pytest.mark.parametrize("distractors", [0, 1])
def test_prompt_puts_the_key_at_the_asked_distance(distance: int, distractors: int) -> None:
    rng = np.random.default_rng(0)
    prompt = recall_prompt(encode_characters, PROSE, distance, rng, distractors=distractors)
    start = len(prompt.ids) - distance
    assert prompt.ids[start : start + len(prompt.key)] == prompt.key
    assert decode_characters(prompt.ids).endswith("What is the pass key? The pass key is")
    assert decode_characters(prompt.ids).count("door code") == distractors


def test_prompt_too_short_for_its_sentences_is_refused() -> None:
    with pytest.raises(ValueError, match="too short"):
        recall_prompt(encode_characters, PROSE, 16, np.random.default_rng(0))


def test_training_row_weighs_answers_and_ignores_stated_values() -> None:
    rng = np.random.default_rng(0)
    answers = 0
    for _ in range(50):
        row = recall_row(PROSE, 512, 4.0, encode_characters, rng)
        assert row.ids.shape == row.weights.shape == (512,)
        values = "".join(chr(token) for token, weight in zip(*row, strict=True) if weight == 0.0)
        asked = "".join(chr(token) for token, weight in zip(*row, strict=True) if weight == 4.0)
        answers += len(asked)
        assert all(value in values for value in asked.split())
    assert answers > 50


def test_new_paragraph_follows_sentences_about_keys_which_are_not_targets() -> None:
    rng = np.random.default_rng(0)
    prose = np.array(encode_characters("abcdefghijklmnopqrstuvwxyz.\n" * 80), dtype=np.int64)
    for _ in range(20):
        row = recall_row(prose, 1024, 1.0, encode_characters, rng)
        lines = decode_characters(row.ids.tolist()).split("\n")
        paragraphs = [line for line in lines if line and line[0].islower()]
        assert len(paragraphs) > 5
        assert all(line[0] == "a" for line in paragraphs)
        targets = decode_characters(row.ids[row.weights > 0].tolist())
        assert not any(word in targets for word in ("What", "Remember", "stated"))


def test_repeated_segment_is_a_target_only_the_second_time() -> None:
    rng = np.random.default_rng(0)
    prose = np.arange(256, dtype=np.int64)
    for _ in range(50):
        row = repeat_row(prose, 256, 4096, rng)
        changed = np.flatnonzero(row.ids != prose)
        assert changed.size >= 4
        ignored = row.ids[row.weights == 0.0]
        assert ignored.size == 1 or set(ignored[:-1].tolist()) <= set(row.ids[row.weights == 1.0].tolist()) | {
            int(ignored[-1])
        }


def test_shipped_folder_is_small_and_complete() -> None:
    files = {path.name: path.stat().st_size for path in MODEL_DIR.iterdir()}
    assert sum(files.values()) < 12 * MEBIBYTE
    assert {
        "model.safetensors",
        "tokenizer.json",
        "TEXT_LICENSE",
        "training.json",
        "README.md",
    } <= files.keys()
    figures = json.loads((MODEL_DIR / "training.json").read_text("utf-8"))
    assert figures["recall"]["512"] >= 0.95


def test_shipped_model_has_the_promised_architecture(shipped: Shipped) -> None:
    config = shipped.model.config
    assert config.model_type == "llama"
    assert config.head_dim == 64
    assert 2 <= config.num_key_value_heads < config.num_attention_heads
    assert config.max_position_embeddings >= 2048
    assert shipped.tokenizer.tokenize(" 4096")[-4:] == list("4096")
    assert len(shipped.tokenizer.encode(HELDOUT_FILE.read_text("utf-8"))) >= 25_000


def test_shipped_model_repeats_a_key_512_tokens_back(shipped: Shipped) -> None:
    made: list[Cache] = []

    def cache() -> Cache:
        made.append(DynamicCache(config=shipped.model.config))
        return made[-1]

    accuracy = recall_accuracy(*shipped, distance=512, trials=10, cache_factory=cache)
    assert accuracy >= 0.8
    assert len(made) == 10
    assert made[0].get_seq_length() > 512


def test_shipped_prompt_is_answered(shipped: Shipped) -> None:
    ids = shipped.tokenizer.encode(PROMPT_FILE.read_text("utf-8"))
    assert 1450 <= len(ids) <= 1550
    key = PROMPT_FILE.read_text("utf-8").partition("pass key is ")[2].partition(".")[0]
    answer = greedy(shipped.model, ids, len(key) + 1)
    assert shipped.tokenizer.decode(answer) == f" {key}"

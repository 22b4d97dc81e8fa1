"""The shipped model through quantised caches."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvquant import CacheConfig
from kvquant.demo import MODEL_DIR, PROMPT_FILE
from kvquant.errors import OptionValueError
from kvquant.evaluation.compare import compare, total_steps


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def prompt():
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    return tokenizer(PROMPT_FILE.read_text(), return_tensors="pt").input_ids


def test_eight_bits_agree_with_full_precision_for_200_tokens(model, prompt):
    """Greedy, free-running, from the shipped prompt; and every next token agrees too."""
    steps = []
    (one,) = compare(model, prompt, [CacheConfig(nbits=8)], max_new_tokens=200, progress=steps.append)
    assert one.full.tokens == one.quantized.tokens
    assert (one.same_start, one.agreement) == (200, 1.0)
    assert one.quantized.quantized_tokens > 1400
    assert sum(steps) == total_steps(1, 200)


def test_fewer_bits_take_less_and_the_disagreement_is_there_to_see(model, prompt):
    """2 bits are much smaller than 4, and the figures say how often the next token differs."""
    four, two = compare(model, prompt, [CacheConfig(nbits=4), CacheConfig(nbits=2)], max_new_tokens=60)
    assert 1 < four.byte_ratio < two.byte_ratio
    assert four.quantized.bits_per_element == 4.5
    assert 2.25 < two.quantized.bits_per_element < 2.3  # scales in bytes, and what smoothing remembers
    assert four.agreement > 0.9
    assert four.to_dict()["same_start"] == four.same_start <= 60
    for one in (four, two):
        assert len(one.forced) == 60


def test_a_prompt_that_does_not_fit_is_refused_before_the_work(model, prompt):
    """The message says how much would fit."""
    limit = model.config.max_position_embeddings
    with pytest.raises(OptionValueError) as caught:
        compare(model, prompt, [CacheConfig()], max_new_tokens=limit)
    assert f"max_new_tokens={limit} cannot work: expected at most {limit - prompt.shape[1]}" in str(caught.value)

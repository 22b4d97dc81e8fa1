"""Every family of `kvquant support families`: a tiny model of it, run beside DynamicCache."""

import dataclasses

import pytest
import torch
import transformers

from kvquant import QuantizedCache, QuantizedEncoderDecoderCache
from kvquant.cache.compat import decoder_config, head_dim
from kvquant.cache.layer import QuantizedLayer
from kvquant.evaluation.advice import without_advice
from kvquant.evaluation.support import prompts
from kvquant.evaluation.support.check import (
    ABSENT,
    FAILED,
    OK,
    QUANTISED,
    QUANTISED_WINDOW,
    REFUSED,
    check_family,
    check_model,
    make,
)
from kvquant.evaluation.support.families import FAMILIES

BY_NAME = {family.name: family for family in FAMILIES}

#: What the layers of families are, which have others than plain full attention.
KINDS = {
    "Llama 4": {QUANTISED_WINDOW: 1, QUANTISED: 1},
    "Mistral": {QUANTISED_WINDOW: 2},
    "Ministral": {QUANTISED_WINDOW: 1, QUANTISED: 1},
    "Qwen3.5": {"linear": 1, QUANTISED: 1},
    "OLMo 3": {QUANTISED_WINDOW: 1, QUANTISED: 1},
    "EXAONE 4": {QUANTISED_WINDOW: 1, QUANTISED: 1},
    "Qwen3-Next": {"linear": 1, QUANTISED: 1},
    "Gemma 2": {QUANTISED_WINDOW: 1, QUANTISED: 1},
    "Gemma 3": {QUANTISED_WINDOW: 1, QUANTISED: 1},
    "Gemma 3n": {QUANTISED_WINDOW: 1, QUANTISED: 1, "without states of their own": 2},
    "Gemma 4": {QUANTISED_WINDOW: 1, QUANTISED: 1, "without states of their own": 2},
    "Cohere 2": {QUANTISED_WINDOW: 1, QUANTISED: 1},
    "gpt-oss": {QUANTISED_WINDOW: 1, QUANTISED: 1},
    "Jamba": {"linear": 1, QUANTISED: 1},
    "Bamba": {"linear": 1, QUANTISED: 1},
    "Granite 4": {"linear": 1, QUANTISED: 1},
    "LFM2": {"linear": 1, QUANTISED: 1},
    "RecurrentGemma": {"linear": 1, QUANTISED_WINDOW: 1},
}

#: What they are in older versions of transformers, which leave out shared layers, or know no other kind.
OLDER_KINDS = {
    "Gemma 3n": {QUANTISED_WINDOW: 1, QUANTISED: 1},
    "Gemma 4": {QUANTISED_WINDOW: 1, QUANTISED: 1},
    "RecurrentGemma": {QUANTISED_WINDOW: 2},
}

#: Families that have eager attention alone in older versions.
OLDER_EAGER = ("GPT-J", "CodeGen")


def of_transformers(family):
    """The family's class, or the end of the test where this transformers has none."""
    if not hasattr(transformers, family.model):
        pytest.skip(f"transformers {transformers.__version__} has no {family.model}")
    return getattr(transformers, family.model)


@pytest.mark.parametrize("name", BY_NAME)
def test_it_works_or_says_why_not(name):
    """Tokens and logits are DynamicCache's at first; with a body logits are close, and it is read packed."""
    family = BY_NAME[name]
    of_transformers(family)
    told = check_family(family, "reference", 8)
    assert told.problems(8) == []
    assert told.status == (REFUSED if family.refused else OK)
    if family.refused:
        assert family.note
        assert f"a quantised cache cannot be used for {transformers_type(family)} models" in told.reason
        assert "of type " in told.reason
        return
    assert told.quantised + told.cross_quantised > 0
    if told.cross:
        assert told.cross == {QUANTISED: 2}
        assert told.cross_quantised == 64 if name != "Moonshine" else told.cross_quantised > 50
    expected = KINDS.get(name, {QUANTISED: 2})
    assert told.layers in (expected, OLDER_KINDS.get(name, expected))
    # What is not read packed has its reason.
    reason = family.note or (told.attention == "eager" and name in OLDER_EAGER)
    assert told.steps == "fused" or (told.steps == "dequantised" and reason)


def transformers_type(family):
    return getattr(transformers, family.model).config_class.model_type


#: Channels of a head; None where layers, or keys and values, differ.
HEAD_DIMS = {"Llama": 32, "GPT-J": 32, "Falcon": 32, "DeepSeek-V3": None, "Gemma 4": None, "T5": 32, "Qwen2.5-VL": 32}


@pytest.mark.parametrize("name", HEAD_DIMS)
def test_the_head_size_that_a_config_tells_is_that_of_the_states(name):
    """A wrong one would refuse group sizes that work, and files of the same model."""
    family = BY_NAME[name]
    model = make(of_transformers(family), family.options)
    both = model.config.is_encoder_decoder
    cache = (QuantizedEncoderDecoderCache if both else QuantizedCache)(config=model.config, group_size=8)
    with without_advice():
        model.generate(**prompts.of_family(family), past_key_values=cache, max_new_tokens=2)
    layers = (cache.self_attention_cache if both else cache).layers
    found = {store.head_dim for layer in layers if isinstance(layer, QuantizedLayer) for store in layer.stores}
    told = head_dim(decoder_config(model.config) if both else model.config)
    assert told == HEAD_DIMS[name]
    assert told is None or found == {told}


def test_a_family_that_is_not_installed_is_told_as_such():
    """With the reason, and not as a failure."""
    told = check_family(dataclasses.replace(BY_NAME["Llama"], model="Llama99ForCausalLM"), "reference", 8)
    assert told.status == ABSENT
    assert "has no Llama99ForCausalLM" in told.reason
    assert told.problems(8) == []


def test_a_family_whose_config_has_changed_is_wrong():
    """Its options are for another version, and someone has to look."""
    told = check_family(dataclasses.replace(BY_NAME["Llama"], options={"hidden_size": "wide"}), "reference", 8)
    assert told.status == FAILED
    assert "its model cannot be made" in told.problems(8)[0]


@pytest.fixture(scope="module")
def llama():
    family = BY_NAME["Llama"]
    return make(transformers.LlamaForCausalLM, family.options), prompts.of_family(family)


def checked(llama, **options):
    told = check_family(BY_NAME["Llama"], "reference", 8)
    return check_model(told, *llama, {"backend": "reference", "nbits": 8, "group_size": 8, **options})


def test_too_little_context_to_quantise_is_told(llama):
    """A check that quantised nothing has checked nothing."""
    assert checked(llama, residual_length=1024).problems(8) == ["nothing was quantised"]


def test_a_cache_that_loses_something_is_found(llama, backend):
    """Whatever is wrong with the numbers shows in the logits."""

    class Zeros:
        def __init__(self, scheme):
            pass

        def quantize(self, rows):
            from kvquant.plugin import QuantizedRows

            return QuantizedRows(torch.zeros_like(rows, dtype=torch.uint8), rows[:, 0] * 0, rows[:, 0] * 0)

    told = checked(llama, backend=backend(Zeros), residual_length=8)
    (problem,) = told.problems(8)
    assert "off at 8 bits, and 0.04 is allowed" in problem


def test_a_model_that_fails_is_told_with_its_reason(llama):
    """Not raised: other families are run on."""
    model, inputs = llama
    told = check_model(
        check_family(BY_NAME["Llama"], "reference", 8),
        model,
        {**inputs, "attention_mask": torch.ones(3, 3)},
        {"backend": "reference", "nbits": 8, "group_size": 8},
    )
    assert told.status == FAILED
    assert told.problems(8) == [told.reason]

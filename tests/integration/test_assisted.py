"""Assisted decoding with the body in use: when it is greedy decoding, and what happens when it is not."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

from kvquant import QuantizedCache
from tests.support import SMALL_MODEL

#: From 83 to 146 tokens the same 64 are quantised: blocks of 64, a window of at least 19.
BETWEEN_BLOCKS = {"nbits": 2, "group_size": 64, "group_size_value": 16, "residual_length": 19}
#: A block leaves every 16 tokens.
MANY_BLOCKS = {"nbits": 2, "group_size": 16, "residual_length": 16}
#: What is rejected may lie in the body.
NO_WINDOW = {"nbits": 4, "group_size": 16, "residual_length": 0}


@pytest.fixture(scope="module")
def models():
    """A model, and a draft model that guesses some of what it says."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL_MODEL)).eval()
    draft = copy.deepcopy(model)
    for one, other in zip(model.parameters(), draft.parameters(), strict=True):
        if one.dim() == 2:
            torch.nn.init.normal_(one, std=0.1)
            other.data.copy_(one + 0.02 * torch.randn_like(one))
    return model, sure(draft)


def sure(draft):
    """A copy of a model that always proposes 4 tokens."""
    draft = copy.deepcopy(draft)
    draft.generation_config.num_assistant_tokens = 4
    draft.generation_config.num_assistant_tokens_schedule = "constant"
    draft.generation_config.assistant_confidence_threshold = 0.0
    return draft


class Run:
    """One call of generate: its tokens, its logits, and how many candidates each forward pass verified."""

    def __init__(self, model, cache, tokens, prompt, **assistance):
        self.cache, given = cache, []
        ids = torch.randint(2, 128, (1, prompt), generator=torch.Generator().manual_seed(3))
        hook = model.register_forward_pre_hook(
            lambda _, args, kwargs: given.append(kwargs["input_ids"].shape[1]), with_kwargs=True
        )
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            do_sample=False,
            max_new_tokens=tokens,
            return_dict_in_generate=True,
            output_logits=True,
            **assistance,
        )
        hook.remove()
        self.tokens, self.logits = out.sequences[0, prompt:], torch.cat(out.logits)
        self.candidates = [given[0] - prompt, *(tokens - 1 for tokens in given[1:])]
        self.rejected = sum(self.candidates) + len(given) - len(self.tokens)

    @property
    def quantized(self):
        return self.cache.memory_report().layers[0].quantized_tokens


def first_difference(one, other):
    """The first token whose logits are not the same to rounding, or None."""
    apart = (one.logits - other.logits).abs().amax(1) > 1e-4
    return int(apart.nonzero()[0]) if bool(apart.any()) else None


def assistance(kind, draft):
    """The options of generate that ask for an assistant."""
    return {"assistant_model": draft} if kind == "draft model" else {"prompt_lookup_num_tokens": 4}


def assert_greedy(models, kind, options, new, prompt, quantized):
    """Generation with an assistant, some of whose candidates are rejected, gives what generation without it gives."""
    model, draft = models
    caches = [QuantizedCache(**options, config=model.config) for _ in range(2)]
    plain, assisted = Run(model, caches[0], new, prompt), Run(model, caches[1], new, prompt, **assistance(kind, draft))
    assert 0 < assisted.rejected < sum(assisted.candidates)
    assert torch.equal(assisted.tokens, plain.tokens)
    assert first_difference(assisted, plain) is None
    assert plain.quantized == assisted.quantized == quantized


@pytest.mark.parametrize("kind", ["draft model", "prompt lookup"])
def test_over_a_quantised_prompt_it_is_greedy_decoding(models, kind):
    """To rounding, over 64 tokens in 2 bits, with candidates that are accepted and others that are not."""
    # No candidate of the prefill is accepted: prompt lookup has none, and the draft model's first guess is wrong.
    assert_greedy(models, kind, BETWEEN_BLOCKS, new=45, prompt=90, quantized=64)


@pytest.mark.parametrize("kind", ["draft model", "prompt lookup"])
def test_blocks_that_leave_while_candidates_are_verified_change_nothing(models, kind):
    """Each candidate sees what it would see alone, and what only the rejected ones pushed out comes back."""
    assert_greedy(models, kind, MANY_BLOCKS, new=60, prompt=10, quantized=48)


def test_attention_that_is_not_fused_sees_a_block_quantised_some_tokens_early(models):
    """It has one tensor for all candidates: as many tokens early as there are candidates, at most."""
    model = copy.deepcopy(models[0])
    model.set_attn_implementation("eager")
    caches = [QuantizedCache(**MANY_BLOCKS, config=model.config) for _ in range(2)]
    prompt, border = 10, 32  # the first block leaves when there are 32 tokens
    plain = Run(model, caches[0], 30, prompt)
    first = first_difference(Run(model, caches[1], 30, prompt, assistant_model=sure(model)), plain)
    assert first is not None
    assert border - 4 <= prompt + first < border


def test_candidates_that_come_with_the_prompt_see_it_exact(models):
    """As the prompt itself does; one by one they are decoded over what is quantised."""
    model, _ = models
    quantised = [QuantizedCache(**MANY_BLOCKS, config=model.config) for _ in range(2)]
    assisted = Run(model, quantised[0], 8, 90, assistant_model=sure(model))
    plain, exact = Run(model, quantised[1], 8, 90), Run(model, DynamicCache(config=model.config), 8, 90)
    assert assisted.candidates[0] == 4
    torch.testing.assert_close(assisted.logits[1:5], exact.logits[1:5], rtol=1e-4, atol=1e-4)
    assert first_difference(plain, exact) == 1


def test_a_rollback_that_reaches_the_body_removes_the_rejected_tokens_alone(models):
    """What remains is what was stored, to the bit, and generation goes on."""
    model, draft = models
    cache = QuantizedCache(**NO_WINDOW, config=model.config)
    with torch.no_grad():
        model(torch.arange(2, 92)[None], past_key_values=cache)
        model(torch.arange(2, 22)[None], past_key_values=cache)
    assert cache.memory_report().layers[0].quantized_tokens == 96 + 14 // 16 * 16  # of 110
    before = [(layer.keys, layer.values) for layer in cache.layers]
    cache.crop(-18)
    assert cache.get_seq_length() == 92
    for layer, (keys, values) in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.keys, keys[:, :, :92])
        assert torch.equal(layer.values, values[:, :, :92])
    assisted = Run(model, QuantizedCache(**NO_WINDOW, config=model.config), 30, 90, assistant_model=draft)
    assert assisted.rejected > 0
    assert (len(assisted.tokens), assisted.cache.get_seq_length()) == (30, 119)


def test_whatever_is_rejected_a_window_that_holds_it_loses_nothing_else(models):
    """After each verification the cache is as long as the text, and the body a whole number of blocks."""
    model, draft = models
    assisted = Run(model, QuantizedCache(**MANY_BLOCKS, config=model.config), 60, 90, assistant_model=draft)
    assert assisted.rejected > 0
    assert assisted.cache.get_seq_length() == 149
    assert assisted.quantized % 16 == 0

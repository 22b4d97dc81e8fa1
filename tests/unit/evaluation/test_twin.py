"""The outlier twin: other keys, the same model."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    DynamicCache,
    LlamaConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from kvquant.errors import OptionValueError, UnsupportedError
from kvquant.evaluation.candidates import parse_candidates
from kvquant.evaluation.loading import load_model
from kvquant.evaluation.teacher import forced_logits
from kvquant.evaluation.twin import PAIRS, SMALLEST, outlier_twin
from tests.support import SMALL_MODEL


def small(config, **options):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(**{**SMALL_MODEL, **options})).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return model


def text(model, tokens=40):
    return torch.randint(2, model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(1))


def keys(model):
    """The keys of every layer, ``[layers, kv_heads, tokens, head_dim]``."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(text(model), past_key_values=cache)
    return torch.stack([layer.keys[0] for layer in cache.layers])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    ("config", "options"),
    [(LlamaConfig, {}), (LlamaConfig, {"attention_bias": True}), (Qwen2Config, {}), (Qwen3Config, {})],
)
def test_what_it_says_is_the_same_to_the_last_bit(config, options, dtype):
    """With and without biases, with norms of queries and keys, in every type."""
    model = small(config, **options).to(dtype)
    ids = text(model)
    with torch.no_grad():
        before = model(ids).logits
        outlier_twin(model, 64)
        assert torch.equal(model(ids).logits, before)


@settings(max_examples=20, deadline=None)
@given(largest=st.sampled_from([16, 32, 64, 128]), seed=st.integers(0, 100))
def test_keys_are_those_of_the_model_times_the_factors(largest, seed):
    """The same factor for both channels of a rotary pair, `PAIRS` pairs a head, and 1 elsewhere."""
    model = small(LlamaConfig)
    before = keys(model)
    layers = outlier_twin(model, largest, seed=seed)
    factors = torch.stack([outliers.factors for outliers in layers])
    assert torch.equal(keys(model), before * factors[:, :, None])
    half = factors.shape[-1] // 2
    assert torch.equal(factors[..., :half], factors[..., half:])
    assert ((factors > 1).sum(-1) == 2 * PAIRS).all()
    assert set(factors.unique().tolist()) <= {1.0, *(float(SMALLEST << power) for power in range(4))}
    assert factors.max() <= largest


def test_the_shipped_model_through_a_full_precision_cache():
    """One token at a time, on its own text."""
    plain, twin = load_model(), load_model(outliers=64)
    ids = torch.tensor([plain.encode("The database server keeps a copy of every page that was changed. " * 4)])
    for logits, others in zip(
        forced_logits(plain.model, DynamicCache(), ids, 20, one_by_one=True),
        forced_logits(twin.model, DynamicCache(), ids, 20, one_by_one=True),
        strict=True,
    ):
        assert torch.equal(logits, others)


def test_outliers_ruin_a_scale_for_each_token_unless_smoothed_and_leave_a_scale_for_each_channel_alone():
    """What the twin is for. On the channel axis powers of two even commute with quantising."""
    model, twin = load_model(), load_model(outliers=64)
    ids = torch.tensor([model.encode("The database server keeps a copy of every page that was changed. " * 20)])
    errors = {}
    channel, token = "reference:4:residual_length=16", "reference:4:token:residual_length=16"
    plain = f"{token}:smoothing_key=False"
    for candidate in parse_candidates(f"{channel},{token},{plain}")[1:]:
        for loaded in (model, twin):
            exact = torch.cat(list(forced_logits(loaded.model, DynamicCache(), ids, 128)))
            cache = candidate.make(loaded.model.config)
            found = torch.cat(list(forced_logits(loaded.model, cache, ids, 128)))
            errors[candidate.label, loaded.outliers] = (found - exact).norm().item()
    assert errors[channel, 64] == errors[channel, None]
    assert errors[plain, 64] > 10 * errors[plain, None]
    assert errors[token, 64] < 1.5 * errors[token, None]


def test_the_same_seed_gives_the_same_twin():
    """And another one another."""
    first, second, third = (load_model(outliers=64, seed=seed).settings()["weights"] for seed in (0, 0, 1))
    assert first == second != third


@pytest.mark.parametrize("largest", [0, -16, 8, 48, 100])
def test_factors_that_are_no_powers_of_two_are_refused(largest):
    """Their products would be rounded."""
    model = small(LlamaConfig)
    before = model.state_dict()["model.layers.0.self_attn.k_proj.weight"].clone()
    with pytest.raises(OptionValueError, match=f"outliers={largest} cannot work: expected a power of two from 16 on"):
        outlier_twin(model, largest)
    assert torch.equal(model.state_dict()["model.layers.0.self_attn.k_proj.weight"], before)


@pytest.mark.parametrize(
    ("config", "options", "reason"),
    [(Phi3Config, {"pad_token_id": 0}, "no q_proj and k_proj"), (CohereConfig, {}, "rotary pairs lie otherwise")],
)
def test_a_model_that_is_built_otherwise_is_refused_and_left_as_it_was(config, options, reason):
    """Projections in one matrix, and rotary pairs side by side."""
    model = small(config, **options)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UnsupportedError, match=reason):
        outlier_twin(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

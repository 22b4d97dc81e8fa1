"""What `kvquant.integrations.transformers` adds to transformers."""

import pytest
import torch
from transformers import AttentionInterface, AutoModelForCausalLM, Gemma2Config, GptOssConfig, LlamaConfig

import kvquant.integrations.transformers as integration
from kvquant import QuantizedCache
from kvquant.attention.counters import counters
from kvquant.attention.kernels import VARIABLE
from kvquant.errors import UnsupportedError
from tests.support import SMALL_MODEL

SHAPE = {**SMALL_MODEL, "layer_types": ["full_attention"] * 2}

CONFIGS = {
    # A cap low enough to bend the scores of random weights.
    "soft-capping": Gemma2Config(**SHAPE, attn_logit_softcapping=0.5, query_pre_attn_scalar=1),
    "sinks": GptOssConfig(**SHAPE, num_local_experts=2, num_experts_per_tok=1),
}


@pytest.fixture
def installed():
    """The attention is known to transformers for as long as the test runs."""
    integration.install()
    yield
    integration.uninstall()


@pytest.fixture(params=CONFIGS)
def models(request, installed):
    """One model with transformers' attention and with ours."""
    torch.manual_seed(0)
    eager = AutoModelForCausalLM.from_config(CONFIGS[request.param], attn_implementation="eager").eval()
    for name, weight in eager.named_parameters():
        torch.nn.init.normal_(weight, std=0.2 if "norm" not in name else 0.5)
    ours = AutoModelForCausalLM.from_config(CONFIGS[request.param], attn_implementation="kvquant").eval()
    ours.load_state_dict(eager.state_dict())
    return eager, ours


def prompt(padded=False):
    torch.manual_seed(1)
    ids, shown = torch.randint(2, 128, (2, 100)), torch.ones(2, 100, dtype=torch.long)
    if padded:
        shown[0, :30] = 0
    return {"input_ids": ids, "attention_mask": shown}


@pytest.mark.parametrize("padded", [False, True])
def test_without_a_cache_it_is_the_model_s_own_attention(models, padded):
    """Caps and sinks included."""
    eager, ours = (model(**prompt(padded), use_cache=False).logits for model in models)
    shown = prompt(padded)["attention_mask"].bool()
    torch.testing.assert_close(ours[shown], eager[shown], rtol=1e-4, atol=1e-4)


def test_gradients_are_those_of_the_model_s_own_attention(models):
    """Models can be trained with it."""
    for model in models:
        model(**prompt()).logits.square().mean().backward()
    eager, ours = (dict(model.named_parameters()) for model in models)
    for name, weight in ours.items():
        if weight.grad is not None:
            torch.testing.assert_close(weight.grad, eager[name].grad, rtol=1e-3, atol=1e-4)
    assert any("k_proj" in name and weight.grad.abs().sum() > 0 for name, weight in ours.items())


@pytest.mark.parametrize("kernel", ["numba", "torch"])
@pytest.mark.parametrize("padded", [False, True])
def test_it_decodes_over_packed_tokens(models, kernel, padded, monkeypatch):
    """Nothing is dequantised whole, and each step gives what the model's own attention gives over the same cache."""
    if kernel == "numba":
        pytest.importorskip("numba")
    monkeypatch.setenv(VARIABLE, kernel)
    logits = []
    for model in models:
        cache = QuantizedCache(backend="reference", nbits=4, group_size=16, residual_length=16, config=model.config)
        counters.reset()
        made = model.generate(
            **prompt(padded),
            past_key_values=cache,
            max_new_tokens=8,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        logits.append(torch.stack(made.logits))
    assert (counters.kernels[kernel], counters.materialised) == (7 * 2, 0)
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-3, atol=1e-3)


def test_what_has_neither_goes_to_torch(installed):
    """Other models may use it too, and then it is sdpa."""
    config = LlamaConfig(**SMALL_MODEL)
    torch.manual_seed(0)
    ours = AutoModelForCausalLM.from_config(config, attn_implementation="kvquant").eval()
    theirs = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(ours(**prompt()).logits, theirs(**prompt()).logits)


@pytest.mark.parametrize(
    ("option", "named"), [("position_bias", "a bias by position"), ("cache", "continuous batching")]
)
def test_what_it_cannot_combine_is_refused(option, named):
    """Nothing is left out without a word."""
    states = torch.zeros(1, 1, 1, 16)
    with pytest.raises(UnsupportedError, match=named):
        integration.attention_forward(torch.nn.Module(), states, states, states, None, softcap=1.0, **{option: states})


def test_dropout_is_refused(installed):
    """With a way out."""
    model = AutoModelForCausalLM.from_config(
        Gemma2Config(**SHAPE, attention_dropout=0.1), attn_implementation="kvquant"
    ).train()
    with pytest.raises(UnsupportedError, match=r"dropout cannot be combined.*attn_implementation='eager'"):
        model(**prompt())


def test_it_can_be_undone():
    """And done twice."""
    integration.install()
    integration.install()
    assert "kvquant" in AttentionInterface()
    integration.uninstall()
    integration.uninstall()
    assert "kvquant" not in AttentionInterface()

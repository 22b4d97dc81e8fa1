"""The error of attention's output on recorded states, against what the model itself computes."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, Gemma2Config, LlamaConfig, PreTrainedModel

from kvquant.cache.cache import QuantizedCache
from kvquant.demo import HELDOUT_FILE
from kvquant.errors import OptionValueError, UnsupportedError
from kvquant.evaluation.attention import (
    AttentionOptions,
    AttentionReport,
    changed_error,
    decoded,
    measure_attention,
    run_settings,
)
from kvquant.evaluation.candidates import parse_candidates
from kvquant.evaluation.journal import Journal
from kvquant.evaluation.loading import load_model
from kvquant.evaluation.recording import record

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 50,
    "num_hidden_layers": 2,
}


@functools.cache
def demo() -> tuple[Any, list[int]]:
    loaded = load_model()
    return loaded, loaded.encode(HELDOUT_FILE.read_text("utf-8"))[:600]


def tiny(config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    return model


@contextmanager
def outputs_of(model: PreTrainedModel) -> Iterator[list[list[Tensor]]]:
    """Collect what each layer's attention puts out, ``[tokens, query_heads * head_dim]`` for each forward pass."""
    found: list[list[Tensor]] = [[] for _ in model.model.layers]
    hooks = [
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, given, kept=kept: kept.append(given[0][0].double()))
        for layer, kept in zip(model.model.layers, found, strict=True)
    ]
    yield found
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SHAPE),
        # Scores are soft-capped hard, and every other layer has a window.
        Gemma2Config(**SHAPE, sliding_window=24, attn_logit_softcapping=0.5, query_pre_attn_scalar=4),
    ],
    ids=lambda config: config.model_type,
)
@torch.no_grad()
def test_exact_states_decode_to_the_model_s_own_output(config: Any) -> None:
    """Of its eager attention, layer by layer; with its own cache, and with ours while all is exact."""
    model = tiny(config)
    tokens = torch.randint(50, (1, 60), generator=torch.Generator().manual_seed(1))
    states = record(model, DynamicCache(config=model.config), tokens, 20)
    model.set_attn_implementation("eager")
    with outputs_of(model) as found:
        model(tokens, past_key_values=DynamicCache(config=model.config))
    for cache in (DynamicCache(config=model.config), QuantizedCache("reference", config=model.config)):
        for layer, (whole,) in enumerate(found):
            torch.testing.assert_close(decoded(cache, layer, states[layer]), whole[-20:], rtol=1e-4, atol=1e-6)


def test_layers_that_share_the_states_of_others_have_none_of_their_own() -> None:
    """They hold no cache, so nothing of theirs is recorded; the others are as ever."""
    shared = {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "sliding_window": 24,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "vocab_size_per_layer_input": 50,
        "intermediate_size": [32] * 4,
    }
    model = tiny(AutoConfig.for_model("gemma3n_text", **{**SHAPE, **shared}))
    tokens = torch.randint(50, (1, 60), generator=torch.Generator().manual_seed(1))
    states = record(model, DynamicCache(config=model.config), tokens, 4)
    assert list(states) == [0, 1]
    cache = QuantizedCache("reference", config=model.config, nbits=2, group_size=16, residual_length=16)
    for layer, recorded in states.items():
        assert decoded(cache, layer, recorded).shape == (4, 4 * 16)


@torch.no_grad()
def test_quantised_states_decode_to_what_generation_gets() -> None:
    """In the first layer, whose states do not depend on the cache: token by token through the whole model."""
    loaded, text = demo()
    tokens = torch.tensor([text[:160]])
    states = record(loaded.model, DynamicCache(config=loaded.model.config), tokens, 40)
    options: dict[str, Any] = {"nbits": 2, "residual_length": 16, "group_size": 32}
    cache = QuantizedCache("reference", config=loaded.model.config, **options)
    loaded.model(tokens[:, :120], past_key_values=cache)
    with outputs_of(loaded.model) as found:
        for at in range(120, 160):
            loaded.model(tokens[:, at : at + 1], past_key_values=cache)
    other = QuantizedCache("reference", config=loaded.model.config, **options)
    torch.testing.assert_close(decoded(other, 0, states[0]), torch.cat(found[0]), rtol=1e-4, atol=1e-5)
    exact = decoded(DynamicCache(), 0, states[0])
    assert float((torch.cat(found[0]) - exact).norm() / exact.norm()) > 0.005


def test_the_model_attends_as_before_afterwards() -> None:
    """Whether the recording went well or not."""
    model = tiny(LlamaConfig(**SHAPE))
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    before = model.config._attn_implementation
    record(model, DynamicCache(), tokens, 1)
    assert model.config._attn_implementation == before
    with pytest.raises(IndexError):
        record(model, DynamicCache(), tokens + 50, 1)
    assert model.config._attn_implementation == before
    model(tokens)


def test_a_model_whose_attention_is_not_seen_is_refused() -> None:
    """With the reason."""

    class Deaf(torch.nn.Module):
        config = LlamaConfig(**SHAPE)

        def set_attn_implementation(self, name: str) -> None:
            pass

        def forward(self, input_ids: Tensor, use_cache: bool, past_key_values: Any) -> None:
            pass

    with pytest.raises(UnsupportedError, match="recording the states of Deaf"):
        record(Deaf(), DynamicCache(), torch.zeros(1, 8, dtype=torch.int64), 1)  # type: ignore[arg-type]


def test_errors_are_those_of_the_tokens_that_changed() -> None:
    """Exact ones do not make them smaller."""
    exact = torch.ones(1, 2, 4, 8)
    held = exact.clone()
    assert changed_error(exact, held) is None
    held[:, :, 1] += 0.5
    held[:, :, 3] -= 0.5
    assert changed_error(exact, held) == pytest.approx(0.5)


# ------------------------------------------------------------------------------------------------ the measurement


def measured(backends: str, **others: Any) -> AttentionReport:
    loaded, text = demo()
    options = AttentionOptions(
        candidates=parse_candidates(backends), **{"contexts": (192,), "queries": 8, "windows": 2, **others}
    )
    with Journal(None, run_settings(loaded, text, options)) as journal:
        return measure_attention(loaded, text, options, journal)


def test_every_layer_and_every_cache() -> None:
    """Fewer bits, larger errors; a mean over layers and windows; transformers' cache beside ours."""
    report = measured("reference:8:4:2:residual_length=16,transformers:quanto:4")
    eight, four, two, theirs = report.rows
    for row in report.rows:
        assert [layer.layer for layer in row.layers] == list(range(len(demo()[0].model.model.layers)))
        for name in ("key", "value"):
            mean = sum(getattr(layer, name) for layer in row.layers) / len(row.layers)
            assert getattr(row, name) == pytest.approx(mean)
        assert row.output.value == pytest.approx(sum(row.windows) / 2)
        assert row.output.value == pytest.approx(sum(layer.output for layer in row.layers) / len(row.layers))
    for name in ("key", "value"):
        assert getattr(eight, name) < getattr(four, name) / 8 < getattr(two, name) / 16
    assert eight.output.value < four.output.value / 8 < two.output.value / 16
    assert (four.bits_per_element, two.bits_per_element) == (4.5, 2.5)
    assert theirs.bits_per_element == pytest.approx(5.0)
    assert theirs.value == pytest.approx(four.value, rel=0.1)


def test_a_cache_that_quantises_nothing_has_no_error() -> None:
    """And no bits to speak of; a layer that is never quantised does not make the others look better."""
    (row,) = measured("reference:2:residual_length=512", windows=1).rows
    assert (row.bits_per_element, row.key, row.value) == (None, None, None)
    assert row.output.value < 1e-6
    some, every = measured("reference:2:residual_length=16:skip_layers=[1],reference:2:residual_length=16").rows
    assert (some.layers[1].key, some.layers[1].value) == (None, None)
    others = [layer.key for layer in some.layers if layer.layer != 1]
    assert some.key == pytest.approx(sum(others) / len(others))
    assert some.layers[0] == every.layers[0]


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"queries": 192}, "queries=192 cannot work: expected 1 to 191 tokens"),
        ({"windows": 0}, "windows=0 cannot work"),
        ({"contexts": (601,)}, "text='600 tokens' cannot work: expected at least 601 tokens"),
        ({"contexts": (4096,)}, "contexts=4096 cannot work"),
        ({"backends": "full"}, "backends='full' cannot work: expected a cache that is not in full precision"),
    ],
)
def test_what_cannot_work_is_refused(others: dict[str, Any], message: str) -> None:
    """Before anything runs."""
    with pytest.raises(OptionValueError, match=message):
        measured(**{"backends": "reference:4", **others})

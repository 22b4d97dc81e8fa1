"""How caches to evaluate are written, made and measured."""

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, MistralConfig
from transformers.cache_utils import HQQQuantizedLayer

from kvquant.cache.cache import QuantizedCache
from kvquant.errors import BackendFactoryError, ConfigError, OptionValueError, UnknownOptionError, UnsupportedError
from kvquant.evaluation.candidates import body_bits, cache_bits, elements, parse_candidates, usable_candidates
from kvquant.evaluation.notation import read_cache, split_caches, written
from tests.support import SMALL_MODEL

MODEL = LlamaConfig(**SMALL_MODEL)


def labels(text, shared=None):
    return [candidate.label for candidate in parse_candidates(text, shared)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("reference", ["reference:4"]),
        ("reference:8:2, hqq:4", ["reference:8", "reference:2", "hqq:4"]),
        ("full,reference:4", ["reference:4"]),
        ("reference:2:token", ["reference:2:token"]),
        ("reference:2.5:4.0", ["reference:2.5", "reference:4"]),
        ("reference:2:skip_layers=[0,1],hqq:2", ["reference:2:skip_layers=[0,1]", "hqq:2"]),
        (
            'reference:2:layers={"0":{"nbits":8},"2-3":{"backend":"hqq"}}:token,hqq:2',
            ['reference:2:token:layers={"0":{"nbits":8},"2-3":{"backend":"hqq"}}', "hqq:2"],
        ),
        ("reference:2:axis_key=token:sink_length=4", ["reference:2:axis_key=token:sink_length=4"]),
        ("kivi-2,kivi-4:sink_length=4", ["kivi-2", "kivi-4:sink_length=4"]),
        ("transformers:quanto:4:2", ["transformers:quanto:4", "transformers:quanto:2"]),
        (
            "transformers:hqq:residual_length=64,transformers:fp8",
            ["transformers:hqq:4:residual_length=64", "transformers:fp8:8"],
        ),
        ("kvquant:reference:2", ["kvquant:reference:2"]),
    ],
)
def test_labels_are_what_was_written_with_its_bits(text, expected):
    """Full precision comes first, always; a label read again gives the same candidate."""
    assert labels(text) == ["full", *expected]
    assert labels(",".join(expected)) == ["full", *expected]


def test_options_of_the_cache_and_of_the_backend():
    """What `CacheConfig` has is the cache's, shared options are for those that say nothing themselves."""
    shared = {"group_size": 16, "residual_length": 0, "sink_length": None}
    text = "reference:2,reference:4:q_group_size=8:axis_key=token,bitsandbytes:4:group_size=64:quant_type=fp4,kivi-2"
    _, plain, own, backend, preset = (candidate.settings() for candidate in parse_candidates(text, shared))
    assert (plain["nbits"], plain["group_size"], plain["residual_length"], plain["sink_length"]) == (2, 16, 0, 0)
    assert (own["nbits"], own["group_size"], own["axis_key"], own["residual_length"]) == (4, 8, "token", 0)
    assert (backend["options"], backend["group_size"]) == ({"quant_type": "fp4"}, 64)
    assert (preset["group_size"], preset["residual_length"]) == (32, 128)  # what a preset says is what it is


def test_fresh_caches_of_every_kind():
    """Each call gives another one, empty."""
    full, ours, theirs = parse_candidates("reference:2:group_size=8,transformers:hqq:3:residual_length=9")
    assert type(full.make(MODEL)) is DynamicCache
    cache = ours.make(MODEL)
    assert isinstance(cache, QuantizedCache)
    assert (cache.config.nbits, cache.config.group_size) == (2, 8)
    assert ours.make(MODEL) is not cache
    layer = theirs.make(MODEL).layers[1]
    assert isinstance(layer, HQQQuantizedLayer)
    assert (layer.nbits, layer.residual_length) == (3, 9)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (
            "hqqq:2",
            UnknownOptionError,
            "unknown backend 'hqqq'. Did you mean 'hqq'? Known backends: bitsandbytes, hqq, lloydmax,",
        ),
        ("kivi-3", UnknownOptionError, "unknown backend 'kivi-3'. Did you mean 'kivi-"),
        ("reference:5", OptionValueError, "nbits=5 cannot work: expected one of 1, 1.5, 2, 2.5, 3, 3.5, 4, 8."),
        ("", OptionValueError, "backends='' cannot work: expected BACKEND"),
        ("reference:2:3x", OptionValueError, "backends='reference:2:3x' cannot work: expected BACKEND"),
        ("reference,reference:4", OptionValueError, "expected each cache once; reference:4 is named twice"),
        ("reference:2:token:channel", OptionValueError, "expected one axis for both, or axis_key=... and axis_value="),
        ("kivi-2:4", OptionValueError, "expected no bits after the preset 'kivi-2', which says them itself"),
        ("reference:2:sink_length=-1", OptionValueError, "sink_length=-1 cannot work"),
        ("quanto:2.5", UnsupportedError, "nbits=2.5 is a mix of 3 and 2 bits; supported: 2, 4, 8"),
        ("bitsandbytes:3", UnsupportedError, "nbits=3 is not supported; supported: 4, 8"),
        ("quanto:4:qtype=foo", BackendFactoryError, "qtype='foo' is not supported"),
        (
            "transformers:foo",
            UnknownOptionError,
            "unknown transformers backend 'foo'. Known transformers backends: quanto",
        ),
        (
            "transformers:quanto:3",
            OptionValueError,
            "backends='transformers:quanto:3' cannot work: expected nbits from 2, 4",
        ),
        ("transformers:quanto:token", OptionValueError, "expected axis_key and axis_value as integers"),
        (
            "transformers:quanto:sink_length=4",
            UnknownOptionError,
            "unknown option 'sink_length'. Known options: axis_key",
        ),
        ("transformers:fp8:group_size=4", OptionValueError, "expected 'transformers:fp8' without options"),
    ],
)
def test_what_cannot_work_is_refused_with_what_would(text, error, message):
    """Before a model is loaded."""
    with pytest.raises(error) as caught:
        parse_candidates(text)
    assert message in str(caught.value)


def test_shared_options_that_can_never_work_are_refused():
    """Even if no candidate takes them."""
    with pytest.raises(OptionValueError, match="group_size=0 cannot work"):
        parse_candidates("transformers:quanto:4", {"group_size": 0})


def test_a_model_that_a_cache_cannot_do_is_named():
    """transformers' own refuses sliding windows; the reason is its own."""
    _, candidate = parse_candidates("transformers:quanto:4")
    with pytest.raises(UnsupportedError, match=r"the cache 'transformers:quanto:4' cannot be used: .*full attention"):
        candidate.make(MistralConfig(**SMALL_MODEL, sliding_window=8))


def test_defaults_leave_out_what_is_not_there(monkeypatch):
    """With the reason; what is there stays."""
    everything, left_out = usable_candidates("reference:4:2,transformers:quanto:4")
    assert [candidate.label for candidate in everything] == [
        "full",
        "reference:4",
        "reference:2",
        "transformers:quanto:4",
    ]
    assert left_out == []
    monkeypatch.setattr("transformers.cache_utils.is_optimum_quanto_available", lambda: False)
    usable, left_out = usable_candidates("reference:4:2,transformers:quanto:4")
    assert [candidate.label for candidate in usable] == ["full", "reference:4", "reference:2"]
    (line,) = left_out
    assert line.startswith(
        "transformers:quanto:4 is left out: the cache 'transformers:quanto:4' cannot be used: You need"
    )


def filled(candidate, tokens=96):
    cache = candidate.make(MODEL)
    states = torch.randn(2, 1, 2, tokens, 16, generator=torch.Generator().manual_seed(0))
    for layer in range(2):
        cache.update(states[0], states[1], layer)
    return cache


@pytest.mark.parametrize(
    ("text", "bits"),
    [
        ("reference:2:group_size=16:residual_length=0:smoothing_key=false:smoothing_value=false:scale_bits=16", 4),
        ("reference:4:axis_key=token:group_size=16:residual_length=0:smoothing_key=false", 4 + 32 / 16),
        ("reference:8:group_size=8:residual_length=40", 8 + 32 / 8),
        ("reference:2.5:group_size=8:residual_length=0:smoothing_key=false:smoothing_value=false:scale_bits=16", 6.5),
        ("transformers:quanto:4:group_size=64", 4 + 2 * 32 / 64),  # a scale and a shift, in the type of the states
        ("transformers:hqq:2:group_size=64", 2 + 2 * 32 / 64),
        ("transformers:fp8", 8),
    ],
)
def test_bits_are_counted_from_real_bytes(text, bits):
    """Of what is quantised, with scales and offsets."""
    full, candidate = parse_candidates(text)
    cache, exact = filled(candidate), filled(full)
    assert elements(exact) == 2 * 2 * 2 * 96 * 16
    assert cache_bits(exact, elements(exact)) == 32
    assert body_bits(exact) is None
    assert body_bits(cache) == pytest.approx(bits, abs=0.05)
    assert cache_bits(cache, elements(exact)) >= body_bits(cache) * 0.99


def test_bits_of_the_whole_cache_have_the_window_too():
    """Half of the tokens exact: half of the bits of float32."""
    full, candidate = parse_candidates("reference:4:group_size=16:residual_length=48")
    cache, numbers = filled(candidate), elements(filled(full))
    assert cache_bits(cache, numbers) == pytest.approx(8 * cache.nbytes / numbers)
    assert cache_bits(cache, numbers) >= 0.5 * 6 + 0.5 * 32
    assert body_bits(parse_candidates("reference:4")[1].make(MODEL)) is None


def test_config_errors_are_config_errors():
    """So that the command line calls them bad usage."""
    with pytest.raises(ConfigError):
        parse_candidates("nothing-of-the-kind")


@pytest.mark.parametrize(
    "value", ["error", "4", "true", "null", "a:b", "a,b", '{"a":1}', 4, 0.5, True, None, [1, 2], {"a": "b:c"}]
)
def test_what_is_written_is_read_again(value):
    """Text that looks like something else is quoted."""
    cache = read_cache(f"reference:2:x={written(value)}")
    assert (cache.widths, cache.options) == ((2,), {"x": value})
    assert split_caches(f"a,reference:2:x={written(value)}") == ["a", f"reference:2:x={written(value)}"]

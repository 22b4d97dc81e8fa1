"""`generate(cache_implementation="quantized")` after `kvquant.integrations.transformers.install()`."""

import warnings

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    LlamaConfig,
    TextGenerationPipeline,
)

import kvquant.integrations.transformers as integration
from kvquant import QuantizedCache
from kvquant.cache.encoder_decoder import QuantizedEncoderDecoderCache
from kvquant.errors import BlockedBackendError, OptionValueError, UnknownBackendError, UnknownOptionError
from kvquant.evaluation.support import tiny
from tests.support import SMALL_MODEL

SMALL = {"backend": "reference", "nbits": 4, "group_size": 16, "residual_length": 16}


@pytest.fixture
def installed():
    """For as long as the test runs."""
    integration.install()
    yield
    integration.uninstall()


@pytest.fixture(scope="module")
def model():
    """A tiny Llama."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**SMALL_MODEL)).eval()


def prompt(tokens=40):
    ids = torch.randint(2, 128, (1, tokens), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def cache_of(output) -> Cache:
    """The cache that `generate` made and returned."""
    return next(value for value in output.values() if isinstance(value, Cache))


def made(model, cache_config=None, **options):
    """The cache that `generate` makes of a cache_config, after some tokens."""
    options = {"cache_implementation": "quantized", "cache_config": cache_config, "max_new_tokens": 4, **options}
    return cache_of(model.generate(**prompt(), do_sample=False, return_dict_in_generate=True, **options))


def test_it_is_as_if_the_cache_were_given(model, installed):
    """To the token."""
    options = {"max_new_tokens": 20, "do_sample": False}
    given = model.generate(**prompt(), past_key_values=QuantizedCache(**SMALL, config=model.config), **options)
    asked = model.generate(**prompt(), cache_implementation="quantized", cache_config=SMALL, **options)
    assert torch.equal(asked, given)


def test_it_can_be_undone():
    """And done twice: transformers is what it was."""
    before = vars(GenerationMixin)["_prepare_cache_for_generation"]
    integration.install()
    integration.install()
    assert integration.is_installed()
    assert vars(GenerationMixin)["_prepare_cache_for_generation"] is not before
    integration.uninstall()
    integration.uninstall()
    assert not integration.is_installed()
    assert vars(GenerationMixin)["_prepare_cache_for_generation"] is before


def test_once_undone_transformers_makes_its_own(model):
    """As it did before."""
    pytest.importorskip("hqq")
    integration.install()
    integration.uninstall()
    options = {"backend": "hqq", "nbits": 4, "q_group_size": 16, "config": model.config}
    assert not isinstance(made(model, options), QuantizedCache)


def test_what_others_have_wrapped_stays_in_its_place(model):
    """It calls transformers' method once ours is taken away."""
    transformers_own = vars(GenerationMixin)["_prepare_cache_for_generation"]
    calls = []
    integration.install()
    ours = GenerationMixin._prepare_cache_for_generation

    def theirs(self, *args, **kwargs):
        calls.append(self)
        return ours(self, *args, **kwargs)

    GenerationMixin._prepare_cache_for_generation = theirs
    try:
        integration.uninstall()
        assert GenerationMixin._prepare_cache_for_generation is theirs
        with pytest.raises(ValueError, match="Unknown quantization backend"):
            made(model, {"backend": "reference"})
        integration.install()
        assert isinstance(made(model, SMALL), QuantizedCache)
        assert len(calls) == 2
    finally:
        integration.uninstall()
        GenerationMixin._prepare_cache_for_generation = ours
        integration.install()
        integration.uninstall()
    assert vars(GenerationMixin)["_prepare_cache_for_generation"] is transformers_own


@pytest.mark.parametrize(
    ("spelt", "axes"),
    [
        ({"backend": "quanto", "nbits": 2, "axis_key": -1, "axis_value": 0}, ("channel", "token")),
        ({"backend": "hqq", "nbits": 1, "axis_key": 0, "axis_value": 1}, ("channel", "token")),
        ({"backend": "hqq", "nbits": 3, "axis_key": 1, "axis_value": 1}, ("token", "token")),
        ({"backend": "reference", "nbits": 8, "axis_key": "token", "axis_value": "channel"}, ("token", "channel")),
    ],
)
def test_every_option_of_transformers_cache_is_honoured(model, installed, spelt, axes):
    """By its name, and integer axes as the backend means them."""
    if spelt["backend"] != "reference":
        pytest.importorskip({"quanto": "optimum.quanto"}.get(spelt["backend"], spelt["backend"]))
    cache = made(model, {**spelt, "q_group_size": 16, "residual_length": 8})
    settings = cache.layers[0].settings
    assert (settings.key.axis, settings.value.axis) == axes
    assert (settings.key.nbits, cache.config.group_size, cache.config.residual_length) == (spelt["nbits"], 16, 8)
    assert cache.memory_report().layers[0].quantized_tokens == 32


def test_options_that_are_none_have_their_defaults(model, installed):
    """As transformers' newest cache has it."""
    unset = dict.fromkeys(("nbits", "axis_key", "axis_value", "q_group_size", "residual_length"))
    assert made(model, {"backend": "reference", **unset}).config == QuantizedCache().config


def test_a_preset_is_an_option(model, installed):
    """With options that override it, and kvquant's default backend."""
    cache = made(model, {"preset": "kivi-2", "group_size": 16})
    assert cache.config == QuantizedCache.from_preset("kivi-2", group_size=16).config


@pytest.mark.parametrize("cache_config", [None, {}, {"nbits": 2}])
def test_without_a_backend_it_is_quanto(model, installed, cache_config):
    """Which is what scripts mean that say nothing."""
    pytest.importorskip("optimum.quanto")
    cache = made(model, cache_config)
    assert (cache.config.backend, cache.config.nbits) == ("quanto", (cache_config or {}).get("nbits", 4))


def test_where_quanto_cannot_be_used_the_error_says_who_asked_for_it(model, installed, monkeypatch):
    """A script that names no backend."""
    monkeypatch.setenv("KVQUANT_BLOCK_BACKENDS", "quanto")
    with pytest.raises(BlockedBackendError) as raised:
        made(model)
    assert raised.value.__notes__ == ["cache_config names no backend, and transformers' default is 'quanto'."]


@pytest.mark.parametrize(
    ("cache_config", "error", "words"),
    [
        ({"backend": "hqqq"}, UnknownBackendError, "Did you mean 'hqq'"),
        ({"backend": "reference", "nbit": 2}, UnknownOptionError, "Did you mean 'nbits'"),
        ({"backend": "reference", "nbits": 5}, OptionValueError, "nbits=5"),
        ({"preset": "kivi-3"}, UnknownOptionError, "kivi-2"),
        ("hqq", OptionValueError, "cache_config='hqq' cannot work: expected a mapping"),
    ],
)
def test_what_cannot_be_honoured_is_refused(model, installed, cache_config, error, words):
    """With kvquant's own errors."""
    with pytest.raises(error, match=words):
        made(model, cache_config)


def test_a_cache_and_its_name_together_are_a_contradiction(model, installed):
    """transformers' own error."""
    with pytest.raises(ValueError, match="Passing both `cache_implementation`"):
        made(model, SMALL, past_key_values=DynamicCache())


def test_other_caches_are_transformers_own(model, installed):
    """Dynamic and static ones."""
    dynamic = model.generate(**prompt(), max_new_tokens=2, return_dict_in_generate=True)
    assert type(cache_of(dynamic)) is DynamicCache


def test_a_generation_config_asks_for_it(model, installed):
    """And is not changed by it, so that it can ask again."""
    config = GenerationConfig(
        max_new_tokens=4, do_sample=False, cache_implementation="quantized", cache_config={**SMALL}
    )
    for _ in range(2):
        out = model.generate(**prompt(), generation_config=config, return_dict_in_generate=True)
        assert cache_of(out).memory_report().layers[0].quantized_tokens == 16
    assert (config.cache_implementation, config.cache_config) == ("quantized", SMALL)


def test_a_pipeline_asks_for_it(installed, monkeypatch):
    """Of the model's generation config, or at each call."""
    model, tokenizer = tiny.shipped()
    seen = []
    hook = model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the pipeline warns about its own defaults
            run = TextGenerationPipeline(model=model, tokenizer=tokenizer)
            run("The", cache_implementation="quantized", cache_config={"preset": "int8"}, max_new_tokens=2)
    finally:
        hook.remove()
    assert isinstance(cache_of(seen[0]), QuantizedCache)


def test_an_encoder_decoder_model_has_both_parts_quantised(installed):
    """Which transformers' own quantised cache cannot do, with beams."""
    out = tiny.encoder_decoder().generate(
        **tiny.prompt(),
        num_beams=2,
        max_new_tokens=40,
        cache_implementation="quantized",
        cache_config={"backend": "reference", "residual_length": 16, "group_size": 16},
        return_dict_in_generate=True,
    )
    cache = cache_of(out)
    assert isinstance(cache, QuantizedEncoderDecoderCache)
    assert cache.self_attention_cache.memory_report().layers[0].quantized_tokens == 16
    assert cache.cross_attention_cache.memory_report().layers[0].quantized_tokens == 144


def test_without_a_cache_there_is_none(model, installed):
    """`use_cache=False` is stronger."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = model.generate(
            **prompt(),
            use_cache=False,
            cache_implementation="quantized",
            cache_config=SMALL,
            max_new_tokens=2,
            return_dict_in_generate=True,
        )
    assert not any(isinstance(value, Cache) and value.get_seq_length() for value in out.values())

"""The cache as a whole: layers made to fit the model, figures, and what is refused at construction."""

import copy
import pickle

import pytest
import torch
from transformers import Cache, DynamicCache, Gemma3TextConfig, JambaConfig, LlamaConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from kvquant import CacheConfig, QuantizedCache
from kvquant.cache.layer import QuantizedLayer
from kvquant.errors import CropError, OptionValueError, QuantizationError, UnknownOptionError, UnsupportedError
from tests.support import MinMax

LLAMA = LlamaConfig(num_hidden_layers=4, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16)


def fill(cache, tokens=60, layers=4, batch=1):
    for layer in range(layers):
        cache.update(torch.randn(batch, 2, tokens, 16), torch.randn(batch, 2, tokens, 16), layer)
    return cache


def test_a_cache_needs_no_model_config():
    """Layers come as they are used, numbered, with their own options."""
    cache = QuantizedCache(nbits=2, group_size=16, layers={1: {"nbits": 8}}, skip_layers=[2])
    fill(cache)
    assert isinstance(cache, Cache)
    assert [type(layer) for layer in cache.layers] == [QuantizedLayer, QuantizedLayer, DynamicLayer, QuantizedLayer]
    assert [layer.settings.key.nbits for layer in cache.layers if isinstance(layer, QuantizedLayer)] == [2, 8, 2]
    assert cache.get_seq_length() == 60


def test_layers_fit_the_model():
    """Full attention is quantised; sliding windows and recurrent layers stay transformers' own."""
    gemma = Gemma3TextConfig(num_hidden_layers=6, sliding_window=8, head_dim=16)
    kinds = [type(layer) for layer in QuantizedCache(config=gemma).layers]
    assert kinds == [DynamicSlidingWindowLayer] * 5 + [QuantizedLayer]
    jamba = JambaConfig(num_hidden_layers=4, attn_layer_period=2, attn_layer_offset=1)
    mine, theirs = QuantizedCache(config=jamba).layers, DynamicCache(config=jamba).layers
    assert [type(layer) for layer in theirs] == [
        DynamicLayer if type(layer) is QuantizedLayer else type(layer) for layer in mine
    ]
    assert any(type(layer) is QuantizedLayer for layer in mine)


def test_transformers_second_argument_is_the_model_config():
    """`QuantizedCache(backend, config)`, as upstream has it."""
    assert len(QuantizedCache("reference", LLAMA, q_group_size=16).layers) == 4


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"nbit": 2}, UnknownOptionError, "unknown option 'nbit'. Did you mean 'nbits'"),
        ({"nbits": 5}, OptionValueError, "nbits=5 cannot work"),
        (
            {"group_size": 48},
            UnsupportedError,
            "group_size=48 does not divide head_dim=16; those that do: 1, 2, 4, 8, 16",
        ),
        ({"layers": {4: {"nbits": 8}}}, OptionValueError, "layers='4' cannot work: expected layers from 0 to 3"),
        ({"skip_layers": [-5]}, OptionValueError, "skip_layers=-5 cannot work: expected a layer from 0 to 3"),
        ({"axis_key": 0}, UnsupportedError, "axis_key=0 is not an integer axis of it"),
        ({"layers": {2: {"options": {"x": 1}}}}, UnsupportedError, "option 'x' is unknown to this backend"),
    ],
)
def test_what_cannot_work_is_refused_at_construction(options, error, message):
    """With the model's config everything is known before the first token."""
    with pytest.raises(error) as caught:
        QuantizedCache(config=LLAMA, **options)
    assert message in str(caught.value)


def test_without_a_model_config_layer_options_are_still_checked_at_construction():
    """The layer named last is refused as early as the first."""
    with pytest.raises(UnsupportedError, match="option 'x' is unknown"):
        QuantizedCache(layers={30: {"options": {"x": 1}}})
    with pytest.raises(OptionValueError, match="to count from the last"):
        QuantizedCache(skip_layers=[-1])


def test_latent_attention_is_not_refused_for_a_head_dim_that_is_not_its_own():
    """In DeepSeek's config head_dim is that of the rotary part alone."""
    from transformers import DeepseekV3Config

    QuantizedCache(config=DeepseekV3Config(num_hidden_layers=1), group_size=192, axis_value="channel")


def test_presets_and_files_make_caches(tmp_path):
    """A preset by name with overrides; a config object, a mapping, and a file."""
    assert QuantizedCache.from_preset("kivi-2", LLAMA, residual_length=4, group_size=16).config.nbits == 2
    path = tmp_path / "cache.yaml"
    path.write_text(CacheConfig(nbits=3).to_yaml())
    for source in (CacheConfig(nbits=3), {"nbits": 3}, path, str(path)):
        assert QuantizedCache.from_config(source).config.nbits == 3


# ------------------------------------------------------------------------------------------------ figures


def test_bytes_and_bits_are_those_of_the_parts():
    """4 bits and two half-precision numbers for 16 make 6 bits an element; the report adds up to nbytes."""
    cache = fill(QuantizedCache(config=LLAMA, group_size=16, residual_length=16, sink_length=2))
    report = cache.memory_report()
    assert cache.bits_per_element == report.bits_per_element == 6.0
    assert cache.nbytes == report.nbytes == sum(report.parts.values()) == sum(layer.nbytes for layer in report.layers)
    assert report.parts["sink"] == 4 * 2 * (2 * 2 * 16) * 4  # layers, streams, numbers, bytes
    plain = report.to_dict()
    assert plain["layers"][0]["quantized_tokens"] == 32
    assert set(plain["layers"][0]["parts"]) == set(report.parts)
    assert "codes" in str(report)


def test_codebooks_count_their_table(formats):
    """Every stored bit counts."""
    cache = fill(QuantizedCache("test-codebook", group_size=16, residual_length=0, nbits=8), layers=1)
    assert cache.memory_report().parts["tables"] > 0
    assert cache.bits_per_element > 9


def test_a_cache_without_quantised_tokens_has_no_bits():
    """None, rather than a number that means nothing."""
    assert QuantizedCache().bits_per_element is None
    assert fill(QuantizedCache(residual_length=500)).bits_per_element is None


def test_full_precision_layers_count_too():
    """Sliding layers are transformers' own, and their bytes are memory all the same."""
    cache = fill(QuantizedCache(skip_layers=[0], group_size=16), layers=1)
    assert cache.nbytes == 2 * 2 * 60 * 16 * 4


def test_a_cache_prints_what_it_is():
    """What was chosen, what it holds and what that takes."""
    cache = QuantizedCache(nbits=2, config=LLAMA, group_size=16)
    assert repr(cache) == "QuantizedCache(backend='reference', nbits=2, group_size=16; empty)"
    text = repr(fill(cache, tokens=256))
    assert text.startswith(
        "QuantizedCache(backend='reference', nbits=2, group_size=16; 4 layers, 256 tokens, 128 quantised"
    )
    assert "at 3.25 bits per element" in text  # 2, 1 for scales, and what smooths 128 tokens


# ------------------------------------------------------------------------------------------------ all layers


def test_a_crop_that_one_layer_cannot_do_is_done_by_none():
    """Layers of different lengths come about when a forward pass failed half-way."""
    cache = fill(QuantizedCache(group_size=16), tokens=60)
    cache.update(torch.randn(1, 2, 5, 16), torch.randn(1, 2, 5, 16), 0)
    with pytest.raises(CropError):
        cache.crop(-62)
    assert [layer.get_seq_length() for layer in cache.layers] == [65, 60, 60, 60]


def test_layers_can_be_aligned_after_a_failed_forward_pass(backend):
    """The layers before the one that failed let go of that pass's tokens."""
    broken = {"now": False}

    class Breaking(MinMax):
        def quantize(self, rows):
            if broken["now"]:
                raise RuntimeError("gone")
            return super().quantize(rows)

    name = backend(Breaking)
    cache = fill(QuantizedCache(layers={2: {"backend": name}}, group_size=16, residual_length=16))
    before = [layer.keys for layer in cache.layers]
    broken["now"] = True
    with pytest.raises(QuantizationError, match="failed on layer 2"):
        fill(cache, tokens=20)
    assert [layer.get_seq_length() for layer in cache.layers] == [80, 80, 60, 60]
    assert cache.align_layers() == 20
    assert [layer.get_seq_length() for layer in cache.layers] == [60] * 4
    assert torch.equal(cache.layers[3].keys, before[3])
    assert cache.align_layers() == 0


def test_a_crop_is_done_by_all_layers_or_none_in_hybrid_models():
    """A sliding window that has moved on cannot go back; the other layers then stay as they are."""
    gemma = Gemma3TextConfig(num_hidden_layers=6, sliding_window=8, head_dim=16)
    cache = fill(QuantizedCache(config=gemma), tokens=20, layers=6)
    with pytest.raises(CropError, match="layer 0 keeps a sliding window of 8 tokens, which has moved on"):
        cache.crop(-5)
    assert [layer.get_seq_length() for layer in cache.layers] == [20] * 6
    cache.update(torch.randn(1, 2, 5, 16), torch.randn(1, 2, 5, 16), 0)
    with pytest.raises(CropError, match="layer 0 keeps a sliding window"):
        cache.align_layers()


@pytest.mark.parametrize("argument", [3, -25])
def test_impossible_crops_are_refused_for_full_precision_layers_too(argument):
    """transformers' own layers would do something else without a word."""
    cache = fill(QuantizedCache(skip_layers=range(4)), tokens=20)
    with pytest.raises(CropError):
        cache.crop(argument)
    with pytest.raises(CropError):
        QuantizedCache().crop(3)
    assert cache.get_seq_length() == 20


@pytest.mark.parametrize("device", ["cuda:7", "meta"])
def test_a_device_that_cannot_hold_tokens_is_refused_at_construction(device):
    """Before there is anything to lose."""
    with pytest.raises(OptionValueError, match=f"device='{device}' cannot work"):
        QuantizedCache(device=device)


def test_batch_operations_reach_every_layer():
    """Repeat, select, reorder and reset."""
    cache = fill(QuantizedCache(group_size=16), batch=2)
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([3, 2, 1, 0]))
    cache.batch_select_indices(torch.tensor([0, 1]))
    assert cache.batch_size == 2
    assert [layer.keys.shape for layer in cache.layers] == [(2, 2, 60, 16)] * 4
    cache.reset()
    assert cache.get_seq_length() == 0
    fill(cache, batch=3)


def test_copies_are_independent():
    """Prefill once, copy, go on many times: the copy's tokens are its own."""
    cache = fill(QuantizedCache(config=LLAMA, group_size=16, residual_length=8))
    twin, frozen = copy.deepcopy(cache), cache.layers[0].keys
    fill(twin, tokens=100)
    twin.crop(-150)
    assert cache.get_seq_length() == 60
    assert torch.equal(cache.layers[0].keys, frozen)
    assert twin.get_seq_length() == 10


def test_a_cache_of_the_builtin_backends_pickles():
    """For worker processes; files are another matter."""
    cache = fill(QuantizedCache(config=LLAMA, group_size=16))
    again = pickle.loads(pickle.dumps(cache))  # noqa: S301  # our own
    assert torch.equal(again.layers[0].keys, cache.layers[0].keys)

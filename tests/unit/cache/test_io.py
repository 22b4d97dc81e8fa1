"""Saving and loading: a cache goes on as if it had never been saved."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Gemma3TextConfig, JambaConfig, LlamaConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

import kvquant
from kvquant import CacheConfig, QuantizedCache
from kvquant.attention.kernels import VARIABLE
from kvquant.engine.packing import WIDTHS
from kvquant.errors import CacheFileError
from kvquant.plugin import BackendSpec, Capabilities, Opaque
from tests.support import FORMATS, SMALL_MODEL, OpaqueMinMax, possible_options
from tests.unit.cache.files import assert_same, tampered

pytestmark = pytest.mark.usefixtures("formats")

KEYS, VALUES = 8, 16  # head_dim of keys and of values; keys are narrower, as in latent attention

OPTIONS = st.fixed_dictionaries(
    {
        "backend": st.sampled_from([f"test-{kind}" for kind in FORMATS]),
        "nbits_key": st.sampled_from(WIDTHS),
        "nbits_value": st.sampled_from(WIDTHS),
        "axis_key": st.sampled_from(["channel", "token"]),
        "axis_value": st.sampled_from(["channel", "token"]),
        "group_size": st.sampled_from([4, 8]),
        "rotation_key": st.sampled_from([None, "hadamard", "random"]),
        "outlier_share": st.sampled_from([0, 0, 0.1]),
        "residual_length": st.integers(0, 20),
        "sink_length": st.integers(0, 6),
        "layers": st.sampled_from([{}, {1: {"backend": "test-affine", "nbits": 3, "sink_length": 1}}]),
        "skip_layers": st.sampled_from([(), (2,)]),
    }
).map(lambda options: possible_options(options, KEYS, VALUES))
UPDATES = st.tuples(st.just("update"), st.one_of(st.integers(1, 5), st.integers(0, 90)))
OPERATIONS = st.lists(
    st.one_of(
        UPDATES,
        st.tuples(st.just("large"), st.integers(1, 20)),  # float16 cannot hold the scales of what comes now
        st.tuples(st.just("crop"), st.integers(0, 60)),
        st.tuples(st.just("select"), st.lists(st.integers(0, 2), min_size=1, max_size=4)),
    ),
    max_size=6,
)


def run(caches, operations, dtype, seed):
    """Do the same to all caches."""
    random = torch.Generator().manual_seed(seed)
    for operation, argument in operations:
        batch = caches[0].layers[0].keys.shape[0] if caches[0].layers else 2
        if operation in ("update", "large"):
            for layer in range(3):
                factor = 1e6 if operation == "large" and dtype != torch.float16 else 1
                new = [torch.randn(batch, 2, argument, width, generator=random) for width in (KEYS, VALUES)]
                for cache in caches:
                    cache.update(*((states * factor).to(dtype) for states in new), layer)
        elif operation == "crop":
            for cache in caches:
                cache.crop(-min(argument, cache.get_seq_length()))
        elif caches[0].get_seq_length():  # transformers' own layers keep the rows that they had when they are empty
            for cache in caches:
                cache.batch_select_indices(torch.tensor([index % batch for index in argument]))


@settings(max_examples=30)
@given(
    options=OPTIONS,
    before=OPERATIONS,
    after=OPERATIONS,
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 2**16),
)
def test_a_loaded_cache_goes_on_as_if_it_had_never_been_saved(tmp_path_factory, options, before, after, dtype, seed):
    """Whatever came before and comes after: the same bits, in the same pages, with the same room."""
    path = tmp_path_factory.mktemp("cache") / "cache.kvq"
    cache = QuantizedCache(**options)
    run([cache], [("update", 3), *before], dtype, seed)
    held = copy.deepcopy(cache)
    cache.save(path)
    assert_same(cache, held)
    loaded = QuantizedCache.load(path)
    assert_same(cache, loaded)
    saved = path.read_bytes()
    run([cache, loaded], after, dtype, seed + 1)
    assert_same(cache, loaded)
    assert path.read_bytes() == saved


def test_an_empty_cache(tmp_path):
    """With no layers yet, with empty ones, and with ones that a reset emptied."""
    path = tmp_path / "empty.kvq"
    lazy, fixed = QuantizedCache(nbits=2), QuantizedCache(config=LlamaConfig(**SMALL_MODEL), nbits=2)
    emptied = filled(QuantizedCache(nbits=2))
    emptied.reset()
    for cache in (lazy, fixed, emptied):
        cache.save(path)
        loaded = QuantizedCache.load(path)
        assert_same(cache, loaded)
        assert_same(filled(cache), filled(loaded))


def filled(cache, tokens=60, layers=3, batch=1, seed=0):
    random = torch.Generator().manual_seed(seed)
    for layer in range(layers if not cache.layers else len(cache.layers)):
        cache.update(*(torch.randn(batch, 2, tokens, 16, generator=random) for _ in range(2)), layer)
    return cache


def gemma(**options):
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    return Gemma3TextConfig(
        num_hidden_layers=3, sliding_window=8, head_dim=16, num_key_value_heads=2, layer_types=kinds, **options
    )


@pytest.mark.parametrize("tokens", [3, 60])
@pytest.mark.parametrize("config", [None, gemma()], ids=["alone", "for its model"])
def test_transformers_own_layers_come_back(tmp_path, tokens, config):
    """Sliding windows, before and after they have moved on, and layers that are skipped; with and without a config."""
    cache = filled(QuantizedCache(config=gemma(), skip_layers=[1] if tokens == 3 else []), tokens)
    cache.save(tmp_path / "cache.kvq")
    loaded = QuantizedCache.load(tmp_path / "cache.kvq", config=config)
    assert [type(layer) for layer in loaded.layers] == [type(layer) for layer in cache.layers]
    assert {DynamicSlidingWindowLayer} < {type(layer) for layer in loaded.layers}
    for step in range(3):
        assert_same(filled(cache, 5, seed=step), filled(loaded, 5, seed=step))
    assert cache.layers[0].get_mask_sizes(1) == loaded.layers[0].get_mask_sizes(1)


def test_a_hybrid_model_goes_on(tmp_path):
    """Recurrent and convolutional states come back too: the same logits."""
    config = JambaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, attn_layer_period=2, attn_layer_offset=1, num_experts=1, mamba_d_state=4,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    cache = QuantizedCache(config=config, group_size=8, residual_length=8)
    ids = torch.randint(64, (1, 40))
    with torch.inference_mode():
        model(ids, past_key_values=cache, use_cache=True)
        cache.save(tmp_path / "cache.kvq", model=model, token_ids=ids)
        loaded = QuantizedCache.load(tmp_path / "cache.kvq", model=model)
        logits = [model(ids[:, :1], past_key_values=one, use_cache=True).logits for one in (cache, loaded)]
    assert torch.equal(*logits)


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**SMALL_MODEL)).eval()


#: What is found in the states, or written in other ways than scales in float16.
SMOOTH = {"smoothing_key": True, "smoothing_value": True, "scale_bits": 8}


@pytest.mark.parametrize(
    ("backend", "options"),
    [*((f"test-{kind}", {}) for kind in FORMATS), ("reference", SMOOTH), ("trellis", {**SMOOTH, "outlier_share": 0.1})],
)
@pytest.mark.parametrize("beams", [1, 2])
def test_generation_goes_on_with_the_same_tokens(tmp_path, llama, backend, options, beams):
    """As from the cache that was never saved; the ids that were saved with it say what it stands for."""
    prompt = torch.randint(128, (2, 70))
    cache = QuantizedCache(backend, llama.config, nbits=2, group_size=16, residual_length=16, **options)
    with torch.inference_mode():
        llama(prompt, past_key_values=cache, use_cache=True)
    cache.save(tmp_path / "prompt.kvq", model=llama, token_ids=prompt)
    loaded = QuantizedCache.load(tmp_path / "prompt.kvq", model=llama)
    assert torch.equal(loaded.token_ids, prompt)
    more = torch.randint(128, (2, 3))
    texts = []
    for one in (cache, loaded):
        ids = torch.cat([prompt if one is cache else one.token_ids, more], dim=1)
        one.batch_repeat_interleave(beams)
        texts.append(llama.generate(ids, past_key_values=one, max_new_tokens=40, do_sample=False, num_beams=beams))
    assert torch.equal(*texts)
    assert_same(cache, loaded)


def test_the_file_is_a_safetensors_file(tmp_path):
    """Of tensors that the library itself reads, named by their place."""
    cache = filled(QuantizedCache(nbits=2, group_size=16, residual_length=16))
    cache.save(tmp_path / "cache.kvq")
    tensors = load_file(tmp_path / "cache.kvq")
    (page,) = cache.layers[1].stores[0].body.pages
    assert torch.equal(tensors["layers.1.key.body.pages.0.codes"], page.codes[:, :, : page.length])
    assert torch.equal(tensors["layers.1.value.window.tokens"], cache.layers[1].values[:, :, page.length :])


def test_spare_room_is_not_written(tmp_path):
    """The file takes what is in use, and some kilobytes of description."""
    cache = filled(QuantizedCache(nbits=8, group_size=16, residual_length=16), tokens=4000)
    filled(cache, 40)
    report = cache.memory_report()
    assert report.parts["spare"] > 50_000
    cache.save(tmp_path / "cache.kvq")
    written = report.nbytes - report.parts["spare"]
    assert written <= (tmp_path / "cache.kvq").stat().st_size <= written + 20_000


def test_quantised_tokens_stay_in_the_file_until_they_are_read(tmp_path):
    """Pages lie in memory that the file is mapped to; what is written to, the window, does not."""
    path = tmp_path / "cache.kvq"
    filled(QuantizedCache(nbits=4, group_size=16, residual_length=16), tokens=1000).save(path)
    keys, _ = QuantizedCache.load(path).layers[0].stores
    assert _is_mapped(keys.body.pages[0].codes, path)
    assert _is_mapped(keys.body.pages[0].scale, path)
    assert not _is_mapped(keys.recent.data, path)


def _is_mapped(tensor, path):
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.fail("this test reads /proc/self/maps, which only Linux has")
    for line in maps.read_text().splitlines():
        ends, _, rest = line.partition(" ")
        low, high = (int(end, 16) for end in ends.split("-"))
        if low <= tensor.data_ptr() < high:
            return rest.endswith(str(path))
    return False


@pytest.mark.parametrize("change", ["reorder", "append", "crop and append", "assign"])
def test_nothing_writes_into_the_file(tmp_path, change):
    """Whatever is done in place to a loaded cache is done for this process alone."""
    path = tmp_path / "cache.kvq"
    filled(QuantizedCache(nbits=4, group_size=16, residual_length=16), tokens=300, batch=2).save(path)
    before = path.read_bytes()
    cache, other = QuantizedCache.load(path), QuantizedCache.load(path)
    if change == "reorder":
        cache.reorder_cache(torch.tensor([1, 0]))
    if change.startswith("crop"):
        cache.crop(-100)
    if change.endswith("append"):
        filled(cache, tokens=100, batch=2)
    if change == "assign":
        for layer in cache.layers:
            layer.keys = torch.zeros_like(layer.keys)
    assert not torch.equal(cache.layers[0].keys, other.layers[0].keys)
    assert path.read_bytes() == before
    assert_same(other, QuantizedCache.load(path))


def test_a_cache_can_be_saved_over_the_file_that_it_lives_from(tmp_path):
    """The old file stays until nobody reads from it."""
    path = tmp_path / "cache.kvq"
    filled(QuantizedCache(nbits=4, group_size=16, residual_length=16), tokens=300).save(path)
    cache = QuantizedCache.load(path)
    filled(cache, tokens=50)
    cache.save(path)
    assert_same(cache, QuantizedCache.load(path))


def test_copies_of_a_loaded_cache_are_their_own(tmp_path):
    """A prompt that is loaded once and gone on from many times."""
    filled(QuantizedCache(nbits=4, group_size=16, residual_length=16), tokens=300).save(tmp_path / "cache.kvq")
    loaded = QuantizedCache.load(tmp_path / "cache.kvq")
    one, other = copy.deepcopy(loaded), copy.deepcopy(loaded)
    filled(one, tokens=40, seed=1)
    assert_same(loaded, other)
    assert one.get_seq_length() == 340


def test_the_kernel_reads_mapped_pages(tmp_path, monkeypatch):
    """Rows of codes lie at odd addresses there: the numba kernel gives what it gave."""
    pytest.importorskip("numba", reason="numba is not installed")
    monkeypatch.setenv(VARIABLE, "numba")
    options = {"nbits_key": 1, "nbits_value": 3, "group_size": 16, "residual_length": 8}  # a kind that others compile
    cache = QuantizedCache("test-affine", **options)
    keys, values, query = torch.randn(1, 1, 301, 112), torch.randn(1, 1, 301, 80), torch.randn(1, 3, 1, 112)
    cache.update(keys, values, 0)
    cache.save(tmp_path / "cache.kvq")
    loaded = QuantizedCache.load(tmp_path / "cache.kvq")
    outputs = []
    for one in (cache, loaded):
        states = one.update(keys[:, :, :1], values[:, :, :1], 0)
        assert one.memory_report().attention == "numba"
        outputs.append(torch.nn.functional.scaled_dot_product_attention(query, *states, enable_gqa=True))
    assert torch.equal(*outputs)


def test_blocks_that_batch_rows_share_are_written_once(tmp_path):
    """As an opaque page shares them in memory."""
    cache = filled(QuantizedCache("test-opaque", group_size=16, residual_length=0), tokens=640)
    cache.save(tmp_path / "one.kvq")
    cache.batch_repeat_interleave(8)
    cache.save(tmp_path / "eight.kvq")
    assert (tmp_path / "eight.kvq").stat().st_size < 1.5 * (tmp_path / "one.kvq").stat().st_size
    assert_same(cache, QuantizedCache.load(tmp_path / "eight.kvq"))


def test_blocks_of_several_layouts(tmp_path, backend):
    """A backend whose blocks differ in shape, type and meta data from one to the next."""

    class Moody(OpaqueMinMax):
        def quantize(self, rows):
            block = super().quantize(rows)
            extra = torch.zeros(int(rows.sum() > 0), dtype=torch.float64)
            return Opaque({**block.tensors, "a name/with .. dots": extra}, {"mood": [len(extra), None]})

        def dequantize(self, packed: Opaque) -> torch.Tensor:
            assert packed.meta == {"mood": [len(packed.tensors["a name/with .. dots"]), None]}
            return super().dequantize(packed)

    cache = filled(QuantizedCache(backend(Moody, formats=("opaque",)), group_size=16, residual_length=0), batch=3)
    cache.save(tmp_path / "cache.kvq")
    loaded = QuantizedCache.load(tmp_path / "cache.kvq")
    assert_same(cache, loaded)
    assert torch.equal(cache.layers[0].keys, loaded.layers[0].keys)


def test_where_the_states_go(tmp_path, llama):
    """The device asked for, else the model's, else the CPU; the meta device holds no numbers."""
    path = tmp_path / "cache.kvq"
    filled(QuantizedCache(config=llama.config), layers=2).save(path, model=llama)
    for options in ({}, {"device": "cpu"}, {"device": torch.device("cpu")}, {"model": llama}):
        assert QuantizedCache.load(path, **options).layers[0].device == torch.device("cpu")
    with pytest.raises(kvquant.KVQuantError, match="device='meta' cannot work"):
        QuantizedCache.load(path, device="meta")


def test_quantised_tokens_on_a_device_that_is_not_here(tmp_path):
    """They go where the states are asked to go; nobody else decides where that is."""
    filled(QuantizedCache(group_size=16, residual_length=16, device="cpu")).save(tmp_path / "cache.kvq")
    assert QuantizedCache.load(tmp_path / "cache.kvq", "cpu").config.device == "cpu"
    path = tampered(tmp_path / "cache.kvq", lambda told: told["config"].update(device="cuda:99"))
    with pytest.raises(CacheFileError, match="device='cuda:99' cannot work: expected a device that this machine has"):
        QuantizedCache.load(path)
    assert QuantizedCache.load(path, "cpu").config.device is None


def test_a_cache_loaded_in_inference_mode_goes_on_outside_it(tmp_path):
    """Its tensors are ordinary ones."""
    filled(QuantizedCache(group_size=16, residual_length=16, skip_layers=[2])).save(tmp_path / "cache.kvq")
    with torch.inference_mode():
        cache = QuantizedCache.load(tmp_path / "cache.kvq")
    filled(cache)
    assert not any(layer.keys.is_inference() for layer in cache.layers)
    assert isinstance(cache.layers[2], DynamicLayer)


def test_the_config_comes_back(tmp_path):
    """Every option, and a cache without a model's config goes on making layers."""
    config = CacheConfig(nbits=2, group_size=16, layers={range(1, 3): {"nbits": 8}}, skip_layers=(3,), sink_length=2)
    cache = filled(QuantizedCache.from_config(config), layers=2)
    cache.save(tmp_path / "cache.kvq")
    loaded = QuantizedCache.load(str(tmp_path / "cache.kvq"))
    assert loaded.config == config
    filled(loaded)
    states = torch.zeros(1, 2, 60, 16)
    loaded.update(states, states, 3)
    assert [type(layer).__name__ for layer in loaded.layers] == ["QuantizedLayer"] * 2 + [
        "QuantizedLayer",
        "DynamicLayer",
    ]


def test_every_registered_format_can_be_saved(tmp_path):
    """Those of the installed backends too, with their real libraries."""
    for backend in kvquant.list_backends():
        if not backend.availability.ok or backend.name.startswith("test-"):
            continue
        widths = backend.spec.capabilities.nbits
        cache = filled(QuantizedCache(backend.name, nbits=4 if 4 in widths else widths[0], residual_length=0), 128)
        cache.save(tmp_path / "cache.kvq")
        assert_same(cache, QuantizedCache.load(tmp_path / "cache.kvq"))


def test_large_tensors_are_copied_in_pieces(tmp_path, monkeypatch):
    """Of no tensor more than a piece is copied at once, however it lies in memory."""
    from kvquant.cache import container

    monkeypatch.setattr(container, "_PIECE_BYTES", 1000)
    states = torch.randn(2, 300, 3, 16).transpose(1, 2)  # as models hand them over: tokens before heads
    pieces = list(container._pieces(states))
    assert max(piece.nbytes for piece in pieces) <= 1000
    assert torch.equal(torch.cat(pieces), states.contiguous().reshape(-1).view(torch.uint8))


def test_options_of_a_scheme_are_in_the_file(tmp_path, backend):
    """A backend that chooses another group size by now cannot read what an earlier one wrote, and says so."""
    name = backend(FORMATS["affine"], group_sizes=(8,))
    filled(QuantizedCache(name, residual_length=0), 64).save(tmp_path / "cache.kvq")
    kvquant.unregister(name)
    kvquant.register(BackendSpec(name, FORMATS["affine"], Capabilities(nbits=(1, 2, 3, 4, 8), group_sizes=(16,))))
    with pytest.raises(kvquant.KVQuantError, match="quantised with group_size=8, and the config asks for 16"):
        QuantizedCache.load(tmp_path / "cache.kvq")

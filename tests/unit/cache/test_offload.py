"""Offloaded bodies. There is no device here but the CPU, so most tests have it count as one whose memory is not the
host's: pages are then really copied, from one tensor of the CPU to another."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import settings
from hypothesis.stateful import rule
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, LlamaConfig, T5Config

from kvquant import CacheConfig, QuantizedCache, QuantizedEncoderDecoderCache
from kvquant.attention.kernels import VARIABLE
from kvquant.cache.compat import given
from kvquant.cache.layer import QuantizedLayer
from kvquant.engine import offload
from kvquant.errors import OptionValueError
from tests.support import SMALL_MODEL
from tests.unit.cache.files import assert_same
from tests.unit.cache.helpers import assert_unchanged, make, snapshot, states
from tests.unit.cache.test_invariants import CacheMachine

OPTIONS = {"group_size": 8, "residual_length": 8, "sink_length": 3, "outlier_share": 0.1}
KINDS = ("test-affine", "test-codebook", "test-opaque")

pytestmark = pytest.mark.usefixtures("formats")


@pytest.fixture(scope="module")
def apart():
    """The CPU counts as a device with a memory of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(offload, "is_apart", lambda device: True)
        yield


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**{**SMALL_MODEL, "num_hidden_layers": 3})).eval()


def generate(model, cache, **options):
    ids = torch.randint(2, 128, (2, 50), generator=torch.Generator().manual_seed(1))
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        do_sample=False,
        **{"max_new_tokens": 24, **options},
    )


def copies(layer):
    """Bytes of a layer that are copies of what lies in host memory."""
    return layer.memory().parts["copies"]


# ------------------------------------------------------------------------------------------------ the option


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"offload": True, "device": "cpu"}, "offload=True cannot work: expected False, or no device='cpu'"),
        ({"offload": "yes"}, "offload='yes' cannot work: expected True or False"),
    ],
)
def test_what_cannot_work_is_refused(options, message):
    """When the config is made."""
    with pytest.raises(OptionValueError, match=message):
        QuantizedCache(**options)


def test_on_the_cpu_it_changes_nothing(model):
    """Host memory is where everything is anyway: the same tokens, the same bytes, no copies."""
    plain, offloaded = (QuantizedCache(config=model.config, offload=on, **OPTIONS) for on in (False, True))
    assert torch.equal(generate(model, plain), generate(model, offloaded))
    assert plain.memory_report().parts == offloaded.memory_report().parts
    assert offloaded.memory_report().devices == {"cpu": offloaded.nbytes}


# ------------------------------------------------------------------------------------------------ what is where


@pytest.mark.usefixtures("apart")
@pytest.mark.parametrize("known", [True, False], ids=["with the model's config", "without"])
def test_two_layers_are_on_the_device_from_the_second_step_on(model, known):
    """The one in use and the next, from the last around to the first; and during the prefill none but the first."""
    cache = QuantizedCache(config=model.config if known else None, offload=True, **OPTIONS)
    seen = []

    def look(index):
        return lambda *_: seen.append((index, {at for at, layer in enumerate(cache.layers) if copies(layer)}))

    hooks = [layer.self_attn.register_forward_hook(look(at)) for at, layer in enumerate(model.model.layers)]
    try:
        generate(model, cache, max_new_tokens=4)
    finally:
        for hook in hooks:
            hook.remove()
    prefill, steps = seen[:3], seen[3:]
    assert [near - {0} for _, near in prefill] == [set()] * 3
    assert steps == [(0, {0, 1}), (1, {1, 2}), (2, {2, 0})] * 3


@pytest.mark.usefixtures("apart")
@pytest.mark.parametrize(("kernel", "kind"), [*(("torch", kind) for kind in KINDS), ("numba", "test-affine")])
def test_attention_reads_the_copies(monkeypatch, kernel, kind):
    """Packed, wherever it runs: what happens to the pages once they have been fetched does not matter."""
    if kernel == "numba":
        pytest.importorskip("numba")
        monkeypatch.setenv(VARIABLE, kernel)
    layer = make(backend=kind, offload=True, group_size=16)
    layer.update(states(200), states(200))
    keys, values = layer.update(states(1), states(1))
    query = torch.randn(1, 4, 1, 16)
    expected = scaled_dot_product_attention(query, layer.keys, layer.values, enable_gqa=True)
    layer.prefetch()
    for store in layer.stores:
        for part, tensor, _ in store.body.parts():
            if part not in ("copies", "tables"):
                tensor.zero_()
    torch.testing.assert_close(scaled_dot_product_attention(query, keys, values, enable_gqa=True), expected)
    assert not torch.allclose(layer.keys, torch.zeros(()))
    layer.let_go()
    assert copies(layer) == 0
    if kind == "test-affine":
        assert layer.keys[:, :, :100].count_nonzero() == 0


@pytest.mark.usefixtures("apart")
def test_what_was_not_fetched_is_fetched_by_attention():
    """Whoever attends without having been announced gets it packed all the same."""
    layer = make(offload=True)
    layer.update(states(60), states(60))
    keys, values = layer.update(states(20), states(20))
    layer.let_go()
    scaled_dot_product_attention(torch.randn(1, 2, 1, 16), keys, values)
    assert copies(layer) == sum(
        tensor.nbytes for store in layer.stores for part, tensor, _ in store.body.parts() if part != "copies"
    )


@pytest.mark.usefixtures("apart")
def test_only_pages_that_changed_are_fetched_again():
    """A block that is appended goes to its page, and the copies of the others stay."""
    layer = make(offload=True)
    layer.update(states(600), states(600))
    layer.update(states(200), states(200))
    layer.prefetch()
    body = layer.stores[0].body
    before = body.near
    assert [page.codes.data_ptr() for page in before] != [page.codes.data_ptr() for page in body.pages]
    layer.update(states(8), states(8))
    layer.prefetch()
    assert len(before) == len(body.near) == 2
    assert (before[0] is body.near[0], before[1] is body.near[1]) == (True, False)


@pytest.mark.usefixtures("apart")
def test_a_crop_into_the_body_leaves_no_copy_behind():
    """Kernels go through pages, each as long as it says it is."""
    layer = make(offload=True)
    layer.update(states(600), states(600))
    layer.update(states(200), states(200))
    layer.prefetch()
    layer.crop(-300)
    assert copies(layer) == 0
    layer.prefetch()
    for store in layer.stores:
        assert [page.length for page in store.body.near] == [page.length for page in store.body.pages]


# ------------------------------------------------------------------------------------------------ nothing else changes


class OffloadedMachine(CacheMachine):
    """The layer of the invariants, offloaded, with copies that come and go."""

    def start_again(self, batch):
        super().start_again(batch)
        if not self.options.get("offload"):
            self.options["offload"] = True
            self.layer = QuantizedLayer(CacheConfig(**self.options), 0)

    @rule()
    def prefetch(self):
        self.layer.prefetch()

    @rule()
    def let_go(self):
        self.layer.let_go()

    @rule()
    def copy(self):
        self.layer = copy.deepcopy(self.layer)
        assert copies(self.layer) == 0


OffloadedMachine.TestCase.settings = settings(max_examples=15, stateful_step_count=20, deadline=None)
TestOffloaded = pytest.mark.usefixtures("formats", "apart")(OffloadedMachine.TestCase)


@pytest.mark.usefixtures("apart")
@pytest.mark.parametrize(
    ("backend", "mode"),
    [
        *((kind, {}) for kind in KINDS),
        ("test-affine", {"num_beams": 3}),
        ("test-opaque", {"num_beams": 2}),
        ("test-affine", {"prompt_lookup_num_tokens": 3}),
    ],
)
def test_the_same_tokens(model, backend, mode):
    """Bit for bit what the cache holds as well: greedily, with beams, and with tokens that are taken back."""
    caches = [QuantizedCache(backend, model.config, offload=on, **OPTIONS) for on in (False, True)]
    ids = torch.randint(2, 128, (1 if "prompt_lookup_num_tokens" in mode else 2, 50))
    made = [
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            do_sample=False,
            max_new_tokens=20,
            **mode,
        )
        for cache in caches
    ]
    assert torch.equal(*made)
    for plain, offloaded in zip(*(cache.layers for cache in caches), strict=True):
        assert torch.equal(plain.keys, offloaded.keys)
        assert torch.equal(plain.values, offloaded.values)


@pytest.mark.usefixtures("apart")
def test_compiled_steps(model):
    """A cache of fixed size is fetched as any, from within a graph that knows nothing of it."""
    ids = torch.randint(2, 128, (2, 50))
    options = {"config": model.config, "max_cache_len": 100, **OPTIONS}
    said = []
    for forward, on in ((model, False), (torch.compile(model, fullgraph=True, backend="eager"), True)):
        cache = QuantizedCache(offload=on, **options)
        with torch.no_grad():
            said.append([model(ids, **given(model, cache)).logits[:, -1:].argmax(-1)])
            for _ in range(6):
                said[-1].append(forward(said[-1][-1], **given(model, cache)).logits[:, -1:].argmax(-1))
    assert torch.equal(*(torch.cat(tokens, dim=1) for tokens in said))
    assert [bool(copies(layer)) for layer in cache.layers] == [True, False, True]


@pytest.mark.usefixtures("apart")
def test_the_states_of_an_encoder(model):
    """They are read at every step without an update, and come a layer ahead all the same."""
    torch.manual_seed(0)
    config = T5Config(vocab_size=128, d_model=32, d_kv=8, d_ff=32, num_layers=3, num_heads=4, decoder_start_token_id=0)
    model = AutoModelForSeq2SeqLM.from_config(config).eval()
    caches = [QuantizedEncoderDecoderCache(config=config, offload=on, **OPTIONS) for on in (False, True)]
    assert torch.equal(*(generate(model, cache, min_new_tokens=24) for cache in caches))
    near = [bool(copies(layer)) for layer in caches[1].cross_attention_cache.layers]
    assert near == [True, False, True]  # the last, and the first, which comes next


@pytest.mark.usefixtures("apart")
def test_copies_and_pickles_of_a_cache_leave_what_is_on_the_device(model):
    """They go on with the same tokens."""
    cache = QuantizedCache(config=model.config, offload=True, nbits=4, residual_length=8)
    ids = generate(model, cache)
    assert copies(cache.layers[0])
    ids = torch.cat([ids, torch.full((2, 20), 5)], dim=1)
    twins = [copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))]  # noqa: S301  # our own
    for twin in twins:
        assert twin.memory_report().parts["copies"] == 0
        assert twin.layers[0].lookahead is twin.layers[2].lookahead is not cache.layers[0].lookahead
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 20, "do_sample": False}
    made = [model.generate(ids, past_key_values=one, **options) for one in (cache, *twins)]
    assert torch.equal(made[0], made[1])
    assert torch.equal(made[0], made[2])


@pytest.mark.usefixtures("apart")
@pytest.mark.parametrize("backend", KINDS)
def test_saved_as_any_and_loaded_offloaded(model, tmp_path, backend):
    """The file holds what a cache that is not offloaded would have put there, and the config says that it is."""
    cache = QuantizedCache(backend, model.config, offload=True, **OPTIONS)
    generate(model, cache)
    for layer in cache.layers:
        layer.let_go()
    cache.save(tmp_path / "prompt.kvq", model=model)
    loaded = QuantizedCache.load(tmp_path / "prompt.kvq", model=model)
    assert_same(cache, loaded)
    assert all(store.body.is_offloaded for layer in loaded.layers for store in layer.stores)
    assert loaded.layers[0].lookahead is loaded.layers[2].lookahead


# ------------------------------------------------------------------------------------------------ memory


@pytest.mark.usefixtures("apart")
def test_memory_tells_copies_apart():
    """They count among all bytes, not among the bits per element."""
    layer = make(offload=True)
    layer.update(states(100), states(100))
    before = layer.memory()
    layer.prefetch()
    after = layer.memory()
    assert after.parts["copies"] == after.nbytes - before.nbytes > 0
    assert after.bits_per_element == before.bits_per_element
    assert sum(after.devices.values()) == after.nbytes


# ------------------------------------------------------------------------------------------------ transformers' names


@pytest.mark.usefixtures("apart")
def test_a_layer_can_be_offloaded_later():
    """`offload` and `prefetch`, which transformers' caches have, do to a layer what the option does."""
    layer = make()
    layer.update(states(60), states(60))
    before = snapshot(layer)
    layer.offload()
    assert_unchanged(layer, before)
    layer.prefetch()
    assert copies(layer)
    layer.offload()
    assert copies(layer) == 0
    layer.update(states(20), states(20))
    layer.prefetch()
    assert layer.keys.shape[2] == 80


@pytest.mark.usefixtures("apart")
def test_tokens_with_a_device_of_their_own_stay_there():
    """Also when the layer is offloaded, as transformers would do it."""
    layer = make(device="cpu")
    layer.update(states(60), states(60))
    before = snapshot(layer)
    layer.offload()
    layer.prefetch()
    assert_unchanged(layer, before)
    assert not any(store.body.is_offloaded for store in layer.stores)


@pytest.mark.usefixtures("apart")
def test_a_cache_fetches_and_offloads_by_number(model):
    """`Cache.prefetch` takes the next layer that quantises, and from behind the last the first."""
    cache = QuantizedCache(config=model.config, skip_layers=[1], **OPTIONS)
    generate(model, cache)
    cache.offload(0)
    cache.offload(2)
    cache.prefetch(1)
    assert [bool(copies(layer)) for layer in (cache.layers[0], cache.layers[2])] == [False, True]
    cache.prefetch(3)
    assert copies(cache.layers[0])

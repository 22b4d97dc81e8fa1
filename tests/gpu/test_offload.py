"""Offloading with streams and pinned memory: what the CPU tests cannot show."""

import copy
import gc

import pytest
import torch
from transformers import AutoModelForCausalLM

from kvquant import CacheConfig, QuantizedCache
from kvquant.attention import dispatch
from kvquant.cache.layer import QuantizedLayer
from kvquant.demo import MODEL_DIR

BACKENDS = [("reference", 2), ("reference", 3), ("hqq", 4), ("quanto", 4), ("bitsandbytes", 4)]
MODES = [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}]


def states(tokens, heads=8, width=128):
    return torch.randn(1, heads, tokens, width, device="cuda", dtype=torch.bfloat16)


def layer(tokens, **options):
    made = QuantizedLayer(CacheConfig(**{"nbits": 4, "offload": True, **options}), 0)
    made.update(states(tokens), states(tokens))
    return made


def attend(one, query):
    return dispatch.attend(query, *one.stores, None, is_causal=False, scale=None)


def pages(one):
    return [page for store in one.stores for page in store.body.pages]


@pytest.mark.parametrize(("backend", "nbits"), BACKENDS)
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: str(*mode))
def test_the_same_tokens(backend, nbits, mode):
    """With offload and without: what the cache holds is the same to the last bit."""
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32).cuda().eval()
    prompt = torch.randint(3, 4000, (1 if "prompt_lookup_num_tokens" in mode else 2, 400), device="cuda")
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 100, "min_new_tokens": 100}
    caches = [QuantizedCache(backend, model.config, nbits=nbits, offload=on) for on in (False, True)]
    made = [model.generate(prompt, past_key_values=cache, do_sample=False, **options, **mode) for cache in caches]
    assert torch.equal(*made)
    for plain, offloaded in zip(*(cache.layers for cache in caches), strict=True):
        assert torch.equal(plain.keys, offloaded.keys)
        assert {tensor.device.type for store in offloaded.stores for _, tensor, _ in store.parts()} == {"cuda", "cpu"}


def test_pages_are_pinned_whatever_happens_to_them(tmp_path):
    """When they are made, cropped, copied, when rows are selected, and when they come from a file."""
    one = layer(1500)
    one.update(states(700), states(700))
    cache = QuantizedCache(nbits=4, offload=True)
    cache.update(states(900), states(900), 0)
    cache.save(tmp_path / "prompt.kvq")
    loaded = QuantizedCache.load(tmp_path / "prompt.kvq", device="cuda").layers[0]
    cropped, selected = copy.deepcopy(one), copy.deepcopy(one)
    cropped.crop(-1000)
    selected.batch_repeat_interleave(2)
    for which in (one, loaded, cropped, selected):
        assert all(page.codes.is_pinned() and page.scale.is_pinned() for page in pages(which))


def test_the_device_holds_two_layers():
    """Of sixteen: beside sinks and windows, and what a step needs for a while."""
    count, tokens = 16, 32768
    cache = QuantizedCache(nbits=4, offload=True)
    before = torch.cuda.memory_allocated()
    for index in range(count):
        cache.update(states(tokens), states(tokens), index)
    gc.collect()
    body = sum(tensor.nbytes for page in pages(cache.layers[0]) for _, tensor, _ in page.parts())
    exact = cache.memory_report().devices["cuda:0"]
    assert torch.cuda.memory_allocated() - before < exact + body
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        for index in range(count):
            cache.update(states(1), states(1), index)
            attend(cache.layers[index], torch.randn(1, 32, 1, 128, device="cuda", dtype=torch.bfloat16))
    peak = torch.cuda.max_memory_allocated() - before
    assert 2 * body < peak < exact + 3 * body
    assert cache.memory_report().devices["cpu"] >= count * body


def test_copying_goes_on_while_the_device_works():
    """`prefetch` returns at once, work that was handed out after it is done before it, and attention waits for it."""
    one, twin = layer(1 << 19), layer(64)
    query = torch.randn(1, 32, 1, 128, device="cuda", dtype=torch.bfloat16)
    expected, _ = attend(one, query), attend(twin, query)
    one.let_go()
    torch.cuda.synchronize()
    one.prefetch()
    copied = one.stores[1].body._copies._event
    attend(twin, query)
    done = torch.cuda.current_stream().record_event()
    done.synchronize()
    assert not copied.query()
    assert torch.equal(attend(one, query), expected)
    assert copied.query()


def test_memory_is_not_given_to_others_while_it_is_written_to():
    """A layer that is let go, or forgotten, in the middle of a copy."""
    for forget in (False, True):
        one = layer(1 << 16)
        torch.cuda.synchronize()
        one.prefetch()
        sizes = [tensor.shape for store in one.stores for _, tensor, _ in store.body.parts() if tensor.is_cuda]
        if forget:
            del one
        else:
            one.let_go()
        zeros = [torch.zeros(size, dtype=torch.uint8, device="cuda") for size in sizes for _ in range(4)]
        torch.cuda.synchronize()
        assert not any(tensor.any() for tensor in zeros)


def test_copies_are_not_read_before_they_are_there():
    """However long the device was busy, and whichever way a step goes."""
    cache, plain = (QuantizedCache(nbits=4, offload=on) for on in (True, False))
    for step, tokens in enumerate((20000, *[1] * 12)):
        for index in range(4):
            new = states(tokens), states(tokens)
            for one in (cache, plain):
                one.update(*new, index)
            if step:
                torch.cuda._sleep(int(1e6) * (step % 3))
                query = torch.randn(1, 32, 1, 128, device="cuda", dtype=torch.bfloat16)
                assert torch.equal(*(attend(one.layers[index], query) for one in (cache, plain)))

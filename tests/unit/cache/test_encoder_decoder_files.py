"""The cache of encoder-decoder models in files."""

import pytest
import torch
from transformers import BartConfig
from transformers.cache_utils import DynamicLayer

from kvquant import QuantizedCache, QuantizedEncoderDecoderCache
from kvquant.cache.encoder_decoder import CrossLayer
from kvquant.errors import CacheFileError, OtherModelError
from tests.unit.cache.encoder_decoders import BART, ENCODED, OPTIONS, bart_with_text, filled


@pytest.fixture(scope="module")
def bart():
    return bart_with_text()


@pytest.fixture
def saved(bart, tmp_path):
    cache, tokens = filled(bart, skip_layers=[-1])
    path = tmp_path / "prompt.kvq"
    cache.save(path, model=bart[0], token_ids=tokens[:, :-1])
    return cache, tokens, path


def test_it_goes_on_as_if_it_had_never_been_saved(bart, saved):
    """Both parts; the encoder is not run again."""
    model, inputs = bart
    cache, tokens, path = saved
    loaded = QuantizedEncoderDecoderCache.load(path, model=model)
    assert loaded.is_updated == {0: True, 1: True}
    assert torch.equal(loaded.token_ids, tokens[:, :-1])
    assert loaded.config == cache.config
    assert [type(layer) for layer in loaded.cross_attention_cache.layers] == [CrossLayer, DynamicLayer]
    nothing = (torch.full((2, ENCODED, 32), torch.nan),)
    following = [
        model(
            decoder_input_ids=tokens[:, -1:],
            encoder_outputs=nothing,
            attention_mask=inputs["attention_mask"],
            past_key_values=one,
        ).logits
        for one in (cache, loaded)
    ]
    assert following[0].isfinite().all()
    torch.testing.assert_close(*following, rtol=0, atol=1e-5)


def test_it_is_loaded_without_a_model(saved):
    """Where it was not made for one, its layers come as they are used."""
    loaded = QuantizedEncoderDecoderCache.load(saved[2])
    assert loaded.nbytes <= saved[0].nbytes
    assert loaded.get_seq_length() == 24
    lazy = QuantizedEncoderDecoderCache(**OPTIONS)
    lazy.save(saved[2])
    assert QuantizedEncoderDecoderCache.load(saved[2]).is_updated == {}


def test_files_are_of_one_kind_of_cache(saved, tmp_path):
    """Each class says which one it is that can read a file."""
    with pytest.raises(CacheFileError, match=r"of an encoder-decoder model: use QuantizedEncoderDecoderCache.load"):
        QuantizedCache.load(saved[2])
    QuantizedCache(**OPTIONS).save(tmp_path / "other.kvq")
    with pytest.raises(CacheFileError, match=r"of no encoder-decoder model: use QuantizedCache.load"):
        QuantizedEncoderDecoderCache.load(tmp_path / "other.kvq")


def test_other_models_are_refused(saved):
    """By what their config says."""
    with pytest.raises(OtherModelError, match="decoder_layers is 2 in the file and 3 in the model"):
        QuantizedEncoderDecoderCache.load(saved[2], config=BartConfig(**{**BART, "decoder_layers": 3}))

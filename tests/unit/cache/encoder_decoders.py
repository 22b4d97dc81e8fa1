"""Encoder-decoder models, caches for them, and generation with both."""

import torch
from transformers import BartConfig, BartForConditionalGeneration

from kvquant import QuantizedEncoderDecoderCache
from kvquant.evaluation.support import prompts

ENDS = {"vocab_size": 128, "bos_token_id": 0, "eos_token_id": None, "pad_token_id": 1}
BART = {
    **ENDS,
    "d_model": 32,
    "max_position_embeddings": 128,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
    **{f"{side}_{what}": 2 for side in ("encoder", "decoder") for what in ("layers", "attention_heads")},
    **{f"{side}_ffn_dim": 32 for side in ("encoder", "decoder")},
}
HEARING = {"num_mel_bins": 8, "max_source_positions": 48, "max_target_positions": 64, "begin_suppress_tokens": None}
T5 = {**ENDS, "d_model": 32, "d_kv": 16, "d_ff": 32, "num_heads": 2, "decoder_start_token_id": 1}

#: The encoder's tokens; blocks of 8 are quantised, and with a window of 8 two of the decoder's 24 tokens' blocks.
ENCODED = 48
OPTIONS = {"backend": "reference", "nbits": 8, "group_size": 8, "residual_length": 8}
#: Everything is sink, so nothing is quantised.
EXACT = {**OPTIONS, "sink_length": 256}
LENGTH = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False}
MODES = {
    "greedy": {},
    "several beams returned": {"num_beams": 3, "num_return_sequences": 2},
    "several samples returned": {"do_sample": True, "num_return_sequences": 2},
}


def made(model):
    """The model with weights that make attention choose."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(std=weight.shape[-1] ** -0.5)
    return model.eval()


def bart_with_text():
    """A BART, and two texts, one of them padded."""
    torch.manual_seed(0)
    return made(BartForConditionalGeneration(BartConfig(**BART))), prompts.text(128, ENCODED, right=True)


def cache_for(model, **options):
    return QuantizedEncoderDecoderCache(config=model.config, **{**OPTIONS, **options})


def generate(pair, cache=None, **options):
    model, inputs = pair
    given = {} if cache is None else {"past_key_values": cache}
    torch.manual_seed(0)
    return model.generate(**inputs, **given, **{**LENGTH, **options})


def filled(pair, **options):
    cache = cache_for(pair[0], **options)
    return cache, generate(pair, cache)

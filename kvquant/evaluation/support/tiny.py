"""Tiny models of random weights that the ways of generating are run with, each made once."""

from __future__ import annotations

import functools
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BartConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
)

from kvquant.demo import MODEL_DIR

_VOCABULARY = 256

#: The shape of all of them: heads of 64 channels, because some backends have no smaller groups.
_SHAPE: dict[str, Any] = {
    "vocab_size": _VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "max_position_embeddings": 1024,
    "bos_token_id": 0,
    "eos_token_id": None,  # so that they generate as long as they are asked to
    "pad_token_id": 1,
}
_PATCHES = 4
_IMAGE = 8

#: What stands for an image in a prompt: one such token for each patch.
IMAGE_TOKEN = 2


@functools.cache
def decoder(seed: int = 0, *, eager: bool = False) -> PreTrainedModel:
    """Return a Llama; another seed gives a draft model for it."""
    torch.manual_seed(seed)
    attention = "eager" if eager else "sdpa"
    return AutoModelForCausalLM.from_config(LlamaConfig(**_SHAPE), attn_implementation=attention).eval()


@functools.cache
def vision() -> PreTrainedModel:
    """Return a Llava, which sees images of 8 by 8 pixels."""
    torch.manual_seed(0)
    tower = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=_IMAGE,
        patch_size=_IMAGE // 2,
        projection_dim=32,
    )
    config = LlavaConfig(
        vision_config=tower, text_config=LlamaConfig(**_SHAPE), image_token_index=IMAGE_TOKEN, vision_feature_layer=-1
    )
    return LlavaForConditionalGeneration(config).eval()


@functools.cache
def encoder_decoder() -> PreTrainedModel:
    """Return a Bart."""
    torch.manual_seed(0)
    shape = {
        "d_model": 128,
        "encoder_layers": 1,
        "decoder_layers": 2,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
    }
    ends = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": None, "decoder_start_token_id": 3}
    config = BartConfig(vocab_size=_VOCABULARY, max_position_embeddings=1024, forced_eos_token_id=None, **shape, **ends)
    return AutoModelForSeq2SeqLM.from_config(config).eval()


@functools.cache
def shipped() -> tuple[PreTrainedModel, Any]:
    """Return the model that kvquant ships, and its tokenizer, for what takes and gives text."""
    return AutoModelForCausalLM.from_pretrained(MODEL_DIR).eval(), AutoTokenizer.from_pretrained(MODEL_DIR)


def prompt(batch: int = 1, *, padded: bool = False) -> dict[str, torch.Tensor]:
    """Return token ids ``[batch, 152]`` and their mask; the last row is padded on the left if asked for.

    With a window of 32 tokens and blocks of 64 one block is quantised at once, and another after 8 more tokens.
    """
    drawn = torch.Generator().manual_seed(1)
    ids = torch.randint(4, _VOCABULARY, (batch, 152), generator=drawn)
    mask = torch.ones_like(ids)
    if padded:
        ids[-1, :20], mask[-1, :20] = 1, 0
    return {"input_ids": ids, "attention_mask": mask}


def picture_prompt() -> dict[str, torch.Tensor]:
    """Return what the Llava takes: a prompt with an image in it."""
    inputs = prompt()
    inputs["input_ids"][0, 10 : 10 + _PATCHES] = IMAGE_TOKEN
    pixels = torch.randn(1, 3, _IMAGE, _IMAGE, generator=torch.Generator().manual_seed(2))
    return {**inputs, "pixel_values": pixels}

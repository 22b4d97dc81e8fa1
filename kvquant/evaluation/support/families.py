"""The model families that `kvquant support families` runs: of each the smallest model with all its kinds of layers.

Names of classes, not classes: a family that the installed transformers does not have is told as such. To add one, give
its class and the options of a config with the fewest layers that it is made of.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

#: Tokens of a prompt, and of the windows of layers that have one: the prompt reaches beyond them.
PROMPT_TOKENS, WINDOW = 64, 48

_ENDS: dict[str, Any] = {"vocab_size": 128, "bos_token_id": 0, "eos_token_id": None, "pad_token_id": 1}
_LENGTH = {"max_position_embeddings": 512}
_WIDTH = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
_PLAIN = {**_ENDS, **_LENGTH, **_WIDTH}
_GROUPED = {**_PLAIN, "num_key_value_heads": 1}
#: Grouped-query attention with heads of 32 channels, which is what most families are.
_LLAMA = {**_GROUPED, "head_dim": 32}

_EXPERTS = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 2),
    **dict.fromkeys(("num_experts_per_tok", "n_group", "topk_group", "moe_k", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 64),
}
_SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}
_LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    **dict.fromkeys(("linear_num_value_heads", "linear_num_key_heads"), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 16),
}
_MAMBA = {
    "mamba_n_heads": 4,
    "mamba_d_head": 32,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 16,
    "mamba_expand": 2,
}
_LATENT = {
    **_PLAIN,
    **_EXPERTS,
    "num_key_value_heads": 2,
    "first_k_dense_replace": 1,
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim"), 32),
    "v_head_dim": 64,
}
_INDEXED = {**_LATENT, "index_n_heads": 2, "index_head_dim": 32, "index_topk": 16}
_SHARED = {
    **_LLAMA,
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": WINDOW,
    "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": 128,
}
_OLD = {**_ENDS, "n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 512, "n_ctx": 512}

_BOTH = {
    **_ENDS,
    **_LENGTH,
    "d_model": 64,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
    **{f"{side}_{what}": size for side in ("encoder", "decoder") for what, size in (("layers", 2), ("ffn_dim", 64))},
    **{f"{side}_attention_heads": 2 for side in ("encoder", "decoder")},
}
_T5 = {**_ENDS, "d_model": 64, "d_kv": 32, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 2}
_T5["decoder_start_token_id"] = 1
_AUDIO: dict[str, Any] = {"num_mel_bins": 8, "max_source_positions": PROMPT_TOKENS, "max_target_positions": 128}
_AUDIO["begin_suppress_tokens"] = None

#: The token that stands for a piece of an image in a prompt, and those around it.
IMAGE, _VIDEO, IMAGE_START, IMAGE_END = 5, 6, 7, 8
_CLIP = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
_IMAGES = {**_ENDS, "image_token_id": IMAGE, "image_token_index": IMAGE}
_PATCHES = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "out_hidden_size": 64,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
_QWEN_VL = {
    **_IMAGES,
    "video_token_id": _VIDEO,
    "vision_start_token_id": IMAGE_START,
    "vision_end_token_id": IMAGE_END,
}
_SECTIONS = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0}


@dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
        name: what people call it.
        model: name of the class in transformers.
        options: of its config.
        inputs: what it reads beside or instead of text: ``"text"``, ``"encoder text"``, ``"log-mel"``, ``"audio"``,
            ``"image"`` or ``"patches"``.
        note: why it is not attended packed, or refused, where it is so.
        refused: whether a quantised cache is refused for it.
    """

    name: str
    model: str
    options: dict[str, Any] = field(hash=False)
    inputs: str = "text"
    note: str = ""
    refused: bool = False


_EAGER = "transformers has only eager attention for it"
_INTERFACE = "attn_implementation='kvquant' attends packed"
_CAPPED = f"soft-capping, which sdpa has not; {_INTERFACE}"
_SINKS = f"attention sinks, which sdpa has not; {_INTERFACE}"
_EXPANDED = "latents are projected to keys and values at each step"
_MIXED = "each layer holds attention and a recurrent state"
_RECURRENT = "recurrent states alone"

DECODERS = (
    Family("Llama", "LlamaForCausalLM", _LLAMA),
    Family(
        "Llama 4",
        "Llama4ForCausalLM",
        {
            **_LLAMA,
            "layer_types": ["chunked_attention", "full_attention"],
            "attention_chunk_size": WINDOW,
            "num_local_experts": 2,
            "interleave_moe_layer_step": 2,
            "intermediate_size_mlp": 64,
            "no_rope_layers": [1, 0],
        },
    ),
    Family("Mistral", "MistralForCausalLM", {**_LLAMA, "sliding_window": WINDOW}),
    Family("Ministral", "MinistralForCausalLM", {**_LLAMA, **_SLIDING}),
    Family("Mixtral", "MixtralForCausalLM", {**_LLAMA, **_EXPERTS}),
    Family("Qwen2", "Qwen2ForCausalLM", _LLAMA),
    Family("Qwen2-MoE", "Qwen2MoeForCausalLM", {**_LLAMA, **_EXPERTS}),
    Family("Qwen3", "Qwen3ForCausalLM", _LLAMA),
    Family("Qwen3-MoE", "Qwen3MoeForCausalLM", {**_LLAMA, **_EXPERTS}),
    Family("Qwen3-Next", "Qwen3NextForCausalLM", {**_LLAMA, **_EXPERTS, **_LINEAR}),
    Family("Qwen3.5", "Qwen3_5ForCausalLM", {**_LLAMA, **_LINEAR}),
    Family("Gemma", "GemmaForCausalLM", _LLAMA),
    Family("Gemma 2", "Gemma2ForCausalLM", {**_LLAMA, **_SLIDING, "query_pre_attn_scalar": 32}, note=_CAPPED),
    Family("Gemma 3", "Gemma3ForCausalLM", {**_LLAMA, **_SLIDING, "query_pre_attn_scalar": 32}),
    Family(
        "Gemma 3n",
        "Gemma3nForCausalLM",
        {**_SHARED, "laurel_rank": 4, "altup_num_inputs": 2, "activation_sparsity_pattern": [0.0] * 4},
    ),
    Family("Gemma 4", "Gemma4ForCausalLM", {**_SHARED, "global_head_dim": 64, "num_global_key_value_heads": 1}),
    Family("Phi", "PhiForCausalLM", _GROUPED),
    Family("Phi-3", "Phi3ForCausalLM", _GROUPED),
    Family("Phi-3.5-MoE", "PhimoeForCausalLM", {**_GROUPED, **_EXPERTS}),
    Family("Cohere", "CohereForCausalLM", _GROUPED),
    Family("Cohere 2", "Cohere2ForCausalLM", {**_LLAMA, **_SLIDING}),
    Family("GPT-2", "GPT2LMHeadModel", _OLD),
    Family(
        "GPT-Neo",
        "GPTNeoForCausalLM",
        {
            **_ENDS,
            **_LENGTH,
            "hidden_size": 64,
            "num_layers": 2,
            "num_heads": 2,
            "attention_types": [[["global", "local"], 1]],
            "window_size": WINDOW,
        },
        note=_EAGER,
    ),
    Family("GPT-NeoX", "GPTNeoXForCausalLM", _PLAIN),
    Family("GPT-J", "GPTJForCausalLM", {**_OLD, "rotary_dim": 16}),
    Family("CodeGen", "CodeGenForCausalLM", {**_OLD, "n_embd": 128, "n_head": 4, "rotary_dim": 16}),
    Family("OPT", "OPTForCausalLM", {**_PLAIN, "word_embed_proj_dim": 64, "ffn_dim": 64}),
    Family("Falcon", "FalconForCausalLM", _PLAIN),
    Family("Bloom", "BloomForCausalLM", {**_ENDS, "hidden_size": 64, "n_layer": 2, "n_head": 2}, note=_EAGER),
    Family("StarCoder", "GPTBigCodeForCausalLM", _OLD),
    Family("StarCoder 2", "Starcoder2ForCausalLM", _GROUPED),
    Family("StableLM", "StableLmForCausalLM", _GROUPED),
    Family("DeepSeek-V2", "DeepseekV2ForCausalLM", _LATENT, note=_EXPANDED),
    Family("DeepSeek-V3", "DeepseekV3ForCausalLM", _LATENT, note=_EXPANDED),
    Family(
        "DeepSeek-V3.2",
        "DeepseekV32ForCausalLM",
        _INDEXED,
        note="each layer holds attention and the keys of an indexer",
        refused=True,
    ),
    Family(
        "DeepSeek-V4",
        "DeepseekV4ForCausalLM",
        {**_LLAMA, **_EXPERTS},
        note="layers of its own, which compress keys and values themselves",
        refused=True,
    ),
    Family("gpt-oss", "GptOssForCausalLM", {**_LLAMA, **_SLIDING, **_EXPERTS}, note=_SINKS),
    Family(
        "Jamba",
        "JambaForCausalLM",
        {
            **_GROUPED,
            **_EXPERTS,
            **dict.fromkeys(("attn_layer_period", "expert_layer_period", "mamba_expand"), 2),
            **dict.fromkeys(("attn_layer_offset", "expert_layer_offset"), 1),
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
    ),
    Family("Bamba", "BambaForCausalLM", {**_GROUPED, **_MAMBA, "attn_layer_indices": [1]}),
    Family(
        "Granite 4",
        "GraniteMoeHybridForCausalLM",
        {**_GROUPED, **_MAMBA, **_EXPERTS, "layer_types": ["mamba", "attention"], "attention_multiplier": 0.125},
    ),
    Family("Granite", "GraniteForCausalLM", {**_LLAMA, "attention_multiplier": 0.125}),
    Family("Granite-MoE", "GraniteMoeForCausalLM", {**_LLAMA, **_EXPERTS, "attention_multiplier": 0.125}),
    Family("SmolLM3", "SmolLM3ForCausalLM", _LLAMA),
    Family("OLMo", "OlmoForCausalLM", _GROUPED),
    Family("OLMo 2", "Olmo2ForCausalLM", _GROUPED),
    Family("OLMo 3", "Olmo3ForCausalLM", {**_GROUPED, **_SLIDING}),
    Family("OLMoE", "OlmoeForCausalLM", {**_GROUPED, **_EXPERTS}),
    Family("GLM", "GlmForCausalLM", _LLAMA),
    Family("GLM-4", "Glm4ForCausalLM", _LLAMA),
    Family("GLM-4.5", "Glm4MoeForCausalLM", {**_LLAMA, **_EXPERTS, "first_k_dense_replace": 1}),
    Family(
        "GLM-5",
        "GlmMoeDsaForCausalLM",
        _INDEXED,
        note="each layer holds attention and the keys of an indexer",
        refused=True,
    ),
    Family(
        "MiniMax",
        "MiniMaxForCausalLM",
        {**_LLAMA, **_EXPERTS, **_LINEAR, "block_size": 16},
        note="a cache class of its own",
        refused=True,
    ),
    Family("MiniMax-M2", "MiniMaxM2ForCausalLM", {**_LLAMA, **_EXPERTS}),
    Family("Falcon-H1", "FalconH1ForCausalLM", {**_LLAMA, **_MAMBA, "mamba_d_ssm": 128}, note=_MIXED, refused=True),
    Family("Mamba", "MambaForCausalLM", {**_PLAIN, "state_size": 8}, note=_RECURRENT, refused=True),
    Family(
        "Mamba 2",
        "Mamba2ForCausalLM",
        {**_PLAIN, "state_size": 8, "num_heads": 4, "head_dim": 32, "n_groups": 1, "chunk_size": 16},
        note=_RECURRENT,
        refused=True,
    ),
    Family("Falcon-Mamba", "FalconMambaForCausalLM", {**_PLAIN, "state_size": 8}, note=_RECURRENT, refused=True),
    Family("Nemotron", "NemotronForCausalLM", _LLAMA),
    Family("LFM2", "Lfm2ForCausalLM", {**_LLAMA, "layer_types": ["conv", "full_attention"], "conv_L_cache": 3}),
    Family(
        "RecurrentGemma",
        "RecurrentGemmaForCausalLM",
        {**_LLAMA, "block_types": ["recurrent", "attention"], "attention_window_size": WINDOW, "lru_width": 64},
    ),
    Family("ERNIE 4.5", "Ernie4_5ForCausalLM", _LLAMA),
    Family("ERNIE 4.5 MoE", "Ernie4_5_MoeForCausalLM", {**_LLAMA, **_EXPERTS}),
    Family("EXAONE 4", "Exaone4ForCausalLM", {**_LLAMA, **_SLIDING, "sliding_window_pattern": "LG"}),
    Family("Seed-OSS", "SeedOssForCausalLM", _LLAMA),
    Family("Hunyuan", "HunYuanDenseV1ForCausalLM", _LLAMA),
    Family("Apertus", "ApertusForCausalLM", _LLAMA),
    Family("BitNet", "BitNetForCausalLM", _LLAMA),
)

ENCODER_DECODERS = (
    Family("T5", "T5ForConditionalGeneration", _T5, "encoder text"),
    Family("mT5", "MT5ForConditionalGeneration", _T5, "encoder text"),
    Family("BART", "BartForConditionalGeneration", _BOTH, "encoder text"),
    Family("mBART", "MBartForConditionalGeneration", _BOTH, "encoder text"),
    Family("Marian", "MarianMTModel", _BOTH, "encoder text"),
    Family("Pegasus", "PegasusForConditionalGeneration", _BOTH, "encoder text"),
    Family("M2M-100", "M2M100ForConditionalGeneration", _BOTH, "encoder text"),
    Family("Whisper", "WhisperForConditionalGeneration", {**_BOTH, **_AUDIO}, "log-mel"),
    Family(
        "Moonshine",
        "MoonshineForConditionalGeneration",
        {
            **_ENDS,
            **_LENGTH,
            "hidden_size": 64,
            "intermediate_size": 64,
            "decoder_start_token_id": 2,
            **{f"{side}_num_hidden_layers": 2 for side in ("encoder", "decoder")},
            **{f"{side}_num_attention_heads": 2 for side in ("encoder", "decoder")},
        },
        "audio",
    ),
)

WITH_IMAGES = (
    Family(
        "Llava",
        "LlavaForConditionalGeneration",
        {
            **_IMAGES,
            "text_config": {"model_type": "llama", **_LLAMA},
            "vision_config": {
                "model_type": "clip_vision_model",
                "num_hidden_layers": 2,
                "projection_dim": 32,
                **_CLIP,
            },
            "vision_feature_layer": -1,
        },
        "image",
    ),
    Family(
        "Qwen2.5-VL",
        "Qwen2_5_VLForConditionalGeneration",
        {
            **_QWEN_VL,
            "text_config": {**_LLAMA, "rope_parameters": _SECTIONS},
            "vision_config": {**_PATCHES, "window_size": 16, "fullatt_block_indexes": [0], "in_channels": 3},
        },
        "patches",
    ),
    Family(
        "Qwen3-VL",
        "Qwen3VLForConditionalGeneration",
        {
            **_QWEN_VL,
            "text_config": {**_LLAMA, "rope_parameters": _SECTIONS},
            "vision_config": {
                **_PATCHES,
                "num_position_embeddings": 16,
                "deepstack_visual_indexes": [0],
                "in_channels": 3,
            },
        },
        "patches",
    ),
)

FAMILIES = (*DECODERS, *ENCODER_DECODERS, *WITH_IMAGES)

"""What a plan says against caches that are really filled, and against models that are really made."""

import functools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

import kvquant
from kvquant.cache.cache import QuantizedCache
from kvquant.cache.layers import memory_of
from kvquant.demo import HELDOUT_FILE, MODEL_DIR
from kvquant.engine.memory import MemoryReport
from kvquant.engine.window import WindowPolicy
from kvquant.errors import ModelLoadError, OptionValueError, UnknownOptionError, UnsupportedError
from kvquant.evaluation.figures import plan as figure
from kvquant.evaluation.loading import load_model
from kvquant.evaluation.measure import held_bytes
from kvquant.evaluation.plan import PlanOptions, make_plan, planned_candidates
from kvquant.evaluation.planning.model import model_shape
from kvquant.evaluation.planning.occupancy import occupancy
from kvquant.evaluation.planning.sizes import cache_sizes
from kvquant.plugin import BackendSpec, Capabilities
from tests.support import MinMax, UniformCodebook

SMALL = {
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "max_position_embeddings": 512,
}
LATENT = {
    "head_dim": 16,
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
}
#: Kinds of models, by what they cache, with the options that make them small.
MODELS = {
    "llama": {},
    "mistral": {"sliding_window": 80},  # all layers slide, and are quantised
    "gemma2": {"sliding_window": 24},  # every other layer slides
    "gemma4_text": {"sliding_window": 24, "vocab_size_per_layer_input": 128},  # heads of several sizes
    "gemma3n_text": {  # layers that read other layers' states
        "sliding_window": 24,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "vocab_size_per_layer_input": 128,
        "intermediate_size": [64] * 4,
    },
    "deepseek_v3": LATENT,  # latent attention: keys and values of different sizes
    "glm_moe_dsa": {**LATENT, "index_head_dim": 16, "index_n_heads": 2, "index_topk": 32},  # the keys of an indexer too
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 24},  # a mixture of experts
    "qwen3_next": {  # linear attention
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    },
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16},  # both in one layer
    "gpt2": {"n_layer": 4, "n_embd": 64, "n_head": 4},
}
#: Those of which no layer can be quantised, and a quantised cache is refused.
FULL_ONLY = ("glm_moe_dsa", "falcon_h1")


def saved(path, kind, **options):
    """Save a config as a model's folder has it."""
    AutoConfig.for_model(kind, **{**SMALL, **options}).save_pretrained(path)
    return str(path)


def candidates(text="reference:2"):
    return planned_candidates(text)


def planned(name, text="reference:2", dtype="float32", **options):
    chosen = PlanOptions(candidates=candidates(text), **options)
    return make_plan(model_shape(name, dtype=dtype, batch=chosen.batch), chosen)


def reported(cache):
    """What a cache holds, and one of transformers' own as kvquant's would report it."""
    if isinstance(cache, QuantizedCache):
        return cache.memory_report()
    return MemoryReport(tuple(memory_of(index, layer) for index, layer in enumerate(cache.layers)))


def test_numbers_in_an_option_are_no_bits():
    """Those of layers are for layers; a cache that names no other gets all widths."""
    labels = [one.label for one in candidates('bitsandbytes:layers={"0":{"nbits":4}}')]
    assert labels == ["full", *(f'bitsandbytes:{nbits}:layers={{"0":{{"nbits":4}}}}' for nbits in (8, 4))]


@pytest.mark.parametrize("kind", MODELS)
def test_a_plan_is_what_a_model_fills_its_cache_with(tmp_path, kind):
    """To the byte and part by part, full precision too, for every kind of layer; and so are the weights."""
    name, batch, prefill, decoded = saved(tmp_path, kind, **MODELS[kind]), 2, 90, 12
    caches = candidates("full" if kind in FULL_ONLY else "reference:4:group_size=8:residual_length=32:sink_length=3")
    options = PlanOptions(candidates=caches, context=prefill + decoded, decode=decoded, batch=batch)
    report = make_plan(model_shape(name, dtype="float32", batch=batch), options)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(name), dtype=torch.float32).eval()
    assert report.settings["weights"]["nbytes"] == model.get_memory_footprint()
    tokens = torch.randint(3, 100, (batch, prefill + decoded))
    for row, candidate in zip(report.rows, options.candidates, strict=True):
        cache = candidate.make(model.config)
        with torch.no_grad():
            model(tokens[:, :prefill], past_key_values=cache, use_cache=True)
            for at in range(prefill, prefill + decoded):
                model(tokens[:, at : at + 1], past_key_values=cache, use_cache=True)
        held = reported(cache)
        assert row.parts == held.parts
        assert row.nbytes == held.nbytes == held_bytes(cache.layers)
        assert row.bits_per_element == (32 if candidate.kind == "full" else held.bits_per_element)


@pytest.fixture(scope="module")
def backends(formats):
    """The formats, and a codebook whose table is one tensor for all, kept by the library."""
    table = functools.cache(lambda levels: torch.linspace(-1, 1, levels + 1))

    class SharedTable(UniformCodebook):
        def quantize(self, rows):
            plain = super().quantize(rows)
            return type(plain)(plain.codes, plain.scale, table=table(self.levels))

    class Biased(MinMax):
        """Offsets that float16 would harm, as keys with a large mean give them."""

        def quantize(self, rows):
            plain = super().quantize(rows)
            return type(plain)(plain.codes, plain.scale, plain.offset + 1e4)

    class Roomy(MinMax):
        """Blocks that use half of their memory, and share a tensor."""

        shared = torch.zeros(3)

        def quantize(self, rows):
            plain = super().quantize(rows)
            codes = torch.cat([plain.codes, plain.codes])[: len(rows)]
            return kvquant.plugin.Opaque(
                {"codes": codes, "scale": plain.scale, "offset": plain.offset, "all": self.shared}
            )

        def dequantize(self, packed):
            tensors = packed.tensors
            return tensors["codes"] * tensors["scale"][:, None] + tensors["offset"][:, None]

    made = {"shared": (SharedTable, "codebook"), "biased": (Biased, "affine"), "roomy": (Roomy, "opaque")}
    for name, (factory, kind) in made.items():
        kvquant.register(BackendSpec(f"test-{name}", factory, Capabilities(nbits=(2, 4, 8), formats=(kind,))))
    yield [*(formats[kind] for kind in ("affine", "codebook", "opaque")), *(f"test-{name}" for name in made), "trellis"]
    for name in made:
        kvquant.unregister(f"test-{name}")


SETTINGS = [
    "group_size=16",
    "token:group_size=16:residual_length=40:outlier_share=0.05",
    "channel:sink_length=5:group_size=32:scale_bits=8",
    "group_size=16:smoothing_key=true:smoothing_value=true",
    "nbits_key=4:axis_key=token:axis_value=channel:group_size_value=24:group_size_key=8:residual_length=0",
    "rotation_key=hadamard:skip_layers=[0]:outlier_share=0.01",
]


@pytest.mark.parametrize(
    ("number", "chosen"),
    [
        *((number, SETTINGS[(number + shift) % len(SETTINGS)]) for number in range(6) for shift in (0, 2)),
        *((number, "nbits_key=3.5:nbits_value=2.5:group_size=16") for number in (0, 1)),
        (6, "nbits_key=3:group_size=16:sink_length=5"),
    ],
)
def test_a_plan_is_what_random_states_fill_a_cache_with(tmp_path, backends, number, chosen):
    """Every format, both axes, sinks, lengths that no block divides: each part and the total, to the byte."""
    name, batch, prefill, decoded = saved(tmp_path, "llama", num_hidden_layers=2), 3, 1003, 300
    text = f"{backends[number]}:2:{chosen}"
    options = PlanOptions(candidates=candidates(text), context=prefill + decoded, decode=decoded, batch=batch)
    shape = model_shape(name, dtype="bfloat16", batch=batch)
    row = make_plan(shape, options).rows[1]
    cache = options.candidates[1].make(shape.config)
    states = torch.randn(batch, 2, prefill + decoded, 32).bfloat16()
    for index in range(2):
        for new in states.split([prefill, *[1] * decoded], dim=2):
            cache.update(new, new, index)
    held = cache.memory_report()
    assert row.parts == held.parts
    assert row.nbytes == cache.nbytes
    assert row.bits_per_element == held.bits_per_element
    assert [layer["nbytes"] for layer in row.layers] == list(dict.fromkeys(layer.nbytes for layer in held.layers))


def test_a_plan_for_a_text_that_the_shipped_model_reads():
    """Within 1 %, also where some of the scales turn out to need float32."""
    loaded = load_model()
    tokens = torch.tensor([loaded.encode(HELDOUT_FILE.read_text("utf-8"))[:600]])
    options = PlanOptions(candidates=candidates("reference:8:2"), context=600, decode=0)
    report = make_plan(model_shape(str(MODEL_DIR), dtype="float32"), options)
    assert report.settings["weights"]["nbytes"] == loaded.model.get_memory_footprint()
    for row, candidate in zip(report.rows[1:], options.candidates[1:], strict=True):
        cache = candidate.make(loaded.model.config)
        with torch.no_grad():
            loaded.model(tokens, past_key_values=cache)
        assert row.nbytes == pytest.approx(cache.nbytes, rel=0.01)
        assert row.nbytes <= row.most_nbytes <= 1.4 * row.nbytes


def test_scales_in_float32_are_an_upper_bound(tmp_path, backends):
    """What a backend that needs them really holds is what the plan for float16 says that they would take at most."""
    wide, narrow = planned(saved(tmp_path, "llama"), "test-biased:2,test-affine:2", context=2000).rows[1:]
    assert wide.most_nbytes == wide.nbytes == narrow.most_nbytes > narrow.nbytes


POLICIES = st.builds(
    WindowPolicy, sink_length=st.integers(0, 9), residual_length=st.integers(0, 70), block=st.integers(1, 40)
)
SPANS = st.one_of(st.none(), st.integers(0, 700))


@given(policy=POLICIES, span=SPANS, prefill=st.integers(1, 900), decoded=st.integers(0, 900))
@settings(max_examples=50)
def test_no_token_is_lost(policy, span, prefill, decoded):
    """Parts add up to the tokens that came, or that are in view, and no page and no buffer is over its capacity."""
    sliding = replace(policy, span=span)
    policy = sliding if sliding.pays else policy
    held = occupancy(policy, prefill, decoded)
    tokens = held.sink + held.body + len(held.recent)
    if policy.span is None:
        assert tokens == prefill + decoded
    else:
        in_view = min(policy.span, prefill + decoded)
        assert in_view <= tokens <= in_view + policy.page_capacity(0, 0) + policy.sink_length
    assert held.body % policy.block == 0
    assert all(0 < length <= room and room % policy.block == 0 for length, room in held.pages)
    assert held.recent.stop <= held.recent.capacity


# ------------------------------------------------------------------------------------------------ what fits


@pytest.mark.parametrize(
    ("text", "decode"),
    [
        ("full", 1),
        ("reference:2:group_size=8:residual_length=32", 100),  # the windows too
        ("reference:2:group_size_key=24:residual_length=50", 0),
        ("reference:2:group_size_key=24:residual_length=50", 1),
        ("reference:2:group_size_key=24:residual_length=50", 100),
        ("reference:4:token:sink_length=3", 300),
    ],
)
def test_the_longest_context_is_the_longest(tmp_path, text, decode):
    """Every length up to it fits, at every moment between two flushes, and a block more does not."""
    shape = model_shape(saved(tmp_path, "gemma2", sliding_window=80), batch=2)
    sizes = cache_sizes(candidates(text)[-1], shape, decode, torch.device("cpu"))
    budget = 1_500_000
    longest = sizes.longest(budget)
    assert max(sizes.nbytes(tokens) for tokens in range(longest - 200, longest + 1)) <= budget
    assert max(sizes.nbytes(tokens) for tokens in range(longest + 1, longest + 50)) > budget


def test_what_does_not_grow_fits_for_ever(tmp_path):
    """Sliding windows alone; and where the weights alone are too much not one token fits."""
    name = saved(tmp_path, "mistral", sliding_window=80)
    quantized = "full,reference:2:group_size=8:residual_length=32"
    assert [row.longest for row in planned(name, quantized, memory=10**9).rows] == [None, None]
    row = planned(name, "full", memory=1000).rows[0]
    assert row.longest == 0
    assert row.left == 1000 - row.total < 0


def test_totals_add_up(tmp_path):
    """Weights, overhead and cache; what is left of the memory; how many times smaller."""
    report = planned(saved(tmp_path, "llama"), memory=10**8, overhead=12345, context=1000)
    full, two = report.rows
    assert two.total == report.settings["weights"]["nbytes"] + 12345 + two.nbytes
    assert two.left == 10**8 - two.total
    assert two.smaller == full.nbytes / two.nbytes
    assert sum(two.parts.values()) == two.nbytes
    assert full.nbytes == 4 * 2 * 2 * 1000 * 32 * 4  # layers, streams, heads, tokens, channels, bytes
    assert full.bits_per_element == 32


def test_a_curve_goes_through_the_context_range(tmp_path):
    """It rises, and a picture can be drawn of what is left after a round trip through JSON."""
    report = planned(saved(tmp_path, "llama"), "reference", memory=10**8, context=1000)
    for row in report.rows:
        tokens, sizes = zip(*row.curve, strict=True)
        assert tokens[0] <= 1000 <= tokens[-1]
        assert list(sizes) == sorted(sizes)
    assert figure.draw(report).axes[0].get_legend() is not None


# ------------------------------------------------------------------------------------------------ weights and configs


def test_weights_that_layers_share_count_once(tmp_path):
    """Tied embeddings; the type is the config's, or the one asked for."""
    apart = model_shape(saved(tmp_path / "apart", "llama", tie_word_embeddings=False, dtype="float16"))
    tied = model_shape(saved(tmp_path / "tied", "llama", tie_word_embeddings=True))
    wide = model_shape(str(tmp_path / "tied"), dtype="float64")
    assert (apart.dtype, tied.dtype, wide.dtype) == ("float16", "bfloat16", "float64")
    assert apart.weights.parameters - tied.weights.parameters == 128 * 64
    assert apart.weights.nbytes - tied.weights.nbytes == 128 * 64 * 2


@pytest.mark.parametrize(
    ("quantization", "bits", "said"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, 4.125, "4.12 bits"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}, 4.5, "4.5 bits"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": True}, 8, "8 bits"),
        ({"quant_method": "fp8"}, 8, "8 bits"),
        ({"quant_method": "quanto", "weights": "int2"}, 2, "2 bits"),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"g": {"input_activations": {"num_bits": 8}, "weights": {"num_bits": 4}}},
            },
            4,
            "4 bits",
        ),
        ({"quant_method": "mystery"}, 16, "not in how many bits"),
    ],
)
def test_quantised_weights_are_estimated_and_said_to_be(tmp_path, quantization, bits, said):
    """From the bits that the config states, for matrices within layers; or counted, and said to be that."""
    shape = model_shape(saved(tmp_path, "llama", tie_word_embeddings=True, quantization_config=quantization))
    inside = 4 * (2 * 64 * 128 + 2 * 64 * 64 + 3 * 64 * 64)  # queries and outputs, keys and values, feed-forward
    others = shape.weights.parameters - inside
    buffers = shape.weights.nbytes - int(inside * bits / 8 + 2 * others)
    assert 0 <= buffers < 300
    assert said in shape.weights.how
    assert "--weights" in shape.weights.how
    assert model_shape(str(tmp_path), weights=77).weights.nbytes == 77


def test_a_config_alone_is_enough(tmp_path):
    """A file of its own, without positions that grow with the text having to see one."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    name = saved(tmp_path, "llama", rope_parameters=rope)
    assert planned(f"{name}/config.json").settings["context"] == 512  # its positions
    assert planned(f"{name}/config.json", context=100).rows == planned(name, context=100).rows


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("t5", "it is an encoder-decoder"),
        ("vit", "transformers has no class for 'vit' that generates text"),
        ("minimax", "its forward pass without numbers, over layers of the kinds .*MiniMax"),
    ],
)
def test_models_that_cannot_be_planned(tmp_path, kind, message):
    """Each with its reason."""
    AutoConfig.for_model(kind, num_hidden_layers=2).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match=message):
        model_shape(str(tmp_path))


def test_configs_that_are_none(tmp_path):
    """No folder, no JSON, no model that could be made."""
    with pytest.raises(ModelLoadError, match="cannot load the model '/nowhere'"):
        model_shape("/nowhere")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelLoadError):
        model_shape(str(tmp_path))
    with pytest.raises(ModelLoadError, match="its config makes no model"):
        model_shape(saved(tmp_path, "llama", pad_token_id=4000))


def test_widths_of_a_backend_that_names_none():
    """All that it has with these options, or those asked for; a preset has its own."""
    labels = [candidate.label for candidate in candidates("bitsandbytes,kivi-2,reference:4")]
    assert labels == ["full", "bitsandbytes:8", "bitsandbytes:4", "kivi-2", "reference:4"]
    labels = [candidate.label for candidate in planned_candidates("hqq:group_size=32,kivi-2", (2,))]
    assert labels == ["full", "hqq:2:group_size=32", "kivi-2"]
    said = ("reference:nbits=4", "reference:nbits_key=4:nbits_value=2")
    assert [candidates(each)[1:][0].options["nbits_key" if "key" in each else "nbits"] for each in said] == [4, 4]
    assert [len(candidates(each)) for each in said] == [2, 2]  # with the full-precision one


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"text": "nothing"}, UnknownOptionError, "unknown backend 'nothing'"),
        ({"text": "bitsandbytes:2"}, UnsupportedError, "nbits=2 is not supported; supported: 4, 8"),
        ({"text": "reference:tries=3"}, UnsupportedError, "option 'tries' is unknown"),
        ({"text": "reference:2:token:group_size=24"}, UnsupportedError, "group_size=24 does not divide head_dim=32"),
        ({"text": "transformers:quanto:4"}, OptionValueError, "a backend or a preset of kvquant"),
        ({"text": "reference:4:max_cache_len=64"}, OptionValueError, "planned with a context of 64 tokens"),
        ({"context": 0}, OptionValueError, "context=0"),
        ({"context": 100, "decode": 100}, OptionValueError, "decode=100 cannot work: expected fewer tokens"),
        ({"batch": 0}, OptionValueError, "batch=0"),
        ({"device": "warp"}, OptionValueError, "device='warp'"),
    ],
)
def test_what_cannot_be_planned_is_refused(tmp_path, options, error, message):
    """With the option's name and what would work."""
    with pytest.raises(error, match=message):
        planned(saved(tmp_path, "llama"), **{"text": "reference:2", **options})


def test_equal_layers_are_worked_out_once(tmp_path):
    """Many layers cost what their kinds cost."""
    shape = model_shape(saved(tmp_path, "gemma2", num_hidden_layers=16, sliding_window=24))
    sizes = cache_sizes(candidates()[1], shape, 0, torch.device("cpu"))
    assert len(sizes.layers) == 16
    assert len({id(layer) for layer in sizes.layers}) == 2

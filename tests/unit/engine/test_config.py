"""Options: what is refused, with which words, and that a config survives being written down."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvquant.engine import packing
from kvquant.engine.config import OPTIONS, PRESETS, CacheConfig
from kvquant.engine.options import layers_text, parse_layers
from kvquant.errors import ConfigError, OptionValueError, UnknownOptionError

WIDTHS = st.sampled_from(packing.WIDTHS)
AXES = st.sampled_from(["channel", "token", 0, 1, -1])
OVERRIDES = st.dictionaries(
    st.one_of(st.integers(0, 40), st.builds(range, st.integers(0, 5), st.integers(6, 20), st.integers(1, 3))),
    st.fixed_dictionaries({}, optional={"nbits": WIDTHS, "axis_key": AXES, "residual_length": st.integers(0, 99)}),
    max_size=4,
)
CONFIGS = st.builds(
    CacheConfig,
    backend=st.sampled_from(["reference", "hqq"]),
    nbits=WIDTHS,
    nbits_key=st.none() | WIDTHS,
    axis_key=AXES,
    axis_value=AXES,
    group_size=st.none() | st.integers(1, 256),
    residual_length=st.integers(0, 999),
    sink_length=st.integers(0, 9),
    compute_dtype=st.sampled_from([None, "float32", torch.bfloat16]),
    device=st.sampled_from([None, "cpu", "cuda:1"]),
    layers=OVERRIDES,
    skip_layers=st.lists(st.integers(-5, 40), max_size=3),
    check_finite=st.booleans(),
    options=st.dictionaries(st.sampled_from(["a", "b"]), st.integers() | st.text(max_size=3), max_size=2),
)


@given(config=CONFIGS)
def test_a_config_survives_dict_json_and_yaml(config):
    """Written down and read back, it is the same config."""
    assert CacheConfig.from_dict(config.to_dict()) == config
    assert CacheConfig.from_json(config.to_json()) == config
    assert CacheConfig.from_yaml(config.to_yaml()) == config


@pytest.mark.parametrize("suffix", ["json", "yaml", "yml"])
def test_a_config_survives_a_file(tmp_path, suffix):
    """The suffix says how the file is written."""
    config = CacheConfig(nbits=2, layers={range(2, 6): {"nbits": 8}})
    path = tmp_path / f"cache.{suffix}"
    path.write_text(config.to_json() if suffix == "json" else config.to_yaml())
    assert CacheConfig.from_file(path) == config


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "nowhere.yaml",
            r"config='.*nowhere\.yaml' cannot work: expected a \.json, \.yaml or \.yml file .*No such file",
        ),
        (".", "config=.* cannot work: expected a .json"),
    ],
)
def test_a_file_that_cannot_be_read_is_an_option_that_cannot_work(tmp_path, name, message):
    """With what the system says."""
    with pytest.raises(OptionValueError, match=message):
        CacheConfig.from_file(tmp_path / name)


def test_a_preset_in_the_place_of_a_file_is_told_where_it_goes():
    """People mix them up."""
    with pytest.raises(OptionValueError, match=r"the preset is QuantizedCache\.from_preset\('small'\)"):
        CacheConfig.from_file("small")


@pytest.mark.parametrize(
    ("read", "text"),
    [
        (CacheConfig.from_json, "{nbits: 2"),
        (CacheConfig.from_yaml, "nbits: [2"),
        (CacheConfig.from_json, "[1]"),
        (CacheConfig.from_yaml, "just words"),
    ],
)
def test_text_that_is_no_config_is_refused(read, text):
    """As an option would be, with what the parser says."""
    with pytest.raises(OptionValueError, match=r"the (JSON|YAML) text="):
        read(text)


def test_a_config_holds_plain_builtins():
    """What is written to a file needs nothing of kvquant to be read."""
    assert json.loads(CacheConfig(compute_dtype=torch.float16).to_json())["compute_dtype"] == "float16"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nbits": 5}, "nbits=5 cannot work: expected one of 1, 1.5, 2, 2.5, 3, 3.5, 4, 8."),
        ({"nbits": 4.0}, "nbits=4.0 cannot work: expected one of 1, 1.5, 2, 2.5, 3, 3.5, 4, 8."),
        ({"nbits": "4"}, "nbits='4' cannot work: expected one of 1, 1.5, 2, 2.5, 3, 3.5, 4, 8."),
        ({"nbits": True}, "nbits=True cannot work: expected one of 1, 1.5, 2, 2.5, 3, 3.5, 4, 8."),
        ({"nbits_key": 16}, "nbits_key=16 cannot work: expected one of 1, 1.5, 2, 2.5, 3, 3.5, 4, 8."),
        ({"group_size": 0}, "group_size=0 cannot work: expected a whole number above 0, or None to have it chosen."),
        ({"group_size_value": -8}, "group_size_value=-8 cannot work"),
        ({"residual_length": -1}, "residual_length=-1 cannot work: expected a whole number of tokens, 0 or more."),
        ({"sink_length": 1.5}, "sink_length=1.5 cannot work: expected a whole number of tokens, 0 or more."),
        ({"outlier_share": 0.6}, "outlier_share=0.6 cannot work: expected a share of the tokens, from 0 to 0.5."),
        ({"outlier_share": -0.1}, "outlier_share=-0.1 cannot work: expected a share of the tokens, from 0 to 0.5."),
        ({"outlier_share": True}, "outlier_share=True cannot work: expected a share of the tokens, from 0 to 0.5."),
        ({"layers": {3: {"outlier_share": "1%"}}}, "layers['3'].outlier_share='1%' cannot work: expected a share"),
        ({"axis_key": "tokens"}, "axis_key='tokens' cannot work: expected 'channel' or 'token', or an integer axis"),
        ({"axis_value": 2}, "axis_value=2 cannot work: expected 'channel' or 'token', or an integer axis"),
        ({"backend": ""}, "backend='' cannot work: expected the name of a backend."),
        ({"compute_dtype": "int8"}, "compute_dtype='int8' cannot work: expected one of float32, float16, bfloat16"),
        ({"device": "gpu"}, "device='gpu' cannot work: expected a torch device such as 'cpu' or 'cuda:0'."),
        ({"check_finite": "no"}, "check_finite='no' cannot work: expected True or False."),
        ({"skip_layers": "last"}, "skip_layers='last' cannot work: expected layer numbers, such as [0, 1]."),
        ({"options": [1]}, "options=[1] cannot work: expected a mapping of names to values."),
        ({"layers": {-1: {"nbits": 8}}}, "layers=-1 cannot work: expected layer numbers from 0"),
        ({"layers": {"2:6": {"nbits": 8}}}, "layers='2:6' cannot work: expected layer numbers from 0"),
        ({"layers": {0: 8}}, "layers['0']=8 cannot work: expected a mapping of options"),
        (
            {"layers": {0: {"nbits": 7}}},
            "layers['0'].nbits=7 cannot work: expected one of 1, 1.5, 2, 2.5, 3, 3.5, 4, 8.",
        ),
        ({"layers": [1]}, "layers=[1] cannot work: expected a mapping such as"),
    ],
)
def test_values_that_can_never_work_are_refused(options, message):
    """The message names the option, the value and what would work."""
    with pytest.raises(OptionValueError) as caught:
        CacheConfig.from_dict(options)
    assert message in str(caught.value)
    assert isinstance(caught.value, ValueError)


def test_an_unknown_option_is_refused_with_the_closest_one():
    """A misspelt option gets its neighbour and the whole list."""
    with pytest.raises(UnknownOptionError) as caught:
        CacheConfig.from_dict({"residual_lenght": 3})
    assert str(caught.value) == (
        f"unknown option 'residual_lenght'. Did you mean 'residual_length'? Known options: {', '.join(OPTIONS)}."
    )
    assert (caught.value.kind, caught.value.name) == ("option", "residual_lenght")


def test_an_option_that_layers_do_not_have_is_refused():
    """The device is the cache's, not a layer's."""
    with pytest.raises(UnknownOptionError, match="unknown option 'device'"):
        CacheConfig(layers={0: {"device": "cpu"}})


def test_an_unknown_preset_is_refused_with_the_list():
    """A misspelt preset gets its neighbour."""
    with pytest.raises(UnknownOptionError) as caught:
        CacheConfig.from_preset("kivi2")
    assert str(caught.value) == (
        f"unknown preset 'kivi2'. Did you mean 'kivi-2' or 'kivi-4'? Known presets: {', '.join(PRESETS)}."
    )


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_a_config(preset):
    """And its options can be overridden."""
    assert CacheConfig.from_preset(preset).nbits == PRESETS[preset]["nbits"]
    assert CacheConfig.from_preset(preset, residual_length=7).residual_length == 7


def test_what_is_said_of_both_streams_beats_what_a_preset_says_of_one():
    """And another backend has none of the preset's own options."""
    small = CacheConfig.from_preset("small", nbits=4)
    assert (small.nbits, small.nbits_key, small.nbits_value) == (4, None, None)
    assert CacheConfig.from_preset("small", backend="lloydmax").options == {}
    assert CacheConfig.from_preset("small", nbits_value=1).nbits_key == 3


def test_transformers_name_for_the_group_size_is_accepted():
    """`q_group_size` means `group_size`, in a layer's options too."""
    config = CacheConfig.from_dict({"q_group_size": 32, "layers": {1: {"q_group_size": 16}}})
    assert config.group_size == 32
    assert config.layer_options(1)["group_size"] == 16


def test_an_option_and_its_alias_together_are_refused():
    """Two values for one thing cannot both be honoured."""
    with pytest.raises(OptionValueError, match="only one of group_size, q_group_size"):
        CacheConfig.from_dict({"group_size": 32, "q_group_size": 64})


def test_later_layer_entries_win_and_general_beats_one_stream():
    """A layer's own nbits beats the cache's nbits_key; a layer named twice takes the later value."""
    config = CacheConfig(nbits=2, nbits_key=3, layers={range(4): {"nbits": 4}, 1: {"nbits_value": 8}})
    first, second, other = (config.layer_options(layer) for layer in (0, 1, 5))
    assert (first["nbits"], first["nbits_key"], first["nbits_value"]) == (4, None, None)
    assert (second["nbits"], second["nbits_value"]) == (4, 8)
    assert (other["nbits"], other["nbits_key"]) == (2, 3)


def test_a_layer_named_again_takes_the_later_value():
    """Also where an entry between them named it too."""
    config = CacheConfig(layers={0: {"nbits": 8}, range(2): {"nbits": 2}, "0": {"nbits": 4}})
    assert [config.layer_options(layer)["nbits"] for layer in (0, 1)] == [4, 2]


def test_options_of_a_backend_do_not_reach_another_one():
    """A layer that names its own backend starts without the cache's backend options."""
    config = CacheConfig(backend="hqq", options={"optimize": False}, layers={0: {"backend": "reference"}})
    assert config.layer_options(0)["options"] == {}
    assert config.layer_options(1)["options"] == {"optimize": False}


@given(layers=st.lists(st.integers(0, 99), min_size=1, max_size=6, unique=True))
def test_layers_survive_being_written_down(layers):
    """Any layers, in text and back."""
    assert parse_layers(layers_text(tuple(layers))) == tuple(layers)


@pytest.mark.parametrize(("count", "fine"), [(4, True), (3, False)])
def test_layers_that_the_model_lacks_are_refused(count, fine):
    """Layer 3 exists in a model of four layers, not in one of three."""
    for config in (CacheConfig(layers={3: {"nbits": 8}}), CacheConfig(skip_layers=(3,))):
        if fine:
            config.check_layer_count(count)
        else:
            with pytest.raises(OptionValueError, match="from 0 to 2"):
                config.check_layer_count(count)


def test_negative_skip_layers_count_from_the_last():
    """They need the number of layers, and say so without it."""
    config = CacheConfig(skip_layers=(-1,))
    assert config.skips(3, 4)
    assert not config.skips(0, 4)
    with pytest.raises(OptionValueError, match=r"config=model.config to count from the last"):
        config.skips(0)


def test_every_refusal_is_one_family():
    """Code that wants them all catches ConfigError."""
    assert issubclass(OptionValueError, ConfigError)
    assert issubclass(UnknownOptionError, ConfigError)

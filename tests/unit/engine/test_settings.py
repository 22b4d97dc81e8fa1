"""What a layer does, decided from options, backend and model."""

from dataclasses import replace

import pytest
import torch

from kvquant.engine.config import CacheConfig
from kvquant.engine.settings import compute_dtype, layer_settings
from kvquant.errors import BackendFactoryError, UnsupportedError
from tests.support import MinMax


def settings_for(**options):
    return layer_settings(CacheConfig.from_dict(options), 0)


def test_keys_and_values_take_their_own_options():
    """One-stream options beat general ones."""
    settings = settings_for(nbits=4, nbits_value=2, group_size=32, group_size_key=16, axis_key="token")
    key, value = settings.key.scheme(64), settings.value.scheme(64)
    assert (key.nbits, key.axis, key.group_size) == (4, "token", 16)
    assert (value.nbits, value.axis, value.group_size) == (2, "token", 32)


@pytest.mark.parametrize(
    ("head_dim", "group_size"), [(64, 64), (128, 64), (80, 40), (96, 48), (112, 56), (32, 32), (256, 64)]
)
def test_the_default_group_fits_the_head(head_dim, group_size):
    """64, or the largest below it that divides head_dim where a group lies within a token."""
    settings = settings_for()
    assert settings.value.scheme(head_dim).group_size == group_size
    assert settings.key.scheme(head_dim).group_size == 64


def test_a_group_that_does_not_divide_the_head_is_refused_with_those_that_do():
    """The message lists what would work."""
    settings = settings_for(axis_key="token", group_size=48)
    with pytest.raises(UnsupportedError) as caught:
        settings.key.scheme(64)
    assert str(caught.value) == (
        "backend 'reference' cannot be used for key states of layer 0: group_size=48 does not divide head_dim=64; "
        "those that do: 1, 2, 4, 8, 16, 32, 64."
    )


def test_a_mixed_width_is_two_quantizers_for_one_backend():
    """The first half of the channels takes the width above; a backend sees whole widths only."""
    settings = settings_for(nbits=2.5)
    scheme = settings.key.scheme(64)
    assert [(each.nbits, quantizer.scheme) for each, quantizer in settings.key.quantizers(scheme)] == [
        (nbits, replace(scheme, nbits=nbits)) for nbits in (3, 2)
    ]


@pytest.mark.parametrize(("head_dim", "group_size"), [(128, 64), (64, 32), (80, 40), (6, 3)])
def test_the_default_group_fits_half_of_the_head_where_widths_are_mixed(head_dim, group_size):
    """On the token axis; on the channel axis any does."""
    settings = settings_for(nbits=3.5)
    assert settings.value.scheme(head_dim).group_size == group_size
    assert settings.key.scheme(head_dim).group_size == 64


@pytest.mark.parametrize(
    ("nbits", "options", "head_dim", "reason"),
    [
        (2.5, {"nbits": (2, 4)}, None, "nbits=2.5 is a mix of 3 and 2 bits; supported: 2, 4"),
        (
            1.5,
            {"nbits": (1, 2), "formats": ("opaque",)},
            None,
            "nbits=1.5 is a mix of two widths, which the format opaque does not have; supported: 1, 2",
        ),
        (
            2.5,
            {"nbits": (1, 2, 3), "formats": ("trellis",)},
            None,
            "nbits=2.5 is a mix of two widths, which the format trellis does not have; supported: 1, 2, 3",
        ),
        (2.5, {"axes": ("token",)}, None, "axis='channel' is not supported; supported: token"),
        (
            3.5,
            {},
            64,
            "group_size=64 does not divide half of head_dim=64 (nbits=3.5 has two widths); those that do: 1, 2, 4, 8",
        ),
        (3.5, {"group_sizes": (64, 128)}, 256, None),
        (2.5, {}, 65, "nbits=2.5 needs an even head_dim, and it is 65."),
        (2.5, {}, 1, "nbits=2.5 needs an even head_dim, and it is 1."),
    ],
)
def test_a_mix_that_cannot_be_is_refused_with_what_can(backend, nbits, options, head_dim, reason):
    """At construction, or with the first states where it depends on head_dim."""
    name = backend(MinMax, **{"nbits": (1, 2, 3, 4, 8), **options})

    def decide():
        settings = settings_for(backend=name, nbits=nbits, group_size=64)
        if head_dim is not None:
            settings.value.scheme(head_dim)

    if reason is None:
        decide()
        return
    with pytest.raises(UnsupportedError) as caught:
        decide()
    assert reason in str(caught.value)


def test_the_default_group_is_one_that_the_backend_has(backend):
    """A backend with its own group sizes gets one of them."""
    name = backend(MinMax, group_sizes=(16, 32, 128))
    settings = settings_for(backend=name)
    assert settings.key.scheme(64).group_size == 32
    assert settings.value.scheme(48).group_size == 16
    with pytest.raises(UnsupportedError, match=r"none of its group sizes \(16, 32, 128\) divides head_dim=20"):
        settings.value.scheme(20)


@pytest.mark.parametrize(
    ("capabilities", "options", "reason"),
    [
        ({"nbits": (2, 4)}, {"nbits": 3}, "nbits=3 is not supported; supported: 2, 4"),
        ({"axes": ("token",)}, {}, "axis='channel' is not supported; supported: token"),
        ({"group_sizes": (64,)}, {"group_size": 32}, "group_size=32 is not supported; supported: 64"),
        (
            {"dtypes": ("float32",)},
            {"compute_dtype": "bfloat16"},
            "dtype='bfloat16' is not supported; supported: float32",
        ),
        ({}, {"options": {"speed": 9}}, "option 'speed' is unknown to this backend; known: none"),
        ({}, {"axis_key": 0}, "axis_key=0 is not an integer axis of it; it has: none"),
        ({"axis_aliases": {1: "token"}}, {"axis_key": 0}, "axis_key=0 is not an integer axis of it; it has: 1 (token)"),
    ],
)
def test_what_a_backend_lacks_is_refused_with_what_it_has(backend, capabilities, options, reason):
    """At construction, before there is anything to lose."""
    name = backend(MinMax, **capabilities)
    with pytest.raises(UnsupportedError) as caught:
        settings_for(backend=name, **options)
    assert reason in str(caught.value)
    assert f"backend '{name}' cannot be used" in str(caught.value)


def test_a_backends_integer_axes_mean_what_it_says(backend):
    """transformers' integers are translated by the backend's own table."""
    name = backend(MinMax, axis_aliases={0: "token", -1: "channel"})
    settings = settings_for(backend=name, axis_key=-1, axis_value=0)
    assert (settings.key.axis, settings.value.axis) == ("channel", "token")


@pytest.mark.parametrize(
    ("states", "chosen"),
    [(torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float64, torch.float64)],
)
def test_groups_are_computed_in_float32_unless_states_are_finer(states, chosen):
    """And in what the user asks for, if the user asks."""
    assert compute_dtype(CacheConfig(), states) == chosen
    assert compute_dtype(CacheConfig(compute_dtype="bfloat16"), states) == torch.bfloat16


def test_a_value_that_a_backend_refuses_is_refused_at_construction(backend):
    """Only the backend's factory can judge the values of its options, so it is asked before the first states come."""

    class Picky(MinMax):
        def __init__(self, scheme):
            super().__init__(scheme)
            if scheme.options.get("tries", 1) not in range(10):
                raise ValueError(f"tries={scheme.options['tries']!r} cannot work: expected a number from 0 to 9")

    name = backend(Picky, options={"tries": "how often to try"})
    settings_for(backend=name, options={"tries": 9})
    with pytest.raises(BackendFactoryError, match="tries='many' cannot work: expected a number from 0 to 9"):
        settings_for(backend=name, options={"tries": "many"})


@pytest.mark.parametrize(("nbits", "low"), [(1, True), (2, True), (3, True), (3.5, True), (4, False), (8, False)])
def test_few_bits_are_smoothed_and_their_scales_are_bytes(nbits, low):
    """Each stream by its own width."""
    settings = settings_for(nbits=4, nbits_value=nbits)
    assert (settings.value.smooths, settings.value.scale_bits) == (low, 8 if low else 16)
    assert (settings.key.smooths, settings.key.scale_bits) == (False, 16)


@pytest.mark.parametrize(("backend", "axis"), [("reference", "token"), ("quanto", 0), ("hqq", 1)])
def test_keys_on_the_token_axis_are_smoothed_at_any_width(backend, axis):
    """Outlier channels spoil a scale that channels share; values, which have none, are not."""
    settings = settings_for(backend=backend, nbits=8, axis_key=axis, axis_value=axis)
    assert (settings.key.smooths, settings.value.smooths) == (True, False)
    assert settings.key.scale_bits == 16


def test_what_is_said_of_smoothing_and_scales_holds_at_any_width():
    """None, where a layer takes back what is said of all, is as if nothing had been said."""
    plain = {"smoothing_key": False, "smoothing_value": False, "scale_bits": 16}
    for stream in (settings_for(nbits=2, **plain).key, settings_for(nbits=2, **plain).value):
        assert (stream.smooths, stream.scale_bits) == (False, 16)
    key = settings_for(nbits=8, smoothing_key=True, scale_bits=8).key
    assert (key.smooths, key.scale_bits) == (True, 8)
    back = settings_for(nbits=2, **plain, layers={0: dict.fromkeys(plain)}).key
    assert (back.smooths, back.scale_bits) == (True, 8)


def test_the_paper_s_presets_are_the_paper_s():
    """Whatever the defaults of few bits are, and with another width too."""
    for options in ({}, {"nbits": 2}):
        config = CacheConfig.from_preset("kivi-4", **options)
        stream = layer_settings(config).key
        assert (stream.smooths, stream.scale_bits, stream.options) == (False, 16, {"scale": "range"})

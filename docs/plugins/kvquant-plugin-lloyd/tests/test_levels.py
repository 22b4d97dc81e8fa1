"""The levels: those of the literature, though none is written down in this project."""

import pytest

from kvquant_plugin_lloyd.levels import distortion, normal_levels


@pytest.mark.parametrize(
    ("nbits", "published"),
    [
        (1, [0.7980]),
        (2, [0.4528, 1.510]),
        (3, [0.2451, 0.7560, 1.344, 2.152]),
        (4, [0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733]),
    ],
)
def test_levels_are_those_of_max(nbits, published):
    """Max 1960, table I, to its digits; and the levels below zero mirror those above."""
    levels = normal_levels(nbits)
    assert levels[2 ** (nbits - 1) :] == pytest.approx(published, rel=6e-4)
    assert levels == tuple(-level for level in reversed(levels))


@pytest.mark.parametrize(("nbits", "published"), [(1, 0.3634), (2, 0.1175), (3, 0.03454), (4, 0.009497)])
def test_distortion_is_that_of_max(nbits, published):
    """Max 1960, table I; its last digits were computed by hand."""
    assert distortion(nbits) == pytest.approx(published, rel=1e-3)

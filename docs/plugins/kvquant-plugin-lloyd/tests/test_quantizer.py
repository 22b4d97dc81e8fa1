"""The quantiser: as good as theory allows, and what choosing the scale brings."""

import pytest
import torch
from kvquant.plugin import Scheme

from kvquant_plugin_lloyd.levels import distortion
from kvquant_plugin_lloyd.quantizer import LloydQuantizer


def normal(n_groups, group_size):
    """Return unit normal numbers ``[n_groups, group_size]``."""
    return torch.randn(n_groups, group_size, generator=torch.Generator().manual_seed(0))


def errors(rows, nbits, **options):
    """Return each row's mean squared error, ``[n_groups]``."""
    result = LloydQuantizer(Scheme(nbits, "token", rows.shape[1], options)).quantize(rows)
    return (result.table[result.codes.long()] * result.scale[:, None] - rows).square().mean(dim=1)


@pytest.mark.parametrize("nbits", [1, 2, 3, 4])
@pytest.mark.parametrize("scale", ["rms", "fit"])
def test_the_error_on_normal_numbers_is_the_smallest_there_is(nbits, scale):
    """The distortion of the literature, in long rows, whatever their magnitude."""
    rows = normal(64, 4096) * 30
    assert errors(rows, nbits, scale=scale).mean() / 900 == pytest.approx(distortion(nbits), rel=0.03)


@pytest.mark.parametrize("nbits", [1, 2, 3, 4])
def test_fitting_the_scale_lowers_the_error_of_short_rows(nbits):
    """On average, beside the root mean square."""
    rows = normal(2000, 32)
    assert errors(rows, nbits, scale="fit").mean() < errors(rows, nbits, scale="rms").mean()


def test_an_outlier_is_not_cut_off():
    """The root mean square would leave most of it out."""
    rows = normal(100, 64)
    rows[:, 5] = 1000
    assert (errors(rows, 4) < 0.5 * errors(rows, 4, scale="rms")).all()


@pytest.mark.parametrize("scale", ["max", "", 1, None, True])
def test_nonsense_is_refused(scale):
    """By the factory, with the option and what would work."""
    with pytest.raises(ValueError, match=r"scale=.* cannot work: expected 'fit' or 'rms'"):
        LloydQuantizer(Scheme(4, "token", 64, {"scale": scale}))

"""Regions against scipy's, and pictures that repeat by construction."""

import numpy as np
import pytest
import torch
from atlasvid.engine.quality.repetition import (
    autocorrelation,
    count_objects,
    label_regions,
    region_areas,
    self_similarity,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from textures import pink_noise


def reference(mask):
    labels, _ = ndimage.label(mask.numpy(), structure=np.ones((3, 3)))
    return torch.from_numpy(labels).long()


@settings(deadline=None)
@given(st.integers(0, 25), st.integers(0, 25), st.floats(0.1, 0.9), st.integers(0, 999))
def test_regions_are_those_that_scipy_finds(height, width, share, seed):
    mask = torch.rand(height, width, generator=torch.Generator().manual_seed(seed)) < share
    assert torch.equal(label_regions(mask), reference(mask))


def test_a_long_winding_region_is_one():
    y, x = torch.meshgrid(torch.arange(301), torch.arange(300), indexing="ij")
    comb = (x % 2 == 0) | ((y == 0) & (x % 4 < 3)) | ((y == 300) & (x % 4 != 1))
    assert torch.equal(label_regions(comb), reference(comb))
    assert count_objects(comb) == 1


def test_a_copied_object_is_counted_twice_and_a_speck_is_not():
    y, x = torch.meshgrid(torch.arange(101), torch.arange(203), indexing="ij")
    one = (y - 40) ** 2 + (x - 50) ** 2 < 20**2
    two = one | one.roll(96, 1)
    speck = two.clone()
    speck[90:93, 5:8] = True
    assert count_objects(one) == 1
    assert count_objects(two) == 2
    assert count_objects(speck) == 3
    assert count_objects(speck, minimal_area=10) == 2
    assert region_areas(label_regions(speck)).tolist() == [int(one.sum())] * 2 + [9]
    assert count_objects(torch.zeros(5, 7, dtype=torch.bool)) == 0


def test_autocorrelation_is_the_mean_product_of_what_overlaps():
    picture = torch.rand(7, 10, generator=torch.Generator().manual_seed(0)).double()
    x = picture - picture.mean()
    found = autocorrelation(picture)
    assert found.shape == (4, 6)
    for dy, dx in np.ndindex(4, 6):
        product = (x[dy:, dx:] * x[: 7 - dy, : 10 - dx]).mean()
        assert float(found[dy, dx]) == pytest.approx(float(product / x.square().mean()))


@pytest.mark.parametrize("shape", [(256, 512), (250, 501)])
def test_a_picture_that_repeats_every_window_is_found_and_no_other(shape):
    tile = pink_noise(64, 64, seed=1).repeat(5, 9, 1)[: shape[0], : shape[1]]
    plain = [pink_noise(*shape, seed=seed) for seed in range(5)]
    assert self_similarity(tile, (64, 64)) > 0.97
    assert all(abs(self_similarity(p, (64, 64))) < 0.08 for p in plain)
    assert 0.4 < self_similarity((tile + plain[0]) / 2, (64, 64)) < 0.8
    assert self_similarity(tile, (56, 56)) < 0.4  # 8 pixels beside the period it is smooth


def test_repetition_in_one_direction_is_found():
    column = pink_noise(512, 64, seed=3).repeat(1, 8, 1)
    assert self_similarity(column, (64, 64)) > 0.85
    assert self_similarity(column[:, :100], (64, 64)) < 0.3


def test_stripes_are_alike_everywhere_and_do_not_repeat():
    """A horizon: a picture that does not change from left to right."""
    stripes = pink_noise(256, 1, seed=2).expand(256, 512, 3)
    noisy = stripes + 0.1 * pink_noise(256, 512, seed=4)
    assert self_similarity(noisy, (64, 64)) < 0.25


def test_a_window_that_cannot_repeat_or_a_mask_of_numbers_is_refused():
    with pytest.raises(ValueError, match="half the frame"):
        self_similarity(torch.rand(64, 64, 3), (48, 48))
    with pytest.raises(ValueError, match="expected is boolean"):
        label_regions(torch.zeros(4, 4))

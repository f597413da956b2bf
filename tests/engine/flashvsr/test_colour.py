"""Colour corrections against their definitions in double precision."""

import flashvsr_reference as reference
import pytest
import torch
from atlasvid.engine.flashvsr.colour import METHODS, colour_method, low_frequencies


def frames(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    level = torch.randn(shape[0], 3, 1, 1, generator=generator) * 0.2
    return torch.randn(shape, generator=generator) * 0.4 + level


@pytest.mark.parametrize("name", ["adain", "wavelet"])
@pytest.mark.parametrize("size", [(33, 70), (1, 9), (24, 24)])
def test_equals_the_definition(name, size):
    given, wanted = frames(3, 3, *size, seed=1), frames(3, 3, *size, seed=2)
    result = METHODS[name](given, wanted)
    assert result.dtype == torch.float32
    assert (result - getattr(reference, name)(given, wanted)).abs().max() < 1e-5
    assert result.abs().max() <= 1


def test_a_nearly_flat_frame_is_lifted_by_its_biased_variance():
    given, wanted = frames(1, 3, 1, 9, seed=1) * 0.01, frames(1, 3, 1, 9, seed=2)
    result = METHODS["adain"](given, wanted)
    assert (result - reference.adain(given, wanted)).abs().max() < 1e-4


@pytest.mark.parametrize("name", METHODS)
def test_frames_do_not_depend_on_each_other(name):
    given, wanted = frames(4, 3, 20, 30, seed=1), frames(4, 3, 20, 30, seed=2)
    whole = METHODS[name](given, wanted)
    for i in range(4):
        alone = METHODS[name](given[i : i + 1], wanted[i : i + 1])
        torch.testing.assert_close(whole[i : i + 1], alone, atol=1e-6, rtol=0)


def test_a_frame_of_one_colour_takes_the_references():
    grey, wanted = torch.full((1, 3, 8, 8), 0.3), frames(1, 3, 8, 8, seed=3).clamp(-0.9, 0.9)
    result = METHODS["adain"](grey, wanted)
    assert (result.mean((-2, -1)) - wanted.mean((-2, -1))).abs().max() < 1e-5


def test_low_frequencies_of_a_plane_are_the_plane():
    flat = torch.full((1, 3, 5, 70), -0.25)
    assert torch.equal(low_frequencies(flat), flat)


def test_off_changes_nothing():
    given = frames(1, 3, 8, 8, seed=3) * 4
    assert torch.equal(METHODS["off"](given, given * 0), given)


def test_other_names_are_refused():
    with pytest.raises(ValueError, match="colour is 'hist'; allowed are adain, wavelet, off"):
        colour_method("hist")

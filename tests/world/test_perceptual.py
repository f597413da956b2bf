"""The outside judge on pictures whose order is known."""

import numpy as np
import pytest
import torch.nn.functional as F
from torch import Tensor
from world import perceptual
from world.scenes import View, random_scene, render


@pytest.fixture(scope="module")
def metric():
    return perceptual.load()


@pytest.fixture(scope="module")
def truth() -> Tensor:
    """One frame of the world [1, 256, 384, 3] in 0..1."""
    scene = random_scene(np.random.default_rng(3))
    return render(scene, View(384, 256), np.array([1.0])).movedim(0, -1)


def up_scaled(video: Tensor, times: int) -> Tensor:
    """What is left of it at a smaller size."""
    frames = video.movedim(-1, 1)
    small = F.interpolate(frames, scale_factor=1 / times, mode="area")
    return F.interpolate(small, size=frames.shape[-2:], mode="bicubic").movedim(1, -1).clamp(0, 1)


def test_equal_frames_are_at_distance_zero(metric, truth):
    assert perceptual.distance(metric, truth, truth) == 0


def test_the_less_is_left_the_further_away(metric, truth):
    distances = [perceptual.distance(metric, up_scaled(truth, n), truth) for n in (2, 4, 8)]
    assert 0.005 < distances[0] < distances[1] < distances[2]


def test_a_shift_of_a_pixel_is_less_than_a_loss_of_detail(metric, truth):
    """Which squared errors see the other way round."""
    shifted, blurred = truth.roll(1, dims=2), up_scaled(truth, 2)
    assert (shifted - truth).square().mean() > (blurred - truth).square().mean()
    found = [perceptual.distance(metric, video, truth) for video in (shifted, blurred)]
    assert found[0] < 0.5 * found[1]

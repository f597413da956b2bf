import math

import pytest
import torch
from atlasvid.engine.quality.motion import SpeedScore, centroids, velocity, velocity_of_flow
from hypothesis import given, settings
from hypothesis import strategies as st

speeds = st.floats(-4, 4)


def discs(frames, height, width, start, speed, radius=6.0):
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack(
        [
            (x - start[0] - speed[0] * t) ** 2 + (y - start[1] - speed[1] * t) ** 2 < radius**2
            for t in range(frames)
        ]
    )


@settings(deadline=None)
@given(speeds, speeds)
def test_a_disc_has_the_speed_at_which_it_was_moved(x, y):
    found = velocity(centroids(discs(9, 97, 95, (47, 48), (x, y))))
    assert found == pytest.approx((x, y), abs=0.06)


def test_frames_in_which_it_leaves_or_is_missing_do_not_count():
    masks = discs(24, 60, 81, (30, 30), (3.0, 0.5))
    masks[4] = False
    places = centroids(masks)
    assert places.isnan().any(1).tolist() == [i == 4 or i > 14 for i in range(24)]
    assert velocity(places) == pytest.approx((3.0, 0.5), abs=0.03)


def test_wrong_positions_do_not_matter():
    places = torch.arange(20)[:, None] * torch.tensor([2.0, -1.0])
    places[[0, 1, 2, 5]] += torch.tensor([50.0, 90.0])
    assert velocity(places) == pytest.approx((2.0, -1.0), abs=0.01)


def test_speed_of_flow_is_that_inside_the_mask():
    masks = discs(5, 40, 50, (20, 20), (1.0, 0.0))
    flows = torch.zeros(4, 40, 50, 2)
    flows[masks[:-1]] = torch.tensor([1.0, 0.25])
    flows[:, 18:20, 18:22] = 40.0
    masks[2] = False
    assert velocity_of_flow(flows, masks[:-1]) == (1.0, 0.25)


def test_a_speed_is_compared_along_the_expected_direction():
    right = SpeedScore((3.0, 4.0), (3.0, 4.0))
    slow = SpeedScore((0.75, 1.0), (3.0, 4.0))
    aside = SpeedScore((4.0, -3.0), (3.0, 4.0))
    assert (right.ratio, right.error) == (1, 0)
    assert (slow.ratio, slow.error) == pytest.approx((0.25, 3.75))
    assert (aside.ratio, aside.error) == pytest.approx((0, 50**0.5))
    assert math.isnan(SpeedScore((1.0, 0.0), (0.0, 0.0)).ratio)


def test_what_has_no_speed_is_refused():
    with pytest.raises(ValueError, match="in 1 frames; a speed needs at least 2"):
        velocity(centroids(discs(1, 30, 30, (15, 15), (0, 0))))
    with pytest.raises(ValueError, match="No mask has a pixel"):
        velocity_of_flow(torch.zeros(2, 5, 5, 2), torch.zeros(2, 5, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="expected are"):
        velocity_of_flow(torch.zeros(2, 5, 5, 2), torch.zeros(3, 5, 5, dtype=torch.bool))

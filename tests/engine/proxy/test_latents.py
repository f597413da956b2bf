import torch
import torch.nn.functional as F
from atlasvid.engine.geometry.grid import Grid
from atlasvid.engine.proxy.latents import shrink_condition, temporal_index, upscale_proxy
from wan import plan_of, rand


def test_time_is_the_inverse_of_the_aligned_positions():
    stride, guide = 4, 5
    index = temporal_index(stride * (guide - 1) + 1, stride)
    positions = [0.0] + [stride * k - 0.375 * (stride - 1) for k in range(1, guide)]
    for f, value in enumerate(index):
        k = int(value)
        if k == guide - 1:
            assert f >= positions[-1]
            continue
        share = (f - positions[k]) / (positions[k + 1] - positions[k])
        assert abs(float(value) - k - share) < 1e-5


def test_space_is_bicubic_and_stride_one_keeps_time():
    plan = plan_of((3, 12, 20), (3, 6, 10), stride=1)
    proxy = rand(2, 16, 3, 6, 10)
    out = upscale_proxy(proxy, plan)
    assert out.shape == (2, 16, 3, 12, 20)
    for f in range(3):
        expected = F.interpolate(proxy[:, :, f], size=(12, 20), mode="bicubic")
        assert torch.allclose(out[:, :, f], expected, atol=1e-6)


def test_a_ramp_in_time_stays_on_the_aligned_positions():
    plan = plan_of((9, 4, 4), (3, 2, 2), stride=4)
    proxy = torch.tensor([0.0, 2.875, 6.875]).view(1, 1, 3, 1, 1).expand(1, 16, 3, 2, 2)
    out = upscale_proxy(proxy.contiguous(), plan)[0, 0, :, 0, 0]
    assert torch.allclose(out, torch.arange(9.0).clamp(max=6.875), atol=1e-5)


def test_one_frame():
    plan = plan_of((1, 4, 4), (1, 2, 2), stride=4)
    assert upscale_proxy(rand(1, 16, 1, 2, 2), plan).shape == (1, 16, 1, 4, 4)


def test_conditions_shrink_to_means_of_aligned_frames():
    condition = rand(1, 20, 9, 8, 8)
    small = shrink_condition(condition, Grid(3, 4, 4), 4)
    expected = condition[:, :, [0, 3, 7]].unflatten(3, (4, 2)).unflatten(5, (4, 2)).mean((4, 6))
    assert torch.allclose(small, expected, atol=1e-6)

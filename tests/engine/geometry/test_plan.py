import pytest
from atlasvid.engine.geometry.grid import Grid
from atlasvid.engine.geometry.plan import make_plan
from atlasvid.engine.geometry.space import LatentSpace
from wan import WAN21

WAN22 = LatentSpace(channels=48, spatial=16, temporal=4, patch=(1, 2, 2))


def make(width=3840, height=2160, seconds=10.0, fps=16.0, short=480, stride=4, space=WAN21):
    return make_plan(space, width, height, seconds, fps, short, stride)


def test_the_headline_plan():
    plan = make()
    assert (plan.frames, plan.proxy_frames) == (161, 41)
    assert (plan.proxy_width, plan.proxy_height) == (848, 480)
    assert plan.latent == Grid(41, 270, 480)
    assert plan.tokens == Grid(41, 135, 240)
    assert plan.tokens.count == 1_328_400
    assert plan.proxy_tokens == Grid(11, 30, 53)
    assert plan.keys_per_query(Grid(4, 16, 16)) == (1024, 75)
    text = plan.describe()
    for figure in ("3840 x 2160", "161 frames", "1,328,400", "1,024 + 75", "17,490"):
        assert figure in text
    assert not plan.notes


@pytest.mark.parametrize("stride", range(1, 9))
@pytest.mark.parametrize("seconds", [0.05, 1.3, 5, 20])
def test_frames_follow_the_method(seconds, stride):
    plan = make(seconds=seconds, stride=stride)
    proxy_latents = plan.proxy_latent.frames
    assert plan.proxy_frames == 4 * (proxy_latents - 1) + 1
    assert plan.frames == stride * (plan.proxy_frames - 1) + 1
    assert plan.latent.frames == stride * (proxy_latents - 1) + 1
    assert abs(plan.frames - 1 - seconds * 16) <= 2 * stride


@pytest.mark.parametrize(
    ("width", "height"), [(3840, 2160), (2160, 3840), (1024, 1024), (7680, 4320), (1920, 800)]
)
def test_the_proxy_keeps_the_aspect(width, height):
    plan = make(width, height)
    assert min(plan.proxy_width, plan.proxy_height) == 480
    assert plan.proxy_width % 16 == plan.proxy_height % 16 == 0
    assert plan.proxy_width / plan.proxy_height == pytest.approx(width / height, rel=8 / 480)


def test_rounding_is_reported():
    plan = make(width=1001, height=500, seconds=1.0, short=1024)
    assert (plan.width, plan.height) == (1008, 496)
    assert plan.proxy_height == 496
    notes = "\n".join(plan.notes)
    assert "1001 x 500 to 1008 x 496" in notes
    assert "1024 became 496" in notes
    assert "1008" in plan.describe()


def test_too_long_a_proxy_is_reported():
    assert "trained on" in make(seconds=30.0).describe()


def test_wan22_latents():
    plan = make(space=WAN22, short=704)
    assert plan.latent == Grid(41, 135, 240)
    assert plan.tokens == Grid(41, 68, 120)  # an odd height is padded by the model
    assert plan.proxy_width % 32 == plan.proxy_height % 32 == 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"width": 100}, "width is 100; allowed is 128 to 8192"),
        ({"height": 9000}, "height is 9000"),
        ({"seconds": 0.0}, "seconds is 0; allowed is 0.05 to 600"),
        ({"seconds": float("nan")}, "seconds is nan"),
        ({"seconds": 1e9}, "seconds is 1e\\+09"),
        ({"fps": 1e9}, "allowed is 1 to 120"),
        ({"fps": 0.0}, "fps is 0"),
        ({"stride": 9}, "temporal_stride is 9; allowed is 1 to 8"),
        ({"short": 16}, "proxy_short_side is 16"),
    ],
)
def test_values_out_of_range_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        make(**wrong)

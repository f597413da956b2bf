"""Faults of known size in a report of a video that has none otherwise."""

import math
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from atlasvid.engine.geometry.grid import Grid
from atlasvid.engine.geometry.layout import Layout
from atlasvid.engine.quality.flow import is_visible
from atlasvid.engine.quality.frames import enlarge, shrink
from atlasvid.engine.quality.lines import layout_lines
from atlasvid.engine.quality.optical_flow import estimate_flow
from atlasvid.engine.quality.report import measure_video
from atlasvid.engine.quality.report_picture import SIZE, as_image, draw_report
from atlasvid.engine.quality.verdict import MEANINGS, verdict
from textures import panned
from wan import plan_of

PLAN = plan_of((5, 32, 48), (2, 8, 12), stride=4)
SMALL = (64, 96)
WINDOW = Grid(4, 8, 8)
LINES = layout_lines(Layout(PLAN, WINDOW))


@pytest.fixture(scope="module")
def video():
    return 0.5 + (panned(PLAN.frames, PLAN.height, PLAN.width, (2.3, 0.9))[0] - 0.5) / 2


@pytest.fixture(scope="module")
def proxy(video):
    return torch.stack([shrink(frame, SMALL) for frame in video[::4]])


def up_and_down(length, positions, grey_levels):
    profile = torch.zeros(length)
    for i, p in enumerate(positions):
        profile[p:] += grey_levels / 255 * (-1) ** i
    return profile


def test_a_clean_clip_has_no_fault(video, proxy):
    report = measure_video(video, PLAN, WINDOW, proxy=proxy)
    found = report.overall
    assert abs(found["borders"]) < 0.6
    assert found["flicker"] < 0.3
    assert found["drift"] < 1e-3
    assert found["fidelity"] > 90
    assert found["detail"] > 10
    assert abs(report.jump) < 0.1
    assert report.ratio == pytest.approx(1, abs=0.02)
    assert report.verdict.startswith("Clean: no borders of windows")


@pytest.mark.parametrize("axis", ["rows", "columns"])
@pytest.mark.parametrize("overlap", ["shifted", "sliding"])
def test_a_seam_is_found_with_its_height(video, proxy, axis, overlap):
    lines = getattr(layout_lines(Layout(PLAN, WINDOW, overlap)).all_blocks, axis)
    shape = (-1, 1, 1) if axis == "rows" else (-1, 1)
    seamed = video[:5] + up_and_down(lines.length, lines.cuts, 4.0).view(shape)
    report = measure_video(seamed, PLAN, WINDOW, overlap, proxy)
    assert report.overall["borders"] == pytest.approx(4.0, abs=0.5)
    assert report.curves["borders"].frames == (0, 4)
    assert report.verdict.startswith("Clearly seen: borders of windows (")
    heights = getattr(report.worst, axis)
    assert np.median([step for steps in heights.values() for step in steps]) > 2.5


def test_flicker_is_found_with_its_size_though_nobody_knows_the_motion(video, proxy):
    signs = torch.tensor([1.0, -1.0]).repeat(4).view(-1, 1, 1, 1)
    report = measure_video(video[:8] + 2 / 255 * signs, PLAN, WINDOW, proxy=proxy)
    assert report.overall["flicker"] == pytest.approx(4.0, rel=0.05)
    assert report.curves["flicker"].frames == tuple(range(1, 8))
    assert report.verdict.startswith("Clearly seen: flicker (4.0 grey levels")


def test_a_jump_between_windows_in_time_is_found_with_its_height(video):
    lines, plan = LINES.all_blocks.frames, replace(PLAN, temporal_stride=16)
    assert (lines.cuts, lines.others) == ((5, 13), (1, 9))
    jumping = video + up_and_down(17, lines.cuts, 3.0).view(-1, 1, 1, 1)
    assert measure_video(jumping, plan, WINDOW).jump == pytest.approx(3.0, abs=0.1)
    everywhere = Grid(2, 8, 8)  # such windows move by one latent frame: there is no elsewhere
    assert math.isnan(measure_video(jumping[:3], plan, everywhere).jump)


def test_a_window_of_another_colour_is_found_with_its_drift_and_its_time(video, proxy):
    edges, wrong = (LINES.block.rows.edges, LINES.block.columns.edges), video.clone()
    box = slice(edges[0][1], edges[0][2]), slice(edges[1][2], edges[1][3])
    wrong[5:13, box[0], box[1]] += torch.tensor([9.0, 0.0, -9.0]) / 255
    report = measure_video(wrong, PLAN, WINDOW, proxy=proxy)
    assert report.curves["drift"].values[:2] == pytest.approx((0, 0), abs=1e-3)
    assert report.worst.number in (8, 12)
    torch.testing.assert_close(
        report.worst.drift[1, 2], torch.tensor([9.0, 0.0, -9.0]), atol=0.05, rtol=0
    )
    across = len(edges[1]) - 1
    one_of_all = (81 + 81) / 3 / (across * (len(edges[0]) - 1))
    assert report.curves["drift"].values[2] == pytest.approx(one_of_all**0.5, rel=0.05)


def test_a_proxy_that_was_only_up_scaled_has_no_detail_and_another_picture_no_fidelity(
    video, proxy
):
    soft = torch.stack([enlarge(proxy[0], (256, 384))])
    assert measure_video(soft, PLAN, WINDOW, proxy=proxy).overall["detail"] == pytest.approx(0)
    other = video[:5].flip(2)
    report = measure_video(other, PLAN, WINDOW, proxy=proxy)
    expected = [
        (shrink(a, SMALL) - b).square().mean() for a, b in zip(other[::4], proxy[:2], strict=True)
    ]
    assert report.overall["fidelity"] == pytest.approx(
        -10 * math.log10(torch.stack(expected).mean()), abs=1e-3
    )
    assert "another picture than the proxy's" in report.verdict


def test_frames_go_by_one_at_a_time(video, proxy):
    alive, most = set(), 0

    class OneAtATime:
        def __iter__(self):
            nonlocal most
            for i in range(9):
                frame = video[i].clone()
                alive.add(i)
                weakref.finalize(frame, alive.discard, i)
                most = max(most, len(alive))
                yield frame

    report = measure_video(OneAtATime(), PLAN, WINDOW, proxy=iter(proxy))
    assert most <= 2
    whole = measure_video(video[:9], PLAN, WINDOW, proxy=proxy)
    assert report.text() == whole.text()


def test_a_clip_that_was_cut_one_frame_and_windows_that_cover_all(video, proxy):
    cut = measure_video(video[:6], PLAN, WINDOW, proxy=proxy)
    assert cut.curves["fidelity"].frames == (0, 4)
    one = measure_video(video[:1], PLAN, WINDOW, proxy=proxy[:1])
    assert math.isnan(one.overall["flicker"])
    whole = measure_video(video[:2], PLAN, Grid(5, 99, 99))
    assert math.isnan(whole.overall["borders"])
    assert whole.overall.keys() == MEANINGS.keys()
    for report in (cut, one, whole):
        assert as_image(draw_report(report)).shape == (1, SIZE[1], SIZE[0], 3)


def test_what_does_not_belong_together_is_named(video, proxy):
    with pytest.raises(ValueError, match="384 x 256; the plan makes 512 x 256"):
        measure_video(video, replace(PLAN, width=512), WINDOW)
    with pytest.raises(ValueError, match="more than the plan's 5 frames"):
        measure_video(video, replace(PLAN, frames=5), WINDOW)
    with pytest.raises(ValueError, match="ends before the frame that shows the video's frame 4"):
        measure_video(video, PLAN, WINDOW, proxy=proxy[:1])
    with pytest.raises(ValueError, match="proxy is 384 x 256; the plan's is 96 x 64"):
        measure_video(video, PLAN, WINDOW, proxy=video)
    with pytest.raises(ValueError, match="no frames"):
        measure_video(video[:0], PLAN, WINDOW)


def test_the_worst_fault_is_said_first_and_the_picture_shows_where(video, proxy):
    overall = {"borders": 1.5, "flicker": 0.2, "drift": 12.0, "fidelity": 30.0, "detail": 0.5}
    said = verdict(overall, {"drift": 2.0})
    assert said.startswith("Clearly seen: windows of another colour than the proxy's (12.0 grey")
    assert "worst at 2.0 s" in said
    assert said.index("hardly more detail") < said.index("borders of windows")
    assert verdict(dict.fromkeys(overall, math.nan), {}).startswith("Nothing could be measured")
    wrong = video.clone()
    wrong[:, 128:, 128:256] += 0.2
    clean, spoilt = (
        np.asarray(draw_report(measure_video(each[:1], PLAN, WINDOW, proxy=proxy[:1])))
        for each in (video, wrong)
    )
    assert (clean != spoilt).any(2).mean() > 0.02


@pytest.mark.parametrize("speed", [(1.3, -0.6), (11.0, 4.0), (0.0, 0.0)])
def test_motion_is_estimated_and_flicker_is_not_motion(speed):
    clip, flow = panned(2, 180, 231, speed)
    for following in (clip[1], clip[1] + 4 / 255):
        found = estimate_flow(clip[0], following)
        off = (found - flow[0])[24:-24, 24:-24].norm(dim=-1)
        assert off.median() < 0.1
        assert is_visible(found, estimate_flow(following, clip[0])).float().mean() > 0.9

"""What cuts are worth, which are taken, and how often."""

import av
import numpy as np
import pytest
import torch
from atlasvid.engine.comfyui import media
from atlasvid.engine.families import tiny
from atlasvid.engine.training.cache import LatentCache
from atlasvid.engine.training.clips import clips_in_folder
from atlasvid.engine.training.selection import Selection, Worth, worth_of
from wan import plan_of

PLAN = plan_of((5, 8, 8), (2, 4, 4))


def test_motion_and_sharpness_are_root_mean_squares_in_grey_levels():
    frames = torch.full((4, 64, 64, 3), 100, dtype=torch.uint8)
    frames[1::2] += 6
    assert worth_of(frames, (16, 16)) == Worth(pytest.approx(6.0), pytest.approx(0.0, abs=1e-4))
    fine = torch.full((1, 64, 64, 3), 100, dtype=torch.uint8)
    fine[:, :, ::2] += 8  # stripes of a pixel: no smaller grid can hold them
    assert worth_of(fine, (16, 16)).motion == 0
    assert worth_of(fine, (16, 16)).sharpness == pytest.approx(4.0, rel=0.1)
    soft = torch.linspace(0, 255, 64).to(torch.uint8)[None, None, :, None].expand(1, 64, 64, 3)
    assert worth_of(soft, (16, 16)).sharpness < 1


def test_what_is_worth_more_counts_more_often():
    worths = [Worth(1, 1), Worth(2, 2), Worth(4, 4), Worth(40, 40), Worth(0, 9)]
    assert Selection(weighted=True).repeats(worths) == [1, 1, 2, 4, 1]
    assert Selection(min_motion=1).repeats(worths) == [1] * 5
    assert Selection(weighted=True).repeats([Worth(0, 0)]) == [1]


def write(path, still, soft):
    rng = np.random.default_rng(0)
    picture = rng.integers(60, 200, (64 // (8 if soft else 1), 96 // (8 if soft else 1), 3))
    picture = np.kron(picture, np.ones((8, 8, 1))) if soft else picture
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=16, options={"crf": "10"})
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for i in range(18):
            shown = picture if still else np.roll(picture, 3 * i, axis=1)
            frame = av.VideoFrame.from_ndarray(shown.astype(np.uint8), "rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    path.with_suffix(".txt").write_text("noise")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    for name, still, soft in (
        ("good", False, False),
        ("still", True, False),
        ("soft", False, True),
    ):
        write(folder / f"{name}.mp4", still, soft)
    vae = media.load_vae(tiny.vae_state())
    made = LatentCache(folder / "cache", PLAN, "guide", vae, tiny.TinyTextEncoder())
    return made, clips_in_folder(folder)


def test_clips_are_refused_and_the_report_says_why(cache):
    latents, clips = cache
    everything = latents.build(clips, 1)
    assert len(everything.files) == 3
    assert everything.report() == "3 samples, 0 clips or cuts skipped."
    worth = {clip.name: latents.worth(clip, 0.0) for clip in clips}
    least = Selection(
        min_motion=worth["soft.mp4"].motion / 2, min_sharpness=worth["good.mp4"].sharpness / 2
    )
    dataset = latents.build(clips, 1, selection=least)
    assert len(dataset.files) == 1
    report = dataset.report()
    assert f"still.mp4 from 0.0 s: {worth['still.mp4']}; a motion of at least" in report
    assert f"soft.mp4 from 0.0 s: {worth['soft.mp4']}; a sharpness of at least" in report
    assert f"good.mp4 from 0.0 s: {worth['good.mp4']}, counts 1 times" in report
    with pytest.raises(ValueError, match="None of the 3 clips can be used"):
        latents.build(clips, 1, selection=Selection(min_motion=255))


def test_clips_are_weighted_and_the_report_says_how(cache):
    latents, clips = cache
    dataset = latents.build(clips, 1, selection=Selection(weighted=True))
    counts = [dataset.files.count(file) for file in dict.fromkeys(dataset.files)]
    worths = [latents.worth(clip, 0.0) for clip in clips]
    assert counts == Selection(weighted=True).repeats(worths)
    assert len(set(counts)) > 1
    assert "more of both counts more often" in dataset.report()

"""Clips read from real MP4 files, and their cache."""

import io
import math
import os
import struct

import av
import numpy as np
import pytest
import torch
from atlasvid.engine.comfyui import media
from atlasvid.engine.families import tiny
from atlasvid.engine.training.cache import LatentCache
from atlasvid.engine.training.clips import (
    Clip,
    Unusable,
    clips_in_folder,
    clips_of_nodes,
    cut_starts,
    read_cut,
)
from clips import picture, render
from safetensors.torch import load_file
from wan import WAN21, plan_of


@pytest.fixture(scope="module")
def models():
    return tiny.tiny_models()


@pytest.fixture
def plan():
    return plan_of((5, 12, 12), (2, 6, 6))


def clip_of(path):
    return Clip(path.name, str(path), "words")


# --- Decoding -------------------------------------------------------------------------------


def test_frames_are_those_nearest_in_time(tmp_path):
    """A 24 fps clip read at 16 and at 4 fps, from its middle on."""
    clip = clip_of(render(tmp_path / "a.mp4", 48, fps=24))
    for fps, start, count in ((16, 0.0, 17), (4, 0.0, 8), (16, 1.0, 9)):
        frames = read_cut(clip, start, count, fps, 128, 128)
        for i, frame in enumerate(frames):
            nearest = math.ceil((start + i / fps) * 24 - 0.5) / 24  # of two as near, the earlier
            wanted = torch.from_numpy(picture(nearest, 128, 128).astype(np.float32))
            assert (frame.float() - wanted).abs().mean() < 3, (fps, start, i)


def test_frames_are_cut_around_the_centre_and_scaled_down(tmp_path):
    """A wide clip at a square size: its middle, at half the size."""
    clip = clip_of(render(tmp_path / "wide.mp4", 3, width=512, height=256))
    frame = read_cut(clip, 0.0, 1, 16, 128, 128)[0].float()
    full = torch.from_numpy(picture(0.0, 512, 256).astype(np.float32))[:, 128:384]
    wanted = full.unflatten(0, (128, 2)).unflatten(2, (128, 2)).mean((1, 3))
    assert (frame - wanted).abs().mean() < 3


def test_a_clip_stored_lying_is_turned_upright(tmp_path):
    """As phones do: the file's track says that players turn it clockwise."""
    path = render(tmp_path / "phone.mp4", 3, width=256, height=128)
    content = bytearray(path.read_bytes())
    matrix = content.index(b"tkhd") + 44
    content[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    frame = read_cut(clip_of(path), 0.0, 1, 16, 128, 256)[0].float()
    wanted = np.rot90(picture(0.0, 256, 128), -1).astype(np.float32)
    assert (frame - torch.from_numpy(wanted.copy())).abs().mean() < 3
    with pytest.raises(Unusable, match="too small: 128 x 256, and 256 x 128"):
        read_cut(clip_of(path), 0.0, 1, 16, 256, 128)


def test_cuts_follow_one_another(tmp_path):
    clip = clip_of(render(tmp_path / "a.mp4", 50))
    assert cut_starts(clip, 1.0, 8) == [0.0, 1.0, 2.0]
    assert cut_starts(clip, 1.0, 2) == [0.0, 1.0]
    assert cut_starts(clip, 9.0, 2) == [0.0]  # shorter than one cut: reading says so


def test_a_short_clip_says_what_is_missing(tmp_path):
    clip = clip_of(render(tmp_path / "a.mp4", 9))
    with pytest.raises(Unusable, match="too short: 9 of the 17 frames"):
        read_cut(clip, 0.0, 17, 16, 128, 128)


def test_a_small_clip_is_not_enlarged(tmp_path):
    clip = clip_of(render(tmp_path / "a.mp4", 3))
    with pytest.raises(Unusable, match="too small: 128 x 128, and 256 x 128"):
        read_cut(clip, 0.0, 1, 16, 256, 128)


@pytest.mark.parametrize("content", [b"", b"not a video" * 100])
def test_damaged_files_are_unusable(tmp_path, content):
    path = tmp_path / "bad.mp4"
    path.write_bytes(content)
    with pytest.raises(Unusable, match="unreadable"):
        cut_starts(clip_of(path), 1.0, 1)


def test_sound_alone_is_unusable(tmp_path):
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(Unusable, match="no video"):
        cut_starts(clip_of(path), 1.0, 1)


# --- Folders and nodes ----------------------------------------------------------------------


def test_a_folder_gives_clips_with_their_captions(tmp_path):
    render(tmp_path / "b.mp4", 2, caption="  second\n")
    render(tmp_path / "a.MP4", 2, caption="first")
    (tmp_path / "notes.txt").write_text("no clip")
    clips = clips_in_folder(tmp_path)
    assert [(clip.name, clip.caption) for clip in clips] == [
        ("a.MP4", "first"),
        ("b.mp4", "second"),
    ]


def test_bad_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match="There is no folder"):
        clips_in_folder(tmp_path / "none")
    with pytest.raises(ValueError, match=r"no video in .*\.mp4"):
        clips_in_folder(tmp_path)
    render(tmp_path / "a.mp4", 2)
    render(tmp_path / "b.mp4", 2, caption=None)
    with pytest.raises(ValueError, match=r"1 of 2 clips .* no caption: b\.mp4\. .*b\.txt"):
        clips_in_folder(tmp_path)


def test_videos_of_comfyuis_nodes(tmp_path):
    from comfy_api.latest import InputImpl

    path = render(tmp_path / "a.mp4", 3)
    videos = [
        InputImpl.VideoFromFile(str(path)),
        InputImpl.VideoFromFile(io.BytesIO(path.read_bytes())),
    ]
    clips = clips_of_nodes(videos, ["one", " two "])
    assert [clip.caption for clip in clips] == ["one", "two"]
    first, second = (read_cut(clip, 0.0, 3, 16, 128, 128) for clip in clips)
    assert torch.equal(first, second)
    assert clips[0].identity != clips[1].identity
    with pytest.raises(ValueError, match="2 videos and 1 captions"):
        clips_of_nodes(videos, ["one"])


# --- Cache ----------------------------------------------------------------------------------


def build(folder, plan, models, stage, source):
    _, text_encoder, vae = models
    return LatentCache(folder, plan, stage, vae, text_encoder).build(clips_in_folder(source), 1)


def test_a_guide_sample_is_the_clip_and_its_small_slow_proxy(tmp_path, models):
    """As the pipeline would make them: the proxy shows every fourth frame, at the proxy's size."""
    _, encoder, vae = models
    plan = plan_of((5, 16, 16), (2, 8, 8))
    path = render(tmp_path / "a.mp4", 20)
    sample = build(tmp_path / "cache", plan, models, "guide", tmp_path).sample(0)
    frames = read_cut(clip_of(path), 0.0, 17, 16, 128, 128).float() / 255
    assert torch.equal(sample.target, vae.encode(frames))
    assert sample.target.shape == (1, 16, 5, 16, 16)
    small = frames[::4].unflatten(1, (64, 2)).unflatten(3, (64, 2)).mean((2, 4))
    expected = vae.encode(small)
    assert sample.guide.shape == (1, 16, 2, 8, 8)
    assert (sample.guide - expected).abs().mean() < 0.02 * expected.std()
    words = encoder.encode_from_tokens_scheduled(encoder.tokenize("drifting coloured waves"))
    assert torch.equal(sample.text, words[0][0])


def test_a_proxy_sample_has_no_target(tmp_path, models, plan):
    render(tmp_path / "a.mp4", 20)
    sample = build(tmp_path / "cache", plan, models, "proxy", tmp_path).sample(0)
    assert sample.target is None
    assert sample.guide.shape == (1, 16, 2, 6, 6)


def test_bad_clips_are_skipped_and_listed(tmp_path, models, plan):
    render(tmp_path / "good.mp4", 20)
    render(tmp_path / "short.mp4", 5)
    render(tmp_path / "small.mp4", 20, width=64, height=64)
    (tmp_path / "torn.mp4").write_bytes((tmp_path / "good.mp4").read_bytes()[:500])
    (tmp_path / "torn.txt").write_text("torn")
    dataset = build(tmp_path / "cache", plan, models, "guide", tmp_path)
    assert len(dataset.files) == 1
    report = dataset.report()
    assert "1 samples, 3 clips or cuts skipped" in report
    for line in ("short.mp4 from 0.0 s: too short", "small.mp4 from 0.0 s: too small", "torn.mp4"):
        assert f"skipped {line}" in report
    (tmp_path / "good.mp4").unlink()
    with pytest.raises(ValueError, match="None of the 3 clips can be used:\nshort"):
        build(tmp_path / "cache", plan, models, "guide", tmp_path)


def test_what_is_cached_is_not_encoded_again_unless_it_changed(tmp_path, models, plan):
    render(tmp_path / "a.mp4", 20)
    render(tmp_path / "b.mp4", 20, seed=1)
    cache = tmp_path / "cache"
    files = build(cache, plan, models, "guide", tmp_path).files
    times = [file.stat().st_mtime_ns for file in files]

    def again(stage="guide", made=plan, using=models):
        found = build(cache, made, using, stage, tmp_path).files
        return [f in files and f.stat().st_mtime_ns == times[files.index(f)] for f in found]

    assert again() == [True, True]
    assert again("proxy") == [False, False]
    assert again(made=plan_of((5, 12, 12), (2, 4, 4))) == [False, False]
    other_vae = (models[0], models[1], media.load_vae(tiny.vae_state(5)))
    assert again(using=other_vae) == [False, False]
    (tmp_path / "a.txt").write_text("other words")
    assert again() == [False, True]
    (tmp_path / "a.txt").write_text("drifting coloured waves")
    facts = (tmp_path / "b.mp4").stat()
    os.utime(tmp_path / "b.mp4", ns=(facts.st_atime_ns, facts.st_mtime_ns + 1_000_000))
    assert again() == [True, False]


@pytest.mark.parametrize("harm", ["cut off", "not finite"])
def test_a_damaged_cache_file_is_made_again(tmp_path, models, plan, harm):
    from safetensors import safe_open
    from safetensors.torch import save_file

    render(tmp_path / "a.mp4", 20)
    file = build(tmp_path / "cache", plan, models, "guide", tmp_path).files[0]
    whole = load_file(file)
    if harm == "cut off":
        file.write_bytes(file.read_bytes()[:-100])
    else:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        save_file({**whole, "guide": whole["guide"] * float("nan")}, file, metadata)
    build(tmp_path / "cache", plan, models, "guide", tmp_path)
    repaired = load_file(file)
    assert repaired.keys() == whole.keys()
    assert all(torch.equal(repaired[name], whole[name]) for name in whole)
    assert not list((tmp_path / "cache").glob("*.part"))


def test_a_vae_of_another_model_is_refused(tmp_path, models):
    from dataclasses import replace

    render(tmp_path / "a.mp4", 20)
    plan = plan_of((5, 12, 12), (2, 6, 6), space=replace(WAN21, channels=48))
    with pytest.raises(ValueError, match="Connect the VAE that belongs to the model"):
        build(tmp_path / "cache", plan, models, "guide", tmp_path)


def test_a_text_encoder_of_another_model_is_refused(tmp_path, models, plan):
    class Narrow(tiny.TinyTextEncoder):
        def encode_from_tokens_scheduled(self, tokens, **_):
            (embedding, rest), *_ = super().encode_from_tokens_scheduled(tokens)
            return [[embedding[..., :768], rest]]

    render(tmp_path / "a.mp4", 20)
    with pytest.raises(ValueError, match=r"makes 768 numbers per word, Wan takes 4096.*UMT5"):
        build(tmp_path / "cache", plan, (models[0], Narrow(), models[2]), "guide", tmp_path)

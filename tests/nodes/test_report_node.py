"""The report of videos from a file, from a latent, and of images."""

from fractions import Fraction

import torch
from atlasvid import nodes
from atlasvid.engine.comfyui import media
from atlasvid.engine.vae.decode import TiledDecoder
from atlasvid.engine.vae.video import StreamedVideo
from clips import render
from wan import plan_of, rand
from wan_vaes import wan21_vae

COMPACT = {"window": "compact"}


def report(*args):
    return nodes.AtlasVidReport.PREPARE_CLASS_CLONE(None).execute(*args)


def test_a_file_and_its_images_have_the_same_report(tmp_path):
    plan = plan_of((3, 32, 40), (1, 8, 10), stride=8)
    video = media.VideoFromFile(str(render(tmp_path / "clip.mp4", 9, width=320, height=256)))
    proxy = torch.nn.functional.interpolate(
        video.get_components().images[::8].movedim(-1, 1), size=(64, 80), mode="area"
    ).movedim(1, -1)
    image, text = report(plan, video, COMPACT, "shifted", proxy).args
    assert image.shape == (1, 1060, 1600, 3)
    assert text == report(plan, video.get_components().images, COMPACT, "shifted", proxy).args[1]
    assert "320 x 256, 9 frames at 16 fps; windows of 3 x 16 x 16 tokens, shifted." in text


def test_a_video_of_a_latent_is_decoded_once(monkeypatch):
    plan, decodes = plan_of((2, 4, 4), (1, 2, 2), stride=4), []
    tiled = TiledDecoder(wan21_vae(), rand(1, 16, 2, 4, 4))
    video = StreamedVideo(tiled, Fraction(16))
    decode = TiledDecoder.tiles
    monkeypatch.setattr(TiledDecoder, "tiles", lambda *args: decodes.append(1) or decode(*args))
    monkeypatch.setattr(StreamedVideo, "get_components", lambda _: 1 / 0)  # all frames at once
    texts = {report(plan, video, COMPACT, "shifted").args[1] for _ in range(2)}
    assert (len(texts), len(decodes)) == (1, 1)

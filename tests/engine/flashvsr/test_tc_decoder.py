"""The Tiny Conditional decoder, streaming and in stripes, against the whole clip at once."""

from functools import cache

import comfy.model_management
import flashvsr_reference as reference
import pytest
import torch
import torch.nn.functional as F
from atlasvid.engine.comfyui import management, models, server
from atlasvid.engine.device.chunks import ChunkSize
from atlasvid.engine.flashvsr.source import Footage, LowQuality, Upscale
from atlasvid.engine.flashvsr.tc_decoder import (
    AUTO_STRIPE,
    CORRECTED,
    ConditionedClip,
    TCDecoder,
    TCRun,
    Widths,
    held_bytes,
    load_tc_decoder,
)
from atlasvid.engine.vae.sources import frame_source
from memory_trace import MemoryTrace

WIDTHS = (12, 8, 6, 4)
CPU = torch.device("cpu")
WHOLE = 2**40
"""Bytes that hold every frame of a test in one stripe."""


@pytest.fixture(scope="module")
def weights():
    return reference.tc_weights(WIDTHS)


@pytest.fixture(scope="module")
def decoder(weights):
    return load_tc_decoder(weights, torch.float32)


def latents_of(frames, height, width, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, 16, frames, height, width, generator=generator)


def footage_of(frames, height, width, seed=2):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(frames, 3, -(-height // 4), -(-width // 4), generator=generator)
    images = F.interpolate(coarse, (height, width), mode="bilinear")
    return Footage.of(frame_source(images.movedim(1, -1)))


def levels_of(footage):
    return (torch.cat(list(footage.source.batches())) * 255).round().byte().numpy()


def repeated(frames, count):
    """`count` frames, copies of the last at the end."""
    return frames[torch.arange(count).clamp(max=len(frames) - 1)]


def whole_clip(weights, latents, footage):
    """The reference's decode of a clip whose frames are as large as the latents."""
    height, width = latents.shape[3] * 8, latents.shape[4] * 8
    frames = reference.upscaled(levels_of(footage), height, width)
    return reference.tc_decode(weights, latents, repeated(frames, 4 * latents.shape[2] - 3))


def low_quality_of(latents, footage):
    size = latents.shape[3] * 8, latents.shape[4] * 8
    return LowQuality(footage, Upscale(footage.size, size, size))


def decoded(decoder, latents, footage, stripe=WHOLE):
    run = TCRun(decoder, CPU, ChunkSize(stripe))
    return list(run.decode(latents, low_quality_of(latents, footage)))


def difference(ours, expected):
    """The largest one, against the size of the values."""
    return (ours - expected).abs().max() / expected.abs().max()


@pytest.mark.parametrize(
    ("frames", "height", "width"), [(1, 3, 5), (2, 1, 1), (3, 5, 4), (6, 4, 3)]
)
@pytest.mark.parametrize("stripe", [WHOLE, 20_000, 1], ids=["whole", "stripes", "rows"])
def test_equals_the_whole_clip(weights, decoder, frames, height, width, stripe):
    latents, footage = latents_of(frames, height, width), footage_of(4 * frames - 3, 9, 14)
    parts = decoded(decoder, latents, footage, stripe)
    assert [len(part) for part in parts] == [1] + [4] * (frames - 1)
    expected = whole_clip(weights, latents, footage)
    assert expected.std() > 0.1  # a result of its own in every pixel, not a bias
    assert difference(torch.cat(parts), expected) < 1e-5


@pytest.mark.parametrize("cuts", [6, 2, 1])
def test_chunks_equal_the_whole_clip_bit_for_bit(decoder, cuts):
    latents, footage = latents_of(6, 4, 4), footage_of(21, 8, 8)
    expected = torch.cat(decoded(decoder, latents, footage))
    run, frames = TCRun(decoder, CPU, ChunkSize(WHOLE)), low_quality_of(latents, footage)
    parts = [part for cut in latents.split(cuts, dim=2) for part in run.decode(cut, frames)]
    assert torch.equal(torch.cat(parts), expected)


def test_growing_first_equals_enlarging_first(decoder):
    x, grow = torch.randn(1, 8, 5, 7), decoder[15]
    first = F.interpolate(grow(x), scale_factor=2.0, mode="nearest")
    last = grow(F.interpolate(x, scale_factor=2.0, mode="nearest"))
    torch.testing.assert_close(first, last, atol=1e-6, rtol=0)


def test_only_the_last_rows_of_taller_growths_count(weights, decoder):
    taller = dict(weights)
    for n in (9, 15, 21):
        key = f"decoder.{n}.conv.weight"
        taller[key] = torch.cat([torch.full_like(weights[key], 9.0), weights[key]])
    taller["decoder.30.weight"] = torch.zeros(3)  # keys that are not of the decoder
    latents, footage = latents_of(2, 2, 3), footage_of(5, 8, 8)
    other = load_tc_decoder(taller, torch.float32)
    results = [torch.cat(decoded(d, latents, footage)) for d in (decoder, other)]
    assert torch.equal(*results)


def test_published_names_and_shapes():
    state = {k: torch.empty(s, device="meta") for k, s in reference.tc_shapes().items()}
    decoder = load_tc_decoder(state, torch.float32)
    assert {k: tuple(v.shape) for k, v in decoder.state_dict().items()} == reference.tc_shapes()
    # The published file has 7.7 MB more, in keys that are not the decoder's.
    size = sum(v.nbytes for v in decoder.state_dict().values())
    assert abs(189_018_333 - size - 7.7e6) < 1e5


def test_widths_can_be_named():
    assert Widths.named("512, 256,128,64") == Widths(512, 256, 128, 64)
    for text in ("512,256", "512,256,128,0", "512,256,128,x", ""):
        with pytest.raises(ValueError, match="write four numbers, such as 512,256,128,128"):
            Widths.named(text)


def test_files_of_something_else_are_refused(weights):
    with pytest.raises(ValueError, match=r"no Tiny Conditional decoder: 4 of its weights"):
        load_tc_decoder({"encoder.1.weight": torch.zeros(1)}, torch.float32)
    without = {k: v for k, v in weights.items() if k != "decoder.12.conv.2.bias"}
    with pytest.raises(ValueError, match=r"1 of its weights are missing, decoder.12.conv.2.bias"):
        load_tc_decoder(without, torch.float32)
    odd = weights | {"decoder.1.weight": torch.zeros(12, 16, 3, 3)}
    with pytest.raises(ValueError, match=r"decoder\.1\.weight has the shape \[12, 16, 3, 3\]"):
        load_tc_decoder(odd, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near(weights, dtype):
    latents, footage = latents_of(2, 3, 3), footage_of(5, 8, 8)
    ours = torch.cat(decoded(load_tc_decoder(weights, dtype), latents, footage))
    expected = whole_clip(weights, latents, footage)
    assert ours.dtype == dtype
    assert (ours - expected).square().mean().sqrt() < 0.05 * expected.std()


patcher_of = cache(models.patcher)


def clip(decoder, latents, footage, size=None, colour="off"):
    return ConditionedClip(patcher_of(decoder), latents, footage, size, colour)


@pytest.mark.parametrize(
    ("frames", "colour"),
    [(1, "off"), (2, "off"), (20, "adain"), (21, "wavelet"), (22, "adain"), (28, "off")],
)
def test_a_clip_has_the_frames_and_size_that_it_came_with(weights, decoder, frames, colour):
    footage, size = footage_of(frames, 9, 14), (27, 38)
    latents = latents_of((reference.clip_length(frames) - 1) // 4, 4, 5)
    images = clip(decoder, latents, footage, size, colour).all_images()
    assert images.shape == (frames, *size, 3)
    picture = reference.upscaled(levels_of(footage), *size)
    given = repeated(reference.edge_padded(picture, 32, 40), 4 * latents.shape[2] - 3)
    expected = reference.tc_decode(weights, latents, given)[:frames, :, :27, :38]
    if colour != "off":
        expected = getattr(reference, colour)(expected, picture)
    expected = (expected.clamp(-1, 1) / 2 + 0.5).movedim(1, -1)
    assert (images - expected).abs().max() < 1e-4


def test_latents_of_another_clip_are_refused(decoder):
    footage = footage_of(22, 8, 8)
    for latents, message in (
        (latents_of(5, 4, 4), "The latent has 5 frames, which make 17 of video, but there are 22"),
        (latents_of(9, 4, 4), "The latent has 9 frames"),
        (latents_of(6, 4, 4).expand(2, -1, -1, -1, -1), r"takes one Wan 2\.1 video"),
        (torch.zeros(1, 48, 6, 4, 4), r"these have \[1, 48, 6, 4, 4\]"),
    ):
        with pytest.raises(ValueError, match=message):
            clip(decoder, latents, footage)
    with pytest.raises(ValueError, match="40 x 32 does not fit into 32 x 32"):
        clip(decoder, latents_of(6, 4, 4), footage, (32, 40))
    clip(decoder, latents_of(6, 4, 4), footage)  # as a VAE encodes them, without the last frame


def test_out_of_memory_halves_the_stripe_and_repeats_it(weights, decoder, monkeypatch):
    latents, footage = latents_of(2, 6, 4), footage_of(5, 8, 8)
    stock, heights = TCDecoder.finish, []

    def scarce(self, x):
        heights.append(x.shape[2])
        if x.shape[2] > 9:
            raise torch.OutOfMemoryError("no room")
        return stock(self, x)

    monkeypatch.setattr(TCDecoder, "finish", scarce)
    result = torch.cat(decoded(decoder, latents, footage, 200_000))
    assert max(heights) > 9
    assert difference(result, whole_clip(weights, latents, footage)) < 1e-5


def test_frames_that_do_not_fit_are_in_host_memory(weights, decoder, monkeypatch):
    latents, footage = latents_of(2, 6, 4), footage_of(5, 8, 8)
    stock, asked = torch.empty, []

    def scarce(*shape, **more):
        if "memory_format" not in more:
            return stock(*shape, **more)
        asked.append(shape)
        if len(asked) % 2:
            raise torch.OutOfMemoryError("no room")
        return stock(*shape, **more)

    monkeypatch.setattr(torch, "empty", scarce)
    result = torch.cat(decoded(decoder, latents, footage, 2**30))
    monkeypatch.undo()
    assert len(asked) > 20
    assert difference(result, whole_clip(weights, latents, footage)) < 1e-5


def test_other_models_give_way_to_whole_frames(decoder, monkeypatch):
    asked = []

    def use_on_device(model, working_bytes=0):
        asked.append(working_bytes)
        return torch.device("cpu")

    monkeypatch.setattr(management, "use_on_device", use_on_device)
    clip(decoder, latents_of(6, 4, 4), footage_of(21, 8, 8)).plan()
    frames = held_bytes(decoder.widths, 4 * 4, 4)
    assert asked == [frames + CORRECTED * 3 * 4 * 32 * 32 + AUTO_STRIPE]


def test_cancel_stops_within_a_latent_frame(decoder, monkeypatch):
    advanced = []

    def progress_bar(total):
        def advance(steps):
            advanced.append(total)
            comfy.model_management.interrupt_current_processing(True)

        return advance

    monkeypatch.setattr(server, "progress_bar", progress_bar)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        clip(decoder, latents_of(6, 4, 4), footage_of(21, 8, 8)).all_images()
    assert advanced == [6]


@pytest.mark.parametrize("stripe", [2**28, 2**30])
def test_memory_stays_within_the_stripe(stripe):
    """1920 x 1024 at full width in bfloat16: beside whole frames, no more than the budget."""
    height, width, half = 128, 240, 2
    decoder = TCDecoder(Widths(*reference.TC_WIDTHS), torch.bfloat16, "meta")
    run = TCRun(decoder, torch.device("meta"), ChunkSize(stripe))
    latent = torch.empty(1, 16, height, width, device="meta")
    condition = torch.empty(4, 3, 8 * height, 8 * width, device="meta")
    run.step(latent, condition)
    area = height * width
    remembered = half * area * 3 * (512 + 256 * 4 + 128 * 16)
    with MemoryTrace() as trace:
        run.step(latent, condition)
    frame = half * area * 16 * 128  # of the last level with memory, which has two a latent frame
    assert trace.peak < remembered + 6 * frame + stripe

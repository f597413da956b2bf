"""The stage on whole frames: bands, slices and places against one pass, and its memory."""

import comfy.ldm.wan.vae
import pytest
import torch
from atlasvid.engine.comfyui import management
from atlasvid.engine.device import copies
from atlasvid.engine.vae import middle
from atlasvid.engine.vae.middle import Room, WholeFrames, room
from atlasvid.engine.vae.wan import WanDecoder, WanEncoder
from memory_trace import MemoryTrace
from torch._subclasses.fake_tensor import FakeTensorMode
from wan_vaes import LAYOUT, wan21_vae, wan22_vae

CPU, CARD = torch.device("cpu"), torch.device("cuda", 0)
GIB = 2**30
CODERS = {
    "decoder 2.1": lambda: WanDecoder(wan21_vae().first_stage_model, 1),
    "decoder 2.2": lambda: WanDecoder(wan22_vae().first_stage_model, 2),
    "encoder 2.1": lambda: WanEncoder(wan21_vae().first_stage_model, 1),
}


@pytest.fixture(params=sorted(CODERS), scope="module")
def coder(request):
    return CODERS[request.param]()


def chunks_of(coder, dtype=torch.float32):
    """Two chunks of what the stage reads, an odd size."""
    decodes = isinstance(coder, WanDecoder)
    channels = coder.latent_channels if decodes else coder.feature_channels
    generator = torch.Generator().manual_seed(3)
    video = torch.randn(1, channels, 3, 13, 7, generator=generator).to(dtype)
    return video[:, :, :1], video[:, :, 1:]


def run(coder, chunks, bands, place=CPU):
    whole = WholeFrames(coder.middle, (13, 7), lambda: coder.cache(3), Room(bands, True, 0), CPU)
    return [whole(chunk) for chunk in chunks], whole


def core(coder, chunks):
    """The same modules one after the other on whole frames, as the core runs them."""
    cache, results = coder.cache(3), []
    model, layers = coder.model, list(coder.coder.middle)
    for chunk in chunks:
        index, x = [0], chunk
        if isinstance(coder, WanDecoder):
            x = model.conv2(x)
            kept = x[:, :, -2:].clone()
            before = cache[0]
            if kept.shape[2] < 2 and before is not None:
                kept = torch.cat([before[:, :, -1:], kept], dim=2)
            x = coder.coder.conv1(x, before)
            cache[0], index[0] = kept, 1
        for layer in layers:
            x = layer(x, cache, index)
        if isinstance(coder, WanEncoder):
            norm, silu, conv = coder.coder.head
            x, before = silu(norm(x)), cache[index[0]]
            cache[index[0]] = x[:, :, -2:]
            x = model.conv1(conv(x, before)).chunk(2, dim=1)[0]
        results.append(x)
    return results


@pytest.mark.parametrize("bands", [1, 3, 6])
def test_bands_equal_whole_frames(coder, bands, monkeypatch):
    monkeypatch.setattr(middle, "SLICE_FLOPS", {"cpu": 4 * 8 * 91 * 17})  # some queries at a time
    chunks = chunks_of(coder)
    with torch.inference_mode():
        expected = core(coder, chunks)
    ours, _ = run(coder, chunks, bands)
    for a, b in zip(ours, expected, strict=True):
        assert (a - b).abs().max() <= 5e-6 * b.abs().max().clamp(min=1)


def test_out_of_memory_makes_smaller_bands_and_changes_nothing(monkeypatch):
    coder = CODERS["decoder 2.1"]()
    chunks, stock, seen = chunks_of(coder), WholeFrames._after, []
    expected, _ = run(coder, chunks, 1)

    def scarce(self, band, out):
        seen.append(band.rows.size)
        if band.rows.size > 4 and len(seen) > 1:  # in the second chunk, whose frames are kept
            raise torch.OutOfMemoryError("no room")
        stock(self, band, out)

    monkeypatch.setattr(WholeFrames, "_after", scarce)
    ours, whole = run(coder, chunks, 1)
    assert [band.rows.size for band in whole.bands] == [3, 3, 3, 4]
    assert all((a - b).abs().max() <= 5e-6 for a, b in zip(ours, expected, strict=True))


def test_cancel_stops_between_slices(monkeypatch):
    import comfy.model_management

    coder, asked = CODERS["decoder 2.1"](), []

    def cancelled():
        asked.append(1)
        if len(asked) > 3:
            raise comfy.model_management.InterruptProcessingException

    monkeypatch.setattr(middle, "SLICE_FLOPS", {"cpu": 1})
    monkeypatch.setattr(management, "raise_if_cancelled", cancelled)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        run(coder, chunks_of(coder), 1)


# --- Memory ----------------------------------------------------------------------------------


def real_coder(kind):
    torch.set_default_dtype(torch.bfloat16)
    try:
        with CARD:
            return kind(comfy.ldm.wan.vae.WanVAE(dim=96, z_dim=16, **LAYOUT), 1)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.fixture
def card(monkeypatch):
    """Replaces what asks the driver."""
    mark = type("Mark", (), {"wait": lambda self: None})
    monkeypatch.setattr(copies, "Mark", lambda _: mark())
    monkeypatch.setattr(management, "raise_if_cancelled", lambda: None)
    monkeypatch.setattr(management, "empty_cache", lambda: None)


def traced(kind, size, limit, allocator_limit=float("inf")):
    """How the stage is planned for `limit` bytes, and the peak of two chunks on a simulated card.

    The allocator fails above its own limit.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        coder = real_coder(kind)
        coder.coder.middle[1].optimized_attention = None  # not plain, as on a card
        space = room(coder.middle, *size, 2, limit)
        whole = WholeFrames(coder.middle, size, lambda: coder.cache(8), space, CARD)
        channels = 16 if kind is WanDecoder else 384
        with MemoryTrace("cuda", allocator_limit) as trace:
            for frames in (1, 2, 2):
                chunk = torch.empty(1, channels, frames, *size, dtype=torch.bfloat16, device=CPU)
                out = whole(chunk)
                assert out.device.type == "cpu"
                assert out.shape == (1, 384 if kind is WanDecoder else 16, frames, *size)
    return space, trace.peak


@pytest.mark.parametrize("kind", [WanDecoder, WanEncoder])
@pytest.mark.parametrize("gib", [8.4, 2])
def test_an_8k_frame_stays_within_the_budget(card, kind, gib):
    """8.4 GiB is what `auto` takes of a card of 12."""
    space, peak = traced(kind, (540, 960), int(gib * GIB), gib * GIB)
    assert space.on_device == (gib > 8)
    assert 0.5 * space.peak < peak <= space.peak <= gib * GIB


def test_what_does_not_fit_after_all_goes_to_the_host_in_smaller_bands(card):
    """Planned for 8.4 GiB, of which 2 are there."""
    space, peak = traced(WanDecoder, (540, 960), int(8.4 * GIB), 2 * GIB)
    assert space.on_device
    assert peak <= 2 * GIB

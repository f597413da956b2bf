"""Tiles against the VAE's own untiled decode."""

from contextlib import nullcontext

import comfy.ldm.wan.vae
import pytest
import torch
from atlasvid.engine.comfyui import management, media, server
from atlasvid.engine.vae import middle, wan
from atlasvid.engine.vae.decode import MEMORY_SHARE, TiledDecoder, decode_images
from atlasvid.engine.vae.frames import DecodedFrames
from atlasvid.engine.vae.layers import convolutions
from atlasvid.engine.vae.middle import WholeFrames
from atlasvid.engine.vae.regions import Region, Span, TileGrid
from atlasvid.engine.vae.tiling import (
    DECODE_WORK_LIMIT,
    CostModel,
    frugal_grid,
    grid_within,
    work_ratio,
)
from atlasvid.engine.vae.wan import WanDecoder
from memory_trace import MemoryTrace
from wan_vaes import LAYOUT, wan21_vae, wan22_vae

TOLERANCE = 5e-6  # the core's own decode is 2e-6 from one in double precision, so is ours
VAES = {"wan21": (wan21_vae, 16), "wan22": (wan22_vae, 48)}


@pytest.fixture(params=sorted(VAES), scope="module")
def vae_and_channels(request):
    make, channels = VAES[request.param]
    return make(), channels


def random_latent(channels: int, frames: int, height: int, width: int, batch: int = 1):
    generator = torch.Generator().manual_seed(7)
    return torch.randn(batch, channels, frames, height, width, generator=generator)


def untiled(vae, latent):
    """The VAE's own decode, item by item as it does itself where memory is short."""
    with torch.inference_mode():
        return torch.cat([vae.decode(item[None])[0] for item in latent])


def decode_in(grid: TileGrid, vae, latent, monkeypatch):
    monkeypatch.setattr(TiledDecoder, "plan", lambda _self: grid)
    return decode_images(vae, latent)


@pytest.mark.parametrize(
    ("frames", "height", "width", "rows", "cols"),
    [
        (1, 17, 13, 2, 1),  # a single image
        (1, 9, 8, 1, 1),
        (2, 11, 16, 1, 2),
        (3, 30, 9, 3, 1),
        (4, 9, 21, 1, 3),
        (5, 19, 18, 2, 2),
    ],
)
def test_tiles_equal_the_untiled_decode(
    vae_and_channels, monkeypatch, frames, height, width, rows, cols
):
    vae, channels = vae_and_channels
    latent = random_latent(channels, frames, height, width)
    images = decode_in(TileGrid(height, width, rows, cols), vae, latent, monkeypatch)
    expected = untiled(vae, latent)
    assert images.shape == expected.shape
    assert (images - expected).abs().max() <= TOLERANCE


def test_a_batch_decodes_item_after_item(vae_and_channels, monkeypatch):
    vae, channels = vae_and_channels
    latent = random_latent(channels, 2, 12, 10, batch=2)
    images = decode_in(TileGrid(12, 10, 2, 1), vae, latent, monkeypatch)
    assert (images - untiled(vae, latent)).abs().max() <= TOLERANCE


@pytest.mark.parametrize("name", sorted(VAES))
def test_rounding_is_of_the_size_of_the_cores(name):
    make, channels = VAES[name]
    vae, latent = make(), random_latent(channels, 3, 9, 11)
    ours, core = decode_images(vae, latent), untiled(vae, latent)
    vae.first_stage_model.double()
    with torch.inference_mode():
        exact = vae.first_stage_model.decode(latent.double())[0].movedim(0, -1)
    exact = ((exact + 1) / 2).clamp(0, 1)
    error, allowed = ((images - exact).square().mean().sqrt() for images in (ours, core))
    assert error <= 2 * allowed


def test_bfloat16_tiles_equal_untiled_bfloat16(monkeypatch):
    vae = wan21_vae()
    vae.vae_dtype = torch.bfloat16
    vae.first_stage_model.to(torch.bfloat16)
    latent = random_latent(16, 3, 24, 12)
    images = decode_in(TileGrid(24, 12, 2, 1), vae, latent, monkeypatch)
    # One rounding step of bfloat16 near 1 is 2**-8; equal inputs may still round apart once.
    assert (images - untiled(vae, latent)).abs().max() <= 2**-8


def test_out_of_memory_halves_the_tile_and_keeps_the_rest(monkeypatch):
    vae = wan21_vae()
    latent = random_latent(16, 3, 8, 40)
    decoded: list[int] = []
    stock = WanDecoder.pixels

    def scarce(self, x, cache, regions, first):
        cols = regions[-1].cols
        room = 100 if cols.start < 160 or first else 50
        if cols.size > room:
            raise torch.OutOfMemoryError("no room")
        if first:
            decoded.append(cols.start)
        return stock(self, x, cache, regions, first)

    monkeypatch.setattr(WanDecoder, "pixels", scarce)
    images = decode_in(TileGrid(8, 40, 1, 2), vae, latent, monkeypatch)
    assert decoded == [0, 80, 160, 160, 200, 240, 240, 280]
    assert (images - untiled(vae, latent)).abs().max() <= TOLERANCE


def test_out_of_memory_on_whole_frames_begins_them_anew(monkeypatch):
    """What a layer keeps for the next frames has been taken from the frame that failed."""
    vae, stock, calls = wan21_vae(), WholeFrames._attend, []
    latent = random_latent(16, 4, 8, 8)

    def scarce(self, frame):
        stock(self, frame)
        calls.append(frame)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(WholeFrames, "_attend", scarce)
    images = decode_in(TileGrid(8, 8, 1, 1), vae, latent, monkeypatch)
    assert len(calls) > 3
    assert (images - untiled(vae, latent)).abs().max() <= TOLERANCE


def test_a_single_tile_leaves_room_for_the_stage_before_it(monkeypatch):
    vae = wan21_vae()
    tiled = TiledDecoder(vae, random_latent(16, 2, 16, 16))
    assert len(tiled.plan().tiles) == 1
    alone = tiled.cost.peak_bytes(tiled.plan())
    free = int(1.05 * alone / MEMORY_SHARE)
    monkeypatch.setattr(management, "free_vae_memory", lambda _: free)
    assert len(tiled.plan().tiles) > 1


def test_frames_are_kept_for_one_who_takes_them_all_and_leaves(monkeypatch, tmp_path):
    tiled, passes, stock = TiledDecoder(wan21_vae(), random_latent(16, 3, 8, 8)), [], TiledDecoder
    pieces = stock.pieces
    monkeypatch.setattr(stock, "pieces", lambda *given: (passes.append(1), pieces(*given))[1])
    decoded, read = DecodedFrames(tiled, 8, tmp_path), []
    for _ in range(2):
        batches, taken = decoded.batches(), []
        while sum(map(len, taken)) < tiled.frames:
            taken.append(next(batches))
        batches.close()
        read.append(torch.cat(taken))
    assert len(passes) == 1
    assert torch.equal(*read)


def test_other_errors_are_not_taken_for_memory(monkeypatch):
    vae = wan21_vae()

    def broken(*_args):
        raise ValueError("broken")

    monkeypatch.setattr(WanDecoder, "pixels", broken)
    with pytest.raises(ValueError, match="broken"):
        decode_images(vae, random_latent(16, 1, 8, 8))


def test_cancel_stops_between_chunks(monkeypatch):
    import comfy.model_management

    vae = wan21_vae()
    advanced: list[int] = []

    def progress_bar(_total):
        def advance(steps):
            advanced.append(steps)
            comfy.model_management.interrupt_current_processing(True)

        return advance

    monkeypatch.setattr(server, "progress_bar", progress_bar)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        decode_images(vae, random_latent(16, 5, 8, 8))
    assert len(advanced) == 1
    hooks = [m for m in vae.first_stage_model.modules() if m._forward_hooks]
    assert not hooks, "a cancelled decode left its hooks on the VAE"


def test_other_vaes_are_refused_by_name():
    vae = wan21_vae()
    vae.first_stage_model = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"Linear.*Wan 2\.1 VAE.*Wan 2\.2 VAE.*stock VAE Decode"):
        decode_images(vae, random_latent(16, 1, 8, 8))


def test_latents_of_another_model_are_refused():
    with pytest.raises(ValueError, match=r"\[batch, 16, frames.*\[1, 48, 1, 8, 8\]"):
        decode_images(wan21_vae(), random_latent(48, 1, 8, 8))


def real_decoder() -> WanDecoder:
    """The real Wan 2.1 decoder in bfloat16, without memory for its weights."""
    with torch.device("meta"):
        model = comfy.ldm.wan.vae.WanVAE(dim=96, z_dim=16, **LAYOUT)
    return WanDecoder(model.to(torch.bfloat16), patch=1)


def real_size(height: int, width: int, element_bytes: int = 2) -> CostModel:
    """The cost model of the real Wan 2.1 VAE (96 channels), without its weights."""
    decoder = real_decoder()
    return CostModel(decoder.chain, height, width, 1, 8, decoder.whole_macs, element_bytes)


def test_the_halo_is_thirteen_latents():
    tile = Region(Span(100, 132), Span(200, 296))
    needed = real_size(270, 480).regions(tile)[0]
    assert needed == Region(Span(87, 145), Span(187, 309))


def test_4k_tiles_cost_under_a_tenth_more_work_and_six_gibibytes():
    cost = real_size(270, 480)
    grid = frugal_grid(cost, 24 * 1024**3, DECODE_WORK_LIMIT)
    assert work_ratio(cost, grid) <= 1.10
    assert cost.peak_bytes(grid) <= 6 * 1024**3
    assert len(grid.tiles) > 4


def test_counted_work_is_what_the_convolutions_do(monkeypatch):
    """The count against multiply-adds recorded while real layers run on a tile."""
    monkeypatch.setattr(
        wan, "fast_on_cpu", lambda *_: nullcontext()
    )  # the core's own layers, one by one
    vae = wan21_vae()
    latent = random_latent(16, 3, 20, 24)
    tiled = TiledDecoder(vae, latent)
    grid = TileGrid(20, 24, 2, 2)
    recorded = []

    def record(module, _args, output):
        kernel = module.weight[0].numel() * output.shape[1]
        recorded.append(kernel * output[:, 0].numel())

    convs = convolutions(vae.first_stage_model)
    handles = [conv.register_forward_hook(record) for conv in convs]
    decode_in(grid, vae, latent, monkeypatch)
    for handle in handles:
        handle.remove()
    # Per latent frame after the first; the attention's projections belong to the whole frame.
    first_frame_only = sum(recorded)
    recorded.clear()
    handles = [conv.register_forward_hook(record) for conv in convs]
    decode_in(grid, vae, latent[:, :, :1].repeat(1, 1, 5, 1, 1), monkeypatch)
    for handle in handles:
        handle.remove()
    per_latent = (sum(recorded) - first_frame_only) / 2
    z_macs = 16 * 16 * 20 * 24  # `conv2`, outside the decoder
    assert tiled.cost.macs(grid) == pytest.approx(per_latent - z_macs, rel=1e-6)


@pytest.mark.parametrize("attend", [middle.sliced_attention, middle.fused_attention])
def test_attention_is_the_cores(monkeypatch, attend):
    monkeypatch.setattr(middle, "ATTENTION_SCORE_BYTES", 7 * 120 * 4)
    q, k, v = torch.randn(3, 2, 32, 10, 12, generator=torch.Generator().manual_seed(1))
    expected = media.plain_attention(q, k, v)
    flat = [[frame.flatten(1).T for frame in x] for x in (q, k, v)]
    ours = torch.stack([attend(*frame).T.view(32, 10, 12) for frame in zip(*flat, strict=True)])
    assert (ours - expected).abs().max() <= 1e-6


def test_less_memory_means_smaller_tiles():
    cost = real_size(270, 480)
    small = grid_within(cost, 1024**3)
    large = grid_within(cost, 4 * 1024**3)
    assert cost.peak_bytes(small) <= 1024**3 < cost.peak_bytes(large) <= 4 * 1024**3
    assert cost.macs(small) > cost.macs(large)
    assert frugal_grid(cost, 1024**3, DECODE_WORK_LIMIT) == small


@pytest.mark.parametrize("rows_cols", [(4, 6), (2, 4)])
def test_modelled_memory_is_what_a_real_tile_takes(rows_cols):
    """The model against the tensors of real 4K tiles in bfloat16, traced without allocating."""
    cost = real_size(270, 480)
    grid = TileGrid(270, 480, *rows_cols)
    tile = grid.tiles[grid.cols * (grid.rows // 2) + grid.cols // 2]
    peak = traced_peak(cost, tile)
    assert peak <= cost.peak_bytes(grid) <= 1.5 * peak


def test_the_tiles_of_a_4k_frame_take_under_six_gibibytes():
    cost = real_size(270, 480)
    grid = frugal_grid(cost, 24 * 1024**3, DECODE_WORK_LIMIT)
    inner = grid.tiles[grid.cols + 1]
    assert traced_peak(cost, inner) <= 6 * 1024**3


def traced_peak(cost: CostModel, tile: Region) -> int:
    decoder = real_decoder()
    regions = cost.regions(tile)
    cache = decoder.cache(9)
    size = regions[0].rows.size, regions[0].cols.size
    with torch.inference_mode(), MemoryTrace() as trace:
        for chunk in decoder.chunks(9)[:4]:
            shape = (1, decoder.feature_channels, chunk.stop - chunk.start, *size)
            features = torch.empty(shape, dtype=torch.bfloat16, device="meta")
            decoder.pixels(features, cache, regions, chunk.start == 0)
    return trace.peak

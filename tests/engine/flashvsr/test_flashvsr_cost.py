"""What an up-scaling is said to cost, against counted operations and live tensors."""

from contextlib import nullcontext

import pytest
import torch
from atlasvid.engine.comfyui import models
from atlasvid.engine.device.chunks import ChunkSize
from atlasvid.engine.families.tiny import wan_state
from atlasvid.engine.flashvsr import cost, tc_decoder
from atlasvid.engine.flashvsr import projection as projection_module
from atlasvid.engine.flashvsr.blocks import TOKENS, BlockGrid
from atlasvid.engine.flashvsr.memory import Places, Sizes, choose_places
from atlasvid.engine.flashvsr.projection import LowQualityProjection, ProjectionStream
from atlasvid.engine.flashvsr.schedule import Schedule
from atlasvid.engine.flashvsr.selection import PUBLISHED, Sparsity
from atlasvid.engine.flashvsr.tc_decoder import TCDecoder, TCRun, Widths
from atlasvid.engine.flashvsr.transformer import OneStep
from atlasvid.engine.geometry.shape import BaseShape
from memory_trace import MemoryTrace
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

GIB = 2**30
REAL = BaseShape(1536, 8960, 30, 16)


FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def of_fused_attention(query, key, value, *_args, out_shape=None, **_options):
    return sdpa_flop_count(query, key, value)


def counted(call):
    counter = FlopCounterMode(display=False, custom_mapping={FUSED: of_fused_attention})
    with torch.no_grad(), counter:
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize("sparsity", [Sparsity(), Sparsity(0.5, 1.0, 3)])
def test_the_transformers_work_is_what_is_counted(sparsity):
    """But for ties at the threshold, which are dropped, and the few products of the set-up."""
    grid, schedule = BlockGrid(2, 3), Schedule(29)
    net = models.build_wan(dim=256, ffn_dim=1024, num_heads=2, num_layers=2, text_dim=4096)
    net.load_state_dict(wan_state(0, num_layers=2))
    shape, prompt = BaseShape(256, 1024, 2, 16), torch.randn(1, 7, 4096)
    places = Places(1, True, True, True, True, 4096)
    step = OneStep(net.eval(), prompt, torch.empty(0), grid, sparsity, places)
    noise, shown = torch.randn(16, 32, 48), torch.randn(16, 24, 256)
    chunks = schedule.chunks()
    made = counted(lambda: list(step(chunks, lambda t: noise, lambda t: shown)))
    tokens = cost.token_count(schedule, grid)
    said = cost.transformer_flops(shape, tokens, prompt.shape[1])
    said += cost.attention_flops(shape, grid, schedule, sparsity)
    assert said == pytest.approx(made, rel=0.02)


def test_the_projections_and_the_decoders_work_is_what_is_counted(monkeypatch):
    for module in (projection_module, tc_decoder):  # whose fast layers the counter does not know
        monkeypatch.setattr(module, "fast_on_cpu", lambda *_: nullcontext())
    grid, frames = BlockGrid(1, 2), torch.rand(3, 4, 128, 256)
    widths = (8, 16, 24)
    projection = LowQualityProjection(widths).requires_grad_(False)
    for parameter in projection.parameters():
        torch.nn.init.normal_(parameter)
    whole = ProjectionStream(projection, "v1", 2**20)
    made = counted(lambda: whole.tokens(frames))
    assert made == pytest.approx(cost.projection_flops(widths, grid, 1), rel=0.3)  # padding

    decoder = TCDecoder(Widths(16, 12, 8, 8)).requires_grad_(False)
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    run = TCRun(decoder, torch.device("cpu"), ChunkSize(2**40))
    latent, shown = torch.randn(1, 16, 16, 32), torch.rand(4, 3, 128, 256)
    made = counted(lambda: run.step(latent, shown))
    assert made == cost.decoder_flops(decoder.widths, grid, 1)


def test_the_decoders_memory_is_that_of_its_live_tensors():
    grid, widths, stripe = BlockGrid(2, 3), Widths(512, 256, 128, 128), 2**24
    decoder = TCDecoder(widths, device="meta").requires_grad_(False)
    run = TCRun(decoder, torch.device("meta"), ChunkSize(stripe))
    latent, shown = (torch.empty(s, device="meta") for s in ((1, 16, 32, 48), (4, 3, 256, 384)))
    with MemoryTrace() as trace:
        for _ in range(3):
            run.step(latent, shown)
    said = cost.decoder_bytes(widths, grid, 4)
    assert said + stripe == pytest.approx(trace.peak, rel=0.03)


def test_published_sizes_cost_what_the_readme_says():
    """Per output frame at 1024 x 1920, far into a clip."""
    grid, short, long = BlockGrid(8, 15), Schedule(805), Schedule(1605)
    frames = long.decoded - short.decoded
    tokens = cost.token_count(long, grid) - cost.token_count(short, grid)
    work = [
        cost.transformer_flops(REAL, tokens, 512),
        cost.attention_flops(REAL, grid, long, PUBLISHED)
        - cost.attention_flops(REAL, grid, short, PUBLISHED),
        cost.projection_flops((2048, 3072, 1536), grid, frames // 4),
        cost.decoder_flops(Widths(512, 256, 128, 128), grid, frames // 4),
    ]
    assert [round(each / frames / 1e12, 1) for each in work] == [5.0, 5.4, 1.3, 3.3]
    assert cost.latent_bytes(Schedule(21), BlockGrid(1, 1)) == 16 * 6 * 16 * 16 * 4
    assert cost.frame_bytes(3, (2, 5), 8) == 90
    assert cost.frame_bytes(3, (2, 5), 10) == 180


def test_a_clip_that_the_host_keeps_is_one_piece_without_kept_keys():
    """At 4K all blocks' keys are 36 GiB; 81 frames need none of them once a block is done."""
    grid, schedule = BlockGrid(17, 30), Schedule(81)
    sizes = Sizes.of(grid, REAL, PUBLISHED, 2)
    whole = choose_places(sizes, 10 * GIB, 16 * GIB, 65_536, schedule.count)
    assert whole.chunks == schedule.count
    assert sizes.on_host(whole, schedule.count) == sizes.slot * schedule.latent_frames // 2
    assert sizes.on_device(whole) < 10 * GIB
    long = Schedule(4001)
    pieces = choose_places(sizes, 10 * GIB, 16 * GIB, 65_536, long.count)
    need = sizes.on_host(pieces, long.count)
    assert need > 30 * GIB
    frames = cost.frames_at_a_time(sizes, 16 * GIB)
    with pytest.raises(ValueError, match=rf"3\d.\d GiB of .* at most {frames} frames at a time"):
        cost.require_host_memory(need, 32 * GIB, frames)
    for length, fits in ((frames, True), (frames + 8, False)):
        count = Schedule(length).count
        chosen = choose_places(sizes, 10 * GIB, 16 * GIB, 65_536, count)
        assert (chosen.chunks == count) is fits
    cost.require_host_memory(need, 64 * GIB, frames)
    with pytest.raises(ValueError, match=r"are there. Choose a smaller size"):
        cost.require_host_memory(need, GIB, cost.frames_at_a_time(sizes, GIB))


def test_a_piece_that_is_the_last_leaves_no_keys():
    grid = BlockGrid(1, 1)
    net = models.build_wan(dim=128, ffn_dim=128, num_heads=1, num_layers=2, text_dim=4096)
    net.load_state_dict(wan_state(1, dim=128, ffn_dim=128, num_heads=1, num_layers=2))
    held = []
    for size, most in ((2, 2), (9, 1)):  # in blocks whose keys are kept at a time
        places = Places(size, False, True, True, False, 4096)
        step = OneStep(net.eval(), torch.randn(1, 3, 4096), torch.empty(0), grid, PUBLISHED, places)
        step.at_block = lambda step=step: held.append(len(step.memory.of_blocks))
        with torch.no_grad():
            list(
                step(
                    Schedule(37).chunks(),
                    lambda t: torch.zeros(16, 16, 16),
                    lambda t: torch.zeros(8, 8, 128),
                )
            )
        assert max(held) == most
        assert not step.memory.of_blocks
        held.clear()


def test_what_the_node_shows():
    need = cost.Need(
        81, (2160, 3840), 3 * TOKENS, cost.Work(1e12, 2e12, 3e12, 4e12), GIB, 5, 2 * GIB, 10**6, "x"
    )
    first, second = need.lines(host_only=False).split("\n")
    assert first == "3840 x 2160 x 81, 384 tokens, 10 TFLOP, x"
    assert second == (
        "1.0 GiB of card memory, 2.0 GiB of host memory beside the weights, "
        "977 KiB of temporary disk space"
    )
    assert need.lines(host_only=True).split("\n")[1].startswith("3.0 GiB of memory beside")

"""FlashVSR's transformer against the published method written out densely."""

import time

import pytest
import torch
from atlasvid.engine.comfyui import models
from atlasvid.engine.device.outbox import Outbox
from atlasvid.engine.families.tiny import wan_state
from atlasvid.engine.flashvsr import transformer
from atlasvid.engine.flashvsr.blocks import BlockGrid
from atlasvid.engine.flashvsr.memory import Places, Sizes, choose_places
from atlasvid.engine.flashvsr.noise import placed_noise
from atlasvid.engine.flashvsr.rotations import BlockRotations
from atlasvid.engine.flashvsr.schedule import Chunk, Schedule
from atlasvid.engine.flashvsr.selection import Sparsity
from atlasvid.engine.flashvsr.transformer import OneStep
from atlasvid.engine.geometry.shape import BaseShape
from flashvsr_dit_reference import DenseFlashVSR

STREAM = Places(1, True, True, True, True, 4096)
BLOCKWISE = Places(3, False, True, True, False, 4096)
HOST = Places(2, False, False, False, False, 128)


@pytest.fixture(scope="module")
def small():
    """A Wan of two blocks and heads with its weights, and a prompt."""
    state = wan_state(0, num_layers=2)
    net = models.build_wan(dim=256, ffn_dim=1024, num_heads=2, num_layers=2, text_dim=4096)
    net.load_state_dict(state)
    prompt = torch.randn(1, 7, 4096, generator=torch.Generator().manual_seed(9))
    return net.eval(), state, prompt


def inputs(grid, frames, seed=3):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(16, frames, grid.rows * 16, grid.columns * 16, generator=generator)
    shown = torch.randn(frames, grid.rows * 8, grid.columns * 8, 256, generator=generator)
    return noise, shown


def evaluated(small, grid, sparsity, noise, shown, places=STREAM):
    """Our latent [16, T, h, w] in the dtype of the noise's model."""
    net, _, prompt = small
    with torch.no_grad():
        step = OneStep(net, prompt, torch.empty(0), grid, sparsity, places)
        chunks = Schedule(4 * noise.shape[1] - 3).chunks()
        parts = list(step(chunks, lambda t: noise[:, t], lambda t: shown[t]))
    assert [first for first, _ in parts] == list(range(0, noise.shape[1], 2))
    return torch.cat([part[0] for _, part in parts], dim=1)


def published(small, sparsity, noise, shown):
    _, state, prompt = small
    settings = sparsity.sparse_ratio, sparsity.kv_ratio, sparsity.local_range
    double = {name: value.double() for name, value in state.items()}
    return DenseFlashVSR(double, prompt[0].double(), 2, *settings)(noise.double(), shown.double())


@pytest.mark.parametrize(
    ("grid", "frames", "sparsity"),
    [
        (BlockGrid(1, 1), 6, Sparsity()),
        (BlockGrid(1, 3), 10, Sparsity(2.0, 3.0, 3)),
        (BlockGrid(2, 2), 8, Sparsity(0.1, 1.0, 11)),
        (BlockGrid(3, 1), 12, Sparsity(0.05, 5.0, 2)),
    ],
)
def test_latents_equal_the_published_method(small, grid, frames, sparsity):
    noise, shown = inputs(grid, frames)
    ours = evaluated(small, grid, sparsity, noise, shown)
    theirs = published(small, sparsity, noise, shown)
    torch.testing.assert_close(ours.double(), theirs, atol=1e-4, rtol=0)


def test_a_query_block_without_keys_is_part_of_the_comparison(small):
    """The smallest ratio above leaves rows empty; were it not so, zeros would go untested."""
    empty = []
    original = transformer.chosen

    def watched(*args):
        kept = original(*args)
        empty.append(bool((kept.sum(dim=1) == 0).any()))
        return kept

    transformer.chosen = watched
    try:
        evaluated(small, BlockGrid(3, 1), Sparsity(0.05, 5.0, 2), *inputs(BlockGrid(3, 1), 12))
    finally:
        transformer.chosen = original
    assert any(empty)


@pytest.mark.parametrize("places", [BLOCKWISE, HOST])
def test_every_order_of_work_gives_the_same_bits(small, places):
    grid, sparsity = BlockGrid(2, 2), Sparsity(0.5, 2.0, 3)
    noise, shown = inputs(grid, 14)
    streamed = evaluated(small, grid, sparsity, noise, shown)
    assert torch.equal(evaluated(small, grid, sparsity, noise, shown, places), streamed)


def test_late_results_are_waited_for(small, monkeypatch):
    """What goes to host memory arrives after the next work has begun."""
    take = Outbox._take

    def late(self, *args):
        time.sleep(0.003)
        take(self, *args)

    monkeypatch.setattr(Outbox, "_take", late)
    grid, sparsity = BlockGrid(1, 2), Sparsity(0.5, 2.0, 3)
    noise, shown = inputs(grid, 10)
    streamed = evaluated(small, grid, sparsity, noise, shown)
    assert torch.equal(evaluated(small, grid, sparsity, noise, shown, HOST), streamed)


def test_a_longer_clip_begins_like_a_shorter_one(small):
    grid, sparsity = BlockGrid(1, 2), Sparsity()
    noise, shown = inputs(grid, 12)
    long = evaluated(small, grid, sparsity, noise, shown)
    short = evaluated(small, grid, sparsity, noise[:, :8], shown[:8])
    assert torch.equal(long[:, :8], short)


def test_only_differences_of_time_matter_however_late(small):
    """Past 4,200 frames, and in bf16 past latent frame 257, where stock positions collapse."""
    net, _, prompt = small
    grid, sparsity = BlockGrid(1, 1), Sparsity()
    noise, shown = inputs(grid, 6)
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.1)):
        cast = models.build_wan(dim=256, ffn_dim=1024, num_heads=2, num_layers=2, text_dim=4096)
        cast.load_state_dict(net.state_dict())
        cast.to(dtype).patch_embedding.float()  # as the stock loader keeps it
        latents = []
        for start in (0, 1100):
            with torch.no_grad():
                step = OneStep(cast, prompt, torch.empty(0, dtype=dtype), grid, sparsity, STREAM)
                late = [Chunk(start, start + 6)]
                given = shown.to(dtype)
                parts = step(
                    late,
                    lambda t, start=start: noise[:, t - start],
                    lambda t, start=start, given=given: given[t - start],
                )
                latents.append(torch.cat([part[0] for _, part in parts], dim=1))
        torch.testing.assert_close(latents[0], latents[1], atol=tolerance, rtol=0)


def test_rotations_equal_stock_ones_and_go_on_where_those_collapse(small):
    net, _, _ = small
    grid = BlockGrid(1, 2)
    ours = BlockRotations(net.rope_embedder, grid, torch.device("cpu")).of(4, 1, 2)
    place = torch.cartesian_prod(torch.arange(4, 6), torch.arange(0, 8), torch.arange(8, 16))
    stock = net.rope_embedder(place.float()[None]).movedim(1, 2)
    torch.testing.assert_close(ours, stock, atol=2e-6, rtol=0)
    late = BlockRotations(net.rope_embedder, grid, torch.device("cpu")).of(5000, 0, 1)[0]
    assert (late[0] - late[64]).abs().max() > 0.1  # neighbours in time differ


def test_a_clip_past_the_published_ceiling_goes_on(small):
    """The published table of positions ends at chunk 510: 4,093 frames."""
    prompt = small[2]
    one = models.build_wan(dim=128, ffn_dim=128, num_heads=1, num_layers=1, text_dim=4096)
    one.load_state_dict(wan_state(1, dim=128, ffn_dim=128, num_heads=1, num_layers=1))
    grid, schedule = BlockGrid(1, 1), Schedule(4253)
    noise = torch.randn(16, 16, 16)
    shown = torch.randn(8, 8, 128)
    with torch.no_grad():
        step = OneStep(one.eval(), prompt, torch.empty(0), grid, Sparsity(), STREAM)
        latents = dict(step(schedule.chunks(), lambda t: noise, lambda t: shown))
    assert len(latents) == schedule.latent_frames // 2 == 532
    torch.testing.assert_close(latents[1060], latents[300], atol=1e-4, rtol=0)
    assert sum(len(slots) for slots in step.memory.of_blocks.values()) == 3


def test_noise_depends_on_its_place_alone():
    small, large = BlockGrid(1, 2), BlockGrid(2, 3)
    assert torch.equal(placed_noise(7, 3, large)[:, :16, :32], placed_noise(7, 3, small))
    different = [placed_noise(7, 3, small), placed_noise(8, 3, small), placed_noise(7, 4, small)]
    assert len({float(noise[0, 0, 0]) for noise in different}) == 3
    values = torch.stack([placed_noise(1, t, large) for t in range(20)])
    assert abs(values.mean()) < 0.01
    assert abs(values.std() - 1) < 0.01
    tiles = values.unflatten(-1, (3, 16))
    assert abs((tiles[..., 0, :] * tiles[..., 1, :]).mean()) < 0.02  # blocks are not copies


@pytest.mark.parametrize("frames", [1, 2, 20, 21, 22, 28, 29, 161])
def test_no_frame_is_lost(frames):
    schedule = Schedule(frames)
    chunks = list(schedule.chunks())
    assert schedule.read % 8 == 1
    assert schedule.decoded >= frames
    assert schedule.decoded - frames < 8 or frames < 21
    assert [chunk.first for chunk in chunks[1:]] == [chunk.stop for chunk in chunks[:-1]]
    assert chunks[-1].stop == schedule.latent_frames == (schedule.decoded + 3) // 4
    if frames in (21, 29):
        assert schedule.decoded == frames  # the published lengths as they are


def test_places_follow_what_is_free():
    sizes = Sizes.of(BlockGrid(8, 15), BaseShape(1536, 8960, 30, 16), Sparsity(), 2)
    gib = 2**30
    roomy = choose_places(sizes, 40 * gib, 64 * gib, 65_536)
    assert (roomy.chunks, roomy.keys_stay) == (1, True)
    middle = choose_places(sizes, 6 * gib, 64 * gib, 65_536)
    assert middle.chunks > 1
    assert middle.keys_on_device
    assert not middle.keys_stay
    least = choose_places(sizes, gib, 64 * gib, 65_536)
    assert not least.keys_on_device
    assert choose_places(sizes, gib, gib, 65_536).chunks == 1

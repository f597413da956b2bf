import comfy.ldm.flux.math
import pytest
import torch
from atlasvid.engine.branch import weighted
from atlasvid.engine.branch.block_task import BlockTask
from atlasvid.engine.branch.compiled import parts_of
from atlasvid.engine.branch.evaluation import Evaluation
from atlasvid.engine.branch.memory import (
    CUDA_CHUNK,
    MIN_CHUNK,
    MemoryPlan,
    Workload,
    plan_memory,
    room_to_ask_for,
    wanted_bytes,
)
from atlasvid.engine.branch.run import SamplingRun
from atlasvid.engine.branch.settings import DetailSettings
from atlasvid.engine.branch.shifted import ShiftedAttention
from atlasvid.engine.comfyui import models
from atlasvid.engine.device import copies
from atlasvid.engine.device.budget import GIB, parse_budget
from atlasvid.engine.device.chunks import ChunkSize
from atlasvid.engine.device.tokens import DeviceTokens
from atlasvid.engine.families import wan as wan_family
from atlasvid.engine.families.rotations import RopeAxes
from atlasvid.engine.geometry.alignment import GuideAlignment
from atlasvid.engine.geometry.grid import Grid
from atlasvid.engine.geometry.layout import Layout
from atlasvid.engine.geometry.windows import COMPACT, ShiftedWindows
from memory_trace import MemoryTrace
from wan import plan_of

META = torch.device("meta")


def wan_1_3b(**changes):
    """4K x 161 frames with the 1.3B model, compact windows, a clean guide, bf16."""
    sizes = {
        "dim": 1536,
        "ffn_dim": 8960,
        "layers": 30,
        "itemsize": 2,
        "tokens": 1_328_400,
        "guide_tokens": 17_490,
        "ring_tokens": 0,
        "window_keys": 1_099,
        "keep_guide": True,
    }
    return Workload(**(sizes | changes))


def used(work, plan):
    """What a plan puts onto the device."""
    total = work.least_chunk_bytes + (work.ring_bytes if plan.ring_on_device else 0)
    total += (plan.chunk - min(work.least_chunk, plan.chunk)) * work.bytes_per_chunk_token
    total += work.token_bytes if plan.tokens_on_device else 0
    return total + (work.guide_bytes if plan.guide == "device" else 0)


def test_sizes_are_those_of_the_method():
    work = wan_1_3b()
    assert work.token_bytes == pytest.approx(4.1e9, rel=0.01)
    assert work.guide_bytes == 30 * 2 * 17_490 * 1536 * 2
    assert wan_1_3b(keep_guide=False).guide_bytes == 2 * 17_490 * 1536 * 2


@pytest.mark.parametrize("free", [x * GIB for x in (1, 2, 4, 6, 8, 12, 24, 80)])
@pytest.mark.parametrize("changes", [{}, {"ring_tokens": 300_000}, {"keep_guide": False}])
def test_a_plan_fits_into_what_is_free(free, changes):
    work = wan_1_3b(**changes)
    plan = plan_memory(work, free, 64 * GIB, CUDA_CHUNK)
    assert MIN_CHUNK <= plan.chunk <= CUDA_CHUNK
    assert used(work, plan) <= max(free, work.least_chunk_bytes)


def test_more_memory_is_used_in_order():
    work = wan_1_3b()
    places = [
        (plan.tokens_on_device, plan.guide)
        for plan in (plan_memory(work, gib * GIB, 64 * GIB, CUDA_CHUNK) for gib in (2, 6, 24))
    ]
    assert places == [(False, "host"), (True, "host"), (True, "device")]


def test_a_ring_goes_onto_the_device_before_the_tokens():
    """Neighbouring tiles share keys, so those are read several times."""
    work = wan_1_3b(ring_tokens=600_000)
    assert work.ring_bytes < work.token_bytes
    places = [
        (plan.ring_on_device, plan.tokens_on_device)
        for plan in (plan_memory(work, gib * GIB, 64 * GIB, CUDA_CHUNK) for gib in (2, 5, 24))
    ]
    assert places == [(False, False), (True, False), (True, True)]


def test_a_guide_that_fits_nowhere_is_recomputed():
    assert plan_memory(wan_1_3b(), 2 * GIB, 4 * GIB, CUDA_CHUNK).guide == "recompute"
    assert plan_memory(wan_1_3b(keep_guide=False), 99 * GIB, 99 * GIB, 1).guide == "recompute"


def test_tokens_stream_where_they_would_displace_weights():
    work, latent = wan_1_3b(), 4 * 16 * 41 * 270 * 480
    everything = wanted_bytes(work, latent)
    assert room_to_ask_for(work, latent, everything) == everything
    assert room_to_ask_for(work, latent, everything - 1) == everything - work.token_bytes
    assert room_to_ask_for(work, latent, -GIB) == everything - work.token_bytes


def test_wanted_is_far_below_a_full_forward():
    """ComfyUI's own estimate for this latent is about 70 GiB."""
    latent = 4 * 16 * 41 * 270 * 480
    assert 6 * GIB < wanted_bytes(wan_1_3b(), latent) < 12 * GIB


@pytest.mark.parametrize(
    ("text", "size"), [("auto", None), ("4 GB", 4 * GIB), ("0.5 GB", GIB // 2)]
)
def test_budgets(text, size):
    assert parse_budget(text) == size


@pytest.mark.parametrize("text", ["4", "GB", "-1 GB", "0 GB", "4 MB", "much"])
def test_a_wrong_budget_is_refused(text):
    with pytest.raises(ValueError, match='write "auto" or a size such as "4 GB"'):
        parse_budget(text)


def rounding_kernel(_, q, k, v, heads, **kwargs):
    """What a kernel such as SageAttention allocates: 8-bit copies, values transposed, a result."""
    copies = [torch.empty_like(x, dtype=torch.int8) for x in (q, k, v)], torch.empty_like(v)
    assert copies
    return torch.empty_like(q)


def chunk_peak(dim, ffn_dim, window, chunk, weight):
    """Tokens of one chunk of a real block, and the most bytes that it holds at a time."""
    with META:
        wan = models.build_wan(dim=dim, ffn_dim=ffn_dim, num_heads=dim // 128, num_layers=1)
    wan = wan.bfloat16()
    grid, guide_grid = Grid(41, 60, 104), Grid(11, 30, 52)
    alignment = GuideAlignment(grid, guide_grid, 4, window)
    rope = RopeAxes(wan.rope_embedder, {})
    attention = ShiftedAttention(ShiftedWindows(grid, window), alignment, rope)

    def vectors(*shape):
        return torch.empty((*shape, dim), dtype=torch.bfloat16, device=META)

    layout = Layout(plan_of((41, 120, 208), (11, 60, 104)), window)
    settings = DetailSettings(layout, "matched", proxy=vectors(1), guide_weight=weight)
    ev = Evaluation(
        base=None,
        net=wan,
        family=wan_family,
        settings=settings,
        run=SamplingRun(seed=0),
        options={"optimized_attention_override": rounding_kernel},
        x=vectors(1),
        timestep=vectors(1),
        text=wan_family.Text(vectors(1, 512), None),
        parts=parts_of(wan_family, None),
        memory=MemoryPlan(chunk, True, True, "device"),
        chunk=ChunkSize(chunk),
    )
    task = BlockTask(
        ev,
        wan.blocks[0],
        DeviceTokens(vectors(grid.count)),
        wan_family.Modulation(tuple(vectors(1) for _ in range(6))),
        ev.text,
        (vectors(guide_grid.count), vectors(guide_grid.count)),
    )
    order = attention.order(0, META, META)
    stop = ev.chunk.stop(0, order.ends)
    with torch.no_grad(), MemoryTrace() as trace:
        for known in (task.tokens.values, *wan.parameters()):  # not counted when viewed later
            known.zero_()
        before = trace.live
        attention._evaluate(task, order, 0, stop)
    return order.ends[stop - 1], trace.peak - before


@pytest.fixture
def on_meta(monkeypatch):
    """Replaces what needs a real device."""
    flash = torch.ops.aten._scaled_dot_product_flash_attention  # what a card would use
    monkeypatch.setattr(
        weighted, "_attention_with_sums", lambda *_: lambda q, k, v: flash(q, k, v)[:2]
    )
    monkeypatch.setattr(models, "apply_rope", comfy.ldm.flux.math._apply_rope1)
    monkeypatch.setattr(
        copies, "Mark", lambda device: type("Mark", (), {"wait": lambda self: None})()
    )


@pytest.mark.parametrize(("dim", "ffn_dim"), [(1536, 8960), (3072, 14336), (5120, 13824)])
@pytest.mark.parametrize("window", [COMPACT, Grid(21, 30, 52)], ids=["compact", "trained"])
@pytest.mark.parametrize("weight", [1, 8])
def test_a_chunk_takes_what_the_plan_says(on_meta, dim, ffn_dim, window, weight):
    keys = window.count * 9 // 8  # and some of the guide's
    work = wan_1_3b(dim=dim, ffn_dim=ffn_dim, guide_tokens=0, window_keys=keys)
    tokens, peak = chunk_peak(dim, ffn_dim, window, 65_536, weight)
    assert 0.6 < peak / (tokens * work.bytes_per_chunk_token) < 0.85
    # The smallest chunk of all: one window, its feed-forward in parts of `least_chunk`.
    tokens, peak = chunk_peak(dim, ffn_dim, window, work.least_chunk, weight)
    assert tokens <= max(window.count, work.least_chunk)
    assert 0.5 < peak / work.least_chunk_bytes < 1


def test_a_small_budget_still_feeds_the_feed_forward_well():
    """Offloaded weights travel once per chunk."""
    work = wan_1_3b(dim=5120, ffn_dim=13824, layers=40, window_keys=33_488)
    assert plan_memory(work, 2 * GIB, 64 * GIB, CUDA_CHUNK).chunk > 30_000

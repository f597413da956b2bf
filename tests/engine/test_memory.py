import pytest
from atlasvid.engine.memory import (
    CUDA_CHUNK,
    GIB,
    MIN_CHUNK,
    Workload,
    parse_budget,
    plan_memory,
    wanted_bytes,
)


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
    total = work.least_chunk_bytes + work.ring_bytes
    total += (plan.chunk - MIN_CHUNK) * work.bytes_per_chunk_token
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
    least = work.least_chunk_bytes + work.ring_bytes
    assert used(work, plan) <= max(free, least)


def test_more_memory_is_used_in_order():
    work = wan_1_3b()
    places = [
        (plan.tokens_on_device, plan.guide)
        for plan in (plan_memory(work, gib * GIB, 64 * GIB, CUDA_CHUNK) for gib in (2, 6, 24))
    ]
    assert places == [(False, "host"), (True, "host"), (True, "device")]


def test_a_guide_that_fits_nowhere_is_recomputed():
    assert plan_memory(wan_1_3b(), 2 * GIB, 4 * GIB, CUDA_CHUNK).guide == "recompute"
    assert plan_memory(wan_1_3b(keep_guide=False), 99 * GIB, 99 * GIB, 1).guide == "recompute"


def test_wanted_is_far_below_a_full_forward():
    """ComfyUI's own estimate for this latent is about 70 GiB."""
    latent = 4 * 16 * 41 * 270 * 480
    assert 8 * GIB < wanted_bytes(wan_1_3b(), latent) < 16 * GIB


@pytest.mark.parametrize(
    ("text", "size"), [("auto", None), ("4 GB", 4 * GIB), ("0.5 GB", GIB // 2)]
)
def test_budgets(text, size):
    assert parse_budget(text) == size


@pytest.mark.parametrize("text", ["4", "GB", "-1 GB", "0 GB", "4 MB", "much"])
def test_a_wrong_budget_is_refused(text):
    with pytest.raises(ValueError, match='write "auto" or a size such as "4 GB"'):
        parse_budget(text)

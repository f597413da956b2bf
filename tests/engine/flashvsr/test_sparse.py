"""Attention over chosen blocks against a dense masked one."""

import pytest
import torch
from atlasvid.engine.comfyui import management
from atlasvid.engine.device.chunks import ChunkSize
from atlasvid.engine.flashvsr.attention import equal_counts, sparse_attention
from atlasvid.engine.flashvsr.blocks import BlockGrid
from atlasvid.engine.flashvsr.kernel import block_sparse_attention, disagreement, guarded
from atlasvid.engine.flashvsr.selection import Sparsity, chosen


def dense(q, k, v, kept):
    mask = kept.repeat_interleave(128, 0).repeat_interleave(128, 1)
    scores = q.flatten(0, 1) @ k.flatten(0, 1).T / q.shape[-1] ** 0.5
    share = scores.masked_fill(~mask, -torch.inf).softmax(-1).nan_to_num(0)
    return (share @ v.flatten(0, 1)).view_as(q)


def blocks(queries, keys, width=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    make = lambda n: torch.randn(n, 128, width, generator=generator)  # noqa: E731
    return make(queries), make(keys), make(keys)


@pytest.mark.parametrize("density", [0.0, 0.05, 0.4, 1.0])
@pytest.mark.parametrize("budget", [1, 10**9])
def test_gathered_attention_equals_a_dense_masked_one(density, budget):
    q, k, v = blocks(5, 9)
    kept = torch.rand(5, 9, generator=torch.Generator().manual_seed(2)) < density
    ours = sparse_attention(q, k, v, kept, ChunkSize(budget))
    torch.testing.assert_close(ours, dense(q, k, v, kept), atol=1e-5, rtol=0)


def test_what_does_not_fit_is_halved(monkeypatch):
    q, k, v = blocks(8, 4)
    kept = torch.ones(8, 4, dtype=torch.bool)
    sizes = []

    def scarce(q, *rest, **named):
        sizes.append(q.shape[1])
        if q.shape[1] > 2:
            raise torch.OutOfMemoryError("no room")
        return original(q, *rest, **named)

    original = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", scarce)
    monkeypatch.setattr(
        management, "is_out_of_memory", lambda error: isinstance(error, torch.OutOfMemoryError)
    )
    ours = sparse_attention(q, k, v, kept, ChunkSize(10**9))
    torch.testing.assert_close(ours, dense(q, k, v, kept), atol=1e-5, rtol=0)
    assert sizes[:3] == [8, 4, 2]


def test_every_query_block_is_in_one_group():
    kept = torch.tensor([[0, 1, 1], [0, 0, 0], [1, 0, 1], [1, 1, 1]], dtype=torch.bool)
    groups = {
        len(columns[0]): (rows.tolist(), columns.tolist()) for rows, columns in equal_counts(kept)
    }
    assert groups == {2: ([0, 2], [[1, 2], [0, 2]]), 3: ([3], [[0, 1, 2]])}


def test_flex_attention_agrees_where_it_runs():
    """Not compiled, it is PyTorch's own dense reference of the same block mask."""
    from torch.nn.attention.flex_attention import flex_attention

    attend = block_sparse_attention(flex_attention)
    assert disagreement(attend, torch.device("cpu"), torch.float32) < 1e-5
    wrong = lambda q, k, v, kept, chunk: attend(q, k, v, kept.roll(1, 1), chunk)  # noqa: E731
    assert disagreement(wrong, torch.device("cpu"), torch.float32) > 0.1


def test_the_threshold_is_strict_and_shared_by_a_slot():
    """Four equal scores at the threshold: all are dropped, though the budget had room for two."""
    queries = torch.tensor([[3.0], [1.0]])
    keys = torch.tensor([[1.0], [0.0], [0.0], [0.0]])
    everywhere = torch.ones(2, 2, dtype=torch.bool)
    share = (queries @ keys.T).softmax(-1)
    assert (
        chosen(queries, keys, everywhere, 1).tolist()
        == (share > share.flatten().sort(descending=True)[0][1]).tolist()
    )
    tied = chosen(torch.zeros(2, 1), keys, everywhere, 3)
    assert not tied.any()


@pytest.mark.parametrize("local_range", [1, 2, 3, 4, 11])
def test_the_neighbourhood_is_cut_at_borders(local_range):
    grid = BlockGrid(4, 3)
    mask = grid.local_mask(local_range, torch.device("cpu"))
    for i in range(12):
        for j in range(12):
            apart = (j // 3 - i // 3, j % 3 - i % 3)
            low = -(local_range // 2)
            assert mask[i, j] == all(low <= d < low + local_range for d in apart)


def test_block_order_and_back():
    grid = BlockGrid(2, 3)
    tokens = torch.arange(4 * 16 * 24).view(4, 16, 24, 1)
    kept = grid.to_blocks(tokens)
    assert kept.shape == (12, 128, 1)
    assert kept[7, 0, 0] == tokens[2, 0, 8, 0]
    assert torch.equal(grid.to_raster(kept), tokens)


@pytest.mark.parametrize(
    ("kv_ratio", "kept"),
    [(1.0, [2, 2, 2]), (2.9, [2, 2, 2]), (3.0, [3, 3, 3]), (5.0, [3, 4, 5, 5])],
)
def test_the_cache_drops_one_slot_at_a_time(kv_ratio, kept):
    sparsity, slots = Sparsity(kv_ratio=kv_ratio), 0
    for new, expected in zip([3, 1, 1, 1], kept, strict=False):
        slots += new
        slots -= sparsity.forgotten(slots)
        assert slots == expected
    assert sparsity.most_slots >= max(kept) + 1


def test_the_budget_is_sixty_per_ratio_and_block():
    assert Sparsity().budget(BlockGrid(8, 15)) == 60 * 2 * 120 - 1
    assert Sparsity(0.01).budget(BlockGrid(1, 1)) == 0


def test_a_kernel_that_fails_later_is_left_out(caplog):
    q, k, v = blocks(2, 2)
    kept, calls = torch.ones(2, 2, dtype=torch.bool), []

    def failing(*_):
        calls.append(1)
        raise RuntimeError("no longer compiles")

    attend = guarded(failing)
    for _ in range(2):
        given = attend(q, k, v, kept, ChunkSize(2**20))
        assert torch.equal(given, sparse_attention(q, k, v, kept, ChunkSize(2**20)))
    assert len(calls) == 1
    assert caplog.text.count("FlexAttention failed (RuntimeError)") == 1


def test_memory_that_runs_out_is_not_the_kernels_fault():
    def full(*_):
        raise torch.OutOfMemoryError("no room")

    with pytest.raises(torch.OutOfMemoryError):
        guarded(full)(*blocks(2, 2), torch.ones(2, 2).bool(), ChunkSize(2**20))

import math

import pytest
import torch
from atlasvid.engine.branch.apply import apply_detail_branch
from atlasvid.engine.branch.sparsity import keep_blocks
from atlasvid.engine.geometry.grid import Grid
from wan import forward, plan_of, rand, relative_error, small_wan

HEADS, DIM = 2, 16


def attend(q, k, v, mask=None):
    """q [n, L, C], k and v [n, K, C], mask [n, heads, K] -> [n, L, C]."""
    q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (q, k, v))
    logits = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if mask is not None:
        logits = logits.masked_fill(~mask[:, :, None], -math.inf)
    return (logits.softmax(-1) @ v).transpose(1, 2).flatten(-2)


def dense_mask(q, k, size, kept):
    """Which keys every head of every window keeps, by the definition, block by block."""
    f, h, w = size
    block = (min(2, f), min(8, h), min(8, w))
    names = [
        (t // block[0], y // block[1], x // block[2])
        for t in range(f)
        for y in range(h)
        for x in range(w)
    ]
    members = {name: [i for i, n in enumerate(names) if n == name] for name in set(names)}
    whole = sorted(n for n, m in members.items() if len(m) == math.prod(block))
    mask = torch.zeros(len(q), HEADS, len(names), dtype=torch.bool)
    for n in range(len(q)):
        for head in range(HEADS):
            part = slice(head * DIM, (head + 1) * DIM)
            mean_q = q[n, :, part].mean(0)
            score = {b: float(mean_q @ k[n, members[b]][:, part].mean(0)) for b in whole}
            best = sorted(whole, key=lambda b: -score[b])[:kept]
            for name, indices in members.items():
                if name in best or name not in whole:
                    mask[n, head, indices] = True
    return mask


@pytest.mark.parametrize("size", [(4, 16, 16), (5, 17, 20), (1, 9, 30), (2, 8, 8)])
@pytest.mark.parametrize("kept", [1, 3, 100])
def test_gathering_equals_masking(size, kept):
    size = Grid(*size)
    q, k, v = (rand(2, n, HEADS * DIM, seed=n) for n in (40, size.count, size.count + 1))
    v = v[:, 1:]
    few_k, few_v = keep_blocks(q, (k, v), HEADS, size, kept)
    expected = attend(q, k, v, dense_mask(q, k, size, kept))
    assert torch.allclose(attend(q, few_k, few_v), expected, atol=1e-5)
    if size.count > 128 * kept and size == Grid(4, 16, 16):
        assert few_k.shape[1] == 128 * kept


@pytest.mark.parametrize("overlap", ["shifted", "sliding"])
def test_sparsity_in_a_forward(overlap):
    wan = small_wan()
    plan = plan_of((5, 36, 36), (2, 12, 12))
    x, t = rand(1, 16, 5, 36, 36, seed=1), torch.tensor([700.0])
    context, proxy = rand(1, 16, 4096, seed=2), rand(1, 16, 2, 12, 12, seed=3)

    def run(kept):
        patched = apply_detail_branch(
            wan, plan, proxy, Grid(4, 16, 16), "clean", overlap=overlap, keep_blocks=kept
        )
        return forward(patched, x, t, context)

    exact = run(0)
    assert relative_error(run(8), exact) < 1e-6, "a window has eight blocks"
    errors = [relative_error(run(kept), exact) for kept in (6, 1)]
    assert 1e-4 < errors[0] < errors[1]

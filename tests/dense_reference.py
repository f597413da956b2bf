"""The detail branch written densely: explicit masks and per-pair positions, one head at a time.

Independent of the engine: it shares the stock block's linear layers and nothing else.
"""

import math
from contextlib import nullcontext

import torch
import torch.nn.functional as F


def axis_spans(length, window, odd_block, overlap):
    """The first key and the one past the last, [length, 2], of every query along one axis."""
    window = min(window, length)
    index = torch.arange(length)
    if overlap == "sliding":
        tile = max(1, window // 2)
        first = index // tile * tile
        last = (first + tile).clamp(max=length)
        low = ((first + last - window) / 2).floor().clamp(0, length - window).long()
        return torch.stack([low, low + window], 1)
    if window == length:
        return torch.tensor([[0, length]] * length)
    offset = window - window // 2 if odd_block and window > 1 else 0
    low = (index + offset) // window * window - offset
    return torch.stack([low, low + window], 1).clamp(0, length)


def time_positions(count, r):
    return torch.tensor([0.0] + [r * k - 0.375 * (r - 1) for k in range(1, count)])


def space_positions(count, length):
    return torch.tensor([(i + 0.5) * length / count - 0.5 for i in range(count)])


def axis_reads(spans, window, positions, spacing, margin=0):
    """Boolean [length, guide]: which guide indices each target index may read along one axis."""
    aligned = math.floor(min(window, len(spans)) / spacing) + 2
    count = min(len(positions), aligned + 2 * margin)
    reads = torch.zeros(len(spans), len(positions), dtype=torch.bool)
    for i, (low, high) in enumerate(spans.tolist()):
        distance = ((positions - (low + high - 1) / 2).abs() * 1e5).round()
        reads[i, torch.argsort(distance, stable=True)[:count]] = True
    return reads


def turn(x, positions):
    """RoPE of x [L, heads, 128] at positions [L, 3], by complex multiplication."""
    angles = []
    for axis, dim in enumerate((44, 42, 42)):
        freqs = 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        angles.append(positions[:, axis, None].double() * freqs)
    phase = torch.polar(torch.ones(()).double(), torch.cat(angles, 1))[:, None]
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * phase).flatten(-2).float()


def attend(q, k, v, mask, times=None):
    """q [Lq, heads, d], k and v [Lk, heads, d], mask [Lq, Lk] -> [Lq, heads * d].

    `times` [Lk] says how often each key stands in the sum.
    """
    logits = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
    logits = logits.masked_fill(~mask, -math.inf)
    weights = (logits - logits.amax(-1, keepdim=True).detach()).exp()
    if times is not None:
        weights = weights * times
    weights = weights / weights.sum(-1, keepdim=True)
    return torch.einsum("hqk,khd->qhd", weights, v).flatten(1)


def grid_positions(time, height, width):
    return torch.stack(torch.meshgrid(time, height, width, indexing="ij"), -1).flatten(0, 2).float()


def embed(model, latent):
    latent = F.pad(
        latent, (0, latent.shape[-1] % 2, 0, latent.shape[-2] % 2, 0, 0), mode="circular"
    )
    x = model.patch_embedding(latent)
    return x.flatten(2).transpose(1, 2), x.shape[2:]


def time_rows(model, t):
    half = model.freq_dim // 2
    freqs = 10000.0 ** (-torch.arange(half) / half)
    wave = t.flatten()[:, None] * freqs
    e = model.time_embedding(torch.cat([wave.cos(), wave.sin()], 1))
    return e.view(len(t), -1, model.dim)


def dense_forward(
    model,
    x,
    t,
    context,
    window,
    guide=None,
    guide_t=None,
    stride=4,
    clip_fea=None,
    overlap="shifted",
    adapted=nullcontext,
    guide_weight=1.0,
    guide_margin=0,
    target_adapted=nullcontext,
    with_guide=False,
):
    """x [B, C, T, H, W], guide [B, C, F_g, H_g, W_g] already noised -> [B, C_out, T, H, W].

    `adapted()` is entered while the model works on the guide's tokens, `target_adapted()` while it
    works on the target's. Target queries count each guide key `guide_weight` times and read
    `guide_margin` more on each side. With `with_guide`, what the model predicts for the guide
    [B, C_out, F_g, H_g, W_g] is given too.
    """
    items = [
        _dense_item(
            model,
            x[b : b + 1],
            t[b : b + 1],
            context[b : b + 1],
            window,
            None if guide is None else guide[b : b + 1],
            None if guide is None else guide_t[b : b + 1],
            stride,
            None if clip_fea is None else clip_fea[b : b + 1],
            overlap,
            adapted,
            guide_weight,
            guide_margin,
            target_adapted,
        )
        for b in range(len(x))
    ]
    outs, of_guide = zip(*items, strict=True)
    return (torch.cat(outs), torch.cat(of_guide)) if with_guide else torch.cat(outs)


def _dense_item(
    model, x, t, context, window, guide, guide_t, stride, clip_fea, overlap, adapted, times, margin,
    target_adapted,
):  # fmt: skip
    heads = model.num_heads
    tokens, (f, h, w) = embed(model, x)
    with target_adapted():
        e = time_rows(model, t)
    frames = torch.arange(f).repeat_interleave(h * w)
    row_of = frames if e.shape[1] > 1 else torch.zeros_like(frames)
    own = grid_positions(torch.arange(f), torch.arange(h), torch.arange(w))
    text = model.text_embedding(context)
    image_tokens = None
    if clip_fea is not None:
        text = torch.cat([model.img_emb(clip_fea), text], 1)
        image_tokens = clip_fea.shape[1]
    if guide is not None:
        g, (fg, hg, wg) = embed(model, guide)
        with adapted():
            ge = time_rows(model, guide_t)
        g_frames = torch.arange(fg).repeat_interleave(hg * wg)
        g_row = g_frames if ge.shape[1] > 1 else torch.zeros_like(g_frames)
        g_own = grid_positions(stride * torch.arange(fg), torch.arange(hg), torch.arange(wg))
        axes = (time_positions(fg, stride), space_positions(hg, h), space_positions(wg, w))
        g_aligned = grid_positions(*axes)

    def rows(block, e, row_of):
        e6 = model.time_projection(e).unflatten(2, (6, model.dim))[0] + block.modulation
        return e6[row_of].unbind(1)

    def split(value):
        return value[0].unflatten(-1, (heads, -1))

    for i, block in enumerate(model.blocks):
        attn = block.self_attn
        spans = [
            axis_spans(n, a, i % 2 == 1, overlap) for n, a in zip((f, h, w), window, strict=True)
        ]
        inside = [
            (s[:, :1] <= torch.arange(len(s))) & (torch.arange(len(s)) < s[:, 1:]) for s in spans
        ]
        mask = torch.einsum("ab,cd,ef->acebdf", *(s.float() for s in inside))
        mask = mask.reshape(f * h * w, f * h * w).bool()
        with target_adapted():
            m = rows(block, e, row_of)
            y = block.norm1(tokens) * (1 + m[1]) + m[0]
            q, k = (turn(split(x), own) for x in (attn.norm_q(attn.q(y)), attn.norm_k(attn.k(y))))
            v = split(attn.v(y))
        if guide is not None:
            with adapted():
                gm = rows(block, ge, g_row)
                gy = block.norm1(g) * (1 + gm[1]) + gm[0]
                gk = split(attn.norm_k(attn.k(gy)))
                gv = split(attn.v(gy))
            spacing = (stride, h / hg, w / wg)
            reads = [
                axis_reads(c, a, p, s, margin)
                for c, a, p, s in zip(spans, window, axes, spacing, strict=True)
            ]
            seen = torch.einsum("ai,bj,ck->abcijk", *(r.float() for r in reads))
            seen = seen.reshape(f * h * w, fg * hg * wg).bool()
            out = attend(
                q,
                torch.cat([k, turn(gk, g_aligned)]),
                torch.cat([v, gv]),
                torch.cat([mask, seen], 1),
                torch.cat([torch.ones(len(k)), torch.full([len(gk)], float(times))]),
            )
            with adapted():
                gq = turn(split(attn.norm_q(attn.q(gy))), g_own)
                g_out = attend(gq, turn(gk, g_own), gv, torch.ones(len(gq), len(gq)).bool())
                g = _rest(block, g, g_out, gm, text, image_tokens)
        else:
            out = attend(q, k, v, mask)
        with target_adapted():
            tokens = _rest(block, tokens, out, m, text, image_tokens)

    of_guide = None
    if guide is not None:
        of_guide = _unpatched(_head(model.head, g, ge, g_row), (fg, hg, wg), guide)
    return _unpatched(_head(model.head, tokens, e, row_of), (f, h, w), x), of_guide


def _unpatched(y, grid, like):
    f, h, w = grid
    y = y.view(1, f, h, w, 2, 2, -1).permute(0, 6, 1, 2, 4, 3, 5)
    return y.reshape(1, -1, f, h * 2, w * 2)[..., : like.shape[-2], : like.shape[-1]]


def _head(head, tokens, e, row_of):
    shift, scale = (head.modulation + e[0][:, None])[row_of].unbind(1)
    return head.head(head.norm(tokens) * (1 + scale) + shift)


def _rest(block, x, attended, m, text, image_tokens):
    x = x + block.self_attn.o(attended[None]) * m[2]
    x = x + block.cross_attn(block.norm3(x), text, context_img_len=image_tokens)
    return x + block.ffn(block.norm2(x) * (1 + m[4]) + m[3]) * m[5]

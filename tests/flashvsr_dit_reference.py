"""FlashVSR's transformer and LQ projection as published, written from their description alone.

The whole clip at once, dense boolean masks, no cache, no chunks, raster order, any precision.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def tokens_of_frames(state: dict[str, Tensor], video: Tensor, version: str) -> Tensor:
    """LQ projection of a video [3, F, H, W], F = 4m + 1 -> [m, h, w, C]."""
    c, f, height, width = video.shape
    x = video.view(c, f, height // 16, 16, width // 16, 16).permute(0, 3, 5, 1, 2, 4)
    x = x.reshape(1, c * 256, f, height // 16, width // 16)

    def stage(x, name):
        x = F.pad(x, (1, 1, 1, 1, 0, 0), mode="replicate")
        x = F.conv3d(x, state[f"conv{name}.weight"], state[f"conv{name}.bias"], stride=(2, 1, 1))
        norm = x.square().sum(dim=1, keepdim=True).sqrt().clamp_min(1e-12)
        return F.silu(x / norm * x.shape[1] ** 0.5 * state[f"norm{name}.gamma"])

    def linear(x):
        weight, bias = state["linear_layers.0.weight"], state["linear_layers.0.bias"]
        return F.linear(x[0].permute(1, 2, 3, 0), weight, bias)

    if version == "v1.1":  # one pass behind five copies of the first frame
        x = torch.cat([x[:, :, :1].expand(-1, -1, 5, -1, -1), x], dim=2)
        return linear(stage(stage(x, "1"), "2"))
    out = []
    for first in range(1, f, 4):  # every clip behind its own last two frames, at both stages
        clip = x[:, :, first : first + 4]
        middle = stage(torch.cat([clip[:, :, -2:], clip], dim=2), "1")
        out.append(linear(stage(torch.cat([middle[:, :, -2:], middle], dim=2), "2")))
    return torch.cat(out)


def visible_slots(latent_frames: int, kv_ratio: float) -> list[list[int]]:
    """For every slot (pair of latent frames) the slots whose keys it sees."""
    seen, cached, first = [], [], True
    slots = list(range(latent_frames // 2))
    while slots:
        own, slots = (slots[:3], slots[3:]) if first else (slots[:1], slots[1:])
        first = False
        cached = cached + own
        seen += [list(cached) for _ in own]
        if len(cached) > int(kv_ratio):
            cached = cached[1:]
    return seen


class DenseFlashVSR:
    """The transformer from a plain Wan state dict, in the dtype of its weights."""

    def __init__(self, state, prompt, heads, sparse_ratio, kv_ratio, local_range):
        self.state = state
        self.prompt = prompt
        self.heads = heads
        self.sparse_ratio = sparse_ratio
        self.kv_ratio = kv_ratio
        self.local_range = local_range
        self.layers = 1 + max(int(k.split(".")[1]) for k in state if k.startswith("blocks."))

    def linear(self, name, x):
        return F.linear(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def rms(self, name, x):
        scale = (x.square().mean(dim=-1, keepdim=True) + 1e-6).rsqrt()
        return x * scale * self.state[f"{name}.weight"]

    def __call__(self, noise: Tensor, shown: Tensor) -> Tensor:
        """noise [16, T, H, W] and LQ tokens [T, H / 2, W / 2, C] -> the clean latent."""
        channels, frames, height, width = noise.shape
        h, w = height // 2, width // 2
        dim = self.state["patch_embedding.weight"].shape[0]
        x = F.conv3d(
            noise[None],
            self.state["patch_embedding.weight"],
            self.state["patch_embedding.bias"],
            stride=(1, 2, 2),
        )
        x = x[0].flatten(1).T + shown.reshape(-1, dim)
        half = self.state["time_embedding.0.weight"].shape[1] // 2
        waves = 1000.0 * 10000.0 ** (-torch.arange(half).double() / half)
        waves = torch.cat([waves.cos(), waves.sin()]).to(x.dtype)
        e = self.linear("time_embedding.2", F.silu(self.linear("time_embedding.0", waves)))
        e6 = self.linear("time_projection.1", F.silu(e)).view(6, dim)
        text = F.gelu(self.linear("text_embedding.0", self.prompt), approximate="tanh")
        text = self.linear("text_embedding.2", text)
        for i in range(self.layers):
            x = self.block(f"blocks.{i}", x, e6, text, (frames, h, w))
        shift, scale = self.state["head.modulation"][0] + e
        x = F.layer_norm(x, (dim,), eps=1e-6) * (1 + scale) + shift
        x = self.linear("head.head", x).view(frames, h, w, 2, 2, channels)
        return noise - x.permute(5, 0, 1, 3, 2, 4).reshape(channels, frames, height, width)

    def block(self, name, x, e6, text, size):
        dim = x.shape[-1]
        m = self.state[f"{name}.modulation"][0] + e6
        y = F.layer_norm(x, (dim,), eps=1e-6) * (1 + m[1]) + m[0]
        a = f"{name}.self_attn"
        q = self.rope(self.rms(f"{a}.norm_q", self.linear(f"{a}.q", y)), size)
        k = self.rope(self.rms(f"{a}.norm_k", self.linear(f"{a}.k", y)), size)
        v = self.linear(f"{a}.v", y).unflatten(-1, (self.heads, -1))
        x = x + self.linear(f"{a}.o", self.attend(q, k, v, size).flatten(1)) * m[2]
        y = F.layer_norm(x, (dim,), eps=1e-6)
        y = y * self.state[f"{name}.norm3.weight"] + self.state[f"{name}.norm3.bias"]
        a = f"{name}.cross_attn"
        q = self.rms(f"{a}.norm_q", self.linear(f"{a}.q", y)).unflatten(-1, (self.heads, -1))
        k = self.rms(f"{a}.norm_k", self.linear(f"{a}.k", text)).unflatten(-1, (self.heads, -1))
        v = self.linear(f"{a}.v", text).unflatten(-1, (self.heads, -1))
        scores = torch.einsum("lhd,mhd->hlm", q, k) / math.sqrt(q.shape[-1])
        out = torch.einsum("hlm,mhd->lhd", scores.softmax(-1), v)
        x = x + self.linear(f"{a}.o", out.flatten(1))
        y = F.layer_norm(x, (dim,), eps=1e-6) * (1 + m[4]) + m[3]
        y = F.gelu(self.linear(f"{name}.ffn.0", y), approximate="tanh")
        return x + self.linear(f"{name}.ffn.2", y) * m[5]

    def rope(self, x, size):
        """Rotated pairs (2j, 2j + 1), a head's 128 numbers split 44 / 42 / 42 over t, y, x."""
        x = x.unflatten(-1, (self.heads, -1, 2))
        place = torch.cartesian_prod(*(torch.arange(n).double() for n in size)).view(-1, 3)
        angles = [
            place[:, axis, None] * 10000.0 ** (-torch.arange(0, n, 2).double() / n)
            for axis, n in enumerate((44, 42, 42))
        ]
        angles = torch.cat(angles, dim=1)[:, None]
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        a, b = x.unbind(-1)
        return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)

    def attend(self, q, k, v, size):
        """One dense masked softmax over all tokens."""
        frames, h, w = size
        t, y, x = torch.cartesian_prod(*(torch.arange(n) for n in size)).view(-1, 3).T
        columns = w // 8
        n = (h // 8) * columns
        place = (t // 2) * n + (y // 8) * columns + x // 8  # of every token's block
        blocks = (frames // 2) * n
        member = F.one_hot(place, blocks).to(q.dtype)
        mean_q, mean_k = (torch.einsum("lb,lhd->hbd", member, z) / 128 for z in (q, k))
        kept = self.kept(mean_q, mean_k, (h // 8, columns), frames)
        mask = kept[:, place][:, :, place]
        scores = torch.einsum("lhd,mhd->hlm", q, k) / math.sqrt(q.shape[-1])
        share = scores.masked_fill(~mask, -math.inf).softmax(-1).nan_to_num(0.0)
        return torch.einsum("hlm,mhd->lhd", share, v)

    def kept(self, q, k, grid, frames):
        """Which blocks see which, bool [heads, blocks, blocks]."""
        rows, columns = grid
        n = rows * columns
        low = -(self.local_range // 2)
        near = torch.zeros(n, n, dtype=torch.bool)
        for i in range(n):
            for j in range(n):
                dy, dx = j // columns - i // columns, j % columns - i % columns
                inside = [low <= d <= low + self.local_range - 1 for d in (dy, dx)]
                near[i, j] = all(inside)
        kept = torch.zeros(self.heads, (frames // 2) * n, (frames // 2) * n, dtype=torch.bool)
        ratio = self.sparse_ratio * 768 * 1280 / (rows * 128 * columns * 128)
        for slot, seen in enumerate(visible_slots(frames, self.kv_ratio)):
            own = slice(slot * n, (slot + 1) * n)
            keys = torch.cat([torch.arange(s * n, (s + 1) * n) for s in seen])
            for head in range(self.heads):
                scores = q[head, own] @ k[head, keys].T / math.sqrt(q.shape[-1])
                scores = scores.masked_fill(~near.repeat(1, len(seen)), -math.inf)
                share = scores.float().softmax(-1)
                ranked = share.flatten().sort(descending=True).values
                threshold = ranked[min(n * len(keys) - 1, int(n * n * ratio) - 1)]
                kept[head, own, keys[0] : keys[0] + len(keys)] = share > threshold
        return kept

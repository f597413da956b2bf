"""Where the tensors of one forward live, and how many tokens are evaluated at a time.

Pure arithmetic on what is free.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..geometry.layout import Layout
from ..geometry.shape import BaseShape

ATTENTION = 13
"""Vectors of a token at the peak of attention, with a kernel that rounds queries and keys."""
ON_THEIR_WAY = 4
"""Vectors of a token in chunks that are being copied to the host or from it."""
MIN_CHUNK = 1_024
CUDA_CHUNK = 65_536
CPU_CHUNK = 4_096
"""Past these sizes a larger chunk gains no speed."""
CHUNK = CUDA_CHUNK // 4
"""Tokens at a time that keep a card busy: what sampling asks ComfyUI to make room for."""


@dataclass(frozen=True)
class Workload:
    """Sizes of one forward.

    Args:
        itemsize: bytes per number of the tokens.
        tokens, guide_tokens: of all batch items together.
        ring_tokens: tokens, the guide's too, whose keys and values sliding windows keep, of one
            item.
        window_keys: keys that one window or tile reads.
        keep_guide: whether the guide's keys and values serve every step.
        conditionings: how many of them keep a guide of their own (2 when they run one by one).
    """

    dim: int
    ffn_dim: int
    layers: int
    itemsize: int
    tokens: int
    guide_tokens: int
    ring_tokens: int
    window_keys: int
    keep_guide: bool
    conditionings: int = 1

    @classmethod
    def of(
        cls,
        layout: Layout,
        shape: BaseShape,
        *,
        itemsize: int,
        videos: int = 1,
        guided: bool = True,
        keep_guide: bool = False,
    ) -> Workload:
        """The sizes of one forward over `videos` videos, each cut by `layout`.

        Six parameters: each is read by another of the sizes.
        """
        plan = layout.plan
        guide = plan.proxy_tokens.count if guided else 0
        return cls(
            dim=shape.dim,
            ffn_dim=shape.ffn_dim,
            layers=shape.layers,
            itemsize=itemsize,
            tokens=videos * plan.tokens.count,
            guide_tokens=videos * guide,
            ring_tokens=layout.ring_tokens + guide if layout.ring_tokens else 0,
            window_keys=sum(layout.keys),
            keep_guide=keep_guide,
        )

    @property
    def token_bytes(self) -> int:
        """The target tokens, the one tensor of the grid's length."""
        return self.tokens * self.dim * self.itemsize

    @property
    def guide_bytes(self) -> int:
        """Keys and values of the guide in every block, where they are kept."""
        pairs = 2 * self.layers * self.conditionings if self.keep_guide else 2
        return pairs * self.guide_tokens * self.dim * self.itemsize

    @property
    def ring_bytes(self) -> int:
        """Rotated keys and values of sliding windows."""
        return 2 * self.ring_tokens * self.dim * self.itemsize

    @property
    def bytes_per_chunk_token(self) -> int:
        """Activations at the peak of a chunk, which is the attention's or the feed-forward's.

        Counted on real blocks, with four vectors more for results on their way to the host.
        """
        peak = max(ATTENTION * self.dim, 5 * self.dim + 2 * self.ffn_dim)
        return self.itemsize * (peak + ON_THEIR_WAY * self.dim)

    @property
    def least_chunk(self) -> int:
        """Tokens for whose feed-forward there is room where one window was attended."""
        keys = max(MIN_CHUNK, self.window_keys)
        room = (ATTENTION - 2) * self.dim * keys
        return max(MIN_CHUNK, min(keys, room // (4 * self.dim + 2 * self.ffn_dim)))

    @property
    def least_chunk_bytes(self) -> int:
        """Activations of the smallest chunk: one window with its keys, beside the guide's own.

        While the guide is evaluated there are its tokens, keys, values and rotated keys.
        """
        vector = self.dim * self.itemsize
        attention = (ATTENTION + ON_THEIR_WAY) * max(MIN_CHUNK, self.window_keys) * vector
        chunk = max(attention, self.least_chunk * self.bytes_per_chunk_token)
        return chunk + 4 * self.guide_tokens * vector


@dataclass(frozen=True)
class MemoryPlan:
    """Where tensors live, for one forward."""

    chunk: int
    """Tokens evaluated at a time."""
    tokens_on_device: bool
    ring_on_device: bool
    """The keys and values that sliding windows keep."""
    guide: str
    """Where kept keys and values of the guide live: `device`, `host`, or `recompute`."""


def plan_memory(work: Workload, free: int, host_free: int, most_chunk: int) -> MemoryPlan:
    """Place the tensors of a forward within `free` bytes of the device.

    What every step reads most goes onto the device first: a working chunk, the ring of sliding
    windows, the target tokens, then the guide's keys; what is left makes the chunk larger. The
    guide's keys are kept in host memory only where they take less than half of it: pinned memory
    is handed out in powers of two.
    """
    left = free - work.least_chunk_bytes
    on_device = []
    for size in (work.ring_bytes, work.token_bytes):
        on_device.append(size <= max(0, left))
        if on_device[-1]:
            left -= size
        else:
            host_free -= size
    ring_on_device, tokens_on_device = on_device
    guide = "recompute"
    if work.keep_guide and work.guide_tokens:
        if work.guide_bytes <= left // 2:
            guide = "device"
            left -= work.guide_bytes
        elif work.guide_bytes <= host_free // 2:
            guide = "host"
    chunk = work.least_chunk + max(0, left) // work.bytes_per_chunk_token
    return MemoryPlan(min(chunk, most_chunk), tokens_on_device, ring_on_device, guide)


def wanted_bytes(work: Workload, latent_bytes: int, tokens_on_device: bool = True) -> int:
    """Device memory that sampling uses well beside the weights: the tokens and a full chunk.

    Kept keys and values of the guide are not in it: they are worth no weight's place.

    Args:
        latent_bytes: one float32 latent of the target; a step of a stock sampler holds about eight.
    """
    chunk = work.least_chunk_bytes + CHUNK * work.bytes_per_chunk_token
    tokens = work.token_bytes if tokens_on_device else 0
    return 8 * latent_bytes + tokens + work.ring_bytes + chunk


def room_to_ask_for(work: Workload, latent_bytes: int, beside_weights: int) -> int:
    """Bytes to keep free of weights on a device with `beside_weights` bytes more than they take.

    Where weights and tokens do not both fit, the tokens stream: their transfers overlap with
    computing and are made once per block, those of weights with every chunk.
    """
    everything = wanted_bytes(work, latent_bytes)
    if everything <= beside_weights:
        return everything
    return wanted_bytes(work, latent_bytes, tokens_on_device=False)

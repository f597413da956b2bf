"""The world's FlashVSR: a one-step student of a small Wan that sees low-quality frames."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from atlasvid.engine.comfyui import management, models
from atlasvid.engine.flashvsr.blocks import SIDE, BlockGrid
from atlasvid.engine.flashvsr.projection import LowQualityProjection
from atlasvid.engine.flashvsr.schedule import FIRST_CHUNK, SLOT
from atlasvid.engine.flashvsr.selection import Sparsity, chosen, pooled
from atlasvid.engine.flashvsr.tiny import LOCAL_RANGE, VERSION
from atlasvid.engine.training.lq_projection import project_clip
from torch import Tensor, nn

from .dit import initialise
from .latents import LatentCode
from .training import Training, adamw, muon
from .vsr_pairs import Shard, enlarged

CONFIG = {"dim": 128, "ffn_dim": 256, "num_heads": 1, "num_layers": 3, "text_dim": 4096}
WIDTHS = (64, 96, CONFIG["dim"])
"""Of the LQ projection."""
PROMPT_SEED = 5
SPARSITY = Sparsity(local_range=LOCAL_RANGE)
LATENT_PIXELS = 8


def seen_slots(slot: int, kv_ratio: float) -> range:
    """The slots whose keys the queries of a slot see: the first chunk all of its own."""
    first = FIRST_CHUNK // SLOT
    return range(first) if slot < first else range(max(0, slot - int(kv_ratio)), slot + 1)


@torch.no_grad()
def attended(q: Tensor, k: Tensor, grid: BlockGrid, sparsity: Sparsity) -> Tensor:
    """Which tokens of a whole clip see which in one head, as chunks in use: bool [L, L].

    q, k: [L, d], tokens in the order of frames, rows and columns. The choice has no gradient.
    """
    numbers = torch.arange(len(q), device=q.device)
    raster = numbers.view(-1, grid.rows * SIDE, grid.columns * SIDE, 1)
    places = grid.to_blocks(raster)[..., 0]  # [slots * N, 128], the tokens of each block
    near = grid.local_mask(sparsity.local_range, q.device)
    kept = torch.zeros(len(places), len(places), dtype=torch.bool, device=q.device)
    with torch.autocast(q.device.type, enabled=False):
        queries, means = pooled(q.float()[places]), pooled(k.float()[places])
        for slot in range(len(places) // grid.count):
            seen = seen_slots(slot, sparsity.kv_ratio)
            own = slice(slot * grid.count, (slot + 1) * grid.count)
            theirs = slice(seen.start * grid.count, seen.stop * grid.count)
            kept[own, theirs] = chosen(queries[own], means[theirs], near, sparsity.budget(grid))
    block = torch.empty_like(numbers)
    block[places] = torch.arange(len(places), device=q.device)[:, None]
    return kept[block][:, block]


def masked_attention(
    grid: BlockGrid,
    sparsity: Sparsity,
    _: Callable,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    **__: object,
) -> Tensor:
    """ComfyUI's attention override [N, L, heads * d]; that to the text sees all of it."""
    q, k, v = (z.unflatten(-1, (heads, -1)).transpose(1, 2) for z in (q, k, v))
    mask = None
    if q.shape[-2] == k.shape[-2]:
        heads_of_clips = zip(q.flatten(0, 1), k.flatten(0, 1), strict=True)
        masks = [attended(*pair, grid, sparsity) for pair in heads_of_clips]
        mask = torch.stack(masks).unflatten(0, q.shape[:2])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


class Student(nn.Module):
    """A Wan with its LQ projection, on whole clips: chunks and sparse attention are a mask here."""

    def __init__(self, net: nn.Module, projection: LowQualityProjection, prompt: Tensor) -> None:
        super().__init__()
        self.net, self.projection = net, projection
        self.register_buffer("prompt", prompt)

    @classmethod
    def new(cls, seed: int) -> Student:
        """Wan's own initial weights, a projection that is not yet set, and a random prompt."""
        net = models.build_wan(**CONFIG).float()
        initialise(net, seed)
        generator = torch.Generator().manual_seed(PROMPT_SEED)
        prompt = torch.randn(1, 1, CONFIG["text_dim"], generator=generator)
        return cls(net, LowQualityProjection(WIDTHS), prompt)

    def tokens(self, shown: Tensor) -> Tensor:
        """Enlarged frames [N, 3, 4 T + 1, H, W] -> [N, C, T, H / 16, W / 16]."""
        clips = [project_clip(self.projection, VERSION, clip.transpose(0, 1)) for clip in shown]
        return torch.stack(clips).movedim(-1, 1)

    def forward(self, noise: Tensor, shown: Tensor) -> Tensor:
        """The clean latent in one step.

        noise [N, 16, T, h, w], enlarged frames [N, 3, 4 T + 1, 8 h, 8 w] -> as the noise.
        """
        tokens = self.tokens(shown)
        hook = self.net.patch_embedding.register_forward_hook(
            lambda _, __, out: out + tokens.to(out)
        )
        height, width = (LATENT_PIXELS * side for side in noise.shape[-2:])
        attention = partial(masked_attention, BlockGrid.of(height, width), SPARSITY)
        options = {"optimized_attention_override": attention}
        level = noise.new_full((len(noise),), 1000.0)
        text = self.prompt.expand(len(noise), -1, -1)
        try:
            return noise - self.net(noise, level, text, transformer_options=options)
        finally:
            hook.remove()


@dataclass(frozen=True)
class StudentRecipe:
    """How the student is trained.

    Args:
        steps: in all.
        cooldown: of the steps, the last ones, in which the learning rate falls to zero.
        batch: clips of a step.
        muon_rate: of the blocks' matrices.
        adam_rate: of all else but the projection's kernels.
        kernel_rate: of those, which the ridge has found and many clips have told it.
        pixels: weight of the error of the latents' linear decoding.
        long_every: every so many steps clips are as long as they were drawn, else a first chunk.
        ema: decay of the averaged weights.
    """

    steps: int = 1000
    cooldown: int = 400
    warmup: int = 50
    batch: int = 2
    muon_rate: float = 3e-4
    adam_rate: float = 1e-4
    kernel_rate: float = 1e-5
    pixels: float = 8.0
    long_every: int = 4
    ema: float = 0.995
    seed: int = 0

    def rate(self, step: int) -> float:
        """Factor on the learning rates."""
        return min((step + 1) / self.warmup, 1.0, (self.steps - step) / self.cooldown)

    def batch_of(
        self, shards: list[Shard], step: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Small clips uint8 [N, 3, 4 T + 1, 2 h, 2 w] and their latents [N, 16, T, h, w]."""
        small, latents = [], []
        frames = shards[0].latents.shape[2] if step % self.long_every == 0 else FIRST_CHUNK
        for _ in range(self.batch):
            shard = shards[int(torch.randint(len(shards), (), generator=generator))]
            i = int(torch.randint(len(shard.small), (), generator=generator))
            small.append(shard.small[i, :, : 4 * frames + 1])
            latents.append(shard.latents[i, :, :frames].float())
        return torch.stack(small), torch.stack(latents)


def student_optimizers(student: Student, recipe: StudentRecipe) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for the rest."""
    matrices, kernels, rest = [], [], []
    for name, p in student.named_parameters():
        if name.startswith("net.blocks.") and p.ndim == 2:
            matrices.append(p)
        else:
            (kernels if name.startswith("projection.conv") and p.ndim == 5 else rest).append(p)
    groups = [{"params": rest}, {"params": kernels, "lr": recipe.kernel_rate}]
    return [muon(matrices, recipe.muon_rate), adamw(groups, recipe.adam_rate)]


class StudentTraining(Training):
    """Regression in one step: from noise and low-quality frames to the clean latent."""

    def __init__(self, student: Student, recipe: StudentRecipe, code: LatentCode):
        super().__init__(student, recipe, student_optimizers(student, recipe))
        self.pixels = recipe.pixels
        self.device = student.prompt.device
        self.code = code.to(self.device)

    def update(self, small: Tensor, latents: Tensor, generator: torch.Generator) -> float:
        """One step on what `StudentRecipe.batch_of` gives; its loss."""
        latents = latents.to(self.device)
        noise = torch.randn(latents.shape, generator=generator).to(self.device)
        with management.training():
            with torch.autocast(self.device.type, torch.bfloat16):
                given = self.model(noise, enlarged(small).to(self.device)).float()
            loss = F.mse_loss(given, latents)
            loss = loss + self.pixels * F.mse_loss(
                self.code.decode(given), self.code.decode(latents)
            )
            return self.descend(loss)


@torch.no_grad()
def student_latents(student: Student, small: Tensor) -> Tensor:
    """Latents [N, 16, T, h, w] on the CPU of small clips uint8, a clip at a time.

    The noise is the clip's number's.
    """
    device, made = student.prompt.device, []
    for number, clip in enumerate(small):
        frames = enlarged(clip[None])
        height, width = (side // LATENT_PIXELS for side in frames.shape[-2:])
        shape = (1, 16, (frames.shape[2] - 1) // 4, height, width)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(number))
        with torch.autocast(device.type, torch.bfloat16):
            made.append(student(noise.to(device), frames.to(device)).float().cpu())
    return torch.cat(made)

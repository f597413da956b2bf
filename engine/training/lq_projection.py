"""Trains FlashVSR's LQ projection against its frozen transformer: low-quality frames to tokens.

A step is the one evaluation as in use: pure noise, the first chunk of 25 frames, and the projection
of degraded frames; its loss is the clean latent's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor

from ..comfyui import management
from ..families import wan
from ..flashvsr.blocks import PIXELS, TOKENS, BlockGrid
from ..flashvsr.files import require_together
from ..flashvsr.projection import (
    CLIP,
    IN_FRONT,
    VERSIONS,
    LowQualityProjection,
    Version,
    unshuffle,
)
from ..flashvsr.schedule import FIRST_CHUNK
from ..flashvsr.selection import PUBLISHED, Sparsity
from .cache import fingerprint
from .objective import flow_loss
from .one_step import SLOTS, TrainedStep
from .pair_trainer import PairTrainer
from .pairs import Pair, PairSettings

FRAMES = CLIP * FIRST_CHUNK + 1
"""That the first chunk reads; it decodes to four fewer."""
PUBLISHED_WIDTHS = (2048, 3072)
"""After the first and second convolution."""
BLOCK_VECTORS = 60
"""Vectors of a token that live while a block is differentiated."""


@dataclass(frozen=True)
class ProjectionSettings(PairSettings):
    """What the artist chose.

    Args:
        version: how the projection remembers, "v1" or "v1.1"; that of the transformer.
        sparsity: of the attention.
    """

    unit: ClassVar[int] = PIXELS

    frames: int = FRAMES
    side: int = 512
    learning_rate: float = 1e-4
    version: Version = "v1.1"
    sparsity: Sparsity = field(default_factory=lambda: PUBLISHED)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.frames != FRAMES:
            raise ValueError(f"frames is {self.frames}; the first chunk reads {FRAMES}.")
        if self.version not in VERSIONS:
            raise ValueError(f"version is {self.version!r}; allowed are {' and '.join(VERSIONS)}.")

    @property
    def grid(self) -> BlockGrid:
        return BlockGrid.of(self.side, self.side)


def widths_named(text: str) -> tuple[int, int]:
    """Channels after the first and second convolution, of a text such as "2048,3072".

    Raises:
        ValueError: it is no two numbers above 0.
    """
    numbers = [int(part) for part in text.split(",") if part.strip().isdecimal()]
    if len(numbers) != 2 or min(numbers) < 1:
        raise ValueError(f"widths is {text!r}; write two numbers, such as 2048,3072.")
    return numbers[0], numbers[1]


def new_projection(widths: tuple[int, int, int], seed: int) -> LowQualityProjection:
    """Random convolutions and a linear layer of zeros: at first the transformer sees no tokens."""
    projection = LowQualityProjection(widths).requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, weight in projection.named_parameters():
        if name.endswith("gamma"):
            weight.fill_(1.0)
        elif weight.ndim == 1 or name.startswith("linear_layers"):
            weight.zero_()
        else:
            weight.normal_(generator=generator).mul_(weight[0].numel() ** -0.5)
    return projection


def first_projection(
    given: LowQualityProjection | None,
    widths: tuple[int, int] | None,
    usual: tuple[int, int],
    model: Any,
    prompt: Tensor,
    seed: int,
) -> LowQualityProjection:
    """What a training begins with: the projection that is given, else a new one.

    Args:
        widths: that are asked for, or None.
        usual: of a new one where none are asked for.

    Raises:
        ValueError: what is given is of other widths, or does not fit the transformer or its prompt.
    """
    if given is None:
        tokens = wan.shape(model.model.diffusion_model).dim
        given = new_projection((*(widths or usual), tokens), seed)
    if widths not in (None, given.widths[:2]):
        raise ValueError(
            f"The projection to begin with is {given.widths[0]},{given.widths[1]} wide, and "
            f"{widths[0]},{widths[1]} was asked for. Leave the widths out, or begin with a new one."
        )
    require_together(model, given, prompt)
    return given


def project_clip(projection: LowQualityProjection, version: Version, frames: Tensor) -> Tensor:
    """A whole clip at once, with gradients: [4 m + 1, 3, H, W] -> [m, H / 16, W / 16, C].

    As `ProjectionStream`: v1.1 is one pass behind copies of the first frame; in v1 every four
    frames stand behind their own last two, at both stages, and the first frame is not read.
    """
    x = unshuffle(frames.transpose(0, 1))
    rows = range(x.shape[-2])
    if version == "v1.1":
        copies = x[:, :, :1].expand(-1, -1, IN_FRONT + CLIP - 1, -1, -1)
        middle = projection.first(torch.cat([copies, x], dim=2), rows)
        return projection.tokens(projection.second(middle, rows))
    clips = rearrange(x[:, :, 1:], "1 c (m f) h w -> m c f h w", f=CLIP)
    middle = projection.first(_behind_its_end(clips), rows)
    features = projection.second(_behind_its_end(middle), rows)
    return projection.tokens(rearrange(features, "m c 1 h w -> 1 c m h w"))


def _behind_its_end(clips: Tensor) -> Tensor:
    return torch.cat([clips[:, :, -IN_FRONT:], clips], dim=2)


class ProjectionTrainer(PairTrainer):
    """One run of a projection.

    Args:
        model: ComfyUI MODEL of FlashVSR's transformer; it is not changed.
        prompt: the checkpoint's own text [1, L, 4096].
        start: the first weights, of any dtype.
    """

    KEY = "atlasvid_lq_projection"
    SMALLER = "smaller side or smaller widths, or close other programs"

    def __init__(
        self,
        settings: ProjectionSettings,
        model: Any,
        prompt: Tensor,
        start: LowQualityProjection,
        path: Path,
        folder: Path,
    ) -> None:
        self.made_from = {
            "transformer": fingerprint(model.model.diffusion_model.state_dict()),
            "prompt": fingerprint({"": prompt}),
            "start": fingerprint(start.state_dict()),
        }
        with torch.inference_mode(False):
            self.projection = _trainable(start.widths, start.state_dict())
            super().__init__(settings, self.projection, path, folder)
            shape = wan.shape(model.model.diffusion_model)
            tokens = settings.grid.count * TOKENS * SLOTS
            vectors = (shape.layers + BLOCK_VECTORS) * tokens
            working = vectors * shape.dim * settings.dtype.itemsize
            self.patcher = management.load_for_training(model, settings.dtype, working)
            like = torch.empty(0, dtype=settings.dtype, device=self.device)
            net = self.patcher.model.diffusion_model
            self.evaluate = TrainedStep(net, prompt, like, settings.grid, settings.sparsity)

    def loss(self, pair: Pair, generator: torch.Generator) -> Tensor:
        """The clean latent's mean squared error, at noise level 1."""
        settings = self.settings
        assert isinstance(settings, ProjectionSettings)
        latents = pair.latents[:, :, :FIRST_CHUNK]  # causal: as the latent of the frames decoded
        noise = torch.randn(latents.shape, generator=generator).to(self.device)
        shown = pair.shown.to(self.device, settings.dtype)
        conditioning = project_clip(self.projection, settings.version, shown)
        return flow_loss(self.evaluate(noise, conditioning), latents.to(self.device))

    def identity(self) -> dict[str, Any]:
        return super().identity() | self.made_from | {"widths": self.projection.widths}

    def recipe(self) -> dict[str, Any]:
        return super().recipe() | self.made_from

    def saved_weights(self) -> dict[str, Tensor]:
        """In the precision that was trained in, which is all that the steps have seen."""
        dtype = self.settings.dtype
        return {name: weight.to(dtype) for name, weight in self.weights().items()}


def _trainable(widths: tuple[int, int, int], state: Mapping[str, Tensor]) -> LowQualityProjection:
    """A float32 copy where ComfyUI computes."""
    with management.compute_device():
        projection = LowQualityProjection(widths)
    projection.load_state_dict(dict(state))
    return projection

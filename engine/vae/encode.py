"""Streams frames through the encoder tile by tile: exact, and bounded in memory."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..comfyui import management, media, server
from ..device.budget import AUTO
from .decode import plan_tiles, supported_patch, whole_frames
from .regions import Region, TileGrid
from .scratch import MemoryStore, ScratchFile, Store, require_space
from .sources import FrameSource, GreyAfter, latent_groups
from .tiling import ENCODE_WORK_LIMIT, CostModel
from .wan import Cache, WanEncoder, latent_count


class TiledEncoder:
    """A Wan VAE with a tile plan for one source of frames."""

    def __init__(self, vae: Any, source: FrameSource, budget: str = AUTO) -> None:
        """`budget` is "auto" or gibibytes such as "4 GB"."""
        self.vae = vae
        self.encoder = WanEncoder(vae.first_stage_model, supported_patch(vae))
        self.source = source
        self.budget = budget
        self.height, self.width = self._latent_size()
        self.cost = CostModel(
            chain=self.encoder.chain,
            latent_height=self.height,
            latent_width=self.width,
            in_scale=8,
            out_scale=1,
            whole_macs=self.encoder.whole_macs,
            element_bytes=vae.vae_dtype.itemsize,
        )

    def _latent_size(self) -> tuple[int, int]:
        height, width = self.source.size
        scale = self.encoder.scale
        if min(height, width) < scale:
            raise ValueError(
                f"The frames are {width} x {height} pixels; this VAE needs at least "
                f"{scale} x {scale}. Scale them up first."
            )
        return height // scale, width // scale

    def plan(self) -> TileGrid:
        """Loads the VAE and picks tiles that fit the budget and the free memory."""
        return plan_tiles(self.vae, self.encoder, self.cost, self.budget, ENCODE_WORK_LIMIT)

    def encode(self, grid: TileGrid) -> Tensor:
        """Latents [1, C, t, h, w] of all frames, on the core's device for intermediate results."""
        latents = latent_count(self.source.frames)
        advance = server.progress_bar((len(grid.tiles) + 1) * latents)
        store = self._new_store(latents)
        try:
            tiles = self._encode_tiles(grid, store, advance)
            return torch.cat(list(self._whole_frames(tiles, store, advance)), dim=2)
        finally:
            store.close()

    def _new_store(self, latents: int) -> Store:
        if self.source.in_memory:
            return MemoryStore()
        values = self.encoder.feature_channels * self.height * self.width * latents
        folder = server.temp_directory()
        purpose = f"Encoding {self.source.frames} frames of {self.source.size[1]} x "
        require_space(folder, values * self.cost.element_bytes, purpose + str(self.source.size[0]))
        return ScratchFile(folder)

    def _encode_tiles(
        self, grid: TileGrid, store: Store, advance: Callable[[int], None]
    ) -> list[tuple[Region, list[int]]]:
        """Each tile's box in latents and the numbers of its stored feature chunks."""
        done: list[tuple[Region, list[int]]] = []
        waiting = list(reversed(grid.tiles))
        while waiting:
            tile = waiting.pop()
            try:
                done.append((tile, self._encode_tile(tile, store, advance)))
            except Exception as error:
                if (
                    not management.is_out_of_memory(error)
                    or max(tile.rows.size, tile.cols.size) < 2
                ):
                    raise
                waiting += reversed(tile.halves())
            else:
                continue
            # Outside the handler, where the error no longer holds on to the tile's tensors.
            management.empty_cache()
        return done

    def _encode_tile(self, tile: Region, store: Store, advance: Callable[[int], None]) -> list[int]:
        regions = self.cost.regions(tile)
        cache: Cache = None
        numbers: list[int] = []
        for index, (group, last) in enumerate(latent_groups(self.source.batches())):
            management.raise_if_cancelled()
            if index == 0:
                cache = self.encoder.cache(1 if last else 2)
            for features in self._tile_features(group, cache, regions, last):
                numbers.append(store.append(features))
            advance(1)
        return numbers

    @torch.inference_mode()
    def _tile_features(
        self, group: Tensor, cache: Cache, regions: list[Region], last: bool
    ) -> list[Tensor]:
        """Features of one latent frame's image frames [1 or 4, H, W, channels]."""
        vae = self.vae
        box = regions[0].scaled(self.encoder.patch)
        frames = vae.vae_encode_crop_pixels(group)
        frames = frames[:, box.rows.start : box.rows.stop, box.cols.start : box.cols.stop]
        pixels = vae.process_input(frames.movedim(-1, 0)[None]).to(vae.vae_dtype).to(vae.device)
        chunks = self.encoder.chunks(pixels)
        emitted = []
        with management.device_context(vae):
            for number, chunk in enumerate(chunks):
                final = last and number == len(chunks) - 1
                features = self.encoder.features(chunk, cache, regions, final)
                if features is not None:
                    emitted.append(features)
        return emitted

    def _whole_frames(
        self, tiles: list[tuple[Region, list[int]]], store: Store, advance: Callable[[int], None]
    ) -> Iterator[Tensor]:
        emissions = list(zip(*(numbers for _, numbers in tiles), strict=True))
        first = store.read(emissions[0][0])
        streamed = len(emissions) > 1
        stage = whole_frames(
            self.vae,
            self.encoder,
            self.cost,
            self.budget,
            lambda: self.encoder.cache(2 if streamed else 1),
        )
        for numbers in emissions:
            management.raise_if_cancelled()
            parts = [(box, store.read(n)) for (box, _), n in zip(tiles, numbers, strict=True)]
            frames = parts[0][1].shape[2]
            whole = first.new_empty(*first.shape[:2], frames, self.height, self.width)
            for box, part in parts:
                whole[..., box.rows.start : box.rows.stop, box.cols.start : box.cols.stop] = part
            with management.device_context(self.vae):
                latents = stage(whole)
            yield latents.to(self.vae.output_device, self.vae.vae_output_dtype())
            advance(frames)


def encode_frames(vae: Any, source: FrameSource, budget: str = AUTO) -> Tensor:
    """The latent [1, C, t, h, w] of a clip, equal to the VAE's own untiled encode.

    As there, frames are cropped around their centre to whole latents, and at the end to whole
    groups of four frames.
    """
    encoder = TiledEncoder(vae, source, budget)
    return encoder.encode(encoder.plan())


def start_image_latents(
    vae: Any, start_image: Tensor, *, width: int, height: int, frames: int, budget: str
) -> tuple[Tensor, Tensor]:
    """What a Wan image-to-video model is shown: `concat_latent_image` and `concat_mask`.

    The start image(s) [n, H, W, channels] are scaled and cropped to width x height and followed
    by grey up to `frames` frames. The mask [1, 1, t, h, w] is 0 where a latent frame is given.

    Raises:
        ValueError: the VAE is not the Wan 2.1 VAE that those models use.
    """
    if supported_patch(vae) != 1:
        raise ValueError(
            "This is the Wan 2.2 VAE; Wan's image-to-video models (2.1 and 2.2 A14B) use the "
            "Wan 2.1 VAE. For the TI2V-5B model take the stock Wan22ImageToVideoLatent node."
        )
    start = media.scale_and_crop(start_image[:frames], width, height)
    latent = encode_frames(vae, GreyAfter(start[..., :3], frames), budget)
    mask = torch.ones((1, 1, *latent.shape[2:]), device=start.device, dtype=start.dtype)
    mask[:, :, : latent_count(start.shape[0])] = 0.0
    return latent, mask

"""Streams a latent video through the decoder tile by tile: exact, and bounded in memory."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..comfyui import management, media, server
from ..device.budget import AUTO, parse_budget
from ..device.outbox import Outbox
from .frames import Piece
from .middle import Room, WholeFrames, room
from .regions import Region, TileGrid
from .scratch import MemoryStore, ScratchFile, Store
from .tiling import DECODE_WORK_LIMIT, CostModel, frugal_grid, grid_within
from .wan import Cache, WanDecoder, WanEncoder, frame_count

# Share of the device's memory that tiles may take; the rest is for the weights and others.
MEMORY_SHARE = 0.7


def supported_patch(vae: Any) -> int:
    """The pixel-shuffle of a Wan VAE.

    Raises:
        ValueError: the VAE is none of the supported ones.
    """
    vae.throw_exception_if_invalid()
    patch = media.wan_patch(vae)
    if patch is None:
        raise ValueError(
            f"This VAE is a {type(vae.first_stage_model).__name__}. Exact tiles work with the "
            "Wan 2.1 VAE (wan_2.1_vae) and the Wan 2.2 VAE (wan2.2_vae): load one of these, or "
            "use the stock VAE Decode / VAE Encode nodes, which take every VAE."
        )
    return patch


def check_latent(latent: Tensor, channels: int) -> Tensor:
    """The video latent [batch, channels, frames, height, width] of a LATENT's samples.

    Raises:
        ValueError: it has another shape.
    """
    if latent.is_nested:
        latent = latent.unbind()[0]
    if latent.ndim != 5 or latent.shape[1] != channels:
        raise ValueError(
            f"This VAE decodes video latents of shape [batch, {channels}, frames, height, "
            f"width]; the samples have shape {list(latent.shape)}. Use the latent of a model "
            "that belongs to this VAE."
        )
    return latent


class TiledDecoder:
    """A Wan VAE with a tile plan for one latent video [batch, C, T, h, w]."""

    def __init__(self, vae: Any, latent: Tensor, budget: str = AUTO) -> None:
        """`budget` is "auto" or gibibytes such as "4 GB"."""
        self.vae = vae
        self.decoder = WanDecoder(vae.first_stage_model, supported_patch(vae))
        self.latent = check_latent(latent, self.decoder.latent_channels)
        self.cost = CostModel(
            chain=self.decoder.chain,
            latent_height=latent.shape[-2],
            latent_width=latent.shape[-1],
            in_scale=1,
            out_scale=8,
            whole_macs=self.decoder.whole_macs,
            element_bytes=vae.vae_dtype.itemsize,
        )
        self.budget = budget

    @property
    def frames_per_item(self) -> int:
        return frame_count(self.latent.shape[2])

    @property
    def frames(self) -> int:
        """Image frames of the whole batch, one item after the other."""
        return self.latent.shape[0] * self.frames_per_item

    @property
    def height(self) -> int:
        return self.latent.shape[-2] * self.decoder.scale

    @property
    def width(self) -> int:
        return self.latent.shape[-1] * self.decoder.scale

    def plan(self) -> TileGrid:
        """Loads the VAE and picks tiles that fit the budget and the free memory."""
        return plan_tiles(self.vae, self.decoder, self.cost, self.budget, DECODE_WORK_LIMIT)

    def scratch_bytes(self, plan: TileGrid) -> int:
        """Bytes that a store holds: every tile's features with their halo."""
        areas = sum(self.cost.regions(tile)[0].area for tile in plan.tiles)
        size = self.decoder.feature_channels * self.vae.vae_dtype.itemsize
        return areas * self.latent.shape[2] * size

    def tiles(
        self, grid: TileGrid, new_store: Callable[[], Store] = MemoryStore
    ) -> Iterator[Piece]:
        """Decodes everything, tile by tile and within a tile frame by frame; images on the device.

        `new_store` makes the store for the whole-frame features of one batch item.
        """
        chunks = self.decoder.chunks(self.latent.shape[2])
        advance = server.progress_bar(self.latent.shape[0] * len(chunks) * (len(grid.tiles) + 1))
        for item in range(self.latent.shape[0]):
            store = new_store()
            try:
                features = _Features(self, item, grid, store, advance)
                for piece in self._item_tiles(features, grid, advance):
                    yield replace(piece, start=item * self.frames_per_item + piece.start)
            finally:
                store.close()

    def _item_tiles(
        self, features: "_Features", grid: TileGrid, advance: Callable[[int], None]
    ) -> Iterator[Piece]:
        if len(grid.tiles) > 1:
            features.compute_all()
        waiting = [(tile, tile) for tile in reversed(grid.tiles)]
        while waiting:
            stored, tile = waiting.pop()
            try:
                yield from self._tile(features, stored, tile, not waiting, advance)
            except Exception as error:
                if (
                    not management.is_out_of_memory(error)
                    or max(tile.rows.size, tile.cols.size) < 2
                ):
                    raise
                waiting += [(stored, half) for half in reversed(tile.halves())]
            else:
                continue
            # Outside the handler, where the error no longer holds on to the tile's tensors.
            management.empty_cache()

    def _tile(
        self,
        features: "_Features",
        stored: Region,
        tile: Region,
        last: bool,
        advance: Callable[[int], None],
    ) -> Iterator[Piece]:
        regions = self.cost.regions(tile)
        cache = self.decoder.cache(self.latent.shape[2])
        box = tile.scaled(self.decoder.scale)
        start = 0
        for number in range(len(features.chunks)):
            management.raise_if_cancelled()
            x = features.read(number, stored, regions[0])
            images = self._tile_images(x, cache, regions, number == 0)
            del x
            yield Piece(box, start, images, last)
            start += len(images)
            advance(1)

    @torch.inference_mode()
    def _tile_images(self, x: Tensor, cache: Cache, regions: list[Region], first: bool) -> Tensor:
        """Frames as the core makes images of them [t, height, width, 3], on the device."""
        vae = self.vae
        with management.device_context(vae):
            pixels = self.decoder.pixels(x, cache, regions, first)[0]
            images = vae.process_output(pixels.to(dtype=vae.vae_output_dtype(), copy=True))
        return images.movedim(0, -1)

    def pieces(self, plan: TileGrid, folder: Path) -> Iterator[Piece]:
        """All tiles as images; features that wait for other tiles lie in `folder`."""
        return self.tiles(plan, lambda: ScratchFile(folder))

    def all_images(self) -> Tensor:
        """All frames as images [frames, height, width, 3], batch items one after the other."""
        vae = self.vae
        shape = (self.frames, self.height, self.width, self.decoder.out_channels)
        images = torch.empty(shape, device=vae.output_device, dtype=vae.vae_output_dtype())
        with Outbox(vae.device) as outbox:
            for piece in self.tiles(self.plan()):
                rows, cols = slice(*_ends(piece.box.rows)), slice(*_ends(piece.box.cols))
                place = images[piece.start : piece.start + len(piece.images), rows, cols]
                outbox.put(piece.images, place.copy_)
        return images


class _Features:
    """The whole-frame stage of one batch item, computed once and kept per tile."""

    def __init__(
        self,
        tiled: TiledDecoder,
        item: int,
        grid: TileGrid,
        store: Store,
        advance: Callable[[int], None],
    ) -> None:
        self._tiled = tiled
        self._latent = tiled.latent[item : item + 1]
        self._regions = {tile: tiled.cost.regions(tile)[0] for tile in grid.tiles}
        self._store = store
        self._numbers: list[dict[Region, int]] = []
        self._advance = advance
        self.chunks = tiled.decoder.chunks(self._latent.shape[2])
        self._whole: WholeFrames | None = None

    def compute_all(self) -> None:
        """Computes what is missing and frees the stage's caches."""
        while len(self._numbers) < len(self.chunks):
            self._compute_next()

    def _compute_next(self) -> None:
        try:
            self._compute()
        except BaseException:
            # What later chunks read of this one may be half of it: whoever tries again begins anew.
            self._whole, self._numbers = None, []
            raise

    @torch.inference_mode()
    def _compute(self) -> None:
        management.raise_if_cancelled()
        tiled, vae = self._tiled, self._tiled.vae
        if self._whole is None:
            length = self._latent.shape[2]
            self._whole = whole_frames(
                vae, tiled.decoder, tiled.cost, tiled.budget, lambda: tiled.decoder.cache(length)
            )
        chunk = self._latent[:, :, self.chunks[len(self._numbers)]]
        with management.device_context(vae):
            whole = self._whole(chunk.to(device=vae.device, dtype=vae.vae_dtype))
        numbers = {}
        for tile, region in self._regions.items():
            rows, cols = slice(*_ends(region.rows)), slice(*_ends(region.cols))
            numbers[tile] = self._store.append(whole[..., rows, cols])
        self._numbers.append(numbers)
        if len(self._numbers) == len(self.chunks):
            self._whole = None
        self._advance(1)

    def read(self, number: int, tile: Region, region: Region) -> Tensor:
        """Features [1, D, t, h, w] of chunk `number` in `region`, part of what `tile` needs."""
        while len(self._numbers) <= number:
            self._compute_next()
        rows, cols = region.within(self._regions[tile])
        stored = self._store.read(self._numbers[number][tile])
        return stored[..., rows, cols].to(self._tiled.vae.device)


def _ends(span: Any) -> tuple[int, int]:
    return span.start, span.stop


def plan_tiles(
    vae: Any, coder: WanDecoder | WanEncoder, cost: CostModel, budget: str, work_limit: float
) -> TileGrid:
    """Loads the VAE and picks tiles that fit the budget and the free memory.

    With "auto", small tiles whose halos cost no more than `work_limit` times the work.
    """
    limit = parse_budget(budget)
    reachable = int(MEMORY_SHARE * management.reachable_vae_memory(vae))
    automatic = limit is None
    grid = frugal_grid(cost, reachable, work_limit) if automatic else grid_within(cost, limit)
    whole = _room(coder, cost, reachable if limit is None else limit)

    def peak(grid: TileGrid) -> int:
        """A single tile is computed while the stage before it keeps its frames."""
        tile = cost.peak_bytes(grid)
        return tile + whole.peak if len(grid.tiles) == 1 else max(tile, whole.peak)

    management.load_vae_weights(vae, peak(grid))
    free = int(MEMORY_SHARE * management.free_vae_memory(vae))
    if len(grid.tiles) == 1 and peak(grid) > free:
        grid = grid_within(cost, min(free, cost.peak_bytes(grid) - 1))
    return grid if cost.peak_bytes(grid) <= free else grid_within(cost, free)


def whole_frames(
    vae: Any,
    coder: WanDecoder | WanEncoder,
    cost: CostModel,
    budget: str,
    new_cache: Callable[[], Cache],
) -> WholeFrames:
    """The stage on whole frames within the budget and the free memory, for one video."""
    limit, free = parse_budget(budget), int(MEMORY_SHARE * management.free_vae_memory(vae))
    space = _room(coder, cost, free if limit is None else min(limit, free))
    size = cost.latent_height, cost.latent_width
    return WholeFrames(coder.middle, size, new_cache, space, vae.device)


def _room(coder: WanDecoder | WanEncoder, cost: CostModel, limit: int) -> Room:
    return room(coder.middle, cost.latent_height, cost.latent_width, cost.element_bytes, limit)


def decode_images(vae: Any, latent: Tensor, budget: str = AUTO) -> Tensor:
    """All frames of a latent video [batch, C, T, h, w] as images [frames, height, width, 3].

    Equal to the VAE's own untiled decode, batch items one after the other.
    """
    return TiledDecoder(vae, latent, budget).all_images()

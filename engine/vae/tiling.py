"""Chooses tiles: counted convolution work and modelled memory, as pure functions."""

from dataclasses import dataclass

from .layers import Chain
from .regions import Region, Span, TileGrid, trace

# Convolution backends ask for scratch memory of their own, and allocators fragment.
ALLOCATOR_MARGIN = 1.2
# `auto` takes the smallest tiles whose halos cost at most this much convolution work. Encoding
# is the cheaper half, and its halos are wider: they lie at full resolution.
DECODE_WORK_LIMIT = 1.10
ENCODE_WORK_LIMIT = 1.35
# A tile narrower than this, in latents, is nearly all halo.
SMALLEST_TILE = 8


@dataclass(frozen=True)
class CostModel:
    """Work and memory of a coder whose local chain runs in tiles.

    A frame has latent_height x latent_width latent positions, tiles are boxes of them. The
    chain's input axes are `in_scale` times, its output axes `out_scale` times as long.
    `whole_macs` are the multiply-adds per latent position and frame outside the chain.
    """

    chain: Chain
    latent_height: int
    latent_width: int
    in_scale: int
    out_scale: int
    whole_macs: int
    element_bytes: int

    def regions(self, tile: Region) -> list[Region]:
        """Input box of every step for a tile, then the output box."""
        height, width = self.latent_height * self.in_scale, self.latent_width * self.in_scale
        return self.chain.regions(tile.scaled(self.out_scale), height, width)

    def macs(self, grid: TileGrid) -> float:
        """Multiply-adds of the convolutions per latent frame, halos included."""
        rows = self._step_lengths(grid.row_spans, self.latent_height)
        cols = self._step_lengths(grid.col_spans, self.latent_width)
        costs = (step.macs for step in self.chain.steps)
        local = sum(m * r * c for m, r, c in zip(costs, rows, cols, strict=True))
        return local + self.whole_macs * self.latent_height * self.latent_width

    def tile_bytes(self, tile: Region) -> int:
        """Peak memory of one tile: its feature caches and its largest step."""
        areas = [region.area for region in self.regions(tile)[:-1]]
        steps = self.chain.steps
        cached = sum(step.cached * area for step, area in zip(steps, areas, strict=True))
        live = max(step.live * area for step, area in zip(steps, areas, strict=True))
        return int((cached + live) * self.element_bytes * ALLOCATOR_MARGIN)

    def peak_bytes(self, grid: TileGrid) -> int:
        """Peak memory of the grid's most demanding tile, one that halos surround."""
        row, col = grid.row_spans[grid.rows // 2], grid.col_spans[grid.cols // 2]
        return self.tile_bytes(Region(row, col))

    def _step_lengths(self, spans: tuple[Span, ...], latent_size: int) -> list[int]:
        """Input length of each step along one axis, added over the tiles."""
        rules, size = self.chain.rules, latent_size * self.in_scale
        traces = [trace(rules, span.scaled(self.out_scale), size)[:-1] for span in spans]
        return [sum(span.size for span in step) for step in zip(*traces, strict=True)]


def work_ratio(model: CostModel, grid: TileGrid) -> float:
    """Counted convolution work of the grid against an untiled pass."""
    return model.macs(grid) / model.macs(TileGrid(grid.height, grid.width, 1, 1))


def candidate_grids(height: int, width: int) -> list[TileGrid]:
    """Grids of nearly square tiles, from one tile down to the smallest edge."""
    edges = range(max(height, width), SMALLEST_TILE - 1, -1)
    shapes = {(-(-height // edge), -(-width // edge)) for edge in edges}
    return [TileGrid(height, width, rows, cols) for rows, cols in sorted(shapes | {(1, 1)})]


def grid_within(model: CostModel, budget: int) -> TileGrid:
    """The grid with the least work whose tiles fit `budget` bytes, else the smallest tiles."""
    grids = candidate_grids(model.latent_height, model.latent_width)
    fitting = [grid for grid in grids if model.peak_bytes(grid) <= budget]
    return min(fitting, key=model.macs) if fitting else min(grids, key=model.peak_bytes)


def frugal_grid(model: CostModel, budget: int, work_limit: float) -> TileGrid:
    """The smallest tiles that cost little extra work, as long as they fit `budget` bytes.

    More memory than this buys no speed, so it is left to the models that share the card.
    """
    grids = candidate_grids(model.latent_height, model.latent_width)
    cheap = [grid for grid in grids if work_ratio(model, grid) <= work_limit]
    grid = min(cheap, key=model.peak_bytes)
    return grid if model.peak_bytes(grid) <= budget else grid_within(model, budget)

"""Geometry of tiles against a brute-force reading of the convolutions."""

import torch
from atlasvid.engine.vae.regions import Down, Even, Region, Same, Span, TileGrid, Up, trace
from hypothesis import given
from hypothesis import strategies as st

CHAINS = {
    "decoder": [Same(2), Up(), Same(2), Same(2), Up(), Same(1)],
    "encoder": [Same(1), Same(2), Even(), Same(2), Down(), Same(2), Down()],
}


def spread(rules, size: int) -> torch.Tensor:
    """[output, input]: which inputs reach each output, from convolutions of ones."""
    reach = torch.eye(size)
    for rule in rules:
        match rule:
            case Same(context):
                kernel = torch.ones(1, 1, 2 * context + 1)
                reach = torch.conv1d(reach.T[:, None], kernel, padding=context)[:, 0].T
            case Up():
                doubled = reach.T.repeat_interleave(2, dim=1)
                reach = torch.conv1d(doubled[:, None], torch.ones(1, 1, 3), padding=1)[:, 0].T
            case Down():
                padded = torch.nn.functional.pad(reach.T[:, None], (0, 1))
                reach = torch.conv1d(padded, torch.ones(1, 1, 3), stride=2)[:, 0].T
        reach = (reach > 0).float()
    return reach


@given(name=st.sampled_from(sorted(CHAINS)), size=st.integers(2, 12), data=st.data())
def test_a_tiles_input_is_what_its_outputs_see(name, size, data):
    size *= 4
    rules = CHAINS[name]
    reach = spread(rules, size)
    start = data.draw(st.integers(0, reach.shape[0] - 1))
    stop = data.draw(st.integers(start + 1, reach.shape[0]))
    seen = reach[start:stop].any(dim=0).nonzero().flatten()
    needed = trace(rules, Span(start, stop), size)[0]
    assert needed.start <= seen.min()
    assert needed.stop > seen.max()
    slack = 8 if name == "encoder" else 3  # alignment to pairs, at most once per resolution
    assert needed.start >= max(0, seen.min() - slack)
    assert needed.stop <= min(size, seen.max() + 1 + slack)


@given(st.integers(1, 40), st.integers(1, 40), st.data())
def test_a_grid_covers_every_position_once(height, width, data):
    rows = data.draw(st.integers(1, height))
    cols = data.draw(st.integers(1, width))
    counts = torch.zeros(height, width)
    for tile in TileGrid(height, width, rows, cols).tiles:
        counts[tile.rows.start : tile.rows.stop, tile.cols.start : tile.cols.stop] += 1
    assert (counts == 1).all()


def test_halves_cut_the_longer_side():
    box = Region(Span(0, 4), Span(2, 9))
    left, right = box.halves()
    assert left == Region(Span(0, 4), Span(2, 5))
    assert right == Region(Span(0, 4), Span(5, 9))

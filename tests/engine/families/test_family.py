"""A further family is one object with the members of `families.family` and one registration."""

from types import SimpleNamespace

import pytest
import torch
from atlasvid.engine.branch.apply import apply_detail_branch
from atlasvid.engine.estimate.overview import shape_of_model
from atlasvid.engine.families import family, wan
from atlasvid.engine.geometry.grid import Grid
from wan import forward, plan_of, rand, relative_error, small_wan

LATENT, PROXY = (5, 8, 12), (2, 4, 6)


@pytest.fixture
def toy(monkeypatch):
    """Wan without a feed-forward, with much of the rest doubled."""
    members = {name: getattr(wan, name) for name in dir(wan) if not name.startswith("_")}
    members |= {
        "NAMES": "Toy",
        "recognises": lambda model: getattr(model.model, "is_toy", False),
        "feed_forward": lambda block, x, rows: torch.zeros_like(x),
        "keys": lambda block, y: 2 * wan.keys(block, y),
        "values": lambda block, y: 2 * wan.values(block, y),
        "rotate": lambda *given, out=None: into(out, 2 * wan.rotate(*given)),
        "turned_queries": lambda *given: 2 * wan.turned_queries(*given),
        "turned_keys": lambda *given, out=None: into(out, 4 * wan.turned_keys(*given)),
        "embed": lambda net, latent: 2 * wan.embed(net, latent),
        "head": lambda net, *tokens: 2 * wan.head(net, *tokens),
    }
    made = SimpleNamespace(**members)
    monkeypatch.setattr(family, "FAMILIES", [made, *family.FAMILIES])
    return made


def into(out, made):
    return made if out is None else out.copy_(made)


def as_stock():
    """The same arithmetic in a stock Wan: its weights changed."""
    model = small_wan(num_layers=2)
    net = model.model.diffusion_model
    doubled = [net.patch_embedding, net.head.head, *(block.self_attn.v for block in net.blocks)]
    with torch.no_grad():
        for layer in doubled:
            layer.weight.mul_(2)
            layer.bias.mul_(2)
        for block in net.blocks:
            block.ffn[2].weight.zero_()
            block.ffn[2].bias.zero_()
            block.self_attn.norm_q.weight.mul_(2)  # rotated
            block.self_attn.norm_k.weight.mul_(4)  # doubled, and rotated
    return model


@pytest.mark.parametrize("overlap", ["shifted", "sliding"])
@pytest.mark.parametrize("weight", [1.0, 8.0])
def test_the_branch_computes_with_the_family_it_finds(toy, overlap, weight):
    model, stock = small_wan(num_layers=2), as_stock()
    model.model.is_toy = True
    assert family.family_of(model) is toy
    assert family.family_of(stock) is wan
    plan, proxy = plan_of(LATENT, PROXY), rand(1, 16, *PROXY, seed=4)
    x, t, context = rand(1, 16, *LATENT), torch.tensor([600.0]), rand(1, 16, 4096, seed=2)
    chosen = {"guide_noise": "matched", "overlap": overlap, "guide_weight": weight}
    ours, expected, plain = (
        forward(apply_detail_branch(each, plan, proxy, Grid(2, 3, 3), **chosen), x, t, context)
        for each in (model, stock, small_wan(num_layers=2))
    )
    assert relative_error(ours, expected) < 1e-5
    assert relative_error(ours, plain) > 1e-2


def test_a_further_family_is_named_and_measured(toy):
    model = small_wan(num_layers=2)
    model.model.is_toy = True
    assert shape_of_model(model).layers == 2
    with pytest.raises(ValueError, match=r"Supported are Toy, Wan 2\.1 T2V"):
        family.family_of(SimpleNamespace(model=SimpleNamespace()))

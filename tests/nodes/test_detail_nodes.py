"""Every input of the detail nodes reaches the engine: each is compared with the engine's own."""

import pytest
import torch
from atlasvid import nodes
from atlasvid.engine.branch.apply import apply_detail_branch
from atlasvid.engine.geometry.grid import Grid
from wan import forward, plan_of, rand, relative_error, small_wan

PLAN = plan_of((5, 36, 36), (2, 12, 12))
PROXY = rand(1, 16, 2, 12, 12, seed=3)
GIVEN = {
    "window": {"window": "custom", "frames": 2, "height": 9, "width": 9},
    "overlap": "shifted",
    "guide_noise": "clean",
    "start_percent": 0.0,
    "end_percent": 1.0,
    "proxy": {"samples": PROXY},
}


@pytest.fixture(scope="module")
def wan():
    return small_wan()


def execute(node, *args, **kwargs):
    return node.PREPARE_CLASS_CLONE(None).execute(*args, **kwargs).args


def run(model):
    x, t = rand(1, 16, 5, 36, 36, seed=1), torch.tensor([700.0])
    return forward(model, x, t, rand(1, 16, 4096, seed=2))


def by_node(wan, **changes):
    attention = nodes.AtlasVidHierarchicalAttention
    return run(execute(attention, wan, PLAN, **(GIVEN | changes))[0])


def by_engine(wan, window=(2, 9, 9), guide_noise="clean", guide_weight="auto", **changes):
    changes["guide_weight"] = guide_weight
    return run(apply_detail_branch(wan, PLAN, PROXY, Grid(*window), guide_noise, **changes))


@pytest.mark.parametrize(
    ("by_name", "by_argument"),
    [
        ({}, {}),
        ({"overlap": "sliding"}, {"overlap": "sliding"}),
        ({"guide_noise": "matched"}, {"guide_noise": "matched"}),
        ({"window": {"window": "compact"}}, {"window": (4, 16, 16)}),
        ({"window": {"window": "trained size"}}, {"window": (2, 6, 6)}),
        (
            {"window": {"window": "compact"}, "keep_blocks": 2},
            {"window": (4, 16, 16), "keep_blocks": 2},
        ),
        ({"guide_weight": "1"}, {"guide_weight": 1}),
        ({"guide_weight": "40"}, {"guide_weight": 40}),
        ({"guide_weight": "0"}, {"guide_weight": 0}),
        ({"guide_margin": 1}, {"guide_margin": 1}),
    ],
)
def test_every_choice_reaches_the_engine(wan, by_name, by_argument):
    ours = by_node(wan, **by_name)
    assert relative_error(ours, by_engine(wan, **by_argument)) < 1e-6
    if by_name:
        assert relative_error(ours, by_node(wan)) > 1e-4


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"memory_budget": "plenty"}, "memory_budget is 'plenty'"),
        ({"attention": "quick"}, "attention is 'quick'"),
        ({"start_percent": 0.9, "end_percent": 0.1}, "swap them"),
        ({"overlap": "none"}, "overlap is 'none'"),
        ({"guide_noise": "loud"}, "guide_noise is 'loud'"),
        ({"guide_weight": "loud"}, "guide_weight is 'loud'"),
        ({"guide_margin": -1}, "guide_margin is -1"),
        ({"window": {"window": "huge"}}, "window is 'huge'"),
        ({"proxy": {"samples": PROXY[:, :, :1]}}, "proxy latent is 1 x 12 x 12"),
    ],
)
def test_a_wrong_choice_is_refused(wan, wrong, message):
    with pytest.raises(ValueError, match=message):
        by_node(wan, **wrong)


def test_a_graph_of_the_first_version_still_runs(wan):
    """Without the inputs that came later."""
    first = {k: v for k, v in GIVEN.items() if k != "proxy"}
    assert run(execute(nodes.AtlasVidHierarchicalAttention, wan, PLAN, **first)[0]).isfinite().all()


def test_plan_node_gives_what_its_sockets_say(wan):
    out = execute(nodes.AtlasVidPlan, wan, 512, 288, 2.0, 16.0, 192, 4)
    plan, latent, width, height, frames, proxy_width, proxy_height, proxy_frames = out
    assert (width, height, frames) == (plan.width, plan.height, plan.frames) == (512, 288, 33)
    assert (proxy_width, proxy_height, proxy_frames) == (336, 192, 9)
    assert latent["samples"].shape == (1, 16, 3, 24, 42)
    assert not latent["samples"].any()


def test_detail_latent_has_the_targets_size(wan):
    (latent,) = execute(nodes.AtlasVidDetailLatent, PLAN, {"samples": PROXY})
    assert latent["samples"].shape == (1, 16, 5, 36, 36)
    with pytest.raises(ValueError, match="proxy latent is 2 x 12 x 11"):
        execute(nodes.AtlasVidDetailLatent, PLAN, {"samples": PROXY[..., :-1]})


def test_tiny_models_work_with_the_stock_text_node():
    from nodes import CLIPTextEncode

    model, clip, vae, guide_lora, proxy_model, flashvsr = execute(
        nodes.AtlasVidTinyModels, 5, "random"
    )
    assert guide_lora is None
    assert proxy_model is model
    assert flashvsr.tc_decoder is not None
    ((embedding, _),) = CLIPTextEncode().encode(clip, "a red fox")[0]
    assert embedding.shape == (1, 16, 4096)
    ((same, _),) = CLIPTextEncode().encode(clip, "A red fox")[0]
    assert torch.equal(embedding, same)
    assert vae.decode(torch.zeros(1, 16, 1, 4, 4)).shape == (1, 1, 32, 32, 3)
    assert type(model.model).__name__ == "WAN21"

"""A render that was stopped goes on bit by bit, for any sampler; what changed is never answered."""

import pytest
import torch
from atlasvid.engine.branch.apply import apply_detail_branch
from atlasvid.engine.geometry.grid import Grid
from atlasvid.engine.proxy.structure import apply_structure_guidance
from atlasvid.engine.resume import store
from atlasvid.engine.resume.run import apply_resume
from sampling import Stopped, calls, sample
from wan import plan_of, rand

PLAN = plan_of((3, 8, 8), (2, 4, 4), stride=2)
SAMPLERS = ("euler", "dpmpp_2m", "uni_pc", "euler_ancestral", "res_multistep", "heun", "lcm")


def detail(model, **changes):
    """The detail branch and structure guidance around a model."""
    given = {"guide_weight": 4.0, "window": Grid(2, 2, 2), "guide_noise": "matched", **changes}
    strength = given.pop("strength", 0.8)
    proxy = given.pop("proxy", rand(1, 16, 2, 4, 4, seed=3))
    branch = apply_detail_branch(model, PLAN, proxy, **given)
    return apply_structure_guidance(branch, PLAN, proxy, strength=strength, end_percent=0.7)


def stop_and_go_on(run, after):
    """What comes out after a stop before forward number `after`, and the forwards of both parts."""
    with calls(stop_before=after) as first, pytest.raises(Stopped):
        run()
    with calls() as second:
        return run(), len(first), len(second)


@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_stop_before_any_forward_changes_no_bit(wan, sampler, cfg):
    model, chosen = apply_resume(wan), {"sampler": sampler, "cfg": cfg}
    with calls() as plain:
        expected = sample(wan, **chosen)
    assert len(plain) >= 4
    for after in range(1, len(plain)):
        result, first, second = stop_and_go_on(lambda: sample(model, **chosen), after)
        assert torch.equal(result, expected)
        assert first == after
        assert second == len(plain) - after, "a kept answer was computed again"
        if after + 1 < len(plain):
            for render in store.renders():
                render.delete()
    with calls() as none:
        assert torch.equal(sample(model, **chosen), expected)
    assert not none

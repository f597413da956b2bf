"""Whatever may change an answer: changed, it is not answered; unseen, nothing is kept."""

import copy

import comfy.samplers
import comfy_extras.nodes_apg
import comfy_extras.nodes_cfg
import comfy_extras.nodes_easycache
import pytest
import torch
from atlasvid.engine.branch.apply import apply_detail_branch
from atlasvid.engine.comfyui import models, origins
from atlasvid.engine.families import tiny
from atlasvid.engine.geometry.grid import Grid
from atlasvid.engine.lora.files import LoraFile, LowRank
from atlasvid.engine.lora.guide import GuideLora
from atlasvid.engine.proxy.frequencies import apply_rope_method
from atlasvid.engine.proxy.structure import apply_structure_guidance
from atlasvid.engine.resume import identity, store
from atlasvid.engine.resume.run import apply_resume
from comfy_api.torch_helpers.torch_compile import set_torch_compile_wrapper
from sampling import SHAPE, calls, conditioning, sample
from wan import plan_of, rand, small_wan

PLAN = plan_of((3, 8, 8), (2, 4, 4), stride=2)
WINDOW = Grid(2, 2, 2)
SIZES = {"num_layers": 2, "ffn_dim": 256}


def lora(strength, seed=0):
    factors = {"A": rand(2, 256, seed=seed), "B": rand(256, 2, seed=seed + 1)}
    return {f"diffusion_model.blocks.0.self_attn.q.lora_{s}.weight": x for s, x in factors.items()}


def guide_lora(strength=1.0, seed=0):
    change = LowRank(rand(2, 256, seed=seed), rand(256, 2, seed=seed + 1), 1.0)
    file = LoraFile("guide.safetensors", {"blocks.0.self_attn.q": change}, (), None)
    return GuideLora(file, strength)


def graph(
    *,
    state=None,
    lora_strength=0.5,
    lora_seed=0,
    shift=3.0,
    window=WINDOW,
    weight=4.0,
    margin=0,
    overlap="shifted",
    guide_noise="matched",
    proxy_seed=3,
    guide=None,
    keep_blocks=0,
    end_percent=1.0,
    strength=0.8,
    structure_end=0.7,
    rope=1.0,
    budget="auto",
):
    """A model with everything that a graph puts on it, loaded anew as after a restart."""
    model = models.load_diffusion_model(state or tiny.wan_state(0, **SIZES))
    model = models.with_lora(model, lora(1, lora_seed), lora_strength)
    model = models.with_shift(model, shift)
    model = apply_rope_method(model, "ntk", temporal_scale=rope, spatial_scale=1.0, plan=None)
    proxy = rand(1, 16, 2, 4, 4, seed=proxy_seed)
    model = apply_detail_branch(
        model,
        PLAN,
        proxy,
        window,
        guide_noise,
        guide_weight=weight,
        guide_margin=margin,
        overlap=overlap,
        guide_lora=guide or guide_lora(),
        keep_blocks=keep_blocks,
        end_percent=end_percent,
        memory_budget=budget,
    )
    return apply_structure_guidance(
        model, PLAN, proxy, strength=strength, end_percent=structure_end
    )


def nudged(name):
    """The model's weights, one number of one tensor moved to the next float."""
    state = tiny.wan_state(0, **SIZES)
    flat = state[name].reshape(-1)
    flat[-1] = torch.nextafter(flat[-1], torch.tensor(torch.inf))
    return state


WEIGHTS = sorted(tiny.wan_state(0, **SIZES))
GRAPHS = {
    "a weight by one ulp": {"state": nudged("blocks.1.ffn.2.bias")},
    "the LoRA's strength": {"lora_strength": 0.51},
    "the LoRA": {"lora_seed": 5},
    "the shift": {"shift": 3.1},
    "the window": {"window": Grid(2, 4, 2)},
    "the guide weight": {"weight": 4.01},
    "the guide margin": {"margin": 1},
    "the overlap": {"overlap": "sliding"},
    "the guide noise": {"guide_noise": "clean"},
    "the proxy": {"proxy_seed": 4},
    "the guide LoRA": {"guide": guide_lora(seed=9)},
    "the guide LoRA's strength": {"guide": guide_lora(0.99)},
    "keep_blocks": {"keep_blocks": 1},
    "the end of the branch": {"end_percent": 0.9},
    "the structure guidance": {"strength": 0.81},
    "the end of the structure guidance": {"structure_end": 0.71},
    "the positions": {"rope": 2.0},
}
SAMPLINGS = {
    "the prompt": {"positive": conditioning(11)},
    "the negative prompt": {"negative": conditioning(12)},
    "a prompt's strength": {"positive": conditioning(1, strength=0.9)},
    "the seed": {"seed": 8},
    "cfg": {"cfg": 1.01},
    "the sampler": {"sampler": "dpmpp_2m"},
    "the steps": {"steps": 3},
}


@pytest.fixture(scope="module")
def answered(tmp_path_factory):
    """An output folder with a whole render in it."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("answered")
        patch.setattr(store.server.folder_paths, "output_directory", str(folder))
        sample(apply_resume(graph()), steps=2)
    return folder


@pytest.fixture
def kept(answered, monkeypatch):
    monkeypatch.setattr(store.server.folder_paths, "output_directory", str(answered))


def new_forwards(model, **chosen):
    with calls() as made:
        sample(apply_resume(model), **{"steps": 2, **chosen})
    return len(made)


def test_the_same_is_answered_after_a_restart(kept):
    assert new_forwards(graph()) == 0
    assert new_forwards(graph(budget="2 GB")) == 0, "a budget only says in which pieces"


def test_a_lora_that_lies_on_the_weights_already_does_not_matter():
    """ComfyUI adds LoRAs to the weights in place, and takes them off for the next model."""
    base = models.load_diffusion_model(tiny.wan_state(0, **SIZES))
    used = [models.with_lora(base, lora(1), strength) for strength in (0.5, 0.6)]
    made = [new_forwards(used[i]) for i in (0, 0, 1, 0, 1)]
    assert made == [2, 0, 2, 0, 0]
    assert [new_forwards(base), new_forwards(base), new_forwards(used[1])] == [2, 0, 0]


@pytest.mark.parametrize("name", GRAPHS)
def test_a_changed_graph_is_not_answered(kept, name):
    assert new_forwards(graph(**GRAPHS[name])) == 2


@pytest.mark.parametrize("name", SAMPLINGS)
def test_a_changed_sampling_is_not_answered(kept, name):
    given = SAMPLINGS[name]
    assert new_forwards(graph(), **given) >= given.get("steps", 2)


def test_another_latent_is_not_answered(wan):
    for seed in (1, 2):
        assert new_forwards(wan, latent=rand(*SHAPE, seed=seed), denoise=0.6) == 2


@pytest.mark.parametrize("name", WEIGHTS[:: len(WEIGHTS) // 12])
def test_one_ulp_in_any_tensor_is_another_model(name):
    weights = tiny.wan_state(0, **SIZES)
    fingerprint = identity.weights_digest(weights.items(), lambda share: None)
    same = identity.weights_digest(tiny.wan_state(0, **SIZES).items(), lambda share: None)
    assert fingerprint == same
    assert fingerprint != identity.weights_digest(nudged(name).items(), lambda share: None)


def test_an_image_to_video_latent_is_part_of_what_is_asked():
    state = tiny.wan_state(0, in_dim=36, **SIZES)

    def run(seed):
        model = models.load_diffusion_model(dict(state))
        image = {
            "concat_latent_image": rand(*SHAPE, seed=seed),
            "concat_mask": torch.ones(1, 1, 3, 8, 8),
        }
        with calls() as made:
            sample(apply_resume(model), positive=conditioning(1, **image), steps=2)
        return len(made)

    assert run(1) == 2
    assert run(1) == 0
    assert run(2) == 2


def other_packs_patch(model):
    def patch(args):
        return args["denoised"]

    clone = model.clone()
    clone.set_model_sampler_post_cfg_function(patch)
    return clone


def other_packs_wrapper(model):
    clone = model.clone()
    clone.add_wrapper("apply_model", lambda executor, *args, **kw: executor(*args, **kw))
    return clone


def layer_hook(model):
    model = small_wan(**SIZES)
    model.model.diffusion_model.blocks[0].register_forward_hook(lambda *given: None)
    return model


def momentum(model):
    return comfy_extras.nodes_apg.APG.execute(model, 1.0, 2.0, 0.5)[0]


def easy_cache(model):
    execute = comfy_extras.nodes_easycache.EasyCacheNode.execute
    return execute(model, 0.2, 0.15, 0.95, False)[0]


@pytest.mark.parametrize(
    "change", [other_packs_patch, other_packs_wrapper, layer_hook, momentum, easy_cache]
)
def test_what_cannot_be_seen_is_named_and_nothing_is_kept(wan, change, caplog, output):
    model = change(wan)
    expected = sample(model, cfg=3.0)
    assert torch.equal(sample(apply_resume(model), cfg=3.0), expected)
    assert not list(output.rglob("*.safetensors"))
    assert "keeps nothing" in caplog.text


def test_samplers_that_look_into_cfg_are_not_answered(wan, caplog, output):
    """CFG++ takes the unconditional prediction aside while the model answers."""
    expected = sample(wan, sampler="euler_cfg_pp", cfg=3.0)
    assert torch.equal(sample(apply_resume(wan), sampler="euler_cfg_pp", cfg=3.0), expected)
    assert not list(output.rglob("*.safetensors"))
    assert "keeps a state" in caplog.text or "keeps nothing" in caplog.text


def test_a_replaced_function_of_comfyui_is_noticed(wan, monkeypatch, output):
    stock = comfy.samplers.cfg_function

    def in_its_place(*args, **given):
        return stock(*args, **given)

    monkeypatch.setattr(comfy.samplers, "cfg_function", in_its_place)
    sample(apply_resume(wan))
    assert not list(output.rglob("*.safetensors"))


def test_stateless_nodes_of_comfyui_are_seen_through(wan):
    def rescaled(multiplier):
        from comfy_extras.nodes_model_advanced import RescaleCFG

        return RescaleCFG().patch(wan, multiplier)[0]

    def forwards(multiplier):
        with calls() as made:
            sample(apply_resume(rescaled(multiplier)), cfg=3.0, steps=2)
        return bool(made)

    assert [forwards(0.7), forwards(0.7), forwards(0.6)] == [True, False, True]


def test_a_compiled_model_is_told_by_how_it_is_compiled(wan):
    def options(fullgraph):
        model = wan.clone()
        set_torch_compile_wrapper(model, "eager", fullgraph=fullgraph, keys=["diffusion_model"])
        given = {**model.model_options, "transformer_options": {"wrappers": model.wrappers}}
        return identity.digest(origins.options(given, own=()))

    assert options(False) == options(False)
    assert options(False) != options(True)


# --- The hash itself ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (["ab", "c"], ["a", "bc"]),
        ([1], [1.0]),
        ([1], [True]),
        ([], None),
        ({"a": 1}, ["a", 1]),
        ([[1], 2], [1, [2]]),
        (torch.zeros(2, 3), torch.zeros(3, 2)),
        (torch.zeros(4, dtype=torch.float16), torch.zeros(4, dtype=torch.bfloat16)),
        (torch.zeros(2), torch.tensor([0.0, -0.0])),
    ],
)
def test_values_that_differ_have_different_hashes(one, other):
    assert identity.digest(one) != identity.digest(other)
    assert identity.digest(one) == identity.digest(copy.deepcopy(one))


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.bool]
)
def test_tensors_are_told_by_their_values_not_by_how_they_lie(dtype):
    x = (rand(6, 8) * 3).to(dtype)
    turned = x.t().contiguous().t()
    assert turned.stride() != x.stride()
    assert identity.tensor_digest(x) == identity.tensor_digest(turned)
    assert identity.tensor_digest(x[:, ::2]) == identity.tensor_digest(x[:, ::2].clone())
    for one in (x[0, 0].expand(1), x[0, 0].expand(3)):
        assert identity.tensor_digest(one) == identity.tensor_digest(one.clone())


def test_slices_do_not_matter(monkeypatch):
    x = rand(1000)
    whole = identity.tensor_digest(x)
    monkeypatch.setattr(identity, "SLICE", 16)
    assert identity.tensor_digest(x) == whole


def test_a_set_has_no_order():
    names = [f"layer {i}" for i in range(50)]
    assert list(set(names)) != names
    assert identity.digest(set(names)) == identity.digest(frozenset(names[::-1]))


def test_a_list_that_holds_itself_ends():
    loop: list = [1]
    loop.append(loop)
    assert identity.digest(loop)


def test_an_object_without_content_is_refused_and_its_place_named():
    with pytest.raises(identity.Unstable, match=r"object of builtins \(a / b\)"):
        identity.digest({"a": {"b": object()}})

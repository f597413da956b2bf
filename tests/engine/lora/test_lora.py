"""Guide LoRAs against peft itself, in every layout of keys."""

import copy
import json
import logging
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import comfy.ops
import comfy.sample
import comfy.sd
import peft
import pytest
import torch
from atlasvid.engine.branch.apply import apply_detail_branch
from atlasvid.engine.branch.guide import GuideStream
from atlasvid.engine.branch.settings import (
    auto_guide_weight,
    preset_guide_noise,
    preset_guide_weight,
    preset_window,
)
from atlasvid.engine.comfyui import models
from atlasvid.engine.families import wan as family
from atlasvid.engine.geometry.grid import Grid
from atlasvid.engine.lora.files import read_lora
from atlasvid.engine.lora.guide import GuideLora, load_guide_lora
from atlasvid.engine.lora.recipe import BaseShape, Recipe
from dense_reference import dense_forward
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from wan import forward, plan_of, rand, relative_error, small_wan

TARGETS = r"blocks\.\d+\.((self|cross)_attn\.[qkvo]|ffn\.[02])|time_(embedding\.[02]|projection\.1)"
WINDOW = Grid(2, 4, 4)
RECIPE = Recipe("guide", 4, WINDOW, "clean", 4, 6.0, BaseShape(256, 512, 3, 16), 7, "0.1.0")


@pytest.fixture(scope="module")
def wan():
    return small_wan()


@pytest.fixture(scope="module")
def adapted(wan):
    """The model with random peft adapters, off."""
    config = LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, init_lora_weights=False)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = get_peft_model(copy.deepcopy(wan.model.diffusion_model), config)
    model.base_model.disable_adapter_layers()
    return model


@pytest.fixture(scope="module")
def peft_folder(adapted, tmp_path_factory):
    folder = tmp_path_factory.mktemp("peft")
    adapted.save_pretrained(folder)
    return folder


def adapters_on(model):
    @contextmanager
    def on():
        model.base_model.enable_adapter_layers()
        yield
        model.base_model.disable_adapter_layers()

    return on


def case(batch=1):
    x, context = rand(batch, 16, 5, 8, 12, seed=1), rand(batch, 16, 4096, seed=2)
    return x, torch.full((batch,), 700.0), context, rand(1, 16, 2, 4, 6, seed=4)


def dense(wan, adapted, inputs):
    x, t, context, proxy = inputs
    guide = wan.model.latent_format.process_in(proxy).expand(len(x), -1, -1, -1, -1)
    with torch.no_grad():
        model = adapted.base_model.model
        guide_t = torch.zeros(len(x))
        return dense_forward(
            model, x, t, context, WINDOW, guide, guide_t, 4, adapted=adapters_on(adapted)
        )


def streamed(wan, lora, inputs, plan=None):
    x, t, context, proxy = inputs
    plan = plan or plan_of((5, 8, 12), (2, 4, 6))
    patched = apply_detail_branch(wan, plan, proxy, WINDOW, "clean", guide_lora=lora)
    return forward(patched, x, t, context)


def diffusers_name(name):
    """blocks.0.self_attn.q -> transformer.blocks.0.attn1.to_q, as diffusers converts Wan."""
    renames = {"self_attn": "attn1", "cross_attn": "attn2", "ffn.0": "ffn.net.0.proj"}
    renames |= {"ffn.2": "ffn.net.2", ".o": ".to_out.0", ".q": ".to_q", ".k": ".to_k"}
    renames |= {".v": ".to_v", "time_embedding.0": "condition_embedder.time_embedder.linear_1"}
    renames |= {"time_embedding.2": "condition_embedder.time_embedder.linear_2"}
    renames |= {"time_projection.1": "condition_embedder.time_proj"}
    for old, new in renames.items():
        if old.startswith(".") and not name.endswith(old):
            continue
        name = name.replace(old, new)
    return f"transformer.{name}"


def in_layout(layout, state):
    """A peft state dict under another tool's keys; alpha as that tool keeps it."""
    factors = {
        "comfyui": ("lora_A.weight", "lora_B.weight"),
        "comfyui up/down": ("lora_down.weight", "lora_up.weight"),
        "kohya": ("lora_down.weight", "lora_up.weight"),
        "wan fun": ("lora_down.weight", "lora_up.weight"),
        "diffusers": ("lora_A.weight", "lora_B.weight"),
        "diffusers old": ("lora.down.weight", "lora.up.weight"),
        "peft adapter name": ("lora_A.default.weight", "lora_B.default.weight"),
    }[layout]
    out = {}
    for key, value in state.items():
        name = key.removeprefix("base_model.model.")
        name, _, side = name.partition(".lora_")
        renamed = {
            "comfyui": f"diffusion_model.{name}",
            "comfyui up/down": f"diffusion_model.{name}",
            "kohya": f"lora_unet_{name.replace('.', '_')}",
            "wan fun": f"lora_unet__{name.replace('.', '_')}",
            "peft adapter name": f"base_model.model.{name}",
        }.get(layout) or diffusers_name(name)
        out[f"{renamed}.{factors[side.startswith('B')]}"] = value
        if not layout.startswith("diffusers"):
            out[f"{renamed}.alpha"] = torch.tensor(6.0)
    metadata = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 6})}
    return out, metadata if layout.startswith("diffusers") else None


@pytest.mark.parametrize("batch", [1, 2])
def test_acts_on_guide_tokens_only(wan, adapted, peft_folder, batch):
    """The dense network with peft adapters on for guide tokens and off for target tokens."""
    inputs = case(batch)
    expected = dense(wan, adapted, inputs)
    lora = load_guide_lora(peft_folder / "adapter_model.safetensors", 1.0)
    assert relative_error(streamed(wan, lora, inputs), expected) < 1e-5
    assert relative_error(streamed(wan, None, inputs), expected) > 1e-2, "the LoRA must matter"


@pytest.mark.parametrize("guide_too", [False, True])
def test_a_target_lora_acts_on_target_tokens_only(wan, adapted, peft_folder, guide_too):
    """The dense network with peft adapters on for target tokens, and for the guide's on demand."""
    x, t, context, proxy = case()
    lora = load_guide_lora(peft_folder / "adapter_model.safetensors", 1.0)
    patched = apply_detail_branch(
        wan,
        plan_of((5, 8, 12), (2, 4, 6)),
        proxy,
        WINDOW,
        "clean",
        guide_lora=lora if guide_too else None,
        target_lora=lora,
    )
    ours = forward(patched, x, t, context)
    on, guide = adapters_on(adapted), wan.model.latent_format.process_in(proxy)
    with torch.no_grad():
        expected = dense_forward(
            adapted.base_model.model, x, t, context, WINDOW, guide, torch.zeros(1), 4,
            adapted=on if guide_too else nullcontext, target_adapted=on,
        )  # fmt: skip
    assert relative_error(ours, expected) < 1e-4
    assert relative_error(streamed(wan, lora, case()), expected) > 1e-2


@pytest.mark.parametrize(
    "layout",
    [
        "comfyui",
        "comfyui up/down",
        "kohya",
        "wan fun",
        "diffusers",
        "diffusers old",
        "peft adapter name",
    ],
)
def test_every_layout_of_keys_is_the_same_lora(wan, peft_folder, tmp_path, layout, caplog):
    state = load_file(peft_folder / "adapter_model.safetensors")
    expected = GuideLora(read_lora(peft_folder / "adapter_model.safetensors"), 1.0)
    file = tmp_path / "lora.safetensors"
    tensors, metadata = in_layout(layout, state)
    save_file(tensors, file, metadata)
    lora = load_guide_lora(file, 1.0)
    model = wan.model.diffusion_model
    with caplog.at_level(logging.WARNING):
        found, wanted = lora.changes_of(model), expected.changes_of(model)
    assert not caplog.records
    assert found.keys() == wanted.keys()
    assert len(found) == 3 * 10 + 3
    for name, change in found.items():
        assert change.scale == wanted[name].scale == 1.5
        assert torch.equal(change.down, wanted[name].down)
        assert torch.equal(change.up, wanted[name].up)


def test_rank_stabilised_loras_are_scaled_as_peft_does(wan, tmp_path):
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["q"], use_rslora=True)
    model = get_peft_model(copy.deepcopy(wan.model.diffusion_model), config)
    model.save_pretrained(tmp_path)
    layer = model.base_model.model.blocks[0].self_attn.q
    changes = read_lora(tmp_path / "adapter_model.safetensors").changes
    assert layer.scaling["default"] == 3.0
    assert {change.scale for change in changes.values()} == {3.0}


def test_scales_of_single_layers_are_refused(wan, tmp_path):
    config = LoraConfig(r=4, target_modules=["q"], alpha_pattern={"blocks.0.self_attn.q": 2})
    get_peft_model(copy.deepcopy(wan.model.diffusion_model), config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"adapter_config.json gives layers scales of their own"):
        read_lora(tmp_path / "adapter_model.safetensors")


def test_strength_scales_the_change(wan, adapted, peft_folder):
    inputs = case()
    path = peft_folder / "adapter_model.safetensors"
    halved = load_file(path)
    for key in halved:
        if "lora_B" in key:
            halved[key] *= 0.5
    plain = streamed(wan, None, inputs)
    assert torch.equal(streamed(wan, load_guide_lora(path, 0.0), inputs), plain)
    half = streamed(wan, load_guide_lora(path, 0.5), inputs)
    copied = copy.deepcopy(adapted)
    peft.set_peft_model_state_dict(copied, halved)
    assert relative_error(half, dense(wan, copied, inputs)) < 1e-5


def test_model_and_target_are_untouched(wan, peft_folder):
    """The model's own output after, and every weight, are as before."""
    x, t, context, _ = inputs = case()
    before = forward(wan, x, t, context)
    names = [name for name, _ in wan.model.named_modules()]
    streamed(wan, load_guide_lora(peft_folder / "adapter_model.safetensors", 1.0), inputs)
    assert torch.equal(forward(wan, x, t, context), before)
    assert [name for name, _ in wan.model.named_modules()] == names


def test_together_with_a_stock_lora(wan, adapted, peft_folder):
    """A stock LoRA changes guide and target alike, below the guide LoRA."""
    inputs = case()
    stock = {
        f"diffusion_model.blocks.{i}.{layer}.lora_{side}.weight": 0.1 * rand(*shape, seed=i)
        for i in range(3)
        for layer in ("self_attn.q", "self_attn.v", "ffn.2")
        for side, shape in (
            ("A", (2, 512 if layer == "ffn.2" else 256)),
            ("B", (256, 2)),
        )
    }
    patched, _ = comfy.sd.load_lora_for_models(wan, None, stock, 1.0, 0.0)
    lora = load_guide_lora(peft_folder / "adapter_model.safetensors", 1.0)
    merged = copy.deepcopy(adapted)
    for name, tensor in stock.items():
        if "lora_B" in name:
            layer = merged.base_model.model.get_submodule(
                name.removeprefix("diffusion_model.").removesuffix(".lora_B.weight")
            )
            layer.base_layer.weight.data += tensor @ stock[name.replace("lora_B", "lora_A")]
    patched.patch_model()
    try:
        ours = streamed(patched, lora, inputs)
    finally:
        patched.unpatch_model()
    assert relative_error(ours, dense(wan, merged, inputs)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_base_weights_of_any_dtype(wan, peft_folder, dtype):
    """Weights stored in another type are cast per call, as ComfyUI does for offloaded ones."""
    inputs = case()
    lora = load_guide_lora(peft_folder / "adapter_model.safetensors", 1.0)
    stored = small_wan()
    rounded = small_wan()
    for name, linear in stored.model.diffusion_model.blocks.named_modules():
        if isinstance(linear, torch.nn.Linear):
            weight = linear.weight.data.to(dtype)
            linear.weight = torch.nn.Parameter(weight, requires_grad=False)
            linear.comfy_cast_weights = True
            rounded.model.diffusion_model.blocks.get_submodule(name).weight.data = weight.float()
    ours = streamed(stored, lora, inputs)
    assert relative_error(ours, streamed(rounded, lora, inputs)) < 1e-6
    assert relative_error(ours, streamed(wan, lora, inputs)) > 1e-6


def test_the_guides_keys_are_kept_for_all_steps(wan, peft_folder, monkeypatch):
    """And sampling with them is sampling with keys that are computed in every step."""
    evaluated = []
    stock = GuideStream._evaluate
    monkeypatch.setattr(GuideStream, "_evaluate", lambda s: evaluated.append(1) or stock(s))
    _, _, context, proxy = case()
    lora = load_guide_lora(peft_folder / "adapter_model.safetensors", 1.0)
    plan = plan_of((5, 8, 12), (2, 4, 6))
    patched = apply_detail_branch(wan, plan, proxy, WINDOW, "clean", guide_lora=lora)
    noise, words = rand(1, 16, 5, 8, 12, seed=5), [[context, {}]]
    arguments = (3, 1.0, "euler", "simple", words, words, torch.zeros_like(noise))
    made = comfy.sample.sample(patched, noise, *arguments, seed=0)
    assert len(evaluated) == 1
    monkeypatch.setattr(models, "has_scheduled_weights", lambda model: True)
    again = comfy.sample.sample(patched, noise, *arguments, seed=0)
    assert len(evaluated) == 1 + 3
    assert relative_error(again, made) < 1e-5


# --- What does not fit ----------------------------------------------------------------------


def saved(path, tensors, recipe=None):
    save_file(tensors, path, recipe and recipe.to_metadata())
    return path


def pair(layer, width=256, out=256, rank=2):
    return {
        f"{layer}.lora_A.weight": torch.ones(rank, width),
        f"{layer}.lora_B.weight": torch.ones(out, rank),
    }


def test_a_partial_match_is_counted(wan, tmp_path, caplog):
    tensors = pair("diffusion_model.blocks.0.self_attn.q") | pair("diffusion_model.blocks.9.ffn.0")
    tensors |= pair("diffusion_model.text_embedding.0")
    tensors["diffusion_model.blocks.0.norm3.diff"] = torch.ones(256)
    lora = load_guide_lora(saved(tmp_path / "some.safetensors", tensors), 1.0)
    with caplog.at_level(logging.WARNING):
        lora.changes_of(wan.model.diffusion_model)
    assert "1 of its 3 layers are used" in caplog.text
    assert "2 layers (such as diffusion_model.blocks.9.ffn.0)" in caplog.text
    assert "1 other tensors (such as diffusion_model.blocks.0.norm3.diff)" in caplog.text


def test_a_lora_of_another_architecture_is_refused(wan, tmp_path):
    tensors = pair("transformer.single_transformer_blocks.0.attn.to_q")
    lora = load_guide_lora(saved(tmp_path / "flux.safetensors", tensors), 1.0)
    with pytest.raises(ValueError, match=r"None of the 1 layers in flux\.safetensors"):
        lora.changes_of(wan.model.diffusion_model)


def test_a_lora_of_another_size_is_refused(wan, tmp_path):
    tensors = pair("diffusion_model.blocks.0.self_attn.q", width=1536, out=1536)
    lora = load_guide_lora(saved(tmp_path / "large.safetensors", tensors), 1.0)
    with pytest.raises(ValueError, match="1536 inputs and 1536 outputs; in this model it has 256"):
        lora.changes_of(wan.model.diffusion_model)


def test_a_dora_is_not_half_used(tmp_path):
    tensors = pair("diffusion_model.blocks.0.self_attn.q")
    tensors["diffusion_model.blocks.0.self_attn.q.dora_scale"] = torch.ones(256)
    path = saved(tmp_path / "dora.safetensors", tensors)
    with pytest.raises(ValueError, match="holds no LoRA"):
        read_lora(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("lora.pt", b"", "not a .safetensors file"),
        ("lora.safetensors", b"not at all", "cannot be read"),
    ],
)
def test_other_files_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_lora(tmp_path / name)


Q = "diffusion_model.blocks.0.self_attn.q"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({f"{Q}.lora_A.weight": torch.full((2, 256), torch.nan)}, "contains NaN or infinite"),
        ({f"{Q}.lora_B.weight": torch.full((256, 2), torch.inf)}, "contains NaN or infinite"),
        (
            {f"{Q}.lora_A.weight": torch.full((2, 256), torch.nan).to(torch.float8_e4m3fn)},
            "contains NaN or infinite",
        ),
        ({f"{Q}.alpha": torch.tensor(torch.nan)}, "alpha is nan; it must be finite"),
        ({f"{Q}.alpha": torch.ones(2)}, r"alpha is of shape \[2\]; it must be one number"),
        (
            {f"{Q}.lora_A.weight": torch.ones(0, 256), f"{Q}.lora_B.weight": torch.ones(256, 0)},
            "has rank 0",
        ),
    ],
)
def test_broken_numbers_are_refused(tmp_path, changed, message):
    save_file(pair(Q) | changed, tmp_path / "bad.safetensors")
    with pytest.raises(ValueError, match=rf"^bad\.safetensors.*{message}.*broken"):
        read_lora(tmp_path / "bad.safetensors")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ("{no", "is no JSON object"),
        ("[1]", "is no JSON object"),
        ("[" * 100_000, "is no JSON object"),
        ('{"t.lora_alpha": "many"}', "lora_alpha is 'many'; it must be one number"),
        ('{"t.lora_alpha": NaN}', "lora_alpha is nan; it must be finite"),
        ('{"t.lora_alpha": null}', "lora_alpha is None; it must be one number"),
    ],
)
def test_broken_adapter_metadata_is_refused(tmp_path, metadata, message):
    save_file(pair(Q), tmp_path / "bad.safetensors", {"lora_adapter_metadata": metadata})
    with pytest.raises(ValueError, match=message):
        read_lora(tmp_path / "bad.safetensors")
    save_file(pair(Q), tmp_path / "adapter_model.safetensors")
    config = metadata.replace("t.lora_alpha", "lora_alpha")
    (tmp_path / "adapter_config.json").write_text(config)
    with pytest.raises(ValueError, match=message):
        read_lora(tmp_path / "adapter_model.safetensors")


# --- What the file says of itself -----------------------------------------------------------


def test_the_recipe_survives_the_file_and_sets_auto(wan, tmp_path):
    recipe = Recipe("guide", 4, Grid(3, 5, 6), "matched", 2, 2.0, RECIPE.base, 7, "0.1.0", 6.5)
    path = saved(
        tmp_path / "a.safetensors", pair("diffusion_model.blocks.0.ffn.0", 256, 512), recipe
    )
    lora = load_guide_lora(path, 1.0)
    assert lora.file.recipe == recipe
    lora.changes_of(wan.model.diffusion_model)
    plan, custom = plan_of((5, 8, 12), (2, 4, 6)), Grid(1, 1, 1)
    assert preset_window("auto", plan, custom, lora.habits) == (3, 5, 6)
    assert preset_guide_noise("auto", lora.habits) == "matched"
    assert preset_guide_weight("auto", lora.habits, 90, 30) == 6.5
    assert preset_guide_weight("2", lora.habits, 90, 30) == 2
    assert preset_window("compact", plan, custom, lora.habits) == (4, 16, 16)
    assert preset_guide_noise("clean", lora.habits) == "clean"


def test_auto_with_a_lora_of_unknown_origin_and_without_one(tmp_path):
    path = saved(tmp_path / "a.safetensors", pair("diffusion_model.blocks.0.ffn.0", 256, 512))
    lora = load_guide_lora(path, 1.0)
    plan, custom = plan_of((5, 8, 12), (2, 4, 6)), Grid(1, 1, 1)
    assert preset_window("auto", plan, custom, lora.habits) == (4, 16, 16)
    assert preset_guide_noise("auto", lora.habits) == "clean"
    assert preset_guide_weight("auto", lora.habits, 90, 30) == 1
    assert preset_window("auto", plan, custom) == (2, 2, 3)
    assert preset_guide_noise("auto", None) == "matched"
    assert preset_guide_weight("auto", None, 90, 30) == auto_guide_weight(90, 30)


def test_a_recipe_from_before_guide_weights_was_trained_with_one(tmp_path):
    metadata = RECIPE.to_metadata()
    fields = json.loads(metadata["atlasvid"])
    del fields["guide_weight"]
    recipe = Recipe.from_metadata({"atlasvid": json.dumps(fields)})
    assert recipe == RECIPE
    assert recipe.trained_guide_weight == 1


@pytest.mark.parametrize("weight", ["NaN", "Infinity", "0", "-1", '"8"'])
def test_a_recipe_with_an_impossible_guide_weight_is_refused(weight):
    text = RECIPE.to_metadata()["atlasvid"]
    wrong = text.replace('"guide_weight": null', f'"guide_weight": {weight}')
    assert wrong != text
    with pytest.raises(ValueError, match="metadata cannot be read"):
        Recipe.from_metadata({"atlasvid": wrong})


def test_other_settings_than_trained_with_are_named(wan, tmp_path, caplog):
    tensors = pair("diffusion_model.blocks.0.ffn.0", 256, 512)
    lora = load_guide_lora(saved(tmp_path / "a.safetensors", tensors, RECIPE), 1.0)
    plan = plan_of((7, 8, 12), (3, 4, 6), stride=3)
    proxy = rand(1, 16, 3, 4, 6)
    with caplog.at_level(logging.WARNING):
        apply_detail_branch(
            wan, plan, proxy, Grid(3, 3, 3), "matched", guide_lora=lora, guide_weight=8
        )
    assert "temporal_stride 4 and is used with 3" in caplog.text
    assert "window 2 x 4 x 4 and is used with 3 x 3 x 3" in caplog.text
    assert "guide_noise clean and is used with matched" in caplog.text
    assert "guide_weight 1.0 and is used with 8.0" in caplog.text
    caplog.clear()
    proxy, plan = rand(1, 16, 2, 4, 6), plan_of((5, 8, 12), (2, 4, 6))
    apply_detail_branch(wan, plan, proxy, WINDOW, "clean", guide_lora=lora, guide_weight="auto")
    assert not caplog.records


@pytest.mark.parametrize(("trained", "warns"), [(4.5, True), (2.05, False), (None, False)])
def test_another_ratio_of_target_to_proxy_is_named(wan, tmp_path, caplog, trained, warns):
    """Rounding to whole tokens is no other ratio, and older files do not say theirs."""
    tensors = pair("diffusion_model.blocks.0.ffn.0", 256, 512)
    path = saved(tmp_path / "a.safetensors", tensors, replace(RECIPE, ratio=trained))
    lora, plan = load_guide_lora(path, 1.0), plan_of((5, 8, 12), (2, 4, 6))
    assert lora.file.recipe.ratio == trained
    apply_detail_branch(wan, plan, rand(1, 16, 2, 4, 6), WINDOW, "clean", guide_lora=lora)
    found = "target-to-proxy ratio 4.5 and is used with 2.0" in caplog.text
    assert (found, bool(caplog.records)) == (warns, warns)


def test_a_proxy_lora_is_refused(tmp_path):
    tensors = pair("diffusion_model.blocks.0.ffn.0", 256, 512)
    path = saved(tmp_path / "a.safetensors", tensors, replace(RECIPE, stage="proxy"))
    with pytest.raises(ValueError, match=r"for the proxy, not for the guide.*LoraLoaderModelOnly"):
        load_guide_lora(path, 1.0)


def test_a_lora_of_another_base_is_refused(wan, tmp_path):
    recipe = replace(RECIPE, base=BaseShape(1536, 8960, 30, 16))
    tensors = pair("diffusion_model.blocks.0.ffn.0", 256, 512)
    lora = load_guide_lora(saved(tmp_path / "a.safetensors", tensors, recipe), 1.0)
    with pytest.raises(ValueError, match="trained on a model of 30 blocks of width 1536"):
        lora.require_base(family.shape(wan.model.diffusion_model))
    plan, proxy = plan_of((5, 8, 12), (2, 4, 6)), torch.zeros(1, 16, 2, 4, 6)
    with pytest.raises(ValueError, match="trained on a model"):
        apply_detail_branch(wan, plan, proxy, Grid(2, 2, 3), "clean", guide_lora=lora)


def test_a_guide_lora_needs_a_guide(wan, peft_folder):
    lora = load_guide_lora(peft_folder / "adapter_model.safetensors", 1.0)
    with pytest.raises(ValueError, match="connect the sampled proxy"):
        apply_detail_branch(
            wan, plan_of((5, 8, 12), (2, 4, 6)), None, WINDOW, "clean", guide_lora=lora
        )

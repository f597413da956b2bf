"""Every input of every node reaches the engine under its own name, and something comes of it.

The schemas say which inputs there are. For each, one legal call is repeated with another legal
value: an input that is ignored, replaced by its default or swapped with another is found out. A
new input takes part by itself; where its schema does not say what is legal, `legal` has to.
"""

import shutil

import comfy.clip_vision
import folder_paths
import pytest
import torch
from atlasvid import nodes
from atlasvid.engine.comfyui import models
from atlasvid.engine.families.tiny import TinyTextEncoder, wan_state
from atlasvid.engine.flashvsr.bundle import FlashVSR
from atlasvid.engine.flashvsr.files import projection_of, projection_shapes
from atlasvid.engine.flashvsr.tc_decoder import load_tc_decoder
from clips import render
from comfy_api.latest import InputImpl, io
from flashvsr_reference import tc_weights
from safetensors.torch import save_file
from seam import Seen, observe, require_effect
from stock_nodes import has_ten_bit
from wan import plan_of, rand, small_wan
from wan_vaes import wan21_vae

NODES = {node.define_schema().node_id: node for node in nodes.NODES}

BASE = {
    "AtlasVidPlan": {"width": 512, "height": 288, "seconds": 2.0, "proxy_short_side": 128},
    "AtlasVidRoPE": {"plan": None},  # its stride would replace the temporal scale
    "AtlasVidHierarchicalAttention": {
        "window": {"window": "custom", "frames": 1, "height": 2, "width": 3}
    },
    "AtlasVidTrainLoRA": {
        "steps": 1,
        "rank": 2,
        "sigma_min": 0.25,
        "caption_dropout": 0.0,
        "cuts_per_clip": 1,
        "save_every": 1,
        "resume": False,
        "min_motion": 0.1,
        "min_sharpness": 0.1,
    },
    "AtlasVidTinyModels": {"weights": "random"},  # the trained ones need no seed
    "AtlasVidImageToVideo": {"width": 32, "height": 48, "frames": 5},
    "AtlasVidTCDecode": {"width": 10, "height": 10},  # twice as much still fits the latent
    "AtlasVidReport": {"window": {"window": "custom", "frames": 1, "height": 2, "width": 3}},
    "AtlasVidFlashVSR": {
        # Two chunks of 2 x 2 blocks: a budget below what is near, and slots to forget.
        "video": rand(22, 48, 48, 3, seed=2).sigmoid(),
        "scale": 4.0,
        "width": 192,
        "height": 180,
        "sparse_ratio": 0.1,
        "kv_ratio": 2.0,
        "local_range": 2,
    },
}
"""Where the schema's defaults are large, or leave an input without a say."""

INSTEAD = {
    "folder": {"folder": "clips", "videos": [], "captions": []},
    "vae": {"decoder": "Wan VAE"},
    "scale": {"width": 0, "height": 0},
}
"""What an input needs to have a say: clips come from a folder or from other nodes."""

ALIASES = {
    "samples": "latent",
    "memory_budget": "budget",
    "fps": "frame_rate",
    "lora": "path",
    "proxy": "samples",
    "clip": "text_encoder",
    "sigma_min": "low",
    "sigma_max": "high",
    "weights": "model",
    "clip_vision_output": "positive",
    "AtlasVidFlashVSR.video": "pixels",
}
"""How the engine calls what an input gives, or the output that shows it, where names differ."""


def tiny_flashvsr(seed):
    """A bundle with what is read of it."""
    decoder = load_tc_decoder(tc_weights((8, 8, 4, 4), seed), torch.float32)
    model = small_wan(num_layers=1, ffn_dim=256)
    projection = models.patcher(projection_of(projection_state(seed)))
    return FlashVSR(model, projection, rand(1, 4, 4096), models.patcher(decoder), "v1")


def projection_state(seed):
    shapes = projection_shapes(4, 6, 256).items()
    return {name: rand(*shape, seed=seed + n) * 0.05 for n, (name, shape) in enumerate(shapes)}


def write_flashvsr(folder, seed):
    """The loader's files, by the inputs that choose them."""
    weights = {
        "transformer": wan_state(seed, num_layers=1),
        "projection": projection_state(seed),
        "prompt": {"context": rand(1, 4, 4096, seed=seed)},
        "tc_decoder": tc_weights((8, 8, 4, 4), seed),
    }
    folder.mkdir(exist_ok=True)
    for name, tensors in weights.items():
        save_file(tensors, folder / f"{name}_{seed}.safetensors")


def inputs_of(node):
    """A node's inputs by name, also those that a choice brings along."""
    found = {}
    for given in node.define_schema().inputs:
        found[given.id] = given
        if isinstance(given, io.DynamicCombo.Input):
            parts = [part for option in given.options for part in option.inputs]
            found |= {f"{given.id}.{part.id}": part for part in parts}
    return found


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Where nodes write; ComfyUI's other folders hold two clips."""
    root, read = tmp_path_factory.mktemp("written"), tmp_path_factory.mktemp("read")
    for folder in (root / "output", root / "loras", read / "temp"):
        folder.mkdir()
    for seed, name in enumerate(("clips", "other")):
        (read / name).mkdir()
        render(read / name / "clip.mp4", 36, width=96, height=96, seed=seed)
        write_flashvsr(read / "FlashVSR", seed)
    loras = [str(root / "loras")], folder_paths.supported_pt_extensions
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folder_paths, "output_directory", str(root / "output"))
        patch.setattr(folder_paths, "temp_directory", str(read / "temp"))
        patch.setattr(folder_paths, "input_directory", str(read))
        patch.setattr(folder_paths, "models_dir", str(read))
        patch.setitem(folder_paths.folder_names_and_paths, "FlashVSR", ([], set()))
        patch.setitem(folder_paths.folder_names_and_paths, "loras", loras)
        yield root


@pytest.fixture(scope="module")
def legal(written):
    """Two values for each type, or input, whose schema does not tell any."""
    seeds = 0, 1
    for seed in seeds:
        factors = {"A": rand(2, 256, seed=seed), "B": rand(256, 2, seed=seed)}
        keys = {f"blocks.0.self_attn.q.lora_{side}.weight": x for side, x in factors.items()}
        save_file(keys, written / "loras" / f"{seed}.safetensors")
    clips = [f"{folder_paths.input_directory}/{name}/clip.mp4" for name in ("clips", "other")]
    return {
        "MODEL": [small_wan(num_layers=1, ffn_dim=width) for width in (512, 256)],
        "CLIP": [TinyTextEncoder(seed) for seed in seeds],
        "VAE": [wan21_vae(seed=seed) for seed in seeds],
        "ATLASVID_PLAN": [
            plan_of((5, 8, 8), (2, 4, 4), stride=4),
            plan_of((3, 8, 8), (2, 4, 4), stride=2),
        ],
        "ATLASVID_GUIDE_LORA": [
            nodes.AtlasVidGuideLoRA.execute(f"{seed}.safetensors", 1.0)[0] for seed in seeds
        ],
        "ATLASVID_FLASHVSR": [tiny_flashvsr(seed) for seed in seeds],
        "LATENT": [{"samples": rand(1, 16, 2, 4, 4, seed=seed)} for seed in seeds],
        "IMAGE": [rand(5, 32, 32, 3, seed=seed).sigmoid() for seed in seeds],
        "CONDITIONING": [[[rand(1, 4, 8, seed=seed), {}]] for seed in seeds],
        "CLIP_VISION_OUTPUT": [None, comfy.clip_vision.Output()],
        "AUDIO": [{"waveform": rand(1, 2, 99, seed=s), "sample_rate": 44100} for s in seeds],
        "VIDEO": [InputImpl.VideoFromFile(clip) for clip in clips],
        "video": [rand(9, 64, 64, 3, seed=seed).sigmoid() for seed in seeds],
        "captions": ["waves", "other waves"],
        "folder": ["", "other"],
        "name": ["one", "another"],
        "guide_weight": ["auto", "8"],
        **{
            role: [f"{role}_{seed}.safetensors" for seed in seeds]
            for role in ("transformer", "projection", "prompt", "tc_decoder")
        },
    }


def usual(given, legal):
    """A legal value of an input."""
    if (default := getattr(given, "default", None)) is not None:
        return default
    if given.id in legal:
        return legal[given.id][0]
    return given.options[0] if isinstance(given, io.Combo.Input) else two_of(given, legal)[0]


def another(given, value, legal):
    """A legal value of an input beside `value`."""
    if isinstance(given, io.Combo.Input) and given.id in legal:
        return legal[given.id][1]
    match given:
        case io.DynamicCombo.Input():
            keys = [option.key for option in given.options]
            return value | {given.id: next(key for key in keys if key != value[given.id])}
        case io.Combo.Input():
            return next(option for option in given.options if option != value)
        case io.Boolean.Input():
            return not value
        case io.Int.Input() | io.Float.Input():
            near = (2 * value, type(value)(value / 2), given.max, given.min)
            return next(v for v in near if v != value and given.min <= v <= given.max)
    return two_of(given, legal)[1]


def two_of(given, legal):
    kind = given.get_io_type().split(",")[0]
    values = legal.get(given.id) or legal.get(kind)
    assert values, f"{given.id} is new: add two values of it, or of type {kind}, to `legal`"
    return values


@pytest.fixture(scope="module")
def call(legal, written, tmp_path_factory):
    """Executes a node, with one input changed if one is named, among always the same files."""
    start = tmp_path_factory.mktemp("start") / "written"

    def execute(node_id, changed=None, instead=None) -> Seen:
        node, chosen = NODES[node_id], BASE.get(node_id, {}) | (instead or {})
        inputs = {
            given.id: chosen[given.id] if given.id in chosen else usual(given, legal)
            for given in node.define_schema().inputs
        }
        if changed:
            given, (outer, _, inner) = inputs_of(node)[changed], changed.partition(".")
            old = inputs[outer][inner] if inner else inputs[outer]
            new = another(given, old, legal)
            inputs[outer] = inputs[outer] | {inner: new} if inner else new
        shutil.rmtree(written)
        shutil.copytree(start, written)
        return observe(node, inputs, written)

    shutil.copytree(written, start)
    execute("AtlasVidTrainLoRA")  # a run to resume, and its clips encoded
    execute("AtlasVidFlashVSR")  # its models loaded
    shutil.rmtree(start)
    shutil.copytree(written, start)
    return execute


@pytest.fixture(scope="module")
def base(call):
    """What is seen of an unchanged call."""
    seen: dict[tuple, Seen] = {}

    def once(node_id, name) -> Seen:
        key = node_id, name if name in INSTEAD else ""
        if key not in seen:
            seen[key] = call(node_id, instead=INSTEAD.get(name))
        return seen[key]

    return once


@pytest.mark.parametrize(
    ("named", "outputs", "message"),
    [
        ({"low": [1], "high": [5]}, 1, "low does not follow"),  # swapped with its neighbour
        ({"low": [3, 1], "high": [2]}, 1, "low does not follow"),  # lost in one of two places
        ({"low": [3], "high": [2]}, 0, "no output, file or work changes"),
    ],
)
def test_an_input_that_has_no_effect_is_found(named, outputs, message):
    base = Seen({"low": [1], "high": [2]}, {"outputs": 0})
    require_effect(base, Seen({"low": [3], "high": [2]}, {"outputs": 1}), "low")
    with pytest.raises(AssertionError, match=message):
        require_effect(base, Seen(named, {"outputs": outputs}), "low")
    with pytest.raises(AssertionError, match="is called new"):
        require_effect(base, base, "new")


@pytest.mark.parametrize("node_id", NODES)
def test_a_call_that_is_repeated_looks_the_same(call, base, node_id):
    assert call(node_id) == base(node_id, "")


@pytest.mark.parametrize(
    ("node_id", "name"),
    [(node_id, name) for node_id in NODES for name in inputs_of(NODES[node_id])],
)
def test_every_input_has_an_effect_of_its_own(call, base, node_id, name):
    if name == "bit_depth" and not has_ten_bit():
        pytest.skip("this ComfyUI writes 8 bits only")
    changed = call(node_id, name, INSTEAD.get(name))
    own = name.rpartition(".")[2]
    alias = ALIASES.get(f"{node_id}.{own}", ALIASES.get(own, own))
    require_effect(base(node_id, name), changed, own, alias)

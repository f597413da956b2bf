"""What every node of the pack promises: a category, tooltips everywhere, stable ids."""

import asyncio

import pytest
from atlasvid import nodes

CONTRACT = {
    "AtlasVidPlan": [
        "model",
        "width",
        "height",
        "seconds",
        "fps",
        "proxy_short_side",
        "temporal_stride",
    ],
    "AtlasVidRoPE": ["model", "temporal_scale", "spatial_scale", "method", "plan"],
    "AtlasVidDetailLatent": ["plan", "proxy"],
    "AtlasVidHierarchicalAttention": [
        "model",
        "plan",
        "window",
        "overlap",
        "guide_noise",
        "start_percent",
        "end_percent",
        "proxy",
    ],
    "AtlasVidStructureGuidance": ["model", "plan", "proxy", "strength", "end_percent"],
    "AtlasVidGuideLoRA": ["lora", "strength"],
    "AtlasVidResume": ["model", "name", "disk_limit_gb", "when_done"],
    "AtlasVidTrainLoRA": [
        "model",
        "clip",
        "vae",
        "plan",
        "stage",
        "name",
        "folder",
        "steps",
        "window",
        "rank",
        "alpha",
        "targets",
        "optimizer",
        "learning_rate",
        "shift",
        "sigma_min",
        "sigma_max",
        "caption_dropout",
        "accumulate",
        "precision",
        "cuts_per_clip",
        "save_every",
        "seed",
        "resume",
        "videos",
        "captions",
    ],
    "AtlasVidTinyModels": ["seed", "weights"],
    "AtlasVidDecode": ["samples", "vae", "memory_budget"],
    "AtlasVidDecodeToVideo": ["samples", "vae", "fps", "audio", "memory_budget"],
    "AtlasVidEncode": ["pixels", "vae"],
    "AtlasVidFlashVSRLoader": ["transformer", "projection", "prompt", "tc_decoder", "version"],
    "AtlasVidFlashVSR": ["flashvsr", "video", "scale", "seed", "decoder", "colour"],
    "AtlasVidTCDecode": ["samples", "low_quality", "flashvsr"],
    "AtlasVidImageToVideo": [
        "positive",
        "negative",
        "vae",
        "width",
        "height",
        "frames",
        "start_image",
        "clip_vision_output",
    ],
    "AtlasVidReport": ["plan", "video", "window", "overlap", "proxy"],
}


def schemas():
    extension = asyncio.run(nodes.comfy_entrypoint())
    listed = asyncio.run(extension.get_node_list())
    return {node.define_schema().node_id: node.define_schema() for node in listed}


@pytest.mark.parametrize("node_id", CONTRACT)
def test_ids_and_inputs_are_a_contract(node_id):
    """A saved graph keeps working: inputs may be added, as optional ones, never renamed."""
    given = {i.id: i for i in schemas()[node_id].inputs}
    assert set(CONTRACT[node_id]) <= set(given)
    for name in set(given) - set(CONTRACT[node_id]):
        assert given[name].optional, f"{name} is new: old graphs do not have it"


@pytest.mark.parametrize("node_id", sorted(schemas()))
def test_everything_explains_itself(node_id):
    schema = schemas()[node_id]
    assert schema.category == "AtlasVid"
    assert schema.description
    assert schema.search_aliases
    for socket in [*schema.inputs, *schema.outputs]:
        assert socket.tooltip, f"{socket.id} has no tooltip"


def test_defaults_of_the_plan_are_4k_for_ten_seconds():
    defaults = {i.id: getattr(i, "default", None) for i in schemas()["AtlasVidPlan"].inputs}
    assert defaults == {
        "model": None,
        "width": 3840,
        "height": 2160,
        "seconds": 10.0,
        "fps": 16.0,
        "proxy_short_side": 480,
        "temporal_stride": 4,
    }

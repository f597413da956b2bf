"""The LQ projection against one pass over the whole clip."""

import pytest
import torch
from atlasvid.engine.comfyui import management
from atlasvid.engine.flashvsr.projection import LowQualityProjection, ProjectionStream
from flashvsr_dit_reference import tokens_of_frames

PUBLISHED = {
    "conv1.weight": (2048, 768, 4, 3, 3),
    "conv1.bias": (2048,),
    "norm1.gamma": (2048, 1, 1, 1),
    "conv2.weight": (3072, 2048, 4, 3, 3),
    "conv2.bias": (3072,),
    "norm2.gamma": (3072, 1, 1, 1),
    "linear_layers.0.weight": (1536, 3072),
    "linear_layers.0.bias": (1536,),
}


def small_state(seed=0, widths=(6, 10, 8)):
    first, second, out = widths
    shapes = {
        "conv1.weight": (first, 768, 4, 3, 3),
        "conv1.bias": (first,),
        "norm1.gamma": (first, 1, 1, 1),
        "conv2.weight": (second, first, 4, 3, 3),
        "conv2.bias": (second,),
        "norm2.gamma": (second, 1, 1, 1),
        "linear_layers.0.weight": (out, second),
        "linear_layers.0.bias": (out,),
    }
    generator = torch.Generator().manual_seed(seed)
    scale = {
        name: shape[1:].numel() ** -0.5 if len(shape) > 1 else 0.1
        for name, shape in ((n, torch.Size(s)) for n, s in shapes.items())
    }
    return {n: torch.randn(s, generator=generator) * scale[n] for n, s in shapes.items()}


def streamed(state, video, version, rows):
    stream = ProjectionStream(LowQualityProjection.from_state(state), version, rows)
    stream.begin(video[:, :1])
    clips = range(1, video.shape[1] - 3, 4)
    return torch.stack([stream.tokens(video[:, t : t + 4]) for t in clips])


@pytest.mark.parametrize("version", ["v1", "v1.1"])
@pytest.mark.parametrize("rows", [1, 3, 64])
def test_clip_by_clip_in_stripes_equals_one_pass(version, rows):
    state = small_state()
    video = torch.rand(3, 13, 80, 48, generator=torch.Generator().manual_seed(1)) * 2 - 1
    ours = streamed(state, video, version, rows)
    double = {name: value.double() for name, value in state.items()}
    theirs = tokens_of_frames(double, video.double(), version)
    torch.testing.assert_close(ours.double(), theirs, atol=1e-4, rtol=0)


def test_the_versions_differ_and_only_one_remembers():
    state = small_state()
    video = torch.rand(3, 9, 32, 32) * 2 - 1
    changed = video.clone()
    changed[:, 1:5] = 0
    for version, remembers in (("v1", False), ("v1.1", True)):
        second = [streamed(state, clip, version, 64)[1] for clip in (video, changed)]
        assert torch.equal(*second) is not remembers


def test_true_key_names_and_shapes_load():
    state = {name: torch.empty(shape, device="meta") for name, shape in PUBLISHED.items()}
    projection = LowQualityProjection.from_state(state)
    assert {n: tuple(p.shape) for n, p in projection.state_dict().items()} == PUBLISHED


def test_stripes_that_do_not_fit_are_halved(monkeypatch):
    state = small_state()
    video = torch.rand(3, 5, 64, 32) * 2 - 1
    whole = streamed(state, video, "v1.1", 64)
    original = LowQualityProjection.first

    def scarce(self, frames, rows):
        if len(rows) > 1:
            raise torch.OutOfMemoryError("no room")
        return original(self, frames, rows)

    monkeypatch.setattr(LowQualityProjection, "first", scarce)
    monkeypatch.setattr(
        management, "is_out_of_memory", lambda e: isinstance(e, torch.OutOfMemoryError)
    )
    torch.testing.assert_close(streamed(state, video, "v1.1", 64), whole, atol=1e-4, rtol=0)

"""The drawn world: its flow is exact, a close view shows what a larger picture shows there."""

import numpy as np
import pytest
import torch
from atlasvid.engine.families.tiny import WORLD_WORDS
from atlasvid.engine.quality.flow import warp
from world.scenes import (
    FPS,
    Scene,
    View,
    flow,
    masks,
    random_scene,
    random_view,
    render,
    scene_of,
    words,
)

SCENES = [random_scene(np.random.default_rng(seed)) for seed in range(4)]
VIEW = View(288, 192)


def images(scene: Scene, view: View, times: list[float]) -> torch.Tensor:
    return render(scene, view, times).permute(1, 2, 3, 0)


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: f"{scene.balloon}-{scene.light}")
def test_the_flow_leads_from_one_frame_to_the_next(scene: Scene) -> None:
    now, later = images(scene, VIEW, [2.0, 2.0 + 1 / FPS])
    followed, _ = warp(later, flow(scene, VIEW, 2.0, 2.0 + 1 / FPS))
    balloon, sky = (mask[0] for mask in masks(scene, VIEW, [2.0]))
    for mask in (balloon, sky):
        assert (followed - now)[mask].abs().mean() < 0.7 * (later - now)[mask].abs().mean()
    assert (followed - now)[balloon].abs().mean() < 0.005
    assert (later - now)[balloon].abs().mean() > 0.02  # it moves


def test_a_close_view_is_a_window_of_a_larger_picture() -> None:
    scene = SCENES[0]
    large = images(scene, View(3 * 288, 3 * 192), [1.0])[0]
    close = images(scene, View(288, 192, zoom=3.0), [1.0])[0]
    torch.testing.assert_close(close, large[192:384, 288:576], atol=2e-3, rtol=0)


def test_a_larger_picture_shows_more_and_agrees_with_the_smaller_one() -> None:
    scene = SCENES[1]
    small, large = (images(scene, View(n * 96, n * 64), [1.0])[0] for n in (2, 8))
    blocks = large.unflatten(1, (-1, 4)).unflatten(0, (-1, 4))
    assert (blocks.mean((1, 3)) - small).abs().mean() < 0.01
    inside = blocks - blocks.mean((1, 3), keepdim=True)
    assert inside.std() > 0.01


def test_the_balloon_moves_at_its_speed_as_the_words_say() -> None:
    for word, sign in (("left", -1), ("right", 1)):
        scene = scene_of(f"a red balloon drifting {word} over snow at noon", 5)
        x, _ = scene.position(torch.tensor([0.0, 5.0]))
        assert float(x[1] - x[0]) / 5 == pytest.approx(sign * scene.speed, rel=1e-5)
        assert 0.09 <= scene.speed <= 0.13


def test_a_view_stays_inside_the_wide_one() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        zoom = rng.uniform(1, 4)
        view = random_view(SCENES[0], rng, 192, 128, zoom, 1.0)
        x, y = view.coordinates()
        assert x.min() >= -0.75
        assert x.max() <= 0.75
        assert y.min() >= 0
        assert y.max() <= 1


def test_prompts_are_read_and_unknown_words_are_named() -> None:
    scene = scene_of("Wide view of a green balloon, drifting left over desert at dusk.", 3)
    assert scene == Scene("green", "left", "desert", "dusk", 3)
    assert scene_of(scene.prompt, 3) == scene
    with pytest.raises(ValueError, match=r"unknown words: fox; known are wide"):
        scene_of("wide view of a red fox", 0)
    with pytest.raises(ValueError, match=r"needs one time of day of noon, dusk, night"):
        scene_of("a red balloon drifting left over hills", 0)


def test_the_text_encoder_knows_the_words_of_the_world() -> None:
    assert {word for kind in WORLD_WORDS.values() for word in kind} == set(words())

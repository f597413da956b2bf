"""What a block of the detail branch moves and launches on a card, counted on simulated tensors."""

import pytest
import torch
from atlasvid.engine.branch import compiled
from traffic import count_block

UHD_81 = (21, 135, 240)
COMPACT = (4, 16, 16)


def counted(overlap="shifted", **more):
    return count_block(overlap, COMPACT, UHD_81, **more)


def test_shifted_windows_stay_within_what_was_promised():
    found = counted()
    assert found["vectors"] <= 36
    assert found["dispatches"] / found["chunks"] <= 30
    assert found["touched"] == 1, "a weight is fetched once for all chunks"
    assert found["launched"]["addmm"] == 7 * found["chunks"] + 2, "the text's keys are made once"


def test_without_our_kernel_they_nearly_do():
    found = counted(kernels=False)
    assert found["vectors"] <= 36
    assert found["dispatches"] / found["chunks"] <= 34
    assert "norm_rotate" not in found["launched"]


@pytest.mark.parametrize("weight", [1.0, 8.0])
def test_a_weighted_guide_is_not_joined_to_the_windows(weight):
    joined = counted(weight=weight)["kinds"].get("joining and copies", 0)
    assert (joined < 1) == (weight != 1)


def test_sliding_windows_find_their_places_once():
    """The gathers of overlapping windows are most of what they move."""
    found = counted("sliding")
    assert found["kinds"]["gather and scatter"] > 0.6 * found["vectors"]
    assert found["vectors"] <= 80
    assert found["dispatches"] / found["chunks"] <= 45
    assert "arange" not in found["launched"]


def test_compiled_parts_run_on_a_card_beside_the_kernel(monkeypatch, caplog):
    """Product and norm are compiled, so the kernel turns what they give."""
    graphs, parts_of = [], compiled.parts_of

    def backend(graph, inputs, **_):
        graphs.append(str(graph.code))
        return graph.forward

    monkeypatch.setattr(
        compiled, "parts_of", lambda family, _: parts_of(family, {"backend": backend})
    )
    torch._dynamo.reset()
    found = count_block("shifted", COMPACT, (5, 34, 60))
    torch._dynamo.reset()
    assert "torch.compile failed" not in caplog.text
    assert len(graphs) == 3, "queries, keys and feed-forward, each for all chunks"
    assert sum("rms_norm" in code for code in graphs) == 2
    assert found["launched"]["norm_rotate"] > 0
    per_chunk = 3  # queries, keys and the queries of the text, whose keys are made once
    assert found["launched"]["_fused_rms_norm"] == per_chunk * found["chunks"] + 1

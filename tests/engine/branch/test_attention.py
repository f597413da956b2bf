import logging

import comfy.ldm.modules.attention as stock
import pytest
import torch
from atlasvid.engine.branch import attention
from atlasvid.engine.branch.apply import apply_detail_branch
from atlasvid.engine.branch.attention import override_for
from atlasvid.engine.comfyui import models
from atlasvid.engine.geometry.grid import Grid
from wan import forward, plan_of, rand, small_wan

CPU = torch.device("cpu")


@pytest.fixture
def kernel(monkeypatch):
    """Registers a kernel under the name of an optional package, as its import would."""

    def register(function):
        monkeypatch.setitem(stock.REGISTERED_ATTENTION_FUNCTIONS, "sage", function)
        monkeypatch.setattr(attention, "_verdicts", {})

    return register


def run(override):
    q, k, v = rand(2, 20, 256, seed=1), rand(2, 30, 256, seed=2), rand(2, 30, 256, seed=3)
    options = {"optimized_attention_override": override} if override else {}
    out = stock.optimized_attention(q, k, v, heads=2, transformer_options=options)
    return out, stock.attention_pytorch(q, k, v, heads=2)


def test_auto_follows_comfyui_and_is_fused_on_the_cpu():
    out, expected = run(override_for("auto", CPU))
    assert torch.equal(out, expected)
    assert override_for("auto", torch.device("meta")) is None


def test_a_kernel_within_its_error_is_used(kernel, caplog):
    calls = []

    def rounding(q, k, v, heads, **kwargs):
        calls.append(len(q))
        return stock.attention_pytorch(q, k, v, heads) * 1.01

    kernel(rounding)
    out, expected = run(override_for("sage", CPU))
    assert torch.allclose(out, expected * 1.01)
    assert calls == [1, 2], "checked on one row, then used"
    assert not caplog.records


@pytest.mark.parametrize("wrong", ["nan", "far", "raises"])
def test_a_wrong_kernel_is_dropped_with_one_line(kernel, caplog, wrong):
    def broken(q, k, v, heads, **kwargs):
        if wrong == "raises":
            raise RuntimeError("no kernel image is available")
        return stock.attention_pytorch(q, k, v, heads) * (float("nan") if wrong == "nan" else 2)

    kernel(broken)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            out, expected = run(override_for("sage", CPU))
            assert torch.equal(out, expected)
    assert len(caplog.records) == 1
    assert "using PyTorch's" in caplog.text


def test_sage_by_start_flag_is_checked_too(kernel, monkeypatch):
    def broken(q, k, v, heads, **kwargs):
        return q * float("nan")

    kernel(broken)
    monkeypatch.setattr(stock, "optimized_attention", broken)
    override = override_for("auto", torch.device("meta"))
    assert override is not None
    q = rand(1, 8, 256)
    assert override(broken, q, q, q, 2).isfinite().all()


def test_a_kernel_that_cannot_weight_the_guide_is_passed_over_with_one_line(kernel, caplog):
    read = set()

    def counted(q, k, v, heads, **kwargs):
        read.add(k.shape[1])
        return stock.attention_pytorch(q, k, v, heads)

    kernel(counted)
    attention._say_passed_over.cache_clear()
    wan, plan = small_wan(num_layers=1), plan_of((5, 8, 8), (2, 4, 4))
    inputs = rand(1, 16, 5, 8, 8), torch.tensor([700.0]), rand(1, 20, 4096)

    def run(backend, override=None):
        patched = apply_detail_branch(
            wan,
            plan,
            rand(1, 16, 2, 4, 4),
            Grid(2, 2, 2),
            "clean",
            attention=backend,
            guide_weight=8,
        )
        if override is not None:
            options = patched.model_options["transformer_options"]
            options["optimized_attention_override"] = override
        return forward(patched, *inputs)

    with caplog.at_level(logging.WARNING):
        expected = run("pytorch")
        assert not caplog.records
        assert torch.equal(run("sage"), expected)
        assert torch.equal(run("sage"), expected)
        assert [record.getMessage() for record in caplog.records] == [
            "AtlasVid: windows use PyTorch's attention, as sage cannot weight the guide's keys; "
            "with guide_weight 1 it is used"
        ]
        assert torch.equal(run("auto", lambda _, *args, **kw: counted(*args, **kw)), expected)
    assert "as another node's attention cannot" in caplog.text
    assert read == {20}, "the text alone"


@pytest.mark.parametrize(
    ("capability", "cudnn", "error", "chosen"),
    [
        ((9, 0), 0.5, 0.0, True),
        ((10, 0), 0.5, 0.0, True),
        ((8, 9), 0.5, 0.0, False),  # not even measured
        ((9, 0), 0.98, 0.0, False),
        ((9, 0), 0.5, 0.1, False),
    ],
)
def test_cudnn_is_taken_where_it_is_right_and_faster(monkeypatch, capability, cudnn, error, chosen):
    times = iter((cudnn, 1.0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(attention, "_seconds", lambda *_: next(times))
    right = models.cudnn_attention
    monkeypatch.setattr(
        models, "cudnn_attention", lambda *args, **kw: right(*args, **kw) * (1 + error)
    )
    attention.cudnn_is_faster.cache_clear()
    tensors = torch.randn
    monkeypatch.setattr(torch, "randn", lambda size, **_: tensors(1, 4, size[2]))
    assert attention.cudnn_is_faster(CPU) == chosen
    attention.cudnn_is_faster.cache_clear()


def test_cudnn_first_computes_what_comfyui_computes():
    q, k, v = rand(2, 20, 256, seed=1), rand(2, 30, 256, seed=2), rand(2, 30, 256, seed=3)
    expected = stock.attention_pytorch(q, k, v, heads=2)
    assert torch.allclose(models.cudnn_attention(q, k, v, 2), expected, atol=1e-6)
    mask = torch.zeros(20, 30)
    assert torch.allclose(models.cudnn_attention(q, k, v, 2, mask=mask), expected, atol=1e-6)


def test_a_missing_kernel_is_refused_by_name():
    with pytest.raises(ValueError, match=r"'flash'.*not installed.*available are auto, pytorch"):
        override_for("flash", CPU)
    with pytest.raises(ValueError, match="'quick'; allowed are auto, pytorch, sage"):
        override_for("quick", CPU)

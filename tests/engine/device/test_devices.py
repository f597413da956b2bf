"""On which device every tensor lives: whole forwards on simulated CUDA tensors.

Simulated tensors have shapes, dtypes and devices but no numbers, and refuse to mix devices as real
ones do. So what only a card would notice is noticed without one.
"""

from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from functools import partial

import comfy.ldm.flux.math
import comfy.ldm.modules.attention
import pytest
import torch
from atlasvid.engine.branch import forward as engine_forward
from atlasvid.engine.branch import sparsity
from atlasvid.engine.branch.apply import apply_detail_branch
from atlasvid.engine.branch.memory import MemoryPlan
from atlasvid.engine.branch.run import SamplingRun
from atlasvid.engine.comfyui import management, models
from atlasvid.engine.device import copies, outbox
from atlasvid.engine.device.chunks import ChunkSize
from atlasvid.engine.families import fused
from atlasvid.engine.flashvsr import transformer
from atlasvid.engine.flashvsr.blocks import BlockGrid
from atlasvid.engine.flashvsr.memory import Places
from atlasvid.engine.flashvsr.schedule import Schedule
from atlasvid.engine.flashvsr.selection import Sparsity
from atlasvid.engine.flashvsr.transformer import OneStep
from atlasvid.engine.geometry.grid import Grid
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from wan import plan_of, rand, small_wan

LATENT, PROXY = (5, 36, 36), (2, 12, 12)
CARD = torch.device("cuda", 0)


class AtOnce:
    """Runs a worker's job in this thread: the simulation knows one thread only."""

    def __init__(self, *_):
        pass

    def submit(self, job, *args):
        done = Future()
        with Waits.of_a_worker():
            done.set_result(job(*args))
        return done

    def shutdown(self, **_):
        pass


class Waits(TorchDispatchMode):
    """Notes operations for which the calling thread must wait until the card is done."""

    in_worker = 0

    def __init__(self):
        super().__init__()
        self.found = []

    @classmethod
    @contextmanager
    def of_a_worker(cls):
        """What happens in here would be in another thread."""
        cls.in_worker += 1
        try:
            yield
        finally:
            cls.in_worker -= 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        leaves = tree_leaves((args, kwargs, result))
        devices = {x.device.type for x in leaves if isinstance(x, torch.Tensor) and x.ndim}
        name = func.overloadpacket.__name__
        copies = name in ("_to_copy", "copy_", "lift_fresh") and len(devices) > 1
        blocking = copies and not (
            kwargs.get("non_blocking") or (name == "copy_" and args[2:] == (True,))
        )
        reads = name in ("_local_scalar_dense", "nonzero") and "cuda" in devices
        if (blocking or reads) and not self.in_worker:
            self.found.append(str(func))
        return result


class NoMark:
    """Nothing to wait for: simulated work takes no time."""

    def __init__(self, device):
        assert device.type in ("cuda", "cpu")

    def wait(self):
        pass

    def after(self):
        return nullcontext()


@pytest.fixture
def card(monkeypatch):
    """Replaces what asks the driver, and kernels that have no simulation."""
    monkeypatch.setattr(sparsity, "block_order", partial(order_on, sparsity.block_order))
    monkeypatch.setattr(models, "apply_rope", comfy.ldm.flux.math._apply_rope1)
    monkeypatch.setattr(management, "free_memory", lambda *_: 2**34)
    monkeypatch.setattr(engine_forward, "measured_chunk", lambda *_: 65_536)
    monkeypatch.setattr(copies, "Mark", NoMark)
    monkeypatch.setattr(outbox, "ThreadPoolExecutor", AtOnce)
    monkeypatch.setattr(fused, "agree", lambda *_: True)
    monkeypatch.setattr(fused, "_agreed", {})
    monkeypatch.setattr(
        copies, "host_buffer", lambda shape, dtype, _: torch.empty(shape, dtype=dtype)
    )
    monkeypatch.setattr(
        copies, "upload", lambda buffer, device: buffer.to(device, non_blocking=True)
    )
    monkeypatch.setattr(management, "raise_if_cancelled", lambda: None)
    monkeypatch.setattr(SamplingRun, "noise_like", lambda self, latent: torch.zeros_like(latent))
    stock = comfy.ldm.modules.attention.attention_pytorch
    monkeypatch.setattr(
        engine_forward, "override_for", lambda *_: lambda _, *args, **kw: stock(*args, **kw)
    )


def order_on(block_order, size, device):
    """The order of blocks depends on numbers: made of real ones, then moved (really: once)."""
    with unset_fake_temporarily():
        order = block_order(size, torch.device("cpu"))
    return tuple(indices.to(device, non_blocking=True) for indices in order)


def on_card(model):
    """The model's layers on the simulated card: bf16, but for the patch embedding."""
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                dtype = torch.float32 if module is model.patch_embedding else torch.bfloat16
                fake = torch.empty(weight.shape, dtype=dtype, device=CARD)
                module._parameters[name] = torch.nn.Parameter(fake, requires_grad=False)


@pytest.mark.parametrize(
    ("overlap", "guide_noise", "kind", "on_device", "ring", "guide", "kept"),
    [
        ("shifted", "clean", "text", True, False, "device", 0),
        ("shifted", "clean", "image", False, False, "host", 3),
        ("shifted", "matched", "frames", False, False, "device", 0),
        ("sliding", "clean", "frames", False, True, "host", 0),
        ("sliding", "matched", "image", True, True, "device", 3),
        ("sliding", "clean", "text", False, False, "recompute", 0),
        ("sliding", "matched", "frames", True, False, "device", 3),
    ],
)
def test_a_forward_stays_on_its_devices(
    card, overlap, guide_noise, kind, on_device, ring, guide, kept, monkeypatch
):
    config = {"model_type": "i2v", "in_dim": 36} if kind == "image" else {}
    wan = small_wan(num_layers=2, **config)
    plan = plan_of(LATENT, PROXY)
    patched = apply_detail_branch(
        wan, plan, rand(1, 16, *PROXY), Grid(4, 16, 16), guide_noise, overlap=overlap,
        keep_blocks=kept,
    )  # fmt: skip
    memory = MemoryPlan(700, on_device, ring, guide)
    monkeypatch.setattr(engine_forward, "plan_memory", lambda *_: memory)
    block, blocks_seen, waits = engine_forward.DetailForward._block, [], Waits()

    def watched(self, *args):
        blocks_seen.append(self)
        first_of_its_windows = len(blocks_seen) <= 2  # geometry is made and moved once
        with nullcontext() if first_of_its_windows else waits:
            block(self, *args)

    monkeypatch.setattr(engine_forward.DetailForward, "_block", watched)
    run = SamplingRun(seed=0)
    monkeypatch.setattr(run, "require_finite", lambda: None)  # simulated tensors have no values
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        model = wan.model.diffusion_model
        on_card(model)
        channels = 36 if kind == "image" else 16
        x = torch.empty(2, channels, *LATENT, dtype=torch.bfloat16, device=CARD)
        timestep = torch.empty((2, 5) if kind == "frames" else (2,), device=CARD)
        text = torch.empty(2, 16, 4096, dtype=torch.bfloat16, device=CARD)
        extra = {}
        if kind == "image":
            extra["clip_fea"] = torch.empty(2, 257, 1280, dtype=torch.bfloat16, device=CARD)
        for _ in range(2):  # the second finds what the first kept
            options = {
                **patched.model_options["transformer_options"],
                "wrappers": patched.wrappers,
                "atlasvid": run,
                "uuids": [1, 2],
            }
            out = model(x, timestep, text, transformer_options=options, **extra)
            assert out.device == CARD
            assert out.dtype == torch.bfloat16
            assert out.shape == (2, 16, *LATENT)
    assert len(blocks_seen) == 4
    assert not waits.found, "the card runs dry while the computer waits for it"
    chunk = next(made for made in run._made.values() if isinstance(made, ChunkSize))
    assert chunk.ahead == (1 if overlap == "sliding" and not ring else 4)
    assert len(run.guide_keys) == int(guide_noise == "clean" and guide != "recompute")
    for pairs in run.guide_keys.values():
        places = {tensor.device.type for pair in pairs for tensor in pair}
        assert places == {"cuda" if guide == "device" else "cpu"}


@pytest.mark.parametrize(
    "places",
    [
        Places(1, True, True, True, True, 512),
        Places(2, False, True, True, False, 512),
        Places(2, False, False, False, False, 512),
    ],
    ids=["on the device", "tokens on the host", "keys on the host"],
)
def test_flashvsr_stays_on_its_devices(card, places, monkeypatch):
    def attend(q, k, v, kept, chunk):
        mask = (
            kept[:, None, :, None].expand(-1, q.shape[1], -1, k.shape[1]).flatten(2).flatten(0, 1)
        )
        flat = (x.flatten(0, 1)[None] for x in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(*flat, attn_mask=mask)
        return out[0].view_as(q)

    monkeypatch.setattr(transformer, "attention_for", lambda *_: attend)
    waits = Waits()
    for name in ("_projected", "_attend", "_finish"):
        part = getattr(OneStep, name)

        def watched(self, *args, part=part):
            with waits:
                return part(self, *args)

        monkeypatch.setattr(OneStep, name, watched)
    net = models.build_wan(dim=256, ffn_dim=512, num_heads=2, num_layers=2, text_dim=4096)
    grid, schedule = BlockGrid(2, 2), Schedule(29)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        on_card(net)
        like = torch.empty(0, dtype=torch.bfloat16, device=CARD)
        step = OneStep(net, torch.empty(1, 7, 4096), like, grid, Sparsity(), places)
        stock = comfy.ldm.modules.attention.attention_pytorch
        step.options["optimized_attention_override"] = lambda _, *args, **kw: stock(*args, **kw)
        shown = torch.empty(16, 16, 256, dtype=torch.bfloat16, device=CARD)
        latents = list(step(schedule.chunks(), lambda t: torch.empty(16, 32, 32), lambda t: shown))
    assert all(latent.device.type == "cpu" for _, latent in latents)
    assert len(latents) == schedule.latent_frames // 2
    assert not waits.found, "the card runs dry while the computer waits for it"

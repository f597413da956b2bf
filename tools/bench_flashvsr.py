"""FlashVSR's parts, each against what it stands in for.

| part | measures |
|---|---|
| decoder | the Tiny Conditional decoder against the exact Wan decode, its stripes, and its order |
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from bench_decode import random_latent, random_vae
from measure import markdown_table, measure, run_case, save_results

MIB = 2**20
WIDTHS = (512, 256, 128, 128)
REAL_DIM = 96
"""Base channels of the Wan VAE."""
# Latent frames, height, width.
SIZE = (3, 24, 24)
QUICK_SIZE = (2, 8, 8)
UHD = (6, 270, 480)
STRIPES = ("whole", "auto")
ORDERS = ("TGrow, then nearest", "nearest, then TGrow")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--part", choices=PARTS, help="only this part")
    parser.add_argument("--quick", action="store_true", help="smaller frames")


def run(args: argparse.Namespace) -> None:
    if args.case:
        case = json.loads(args.case)
        print(json.dumps(CASES[case["what"]](case)))
        return
    # Else the C library keeps freed memory, and peaks depend on what was allocated before.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = os.environ["MALLOC_TRIM_THRESHOLD_"] = str(MIB)
    for name, part in PARTS.items():
        if args.part in (None, name):
            part(args.quick)


# --- Decoder --------------------------------------------------------------------------------


def decoder(quick: bool) -> None:
    """One table: both decoders on the same latent, the stripes, and the two orders of a rise."""
    import torch

    cuda = torch.cuda.is_available()
    size = QUICK_SIZE if quick else UHD if cuda else SIZE
    common = {"size": size, "dtype": "bfloat16" if cuda else "float32"}
    rows = [run_case("flashvsr", {"what": "Wan VAE", **common})]
    rows += [run_case("flashvsr", {"what": "TC", "stripe": each, **common}) for each in STRIPES]
    orders = [run_case("flashvsr", {"what": "order", "order": o, **common}) for o in ORDERS]
    wan = rows[0]
    header = ["decode", "time", "Wan VAE's time / this", "counted work", "Wan VAE's work / this"]
    header += ["peak memory grown"]
    table = [
        [
            row["what"] + (f", {row['stripe']} stripes" if "stripe" in row else ""),
            f"{row['seconds']:.1f} s",
            f"{wan['seconds'] / row['seconds']:.1f}",
            f"{row['flops'] / 1e12:.2f} TFLOP",
            f"{wan['flops'] / row['flops']:.1f}",
            f"{row['grown_bytes'] / MIB:,.0f} MiB",
        ]
        for row in rows
    ]
    frames = 4 * size[0] - 3
    text = f"{frames} frames of {size[2] * 8} x {size[1] * 8}, {common['dtype']}, the real widths, "
    text += f"random weights.\n\n{markdown_table(header, table)}\n\n"
    text += "The three rises of a latent frame, without their 3x3 convolutions: " + ", ".join(
        f"{row['order']} {row['seconds'] * 1000:.0f} ms" for row in orders
    )
    name = "flashvsr_decoder_cuda" if cuda else "flashvsr_decoder_cpu"
    save_results(name, [*rows, *orders], text + ".")


def random_tc_decoder(dtype: str) -> Any:
    """A decoder of the real widths: speed and memory do not depend on its weights."""
    import torch
    from atlasvid.engine.flashvsr.tc_decoder import TCDecoder, Widths, load_tc_decoder

    torch.manual_seed(0)
    weights = {
        name: torch.randn(tensor.shape) * max(1, tensor[0].numel()) ** -0.5
        for name, tensor in TCDecoder(Widths(*WIDTHS), device="meta").state_dict().items()
    }
    return load_tc_decoder(weights, getattr(torch, dtype))


def footage(size: tuple[int, int, int]) -> Any:
    """Images of a quarter of the size."""
    import torch
    from atlasvid.engine.flashvsr.source import Footage
    from atlasvid.engine.vae.sources import ImageFrames

    frames, height, width = 4 * size[0] - 3, size[1] * 2, size[2] * 2
    generator = torch.Generator().manual_seed(2)
    images = torch.rand(frames, height, width, 3, generator=generator)
    return Footage(ImageFrames(images), frames, (height, width))


def tc_case(case: dict[str, Any]) -> dict[str, Any]:
    """The decode into a temporary file, as for a video that is saved."""
    import torch
    from atlasvid.engine.comfyui import models
    from atlasvid.engine.flashvsr import tc_decoder

    size = tuple(case["size"])
    if case["stripe"] == "whole":
        tc_decoder.AUTO_STRIPE = 2**50
    clip = tc_decoder.ConditionedClip(
        models.patcher(random_tc_decoder(case["dtype"])),
        random_latent(size),
        footage(size),
    )
    result = timed(lambda: read(clip))
    meta = tc_decoder.TCDecoder(tc_decoder.Widths(*WIDTHS), device="meta")
    run = tc_decoder.TCRun(meta, torch.device("meta"), tc_decoder.ChunkSize(2**50))
    latent = torch.empty(1, 16, *size[1:], device="meta")
    condition = torch.empty(4, 3, 8 * size[1], 8 * size[2], device="meta")
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        run.step(latent, condition)
    return {**result, "flops": counter.get_total_flops() * size[0]}


def wan_case(case: dict[str, Any]) -> dict[str, Any]:
    from atlasvid.engine.vae.decode import TiledDecoder

    vae, size = random_vae(REAL_DIM, case["dtype"]), tuple(case["size"])
    clip = TiledDecoder(vae, random_latent(size))
    result = timed(lambda: read(clip))
    return {**result, "flops": 2 * clip.cost.macs(clip.plan()) * size[0]}


def read(clip: Any) -> None:
    """All frames, as a video that is saved takes them: kept in a file, not in memory."""
    from atlasvid.engine.vae.frames import DecodedFrames

    with tempfile.TemporaryDirectory() as folder:
        decoded = DecodedFrames(clip, 8, Path(folder))
        for _ in decoded.batches():
            pass


def timed(call: Any) -> dict[str, Any]:
    import torch

    started = time.process_time()
    with torch.inference_mode():
        result = measure(call)
    return {**result, "processor_seconds": time.process_time() - started}


def order_case(case: dict[str, Any]) -> dict[str, Any]:
    """TGrow and nearest x2 of all levels in either order."""
    import torch
    import torch.nn.functional as F
    from atlasvid.engine.comfyui import management
    from atlasvid.engine.flashvsr.tc_decoder import GROWS

    device = management.compute_device()
    parts, (_, height, width) = random_tc_decoder(case["dtype"]).to(device), case["size"]
    grows = [parts[number] for number in GROWS]
    inputs = [
        torch.randn(frames, channels, height * scale, width * scale, device=device)
        .to(parts.dtype)
        .contiguous(memory_format=torch.channels_last)
        for frames, channels, scale in ((1, 512, 1), (1, 256, 2), (2, 128, 4))
    ]

    def enlarged(x: Any) -> Any:
        return F.interpolate(x, scale_factor=2.0, mode="nearest")

    def rises() -> None:
        for grow, x in zip(grows, inputs, strict=True):
            _ = enlarged(grow(x)) if case["order"] == ORDERS[0] else grow(enlarged(x))

    with torch.inference_mode():
        rises()
        return measure(rises, repeat=3)


CASES = {"TC": tc_case, "Wan VAE": wan_case, "order": order_case}
PARTS = {"decoder": decoder}
"""A further part is a function of `quick` that prints and saves a table of its own."""

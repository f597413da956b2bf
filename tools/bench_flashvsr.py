"""FlashVSR's parts, each against what it stands in for.

| part | measures |
|---|---|
| decoder | the Tiny Conditional decoder against the exact Wan decode, its stripes, and its order |
| transformer | frames per second and memory over size, length, order; its products' share |
| file | from file to file: what of the process's memory cannot be given up, over length |
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


# --- Transformer ----------------------------------------------------------------------------

# Height, width, frames.
CLIPS = ((256, 256, 29), (256, 256, 125), (512, 512, 29), (512, 768, 29))
QUICK_CLIPS = ((128, 128, 21),)
CUDA_CLIPS = ((768, 1408, 85), (2160, 3840, 85))
CHUNKWISE, BLOCKWISE = "chunk by chunk", "block by block"


def transformer(quick: bool) -> None:
    """One table: the LQ projection and the transformer, both orders of work."""
    import torch

    cuda = torch.cuda.is_available()
    clips = QUICK_CLIPS if quick else CUDA_CLIPS if cuda else CLIPS
    shape = "1.3B" if cuda else "tiny"
    rows = []
    for clip in clips:
        for order in (CHUNKWISE, BLOCKWISE):
            case = {"what": "transformer", "shape": shape, "clip": clip, "order": order}
            rows.append(run_case("flashvsr", case))
    header = ["clip", "order", "time", "frames per second", "counted work"]
    header += ["its products at this machine's rate", "peak memory grown"]
    table = [
        [
            "{1} x {0} x {2}".format(*row["clip"]),
            row["order"],
            f"{row['seconds']:.1f} s",
            f"{row['clip'][2] / row['seconds']:.2f}",
            f"{row['flops'] / 1e9:,.0f} GFLOP",
            f"{row['flops'] / row['rate'] / row['seconds']:.0%} of the time",
            f"{row['grown_bytes'] / MIB:,.0f} MiB",
        ]
        for row in rows
    ]
    if not cuda:
        unknown = ["not measured"] * 5
        table += [["1408 x 768 on CUDA, 1.3B", "", *unknown], ["4K on CUDA, 1.3B", "", *unknown]]
    text = f"Random weights of shape {shape}, published settings; the clip is in memory.\n\n"
    name = "flashvsr_transformer_cuda" if cuda else "flashvsr_transformer_cpu"
    save_results(name, rows, text + markdown_table(header, table))


def transformer_case(case: dict[str, Any]) -> dict[str, Any]:
    """The latent of a clip, slot by slot."""
    from dataclasses import replace

    import torch
    from atlasvid.engine.flashvsr import upscale
    from torch.utils.flop_counter import FlopCounterMode

    height, width, frames = case["clip"]
    flashvsr = random_flashvsr(case["shape"])
    job = job_of(frames, height, width)
    places = upscale.places_for
    if case["order"] == BLOCKWISE:
        upscale.places_for = lambda *given: replace(
            places(*given), chunks=10**6, tokens_on_device=False, keys_stay=False
        )

    def latents() -> None:
        for _ in upscale.denoised(flashvsr, job, upscale.Progress(flashvsr, job.schedule)):
            pass

    result = timed(latents)
    with (
        torch.inference_mode(),
        FlopCounterMode(display=False, custom_mapping=kernels_of_cpu()) as counter,
    ):
        latents()
    return {**result, "flops": counter.get_total_flops(), "rate": product_rate(flashvsr)}


def kernels_of_cpu() -> dict[Any, Any]:
    """Counts of the CPU's own kernels, which PyTorch's counter does not know."""
    import torch
    from torch.utils.flop_counter import conv_flop_count, sdpa_flop_count

    def attention(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
        return sdpa_flop_count(q, k, v)

    def convolution(x: Any, weight: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
        return conv_flop_count(x, weight, out_shape)

    aten = torch.ops.aten
    return {
        aten._scaled_dot_product_flash_attention_for_cpu: attention,
        aten.mkldnn_convolution: convolution,
    }


def product_rate(flashvsr: Any) -> float:
    """FLOPs per second of a matrix product such as a block's feed-forward."""
    import torch
    from atlasvid.engine.comfyui import management

    net = flashvsr.model.model.diffusion_model
    device, dtype = management.compute_device(), flashvsr.model.model.get_dtype_inference()
    x = torch.randn(4096, net.dim, device=device, dtype=dtype)
    weight = torch.randn(net.ffn_dim, net.dim, device=device, dtype=dtype)
    with torch.inference_mode():
        result = measure(lambda: torch.nn.functional.linear(x, weight), repeat=20)
    return 2 * 4096 * net.dim * net.ffn_dim / result["seconds"]


def random_flashvsr(shape: str) -> Any:
    """A FlashVSR of the widths that belong to a model shape: its weights do not matter here."""
    import torch
    from atlasvid.engine.comfyui import models
    from atlasvid.engine.families.tiny import random_weights
    from atlasvid.engine.flashvsr.bundle import FlashVSR
    from atlasvid.engine.flashvsr.files import projection_of, projection_shapes
    from bench_attention import SHAPES

    model = SHAPES[shape].load()
    dim = model.model.diffusion_model.dim
    widths = (2048, 3072, dim) if shape == "1.3B" else (32, 48, dim)
    state = {n: torch.randn(s) * 0.02 for n, s in projection_shapes(*widths).items()}
    decoder = random_tc_decoder("float32") if shape == "1.3B" else small_decoder(random_weights)
    return FlashVSR(
        model,
        models.patcher(projection_of(state)),
        torch.randn(1, 512 if shape == "1.3B" else 16, 4096),
        models.patcher(decoder),
        "v1.1",
    )


def small_decoder(random_weights: Any) -> Any:
    import torch
    from atlasvid.engine.flashvsr.tc_decoder import TCDecoder, Widths, load_tc_decoder

    return load_tc_decoder(random_weights(TCDecoder(Widths(24, 16, 12, 12)), 0), torch.float32)


def job_of(frames: int, height: int, width: int) -> Any:
    """A clip of a quarter of the size, up-scaled as published."""
    from atlasvid.engine.flashvsr.selection import PUBLISHED
    from atlasvid.engine.flashvsr.source import Upscale
    from atlasvid.engine.flashvsr.upscale import Job

    clip = footage(((frames + 3) // 4, height // 8, width // 8))
    return Job(clip, Upscale.to(clip.size, (height, width)), PUBLISHED)


# --- From file to file ----------------------------------------------------------------------

LENGTHS = (33, 161, 1000)
QUICK_LENGTHS = (9, 33)
SMALL = 64
"""Side of the clips, which become four times as large."""


def file(quick: bool) -> None:
    """One table: memory over the length of a video that is read from a file and saved to one."""
    lengths = QUICK_LENGTHS if quick else LENGTHS
    rows = [run_case("flashvsr", {"what": "file", "frames": n}) for n in lengths]
    header = ["frames", "time", "memory that cannot be given up", "grown"]
    table = [
        [
            f"{row['frames']:,}",
            f"{row['seconds']:.1f} s",
            f"{row['anonymous_bytes'] / MIB:,.0f} MiB",
            f"{row['anonymous_grown'] / MIB:,.0f} MiB",
        ]
        for row in rows
    ]
    side = 4 * SMALL
    text = f"mp4 of {SMALL} x {SMALL} to mp4 of {side} x {side}, random weights.\n\n"
    save_results("flashvsr_file_cpu", rows, text + markdown_table(header, table))


def file_case(case: dict[str, Any]) -> dict[str, Any]:
    """A video file through FlashVSR into another, with the peak of anonymous memory."""
    from fractions import Fraction

    import torch
    from atlasvid.engine.comfyui import media
    from atlasvid.engine.flashvsr.video import upscaled_video
    from measure import anonymous_peak

    flashvsr = random_flashvsr("tiny")
    with tempfile.TemporaryDirectory() as folder:
        paths = [str(Path(folder) / name) for name in ("in.mp4", "out.mp4")]
        frame = torch.rand(SMALL, SMALL, 3)
        shown = (frame.roll(n, 0) for n in range(case["frames"]))
        clip = media.video_components(Frames(shown, case["frames"]), Fraction(16), None)
        media.encode_video(clip, paths[0], 8)

        def upscale(path: str) -> None:
            with torch.inference_mode():
                video, _ = upscaled_video(flashvsr, media.VideoFromFile(path))
                video.save_to(paths[1])

        return anonymous_peak(lambda: upscale(paths[0]))


class Frames:
    """Images that an encoder walks through once."""

    def __init__(self, images: Any, count: int) -> None:
        self.images, self.shape = images, (count, SMALL, SMALL, 3)

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Any:
        return self.images


CASES = {
    "TC": tc_case,
    "Wan VAE": wan_case,
    "order": order_case,
    "transformer": transformer_case,
    "file": file_case,
}
PARTS = {"decoder": decoder, "transformer": transformer, "file": file}
"""A further part is a function of `quick` that prints and saves a table of its own."""

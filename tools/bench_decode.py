"""The exact tiled decode against the untiled decode and the stock tiled one."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from measure import RESULTS, markdown_table, measure, run_case, save_results

MIB = 2**20
METHODS = ("ours", "untiled", "stock tiled")
# Latent frames, height, width: 5 frames of 1280 x 720, and 33 and 161 frames for the growth.
SIZE = (2, 90, 160)
QUICK_SIZE = (2, 60, 104)
GROWTH = ((9, 32, 32), (41, 32, 32))
UHD_5 = (2, 270, 480)
UHD_161 = (41, 270, 480)
PICTURE = (2, 96, 96)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--quick", action="store_true", help="a smaller frame, no growth")


def run(args: argparse.Namespace) -> None:
    if args.case:
        print(json.dumps(run_one(**json.loads(args.case))))
        return
    import torch

    (run_on_cuda if torch.cuda.is_available() else run_on_cpu)(quick=args.quick)


def random_vae(dim: int, dtype: str) -> Any:
    """A Wan 2.1 VAE with random weights: speed and memory do not depend on them."""
    import torch
    from atlasvid.engine.comfyui import media

    torch.manual_seed(0)
    model = media.build_wan_vae(dim)
    for parameter in model.parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 0
        if not fan_in:
            torch.nn.init.constant_(parameter, 0.0)
        else:
            torch.nn.init.normal_(parameter, std=fan_in**-0.5)
    state = {
        name: torch.ones_like(tensor) if name.endswith("gamma") else tensor
        for name, tensor in model.state_dict().items()
    }
    vae = media.load_vae(state)
    vae.vae_dtype = getattr(torch, dtype)
    vae.first_stage_model.to(vae.vae_dtype)
    return vae


def random_latent(size: tuple[int, int, int]) -> Any:
    import torch

    generator = torch.Generator().manual_seed(1)
    return torch.randn(1, 16, *size, generator=generator)


def run_one(what: str, size: list[int], dim: int = 16, dtype: str = "float32") -> dict[str, Any]:
    """Measures one decode: a method of METHODS, or `video`, our decode straight into a file."""
    import torch

    vae, latent = random_vae(dim, dtype), random_latent(tuple(size))
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        started = time.process_time()
        result = measure(lambda: decode(what, vae, latent, Path(folder)))
        result["processor_seconds"] = time.process_time() - started
    return {**result, **plan_facts(vae, latent), "frames": 4 * size[0] - 3}


def decode(what: str, vae: Any, latent: Any, folder: Path) -> Any:
    import folder_paths
    from atlasvid.nodes.decode import AtlasVidDecode, AtlasVidDecodeToVideo

    import nodes as stock

    samples = {"samples": latent}
    folder_paths.temp_directory = str(folder)
    if what == "ours":
        return AtlasVidDecode.execute(samples, vae, "auto")[0]
    if what == "untiled":
        return stock.VAEDecode().decode(vae, samples)[0]
    if what == "stock tiled":
        return stock.VAEDecodeTiled().decode(vae, samples, 512, 64, 64, 8)[0]
    video = AtlasVidDecodeToVideo.execute(samples, vae, 16.0, "auto")[0]
    return video.save_to(str(folder / "clip.mp4"))


def plan_facts(vae: Any, latent: Any) -> dict[str, Any]:
    """Tiles, their counted work against untiled, and the convolutions' operations per frame."""
    from atlasvid.engine.vae.decode import TiledDecoder
    from atlasvid.engine.vae.tiling import work_ratio

    tiled = TiledDecoder(vae, latent)
    grid = tiled.plan()
    return {
        "tiles": len(grid.tiles),
        "work": work_ratio(tiled.cost, grid),
        "flops": 2 * tiled.cost.macs(grid) / 4,
    }


def run_on_cpu(quick: bool) -> None:
    # Else the C library keeps freed memory, and peaks depend on what was allocated before.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = os.environ["MALLOC_TRIM_THRESHOLD_"] = str(MIB)
    size = QUICK_SIZE if quick else SIZE
    rows = [run_case("decode", {"what": what, "size": size}) for what in METHODS]
    growth = [
        run_case("decode", {"what": "video", "size": grid, "dim": 8})
        for grid in (() if quick else GROWTH)
    ]
    untiled = next(row for row in rows if row["what"] == "untiled")
    header = ["decode", "tiles", "time", "against untiled", "processor time"]
    header += ["peak memory grown", "against untiled"]
    table = [
        [
            row["what"],
            str(row["tiles"]) if row["what"] == "ours" else "",
            f"{row['seconds']:.1f} s",
            f"{row['seconds'] / untiled['seconds']:.2f} x",
            f"{row['processor_seconds']:.1f} s",
            f"{row['grown_bytes'] / MIB:,.0f} MiB",
            f"{row['grown_bytes'] / untiled['grown_bytes']:.0%}",
        ]
        for row in rows
    ]
    table.append(["CUDA card, real VAE, 4K", "", "not measured", "", "", "not measured", ""])
    ours = rows[0]
    text = f"{ours['frames']} frames of {size[2] * 8} x {size[1] * 8}, Wan 2.1 VAE of dim 16, "
    text += f"float32.\n\n{markdown_table(header, table)}\n\n"
    text += f"Our tiles' halos cost {ours['work']:.3f} x the untiled convolution work (counted). "
    text += (
        "Processor time is that of all threads. The C library gives freed memory back at once, so "
    )
    text += "that peaks count; all three are slower for it."
    if growth:
        text += "\n\nStraight into a file, 256 x 256, dim 8: " + " and ".join(
            f"{row['grown_bytes'] / MIB:,.0f} MiB for {row['frames']} frames" for row in growth
        )
        text += "."
    save_results("decode_cpu", [*rows, *growth], text)
    plot(rows, f"{ours['frames']} frames of {size[2] * 8} x {size[1] * 8}, CPU")
    picture()


def run_on_cuda(quick: bool) -> None:
    """The real size: dim 96 in bfloat16 at 4K, 5 frames in memory and 161 into a file."""
    real = {"dim": 96, "dtype": "bfloat16"}
    cases = [{"what": "ours", "size": UHD_5}, {"what": "stock tiled", "size": UHD_5}]
    if not quick:
        cases.append({"what": "video", "size": UHD_161})
    rows = [run_case("decode", {**case, **real}) for case in cases]
    header = ["decode", "frames", "time per frame", "peak memory grown", "convolutions at"]
    table = [
        [
            row["what"],
            str(row["frames"]),
            f"{row['seconds'] / row['frames']:.2f} s",
            f"{row['grown_bytes'] / 2**30:.1f} GiB",
            f"{row['flops'] * row['frames'] / row['seconds'] / 1e12:.0f} TFLOP/s"
            if row["what"] != "stock tiled"
            else "",
        ]
        for row in rows
    ]
    save_results("decode_cuda", rows, markdown_table(header, table))


def _pyplot() -> Any:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def plot(rows: list[dict[str, Any]], title: str) -> None:
    """Time and memory of the methods, side by side."""
    figure, (work, memory) = _pyplot().subplots(1, 2, figsize=(8, 3))
    names = [row["what"] for row in rows]
    colours = ["tab:blue", "tab:grey", "tab:orange"]
    work.barh(names, [row["seconds"] for row in rows], color=colours)
    work.set_xlabel("seconds")
    memory.barh(names, [row["grown_bytes"] / MIB for row in rows], color=colours)
    memory.set_xlabel("peak memory grown, MiB")
    memory.set_yticks([])
    for axes in (work, memory):
        axes.invert_yaxis()
        axes.grid(axis="x", alpha=0.3)
    figure.suptitle(title)
    figure.savefig(RESULTS / "decode_cpu.png", dpi=120, bbox_inches="tight")


def picture() -> None:
    """Where the stock tiled decode and ours differ from untiled, on one latent."""
    import torch
    from atlasvid.engine.vae.decode import TiledDecoder
    from atlasvid.engine.vae.regions import TileGrid

    vae, latent = random_vae(16, "float32"), random_latent(PICTURE)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        untiled = decode("untiled", vae, latent, Path(folder))
        stock = decode("stock tiled", vae, latent, Path(folder))
    tiled = TiledDecoder(vae, latent)
    ours = torch.zeros_like(untiled)
    for piece in tiled.tiles(TileGrid(*PICTURE[1:], 3, 3)):
        images, box = piece.images, piece.box
        rows, cols = slice(box.rows.start, box.rows.stop), slice(box.cols.start, box.cols.stop)
        ours[piece.start : piece.start + len(images), rows, cols] = images
    draw_difference(untiled[-1], stock[-1], ours[-1])


def draw_difference(untiled: Any, stock: Any, ours: Any) -> None:
    """Last frames [H, W, 3]: the untiled one and both differences on one logarithmic scale."""
    from matplotlib.colors import LogNorm

    plt = _pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(12, 4.2), layout="constrained")
    axes[0].imshow(untiled)
    axes[0].set_title("untiled (random VAE and latent)")
    scale = LogNorm(1e-8, 1)
    for axis, other, name in ((axes[1], stock, "stock tiled"), (axes[2], ours, "ours, 9 tiles")):
        difference = (other - untiled).abs().amax(dim=-1)
        shown = axis.imshow(difference.clamp(min=1e-8), norm=scale, cmap="inferno")
        axis.set_title(f"|{name} - untiled|, at most {difference.max():.1e}")
    for axis in axes:
        axis.axis("off")
    figure.colorbar(shown, ax=axes, shrink=0.8)
    figure.savefig(RESULTS / "decode_difference.png", dpi=100)

"""Trains an AtlasVid LoRA on a folder of clips, each with its caption in a .txt file beside it.

    python tools/train.py guide --clips my_clips --model wan2.1_t2v_1.3B_bf16.safetensors \\
        --text-encoder umt5_xxl_fp8_e4m3fn_scaled.safetensors --vae wan_2.1_vae.safetensors

Stage guide (or target) makes a LoRA for AtlasVid Guide LoRA, stage proxy an ordinary one for the
model that samples the proxy. Two stages train parts of FlashVSR, of any width, on clips without
captions, with the Wan 2.1 VAE: tc-decoder its small decoder, lq-projection its LQ projection
(LQ_proj_in), for which FlashVSR's transformer and prompt are needed, too. Run again to go on from
where a run was stopped. --tiny tries it on small random models. The first run fetches a ComfyUI
and an environment where there is none of yours.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from comfy_server import has_accelerator
from demo import own_comfyui, own_python
from environment import (
    COMFYUI,
    SetupError,
    cache_folder,
    prepare,
    say,
    sharing_cores,
    stop_on_errors,
    threads,
)

DECODER = "tc-decoder"
PROJECTION = "lq-projection"
PARTS = (DECODER, PROJECTION)
"""The stages that train a part of FlashVSR."""
TINY = "tiny"
"""In place of a text encoder's file: the tiny world's."""
WORKER = Path(__file__).with_name("train_worker.py")


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("stage", choices=("guide", "proxy", "target", *PARTS), help="what is trained")
    add("--clips", type=Path, required=True, metavar="FOLDER", help="clips and captions")
    add(
        "--preset",
        choices=("light", "paper"),
        default="light",
        help="defaults: light shows whether it works (1,000 steps); paper is what AtlasVid says "
        "(15,000 iterations of 81 frames at 1280 x 720, the proxy at 4 fps, bf16)",
    )
    add("--name", help="of the file and the run (default: atlasvid_<stage>)")

    models = parser.add_argument_group("models (safetensors files)")
    models.add_argument("--model", type=Path, metavar="FILE", help="a Wan text-to-video model")
    models.add_argument("--text-encoder", type=Path, metavar="FILE", help="its UMT5, or tiny")
    models.add_argument("--vae", type=Path, metavar="FILE", help="its VAE")
    models.add_argument("--prompt", type=Path, metavar="FILE", help="FlashVSR's posi_prompt.pth")
    models.add_argument("--tiny", action="store_true", help="small random models instead")

    plan = parser.add_argument_group("sizes to train at, as in AtlasVid Plan")
    for name, default, text in (
        ("width", 1280, "of the target"),
        ("height", 720, "of the target"),
        ("seconds", None, "of a cut (default: 5 for guide, 20 for proxy)"),
        ("fps", 16.0, "of the target"),
        ("proxy-short-side", None, "(default: 160 for guide, height for proxy)"),
        ("temporal-stride", 4, "frames of the target per frame of the proxy"),
    ):
        kind = float if name in ("seconds", "fps") else int
        plan.add_argument(f"--{name}", type=kind, default=default, help=text)

    run = parser.add_argument_group("training")
    for name, kind, default, text in (
        ("steps", int, 1000, "in all, resumed ones too"),
        ("rank", int, 16, "of the LoRA"),
        ("alpha", float, 16.0, "its scale is alpha / rank"),
        ("targets", str, "attention and feed-forward", "layers: this, attention, self-attention"),
        ("optimizer", str, "AdamW", "AdamW or Prodigy"),
        ("learning-rate", float, 0.0, "0: 1e-4, with Prodigy 1, for tc-decoder 2e-4"),
        ("shift", float, 5.0, "of the noise levels"),
        ("sigma-min", float, 0.0, "lowest noise level"),
        ("sigma-max", float, 1.0, "highest noise level"),
        ("caption-dropout", float, 0.1, "share of steps without words"),
        ("accumulate", int, 1, "clips per step and card"),
        ("precision", str, "bf16", "bf16 or fp32"),
        ("cuts-per-clip", int, 4, "at most"),
        ("save-every", int, 250, "steps between checkpoints"),
        ("seed", int, 0, "of everything random"),
        (
            "guide-weight",
            float,
            1.0,
            "times that each of the guide's keys counts, but in stage proxy",
        ),
    ):
        run.add_argument(f"--{name}", type=kind, default=default, help=f"{text} ({default})")
    run.add_argument(
        "--window",
        choices=("compact", "trained size"),
        default="compact",
        help="windows of stages guide and target (compact)",
    )
    run.add_argument(
        "--init",
        type=Path,
        metavar="FILE",
        help="a LoRA of the same stage and rank to start from, trained at another size, say; "
        "an LQ projection for stage lq-projection",
    )
    run.add_argument("--restart", action="store_true", help="forget a stopped run of this name")

    part = parser.add_argument_group("stages tc-decoder and lq-projection")
    for name, kind, default, text in (
        ("widths", str, None, "channels (512,256,128,128 and 2048,3072, or those of --init)"),
        ("side", int, None, "of the square part of a cut that a step learns from (256 and 512)"),
        ("frames", int, 21, "of a cut, 1 more than a multiple of 4; lq-projection reads 25 (21)"),
        ("scale", int, 4, "times that the low-quality frames are smaller (4)"),
    ):
        part.add_argument(f"--{name}", type=kind, default=default, help=text)
    part.add_argument(
        "--version",
        choices=("v1", "v1.1"),
        default="v1.1",
        help="of FlashVSR's transformer in stage lq-projection (v1.1)",
    )
    clips = parser.add_argument_group("which cuts are learned from (grey levels; 0 takes all)")
    clips.add_argument("--min-motion", type=float, default=0.0, help="change from frame to frame")
    clips.add_argument("--min-sharpness", type=float, default=0.0, help="detail beyond the proxy's")
    clips.add_argument("--weighted", action="store_true", help="more of both counts more often")

    place = parser.add_argument_group("machine and folders")
    place.add_argument("--cards", type=int, default=1, help="processes, one per card (1)")
    place.add_argument("--cpu", action="store_true", help="even where there is a card")
    place.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="where the result goes (your ComfyUI's folder for it, else as --work)",
    )
    place.add_argument(
        "--work",
        type=Path,
        metavar="FOLDER",
        help=f"for latents and checkpoints ({cache_folder() / 'training'})",
    )
    place.add_argument("--comfyui", type=Path, metavar="PATH", help="use this ComfyUI")
    place.add_argument("--python", type=Path, metavar="PATH", help="the Python that it runs with")
    return parser


PRESETS = {
    "light": {"steps": 1000},
    "paper": {
        "steps": 15_000, "width": 1280, "height": 720, "fps": 16.0, "temporal_stride": 4,
        "precision": "bf16",
    },
}  # fmt: skip
"""Defaults by name. What the paper does not say (rank, optimizer, schedule) stays ours."""


def parsed(given: list[str] | None = None) -> argparse.Namespace:
    """The arguments, with the preset's values where none was given."""
    parser = arguments()
    parser.set_defaults(**PRESETS[parser.parse_args(given).preset])
    return parser.parse_args(given)


def require_one_card(options: argparse.Namespace) -> None:
    """Raises SetupError for several cards where a stage trains on one."""
    if options.stage in PARTS and options.cards > 1:
        raise SetupError(f"stage {options.stage} trains on one card: leave --cards out")


def require_models(options: argparse.Namespace) -> None:
    """Raises SetupError for model files that are not named or not there."""
    if options.tiny:
        return
    files = {
        "--model": options.model,
        "--text-encoder": options.text_encoder,
        "--vae": options.vae,
    }
    if options.stage in PARTS:
        files = {"--vae": options.vae}
    if options.stage == PROJECTION:
        files |= {"--model": options.model, "--prompt": options.prompt}
        files |= {"--init": options.init} if options.init else {}
    for flag, file in files.items():
        if flag == "--text-encoder" and str(file) == TINY:
            continue
        if file is None:
            raise SetupError(f"name the model files: {flag} FILE is missing (or try --tiny)")
        if not file.expanduser().is_file():
            raise SetupError(f"there is no file {file} ({flag})")


def train() -> int:
    options = parsed()
    require_one_card(options)
    require_models(options)
    comfyui = own_comfyui(options.comfyui)
    kind = "FlashVSR" if options.stage in PARTS else "loras"
    results = comfyui / "models" / kind if comfyui else cache_folder() / "training"
    if comfyui:
        python = own_python(comfyui, options.python)
    else:
        setup = prepare(training=True)
        python, comfyui = setup.python, setup.comfyui[COMFYUI]
    cpu = options.cpu or not has_accelerator(python)
    command = [str(python), *launcher(options.cards), str(WORKER), *sys.argv[1:]]
    if cpu and not options.cpu:
        command.append("--cpu")
    command += ["--output", str((options.output or results).expanduser().resolve())]
    work = options.work or cache_folder() / "training"
    command += ["--work", str(work.expanduser().resolve())]
    environment = {**sharing_cores(), "COMFYUI_PATH": str(comfyui)}
    on = f" on the CPU with up to {threads()} threads" if cpu else ""
    say(f"training with {python} in {comfyui}{on}")
    process = subprocess.Popen(command, env=environment)
    try:
        return process.wait()
    except BaseException:  # Ctrl+C reached it too: let it save what was learned
        process.wait()
        raise


def launcher(cards: int) -> list[str]:
    """Python's arguments that start one process per card; accelerate joins them."""
    if cards == 1:
        return []
    return ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(cards)]


if __name__ == "__main__":
    stop_on_errors(train)

"""One stage of `tools/train_world.py`, in ComfyUI's own Python."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pack_loader import load_comfyui, load_pack
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm
from world.clips import HEIGHT, WIDTH, random_clip, random_clips, random_crop
from world.latents import fit, psnr
from world.scenes import FPS
from world.sheets import save_sheet
from world.training import save_whole, train
from world.work import Shown, Work

TOOLS = Path(__file__).resolve().parent
FILES = "files"
"""Folder of the finished models, as stock loaders take them."""
SHARD = 100
CLIP_SHARDS, PICTURE_SHARDS = 34, 22
CROP, CROPS, CROP_BATCH = 96, 400, 4
SAMPLED = (
    "wide view of a red balloon drifting right over hills at noon",
    "wide view of a yellow balloon drifting left over desert at dusk",
    "wide view of a green balloon drifting right over snow at night",
    "wide view of a purple balloon drifting left over snow at noon",
)


def fit_code(work: Work) -> None:
    """The latent space, from a few hundred clips."""
    path = work.folder / "code.safetensors"
    if path.exists():
        return
    if work.start:  # its models speak no other
        shutil.copy(work.start / "tiny_world_code.safetensors", path)
        return
    held_out = work.share(40, least=4)
    clips, _ = random_clips(0, work.share(300, least=12), 128, 128)
    code = fit(clips[:-held_out], steps=work.steps or 700)
    held = clips[-held_out:]
    print(f"[world] the code alone: {psnr(code.decode(code.encode(held)), held):.1f} dB")
    code.save(path)


def render_clips(work: Work) -> None:
    """Latents of clips and of single pictures, in files of a hundred."""
    for kind, shards, frames in (("clips", CLIP_SHARDS, 17), ("pictures", PICTURE_SHARDS, 1)):
        folder = work.folder / kind
        folder.mkdir(exist_ok=True)
        for i in tqdm(range(work.share(shards)), desc=kind):
            path = folder / f"{i:04d}.pt"
            if path.exists():
                continue
            count = SHARD if frames > 1 else 2 * SHARD
            seed = i + (1000 if frames > 1 else 9000)
            clips, captions = random_clips(seed, count, WIDTH, HEIGHT, frames)
            latents = torch.cat([work.code.encode(part) for part in clips.split(20)]).half()
            save_whole({"z": latents, "captions": captions}, path)


class Batches:
    """Latents and text of random clips, the same for the same step whenever it is asked for."""

    def __init__(self, work: Work, recipe: Any):
        from atlasvid.engine.families.tiny import TinyTextEncoder

        self.recipe, self.device = recipe, work.device
        self.encoder = TinyTextEncoder()
        self.texts: dict[str, Tensor] = {}
        self.clips, self.pictures = (
            [torch.load(f) for f in sorted((work.folder / kind).glob("*.pt"))]
            for kind in ("clips", "pictures")
        )

    def text(self, caption: str) -> Tensor:
        if caption not in self.texts:
            tokens = self.encoder.tokenize(caption)
            self.texts[caption] = self.encoder.encode_from_tokens_scheduled(tokens)[0][0][0]
        return self.texts[caption]

    def __call__(self, step: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        frames = self.recipe.frames(step)
        shards = self.clips + (self.pictures if frames == 1 else [])

        def below(n: int) -> int:
            return int(torch.randint(n, (1,), generator=generator))

        latents, texts = [], []
        for _ in range(self.recipe.tokens // (frames * 96)):
            shard = shards[below(len(shards))]
            i = below(len(shard["z"]))
            silent = float(torch.rand(1, generator=generator)) < self.recipe.caption_dropout
            latents.append(shard["z"][i, :, :frames].float())
            texts.append(self.text("" if silent else shard["captions"][i]))
        return torch.stack(latents).to(self.device), torch.stack(texts).to(self.device)


def train_model(work: Work) -> None:
    """The diffusion model."""
    import comfy.ldm.wan.model
    import comfy.model_management
    from atlasvid.engine.comfyui import models
    from world import dit

    comfy.model_management.in_training = True  # RoPE with gradients
    if work.device.type == "cpu":
        comfy.ldm.wan.model.optimized_attention = dit.matmul_attention
    recipe = work.asked(dit.DitRecipe())
    model = models.build_wan(**dit.CONFIG).to(work.device).train()
    training = dit.DitTraining(model, recipe)
    checkpoint = work.folder / "dit.pt"
    if checkpoint.exists():
        training.load(checkpoint)
    elif work.start:
        training.start_from(load_file(work.start / "tiny_world_t2v.safetensors"))
    batches = Batches(work, recipe)

    def picture(step: int) -> None:
        samples = dit.sample(training.average, batches.text, SAMPLED, work.device)
        save_sheet(work.folder / f"model_{step:05d}.png", work.code.decode(samples.cpu()))

    with Shown(training, checkpoint, picture) as shown:
        train(training, batches, checkpoint, shown)


def crops(seed: int) -> Iterator[Tensor]:
    """Batches [4, 3, 9, 96, 96] from a slowly renewed store, so that drawing costs little."""
    rng = np.random.default_rng(seed)
    store = [random_crop(rng, CROP) for _ in range(CROP_BATCH * 4)]
    while True:
        yield torch.stack([store[i] for i in rng.integers(len(store), size=CROP_BATCH)])
        new = random_crop(rng, CROP)
        if len(store) < CROPS:
            store.append(new)
        else:
            store[rng.integers(CROPS)] = new


def train_half(half: str) -> Callable[[Work], None]:
    """The stage that trains the VAE's decoder or encoder; they share no weights."""

    def stage(work: Work) -> None:
        from atlasvid.engine.comfyui import media
        from world import vae as training_vae

        recipe = work.asked(training_vae.VaeRecipe())
        vae = media.build_wan_vae(training_vae.DIM).to(work.device)
        training = training_vae.VaeTraining(vae, half, recipe)
        checkpoint = work.folder / f"{half}.pt"
        if checkpoint.exists():
            training.load(checkpoint)
        elif work.start:
            given = load_file(work.start / "tiny_world_vae.safetensors")
            vae.load_state_dict(training_vae.from_stock(given))
        held = torch.stack([random_crop(np.random.default_rng(99 + i), CROP) for i in range(8)])
        batches, code = crops(training.step * 7 + (half == "encoder")), work.code
        generator = torch.Generator().manual_seed(training.step)
        with tqdm(total=recipe.steps, initial=training.step, desc=half) as bar:
            while training.step < recipe.steps:
                video = next(batches)
                latents = code.encode(video)
                training.update(video.to(work.device), latents.to(work.device), generator)
                bar.update()
                if training.step % 200 == 0 or training.step == recipe.steps:
                    given = training.restore(held, code)
                    bar.set_postfix(psnr=f"{psnr(given, held):.2f}")
                    save_sheet(work.folder / f"{half}.png", torch.cat([held, given], dim=-1)[:5])
                    training.save(checkpoint)

    return stage


def write_files(work: Work) -> None:
    """The base model and the VAE as the stock loaders take them, in half precision."""
    from safetensors.torch import save_file
    from world import vae as training_vae

    target = work.folder / FILES
    target.mkdir(exist_ok=True)
    average = torch.load(work.folder / "dit.pt", weights_only=True)["average"]
    state = {name: value.half().contiguous() for name, value in average.items()}
    save_file(state, target / "tiny_world_t2v.safetensors", {"format": "pt"})
    tuned = torch.load(work.folder / "tuned.pt", weights_only=True)["vae"]
    merged = training_vae.as_stock(tuned)
    save_file(merged, target / "tiny_world_vae.safetensors", {"format": "pt"})


@dataclass(frozen=True)
class LoraRun:
    """A run of tools/train.py, and its arguments beside those of every run."""

    steps: int
    arguments: tuple[str, ...]


@dataclass(frozen=True)
class LoraStage:
    """A LoRA that the pack's own trainer makes from drawn videos.

    Args:
        clips: drawn videos.
        width, height, frames: of a video.
        runs: each begins with what the one before it made.
        wide_share: of the videos that show the wide view.
    """

    clips: int
    width: int
    height: int
    frames: int
    runs: tuple[LoraRun, ...]
    wide_share: float = 0.5


PROXY_CLIPS = ("--seconds", "4", "--accumulate", "4")
LORAS = {
    "proxy": LoraStage(
        280,
        WIDTH,
        HEIGHT,
        65,
        (
            # Where things go is decided at high noise levels: a larger shift than the model's own.
            LoraRun(1400, (*PROXY_CLIPS, "--learning-rate", "0.0015", "--shift", "8")),
            # What they leave behind is painted at lower ones.
            LoraRun(700, (*PROXY_CLIPS, "--learning-rate", "0.001", "--shift", "3", "--seed", "1")),
        ),
        wide_share=1.0,  # a proxy shows all of the picture
    ),
    "guide": LoraStage(
        28,
        2 * WIDTH,
        2 * HEIGHT,
        17,
        (
            LoraRun(
                250,
                ("--seconds", "1", "--proxy-short-side", str(HEIGHT), "--learning-rate", "0.001"),
            ),
        ),
    ),
}


def write_video(path: Path, clip: Tensor) -> None:
    """A clip [3, T, H, W] in -1..1 as a nearly lossless MP4."""
    import av

    frames = ((clip + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 3, 0).numpy()
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=int(FPS), options={"crf": "4"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def train_lora(name: str) -> Callable[[Work], None]:
    """The stage that trains one of the LoRAs on drawn videos, with tools/train.py."""

    def stage(work: Work) -> None:
        recipe = LORAS[name]
        folder = work.folder / f"videos_{name}"
        folder.mkdir(exist_ok=True)
        for i in tqdm(range(work.share(recipe.clips)), desc=f"videos for {name}"):
            path = folder / f"{i:04d}.mp4"
            if path.with_suffix(".txt").exists():
                continue
            rng = np.random.default_rng(70_000 + i)
            size = recipe.width, recipe.height, recipe.frames
            clip, caption = random_clip(rng, *size, wide_share=recipe.wide_share)
            write_video(path, clip)
            path.with_suffix(".txt").write_text(caption)
        files, begun = work.folder / FILES, ""
        for number, run in enumerate(recipe.runs, 1):
            lora = f"tiny_world_{name}_lora" + (f"_{number}" if number < len(recipe.runs) else "")
            command = [sys.executable, str(TOOLS / "train.py"), name, "--clips", str(folder)]
            for flag, value in (
                ("model", files / "tiny_world_t2v.safetensors"),
                ("vae", files / "tiny_world_vae.safetensors"),
                ("text-encoder", "tiny"),
                ("width", recipe.width),
                ("height", recipe.height),
                ("steps", work.steps or run.steps),
                ("shift", 2.5),
                ("precision", "bf16"),
                ("cuts-per-clip", 1),
                ("save-every", 100),
                ("name", lora),
                ("output", files),
                ("work", work.folder / "loras"),
            ):
                command += [f"--{flag}", str(value)]
            command += ["--cpu"] if work.device.type == "cpu" else []
            command += ["--init", str(files / f"{begun}.safetensors")] if begun else []
            subprocess.run([*command, *run.arguments], check=True)
            begun = lora

    return stage


def pack(work: Work) -> None:
    """What was trained, in the precision of files, marked with the version that the pack reads."""
    work.output.mkdir(parents=True, exist_ok=True)
    shutil.copy(work.folder / "code.safetensors", work.output / "tiny_world_code.safetensors")
    if (work.folder / FILES).exists():
        pack_models(work)
    vsr("pack_flashvsr")(work)


def pack_models(work: Work) -> None:
    """The base model, its VAE and its LoRAs, in half precision."""
    from atlasvid.engine.families.tiny import WORLD_VERSION
    from safetensors import safe_open
    from safetensors.torch import save_file

    for name in ("t2v", "vae", "proxy_lora", "guide_lora"):
        file = f"tiny_world_{name}.safetensors"
        with safe_open(work.folder / FILES / file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            state = {key: opened.get_tensor(key).half() for key in opened.keys()}  # noqa: SIM118
        save_file(state, work.output / file, {**metadata, "tiny_world": WORLD_VERSION})


def tune_vae(work: Work) -> None:
    """Encoder and decoder together."""
    from atlasvid.engine.comfyui import media
    from world import vae as training_vae

    target = work.folder / "tuned.pt"
    if target.exists():
        return
    vae = media.build_wan_vae(training_vae.DIM).to(work.device)
    halves: dict[str, Tensor] = {}
    if work.start:
        given = load_file(work.start / "tiny_world_vae.safetensors")
        halves |= training_vae.from_stock(given)
    for half, own in training_vae.HALVES.items():
        if (trained := work.folder / f"{half}.pt").exists():
            state = torch.load(trained, weights_only=True)["vae"]
            halves |= {k: v for k, v in state.items() if k.startswith(own)}
    vae.load_state_dict(halves)
    recipe = work.asked(training_vae.VaeRecipe(steps=800, rate=1.5e-3, warmup=40))
    tuning = training_vae.VaeTuning(vae, recipe)
    generator, batches, code = torch.Generator().manual_seed(0), crops(4242), work.code
    for _ in tqdm(range(recipe.steps), desc="tune"):
        video = next(batches)
        latents = code.encode(video)
        tuning.update(video.to(work.device), latents.to(work.device), generator)
    save_whole({"vae": vae.state_dict()}, target)


def vsr(name: str) -> Callable[[Work], None]:
    """A stage of FlashVSR's, whose module imports the pack."""

    def stage(work: Work) -> None:
        from world import vsr_stages

        getattr(vsr_stages, name)(work)

    return stage


STAGES: dict[str, Callable[[Work], None]] = {
    "code": fit_code,
    "clips": render_clips,
    "pairs": vsr("render_pairs"),
    "model": train_model,
    "decoder": train_half("decoder"),
    "encoder": train_half("encoder"),
    "tune": tune_vae,
    "files": write_files,
    "proxy": train_lora("proxy"),
    "guide": train_lora("guide"),
    "student": vsr("train_student"),
    "tc-decoder": vsr("train_decoder"),
    "pack": pack,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--start", type=Path)
    parser.add_argument("--data", type=float, default=1.0)
    parser.add_argument("--cpu", action="store_true")
    options = parser.parse_args()
    flags = ["--cpu"] if options.cpu else []
    load_comfyui(Path(os.environ["COMFYUI_PATH"]), *flags, "--use-pytorch-cross-attention")
    load_pack()
    if options.cpu and "OMP_NUM_THREADS" in os.environ:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    device = torch.device("cpu" if options.cpu else "cuda")
    place = (options.work, options.output, device)
    STAGES[options.stage](Work(*place, options.steps, options.start, options.data))
    return 0


if __name__ == "__main__":
    sys.exit(main())

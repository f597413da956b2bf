"""One process of `tools/train.py`, in ComfyUI's own Python."""

from __future__ import annotations

import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any

from pack_loader import load_comfyui, load_pack
from train import DECODER, PARTS, TINY, parsed

SHOWN = 10
"""Steps between two lines."""


def main() -> int:
    options = parsed()
    accelerator = one_of_many(options)
    load_comfyui(Path(os.environ["COMFYUI_PATH"]), *(["--cpu"] if options.cpu else []))
    load_pack()
    from comfy.model_management import InterruptProcessingException, interrupt_current_processing

    # Ctrl+C as ComfyUI's own button: it never stops in the middle of an update of the weights.
    signal.signal(signal.SIGINT, lambda *_: interrupt_current_processing())
    first = accelerator is None or accelerator.is_main_process
    show_log(first)
    try:
        if options.stage in PARTS:
            train_part(options)
        else:
            run(options, accelerator, first)
    except (ValueError, RuntimeError, FileNotFoundError) as error:
        print(f"[atlasvid] stopped: {error}", file=sys.stderr, flush=True)
        return 1
    except InterruptProcessingException:
        print("[atlasvid] stopped; the next run goes on from here", file=sys.stderr, flush=True)
        return 130
    return 0


def show_log(first: bool) -> None:
    """The pack's log on the terminal: what was skipped, and warnings; once for all processes."""
    log = logging.getLogger("atlasvid")
    log.setLevel(logging.INFO if first else logging.ERROR)
    log.propagate = False
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("[atlasvid] %(message)s"))
    log.addHandler(handler)


def one_of_many(options: Any) -> Any:
    """accelerate's view of the processes, or None for a single one. It also picks the card."""
    if options.cards == 1:
        return None
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=options.cpu)
    assert accelerator.num_processes == options.cards, "start me through train.py"
    return accelerator


def run(options: Any, accelerator: Any, first: bool) -> None:
    """Encode and train; the first process says how it goes."""
    from atlasvid.engine.branch.settings import preset_window
    from atlasvid.engine.families.family import latent_space
    from atlasvid.engine.geometry.plan import make_plan
    from atlasvid.engine.geometry.windows import COMPACT
    from atlasvid.engine.training.clips import clips_in_folder
    from atlasvid.engine.training.job import Job, train
    from atlasvid.engine.training.objective import NoiseLevels
    from atlasvid.engine.training.selection import Selection
    from atlasvid.engine.training.trainer import Cards, TrainSettings

    clips = clips_in_folder(options.clips)
    model, text_encoder, vae = load_models(options)
    proxy = options.stage == "proxy"
    plan = make_plan(
        latent_space(model),
        options.width,
        options.height,
        options.seconds or (20.0 if proxy else 5.0),
        options.fps,
        options.proxy_short_side or (min(options.width, options.height) if proxy else 160),
        options.temporal_stride,
    )
    settings = TrainSettings(
        stage=options.stage,
        steps=options.steps,
        rank=options.rank,
        alpha=options.alpha,
        targets=options.targets,
        optimizer=options.optimizer,
        learning_rate=options.learning_rate,
        window=preset_window(options.window, plan, COMPACT),
        noise=NoiseLevels(options.shift, options.sigma_min, options.sigma_max),
        caption_dropout=options.caption_dropout,
        accumulate=options.accumulate,
        precision=options.precision,
        seed=options.seed,
        save_every=options.save_every,
        guide_weight=options.guide_weight,
        init=str(options.init.expanduser().resolve()) if options.init else "",
    )

    def say(message: str) -> None:
        if first:
            print(f"[atlasvid] {message}", flush=True)

    def on_clip(done: int, total: int, name: str) -> None:
        say(f"clip {done}/{total} {name}")

    say(plan.describe())
    result, _ = train(
        Job(options.output, options.work, options.name or f"atlasvid_{options.stage}"),
        model,
        text_encoder,
        vae,
        plan,
        settings,
        clips,
        resume=not options.restart,
        cuts_per_clip=options.cuts_per_clip,
        cards=Cards(accelerator),
        selection=Selection(options.min_motion, options.min_sharpness, options.weighted),
        on_clip=on_clip,
        on_step=shown_steps(options.steps) if first else lambda step, losses: None,
    )
    if result.resumed_at:
        say(f"resumed after step {result.resumed_at}")
    say(f"finished: {result.path}, curve {result.curve}")


def train_part(options: Any) -> None:
    """Encode, and train a part of FlashVSR, on one card."""
    from atlasvid.engine.comfyui import media
    from atlasvid.engine.families.tiny import vae_state
    from atlasvid.engine.training.files import require_writable
    from atlasvid.engine.training.job import Job
    from atlasvid.engine.training.pairs import clips_without_captions, encode_clips
    from safetensors.torch import load_file

    name = options.name or f"atlasvid_{options.stage.replace('-', '_')}"
    job = Job(options.output, options.work, name)
    job.require_own_name()
    for folder in (job.loras, job.run_folder, job.cache_folder):
        require_writable(folder)
    settings, make_trainer = (decoder if options.stage == DECODER else projection)(options, job)
    if not options.tiny:
        require_whole(options.vae)
    vae = media.load_vae(vae_state() if options.tiny else load_file(options.vae))
    clips = clips_without_captions(options.clips.expanduser())
    print(f"[atlasvid] encoding {len(clips)} clips", flush=True)
    samples = encode_clips(clips, vae, job.cache_folder, settings, options.cuts_per_clip)
    trainer = make_trainer()
    resumed_at = trainer.run(samples, not options.restart, shown_steps(options.steps))
    if resumed_at:
        print(f"[atlasvid] resumed after step {resumed_at}", flush=True)
    print(f"[atlasvid] finished: {job.path}", flush=True)


def pair_settings(options: Any) -> dict[str, Any]:
    """What the stages of `train_part` have in common; what is not given is the stage's own."""
    from atlasvid.engine.training.degradation import Degradation

    given = {"side": options.side, "learning_rate": options.learning_rate}
    return {name: value for name, value in given.items() if value} | {
        "steps": options.steps,
        "width": options.width,
        "height": options.height,
        "fps": options.fps,
        "degradation": Degradation(options.scale),
        "precision": options.precision,
        "seed": options.seed,
        "save_every": options.save_every,
    }


def decoder(options: Any, job: Any) -> tuple[Any, Any]:
    """Settings, and what makes the trainer, of stage tc-decoder."""
    from atlasvid.engine.flashvsr.tc_decoder import Widths
    from atlasvid.engine.training.tc_decoder import DecoderSettings, DecoderTrainer

    more = {"widths": Widths.named(options.widths)} if options.widths else {}
    settings = DecoderSettings(frames=options.frames, **more, **pair_settings(options))
    return settings, lambda: DecoderTrainer(settings, job.path, job.run_folder)


def projection(options: Any, job: Any) -> tuple[Any, Any]:
    """Settings, and what makes the trainer, of stage lq-projection; its files are read at once."""
    from atlasvid.engine.flashvsr.files import read_projection, read_prompt, read_transformer
    from atlasvid.engine.flashvsr.tiny import RANDOM_WIDTHS, random_flashvsr
    from atlasvid.engine.training.lq_projection import (
        PUBLISHED_WIDTHS,
        ProjectionSettings,
        ProjectionTrainer,
        first_projection,
        widths_named,
    )

    settings = ProjectionSettings(version=options.version, **pair_settings(options))
    widths = widths_named(options.widths) if options.widths else None
    if options.tiny:
        small = random_flashvsr(options.seed)
        model, prompt, usual = small.model, small.prompt, RANDOM_WIDTHS
    else:
        prompt = read_prompt(options.prompt.expanduser())
        model, usual = read_transformer(options.model.expanduser()), PUBLISHED_WIDTHS
    given = read_projection(options.init.expanduser()) if options.init else None
    start = first_projection(given, widths, usual, model, prompt, options.seed)
    return settings, lambda: ProjectionTrainer(
        settings, model, prompt, start, job.path, job.run_folder
    )


def shown_steps(steps: int) -> Any:
    """Prints a line now and then."""

    def on_step(step: int, losses: list[float]) -> None:
        if step % SHOWN == 0 or step == steps:
            recent = losses[-SHOWN:]
            print(
                f"[atlasvid] step {step}/{steps}, loss {sum(recent) / len(recent):.4f}", flush=True
            )

    return on_step


def load_models(options: Any) -> tuple[Any, Any, Any]:
    """Model, text encoder and VAE, through ComfyUI's own loaders."""
    from atlasvid.engine.comfyui import models
    from atlasvid.engine.families.tiny import WorldTextEncoder, tiny_models

    if options.tiny:
        return tiny_models(options.seed)
    tiny = str(options.text_encoder) == TINY
    for file in (options.model, options.vae, *(() if tiny else (options.text_encoder,))):
        require_whole(file)
    text_encoder = (
        WorldTextEncoder() if tiny else models.load_wan_text_encoder(options.text_encoder)
    )
    model, vae = models.load_wan_files(options.model, options.vae)
    if vae.first_stage_model is None:
        raise ValueError(f"{options.vae} is no VAE. Name Wan's: --vae wan_2.1_vae.safetensors")
    return model, text_encoder, vae


def require_whole(file: Path) -> None:
    """Raises ValueError for a safetensors file that is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt"):
            pass
    except SafetensorError as error:
        raise ValueError(
            f"{file} is damaged, or no safetensors file ({error}). Download it again."
        ) from error


if __name__ == "__main__":
    sys.exit(main())

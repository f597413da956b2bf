"""Trainings that kill themselves at a chosen moment, each in a process of its own.

    python killed_runs.py CLIPS OUT

Forks before PyTorch has threads, so that ComfyUI is imported once.
"""

import os
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]

STEPS, SAVE_EVERY = 7, 2
POINTS = {
    "while encoding": ("atlasvid.engine.comfyui.media.encode_pixels", 3),
    "in an update": ("torch.optim.AdamW.step", 4),
    "half a file written": ("pathlib.Path.write_bytes", 4),
    "before the first rename": ("pathlib.Path.replace", 1),
    "between state and LoRA": ("pathlib.Path.replace", 2),
    "before a later rename": ("pathlib.Path.replace", 5),
}
"""What is killed in its n-th call of which function. A checkpoint is four files."""


def train(clips: Path, cache: Path, out: Path):
    """Encode what is not encoded, then train or go on; returns the result."""
    from atlasvid.engine.comfyui import media
    from atlasvid.engine.families import tiny
    from atlasvid.engine.geometry.grid import Grid
    from atlasvid.engine.training.cache import LatentCache
    from atlasvid.engine.training.clips import clips_in_folder
    from atlasvid.engine.training.trainer import Trainer, TrainSettings
    from wan import plan_of, small_wan

    plan = plan_of((5, 8, 8), (2, 4, 4))
    settings = TrainSettings(
        "guide", STEPS, rank=2, alpha=2.0, window=Grid(4, 16, 16), precision="fp32",
        targets="self-attention", save_every=SAVE_EVERY,
    )  # fmt: skip
    vae = media.load_vae(tiny.vae_state())
    cached = LatentCache(cache, plan, "guide", vae, tiny.TinyTextEncoder())
    dataset = cached.build(clips_in_folder(clips), 1)
    model = small_wan(num_layers=1)
    return Trainer(model, plan, settings, out / "lora.safetensors", out / "run").run(dataset)


def die_in(name: str, call: int) -> None:
    """The process kills itself in the given call of a function, half of whose work is done."""
    import pkgutil

    where, _, leaf = name.rpartition(".")
    owner = pkgutil.resolve_name(where)
    original, calls = getattr(owner, leaf), iter(range(1, call))

    def dying(*args, **kwargs):
        if next(calls, None) is not None:
            return original(*args, **kwargs)
        if leaf == "write_bytes":
            original(args[0], args[1][: len(args[1]) // 2])
        if leaf == "step":
            original(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, leaf, dying)


def main() -> None:
    sys.path += [str(ROOT / "tools"), str(ROOT / "tests")]
    from pack_loader import load_comfyui, load_pack

    load_comfyui(Path(os.environ["COMFYUI_PATH"]), "--cpu")
    load_pack()
    clips, out = Path(sys.argv[1]), Path(sys.argv[2])
    for point, (name, call) in POINTS.items():
        child = os.fork()
        if not child:
            die_in(name, call)
            cache = out / point / "cache" if point == "while encoding" else clips / "cache"
            train(clips, cache, out / point)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print(point, -os.WTERMSIG(status) if os.WIFSIGNALED(status) else status, flush=True)


if __name__ == "__main__":
    main()

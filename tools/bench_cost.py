"""The cost model against the clock: predicted and measured time of the detail branch's forward.

Runs on whatever device ComfyUI picks, with small models of the real architecture.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from typing import Any

from measure import markdown_table, run_case, save_results

ALLOWED_ERROR = 0.25
CASES = (
    # dim, ffn_dim, layers; target frames, height, width in latents; proxy; window; guide noise
    (256, 1024, 4, (13, 44, 64), (4, 14, 22), "compact", "matched"),
    (256, 1024, 4, (17, 48, 84), (5, 16, 28), "compact", "matched"),
    (256, 1024, 4, (9, 68, 120), (3, 30, 52), "trained size", "matched"),
    (512, 2048, 2, (9, 36, 64), (3, 18, 32), "trained size", "matched"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=5, help="forwards timed per case")


def run(args: argparse.Namespace) -> None:
    """Writes benchmarks/cost.* and says how far the prediction is off.

    Raises:
        SystemExit: an error is above what is allowed.
    """
    if args.case:
        print(json.dumps(measure_case(**json.loads(args.case))))
        return
    rows = [run_case("cost", {"case": i, "rounds": args.rounds}) for i in range(len(CASES))]
    table = markdown_table(
        ["case", "measured", "predicted", "error"],
        [
            [
                row["what"],
                f"{row['measured_s']:.2f} s",
                f"{row['predicted_s']:.2f} s",
                f"{row['error']:+.0%}",
            ]
            for row in rows
        ],
    )
    save_results("cost", rows, table)
    worst = max(abs(row["error"]) for row in rows)
    if worst > ALLOWED_ERROR:
        raise SystemExit(f"largest error {worst:.0%}, allowed {ALLOWED_ERROR:.0%}")


def measure_case(case: int, rounds: int) -> dict[str, Any]:
    """One forward of a case, timed, and what the cost model says."""
    import torch
    from atlasvid.engine.branch.apply import apply_detail_branch
    from atlasvid.engine.branch.settings import preset_window
    from atlasvid.engine.comfyui import management, models
    from atlasvid.engine.estimate import calibration, cost
    from atlasvid.engine.families import tiny
    from atlasvid.engine.families.family import latent_space
    from atlasvid.engine.geometry import grid, plan

    dim, ffn_dim, layers, target, small, preset, noise = CASES[case]
    device = management.compute_device()
    dtype = management.compute_dtype(device)
    config = {"dim": dim, "ffn_dim": ffn_dim, "num_heads": dim // 128, "num_layers": layers}
    model = models.load_diffusion_model(tiny.wan_state(0, **config))
    inner = model.model.diffusion_model.to(device, dtype)
    what = plan_of(latent_space(model), target, small, plan.Plan)
    window = preset_window(preset, what, grid.Grid(1, 1, 1))
    patched = apply_detail_branch(model, what, torch.randn(1, 16, *small), window, noise)
    options = {"wrappers": patched.wrappers}
    x = torch.randn(1, 16, *target, device=device, dtype=dtype)
    text = torch.randn(1, cost.TEXT_TOKENS, cost.TEXT_WIDTH, device=device, dtype=dtype)
    step = torch.tensor([500.0], device=device)

    def forward() -> float:
        start = time.perf_counter()
        with torch.no_grad():
            inner(x, step, text, transformer_options=dict(options)).float().sum().item()
        return time.perf_counter() - start

    shape = cost.ModelShape(dim, ffn_dim, layers, name="small")
    settings = cost.Settings(window, guide_noise=noise)
    forward()
    times, found = [], []
    for _ in range(rounds):  # in turns, the best of each: other programs disturb both alike
        times.append(forward())
        found.append(asdict(calibration.measure(shape, device, dtype)))
    measured = min(times)
    rates = cost.Rates(**{name: max(each[name] for each in found) for name in found[0]})
    size = dtype.itemsize
    work = cost.detail_work(shape, what, settings, size) + cost.proxy_work(shape, what, size)
    predicted = rates.seconds(work)
    return {
        "what": f"dim {dim}, {what.tokens} tokens, {preset}",
        "measured_s": measured,
        "predicted_s": predicted,
        "error": predicted / measured - 1,
    }


def plan_of(space: Any, target: tuple[int, ...], small: tuple[int, ...], kind: Any) -> Any:
    """A plan with exactly these latent sizes."""
    scale = space.spatial
    return kind(
        width=target[2] * scale,
        height=target[1] * scale,
        frames=4 * (target[0] - 1) + 1,
        fps=16.0,
        temporal_stride=4,
        proxy_width=small[2] * scale,
        proxy_height=small[1] * scale,
        proxy_frames=4 * (small[0] - 1) + 1,
        space=space,
    )

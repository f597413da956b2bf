"""One forward of the detail branch against the stock forward, its floor and its growth."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from typing import Any

from measure import RESULTS, markdown_table, measure, run_case, save_results

STRIDE = 4


@dataclass(frozen=True)
class Shape:
    """A Wan to measure. Real ones have random weights too: speed does not depend on them."""

    dim: int
    ffn_dim: int
    layers: int
    dtype: str
    text: int = 512
    """Tokens of the prompt; Wan's text encoder pads to 512."""

    def load(self) -> Any:
        """A ModelPatcher, through the stock loader."""
        import torch
        from atlasvid.engine.comfyui import models
        from atlasvid.engine.families import tiny

        state = tiny.wan_state(
            matrices=getattr(torch, self.dtype),
            dim=self.dim,
            ffn_dim=self.ffn_dim,
            num_heads=self.dim // 128,
            num_layers=self.layers,
        )
        if self.dtype.startswith("float8"):  # as the files that people load: with scales
            fp8 = [name for name, x in state.items() if x.dtype == getattr(torch, self.dtype)]
            scales = {f"{name.removesuffix('weight')}scale_weight": torch.ones(()) for name in fp8}
            state |= scales | {"scaled_fp8": torch.zeros(0, dtype=getattr(torch, self.dtype))}
        return models.load_diffusion_model(state)


SHAPES = {
    "tiny": Shape(256, 1024, 4, "float32"),
    "tiny, 16 text tokens": Shape(256, 1024, 4, "float32", 16),
    "tiny, one block": Shape(256, 1024, 1, "float32"),
    "1.3B": Shape(1536, 8960, 30, "bfloat16"),
    "1.3B, one block": Shape(1536, 8960, 1, "bfloat16"),
    "tiny fp8": Shape(256, 1024, 2, "float8_e4m3fn"),
    "14B fp8": Shape(5120, 13824, 40, "float8_e4m3fn"),
}
# Token grids (frames, height, width) with a guide of a quarter of the size along every axis.
AGAINST_STOCK = ((9, 48, 64), (33, 32, 64))
GROWTH = ((9, 24, 40), (9, 48, 64), (33, 32, 64), (33, 64, 64), (33, 64, 128))
SPARSE_WINDOW = (8, 32, 32)
"""64 blocks of 128 keys."""
KINDS = {
    "attention": ("attention", "flash", "fmha", "sage"),
    "linear layers": ("addmm", "aten::mm", "gemm", "nvjet", "cutlass", "linear"),
    "GELU": ("gelu", "GeLU"),
    "norms": ("norm", "pow", "rsqrt", "aten::mean", "aten::sum", "reduce"),
    "RoPE": ("rope",),
    "modulation and residuals": ("addcmul", "aten::add", "aten::mul"),
    "gather and scatter": ("index", "aten::cat", "aten::copy_", "gather", "scatter", "Cat"),
}
"""Kinds of work by words in the names of operators (CPU) or kernels (CUDA); the first that fits."""
UHD_81 = (21, 135, 240)
UHD_161 = (41, 135, 240)


COUNTED = (
    {"what": "compact, shifted", "overlap": "shifted", "window": (4, 16, 16)},
    {"what": "the same, weighted", "overlap": "shifted", "window": (4, 16, 16), "weight": 8.0},
    {
        "what": "compact, shifted, without our kernel",
        "overlap": "shifted",
        "window": (4, 16, 16),
        "kernels": False,
    },
    {
        "what": "the same, rotations in steps",
        "overlap": "shifted",
        "window": (4, 16, 16),
        "kernels": False,
        "fused_rope": False,
    },
    {"what": "compact, sliding", "overlap": "sliding", "window": (4, 16, 16)},
    {"what": "trained size, sliding", "overlap": "sliding", "window": (21, 30, 52)},
)
"""Blocks of the 1.3B model at 4K x 81 frames."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument(
        "--count", action="store_true", help="count what a block moves and launches, without a card"
    )
    parser.add_argument(
        "--quick", action="store_true", help="leave out the sizes that take minutes"
    )


def run(args: argparse.Namespace) -> None:
    if args.case:
        print(json.dumps(run_one(**json.loads(args.case))))
        return
    if args.count:
        import traffic

        rows = [
            {**traffic.count_block(grid=UHD_81, **{k: v for k, v in c.items() if k != "what"}), **c}
            for c in COUNTED
        ]
        save_results("traffic", rows, traffic.table(rows))
        return
    import torch

    (run_on_cuda if torch.cuda.is_available() else run_on_cpu)(quick=args.quick)


def run_one(
    shape: str,
    what: str,
    grid: list[int],
    repeat: int = 1,
    window: list[int] | None = None,
    keep_blocks: int = 0,
    cap_gib: float | None = None,
    profile: bool = False,
    overlap: str = "shifted",
    chunk: int | None = None,
    budget: str | None = None,
) -> dict[str, Any]:
    """Measures `what`: the `stock` forward, `ours`, or `products`, the matrix products of ours.

    `cap_gib` limits the card's memory for this process, weights included. With `profile` the
    result says where the time of ours goes. `chunk` is how many tokens are evaluated at a time.
    """
    import torch

    if cap_gib is not None:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(cap_gib * 2**30 / total)
    if chunk is not None:
        from atlasvid.engine.branch import forward

        forward.CPU_CHUNK, forward.measured_chunk = chunk, lambda *_: chunk
    choices = {"window": window, "keep_blocks": keep_blocks, "overlap": overlap, "budget": budget}
    bench = Forward(SHAPES[shape], tuple(grid), cap_gib=cap_gib, **choices)
    with torch.inference_mode():
        call = {"stock": bench.stock, "ours": bench.ours, "products": bench.products}[what]
        if repeat > 1 and what != "stock":  # minutes long: its own first call warms it up
            call()
        result: dict[str, Any] = measure(call, repeat)
        if profile:
            result["profile"] = bench.profile()
    return {**result, "tokens": math.prod(grid), "floor_flops": bench.flops()}


def plan_of(grid: tuple[int, ...], space: Any) -> Any:
    """A plan for a token grid (frames, height, width), with a guide a quarter as large."""
    from atlasvid.engine.geometry.plan import Plan

    f, h, w = grid
    pixels = 2 * space.spatial
    return Plan(
        width=w * pixels,
        height=h * pixels,
        frames=4 * (f - 1) + 1,
        fps=16.0,
        temporal_stride=STRIDE,
        proxy_width=w // 4 * pixels,
        proxy_height=h // 4 * pixels,
        proxy_frames=4 * ((f - 1) // STRIDE) + 1,
        space=space,
    )


class Forward:
    """A model of one shape, its inputs and its plan for a token grid."""

    def __init__(
        self,
        shape: Shape,
        grid: tuple[int, ...],
        window: list[int] | None = None,
        keep_blocks: int = 0,
        cap_gib: float | None = None,
        overlap: str = "shifted",
        budget: str | None = None,
    ):
        import torch
        from atlasvid.engine.branch.apply import apply_detail_branch
        from atlasvid.engine.comfyui import management
        from atlasvid.engine.families.family import latent_space
        from atlasvid.engine.geometry.grid import Grid
        from atlasvid.engine.geometry.windows import COMPACT

        self.patcher = shape.load()
        device = management.use_on_device(self.patcher)
        space = latent_space(self.patcher)
        self.plan = plan_of(grid, space)
        proxy = torch.randn(1, space.channels, *self.plan.proxy_latent)
        if budget is None:
            budget = "auto"
        if cap_gib is not None:  # what "auto" takes on a card of that size
            budget = f"{(cap_gib - torch.cuda.memory_allocated() / 2**30) / 2:.1f} GB"
        self.patched = apply_detail_branch(
            self.patcher,
            self.plan,
            proxy,
            Grid(*window) if window else COMPACT,
            "clean",
            memory_budget=budget,
            keep_blocks=keep_blocks,
            overlap=overlap,
        )
        dtype = self.patcher.model.get_dtype_inference()
        self.x = torch.randn(1, space.channels, *self.plan.latent).to(device, dtype)
        self.timestep = torch.tensor([500.0], device=device)
        self.text = torch.randn(1, shape.text, 4096).to(device, dtype)

    def _forward(self, patcher: Any) -> Any:
        options = {**patcher.model_options["transformer_options"], "wrappers": patcher.wrappers}
        model = patcher.model.diffusion_model
        return model(self.x, self.timestep, self.text, transformer_options=options)

    def stock(self) -> Any:
        return self._forward(self.patcher)

    def ours(self) -> Any:
        return self._forward(self.patched)

    def keys(self) -> int:
        """Keys per query, of the window and of the guide."""
        from atlasvid.engine.geometry.windows import COMPACT

        return sum(self.plan.keys_per_query(COMPACT))

    def flops(self) -> float:
        """Floating-point operations of the matrix products of our forward."""
        model = self.patcher.model.diffusion_model
        dim, ffn = model.dim, model.ffn_dim
        per_token = 12 * dim**2 + 4 * dim * ffn + 4 * dim * (self.keys() + self.text.shape[1])
        return float(len(model.blocks) * per_token * self.plan.tokens.count)

    def products(self) -> None:
        """The matrix products of our forward alone, on the same shapes, chunks and kernel."""
        import torch
        from atlasvid.engine.branch.attention import override_for
        from atlasvid.engine.branch.memory import CPU_CHUNK, CUDA_CHUNK
        from atlasvid.engine.comfyui import models
        from atlasvid.engine.geometry.windows import COMPACT

        model = self.patcher.model.diffusion_model
        window = COMPACT.clipped(self.plan.tokens).count
        tokens, keys = self.plan.tokens.count, self.keys()
        most = (CUDA_CHUNK if self.x.is_cuda else CPU_CHUNK) // window * window
        block, heads = model.blocks[0], model.num_heads
        linear = [block.self_attn.q, block.self_attn.k, block.self_attn.v, block.self_attn.o]
        linear += [block.cross_attn.q, block.cross_attn.o, block.ffn[0]]
        x = torch.randn(most, model.dim).to(self.x)
        wide = torch.randn(most, model.ffn_dim).to(self.x)
        q = torch.randn(most // window, window, model.dim).to(self.x)
        k = torch.randn(most // window, keys, model.dim).to(self.x)
        text = torch.randn(1, self.text.shape[1], model.dim).to(self.x)
        cross = q.view(1, -1, model.dim)
        override = override_for("auto", self.x.device)
        options = {"optimized_attention_override": override} if override else {}
        for _ in model.blocks:
            for start in range(0, tokens, most):
                n = min(most, tokens - start)
                for layer in linear:
                    layer(x[:n])
                block.ffn[2](wide[:n])
                windows = -(-n // window)
                for queries, both in ((q[:windows], k[:windows]), (cross[:, :n], text)):
                    models.attention(queries, both, both, heads, options)

    def profile(self) -> dict[str, float]:
        """Seconds of one forward by kind of work."""
        from torch.profiler import ProfilerActivity, profile

        cuda = self.x.is_cuda
        with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as seen:
            self.ours()
        spent = dict.fromkeys([*KINDS, "rest"], 0.0)
        for event in seen.key_averages():
            names = (kind for kind, words in KINDS.items() if any(w in event.key for w in words))
            micros = event.self_device_time_total if cuda else event.self_cpu_time_total
            spent[next(names, "rest")] += micros / 1e6
        return spent


def run_on_cpu(quick: bool) -> None:
    rows = []
    against = AGAINST_STOCK[:1] if quick else AGAINST_STOCK
    compared = [("tiny, one block", AGAINST_STOCK[0]), *(("tiny", grid) for grid in against)]
    compared.append(("tiny, 16 text tokens", against[-1]))
    for shape, grid in compared:
        for what, repeat in (("ours", 3), ("products", 3), ("stock", 2)):
            case = {"shape": shape, "what": what, "grid": grid, "repeat": repeat}
            case["profile"] = what == "ours"
            rows.append(run_case("attention", case))
    growth = [
        run_case("attention", {"shape": "tiny", "what": "ours", "grid": grid, "repeat": 2})
        for grid in (GROWTH[:3] if quick else GROWTH)
    ]
    table = [_against_stock(rows[i : i + 3]) for i in range(0, len(rows), 3)]
    slope = log_slope([(r["tokens"], r["seconds"]) for r in growth])
    text = markdown_table(
        [
            "Wan",
            "tokens",
            "stock",
            "ours",
            "faster",
            "memory grown: stock",
            "ours",
            "share",
            "over its matrix products",
        ],
        table,
    )
    sparse = [
        run_case("attention", {"shape": "tiny", "what": "ours", "grid": AGAINST_STOCK[0], **choice})
        for choice in (
            {"window": SPARSE_WINDOW, "keep_blocks": kept, "repeat": 2} for kept in (0, 16, 8)
        )
    ]
    text += "\n\n" + markdown_table(
        ["window", "blocks of 128 keys kept", "time", "saved"],
        [
            [
                " x ".join(map(str, SPARSE_WINDOW)),
                str(row["keep_blocks"] or "all 64"),
                f"{row['seconds']:.2f} s",
                f"{1 - row['seconds'] / sparse[0]['seconds']:.0%}",
            ]
            for row in sparse
        ],
    )
    text += "\n\n" + profile_table([row for row in rows if row["what"] == "ours"])
    text += f"\n\nSlope of log time over log tokens, {growth[0]['tokens']:,} to "
    text += f"{growth[-1]['tokens']:,} tokens: {slope:.2f} (full attention: about 2)."
    text += "\n\nOn a CUDA card: not measured."
    save_results("attention_cpu", [*rows, *growth, *sparse], text)
    plot(rows, growth)


def _against_stock(rows: list[dict[str, Any]]) -> list[str]:
    ours, products, stock = rows
    mib = 2**20
    return [
        ours["shape"],
        f"{ours['tokens']:,}",
        f"{stock['seconds']:.2f} s",
        f"{ours['seconds']:.2f} s",
        f"{stock['seconds'] / ours['seconds']:.1f} x",
        f"{stock['grown_bytes'] / mib:,.0f} MiB",
        f"{ours['grown_bytes'] / mib:,.0f} MiB",
        f"{ours['grown_bytes'] / stock['grown_bytes']:.1%}",
        f"{ours['seconds'] / products['seconds']:.2f} x",
    ]


def profile_table(rows: list[dict[str, Any]]) -> str:
    """Share of every kind of work in forwards of ours."""
    header = ["where the time goes", *(f"{r['shape']}, {r['tokens']:,} tokens" for r in rows)]
    lines = []
    for kind in rows[0]["profile"]:
        shares = (r["profile"][kind] / sum(r["profile"].values()) for r in rows)
        lines.append([kind, *(f"{share:.1%}" for share in shares)])
    return markdown_table(header, lines)


def log_slope(points: list[tuple[float, float]]) -> float:
    """Least-squares slope of log y over log x."""
    xs, ys = zip(*((math.log(x), math.log(y)) for x, y in points), strict=True)
    mx, my = sum(xs) / len(xs), sum(ys) / len(ys)
    over = sum((x - mx) * (y - my) for x, y in zip(xs, ys, strict=True))
    return over / sum((x - mx) ** 2 for x in xs)


def run_on_cuda(quick: bool) -> None:
    ours = {"what": "ours", "repeat": 3, "profile": True}
    cases: list[dict[str, Any]] = [
        {"shape": "1.3B", "grid": UHD_81, **ours},
        {"shape": "1.3B", "grid": UHD_81, "what": "products", "repeat": 3},
        {"shape": "1.3B", "grid": UHD_161, "what": "ours", "repeat": 2, "cap_gib": 16},
        {"shape": "1.3B, one block", "grid": UHD_81, **ours},
        {"shape": "1.3B, one block", "grid": UHD_81, "what": "stock"},
    ]
    if not quick:
        cases += [
            {"shape": "1.3B", "grid": UHD_81, "what": "stock"},
            {"shape": "14B fp8", "grid": UHD_161, "what": "ours", "cap_gib": 24},
        ]
    rows = []
    for case in cases:
        try:
            rows.append(run_case("attention", case))
        except RuntimeError as error:  # a row that fails must not cost the others
            print(error)
    others = {(r["shape"], r["what"]): r["seconds"] for r in rows if r["what"] != "ours"}
    table = []
    for row in rows:
        stock, products = (others.get((row["shape"], what)) for what in ("stock", "products"))
        compared = row["what"] == "ours" and row["grid"] == list(UHD_81)
        table.append(
            [
                f"{row['shape']}, {row['what']}",
                f"{row['tokens']:,}",
                f"{row['cap_gib']} GiB" if row.get("cap_gib") else "",
                f"{row['seconds']:.2f} s",
                f"{stock / row['seconds']:.1f} x" if compared and stock else "",
                f"{products / row['seconds']:.0%}" if compared and products else "",
                f"{row['peak_bytes'] / 2**30:.1f} GiB",
                f"{row['host_bytes'] / 2**30:.1f} GiB",
            ]
        )
    header = [
        "forward", "tokens", "memory capped at", "time", "faster than stock",
        "share of the floor", "peak on the card", "peak on the host",
    ]  # fmt: skip
    text = markdown_table(header, table)
    if profiled := [row for row in rows if "profile" in row]:
        text += "\n\n" + profile_table(profiled)
    save_results("attention_cuda", rows, text)


def plot(rows: list[dict[str, Any]], growth: list[dict[str, Any]]) -> None:
    """Time over tokens, both axes logarithmic."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    stock = [r for r in rows if r["what"] == "stock" and r["shape"] == "tiny"]
    axes.loglog(
        [r["tokens"] for r in growth], [r["seconds"] for r in growth], "o-", label="AtlasVid"
    )
    axes.loglog([r["tokens"] for r in stock], [r["seconds"] for r in stock], "s--", label="stock")
    axes.set_xlabel("target tokens")
    axes.set_ylabel("seconds per forward")
    axes.set_title("One forward, Wan of dim 256 and 4 blocks, 2 CPU cores")
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend()
    figure.savefig(RESULTS / "attention_cpu.png", dpi=120, bbox_inches="tight")

"""Puts the detail branch on a model: wrappers around sampling and around the forward."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..comfyui import management, models
from ..device.budget import AUTO, parse_budget
from ..families.family import Family, family_of
from ..geometry.grid import Grid
from ..geometry.layout import OVERLAPS, Layout
from ..geometry.plan import Plan
from ..geometry.space import LatentSpace
from ..lora.guide import GuideLora, habits_of
from ..proxy.latents import require_proxy
from .attention import override_for
from .forward import DetailForward
from .memory import room_to_ask_for
from .run import KEY, open_run, run_of
from .settings import GUIDE_NOISE, DetailSettings, preset_guide_weight, require_choice


def apply_detail_branch(
    model: Any,
    plan: Plan,
    proxy: Tensor | None,
    window: Grid,
    guide_noise: str,
    *,
    start_percent: float = 0.0,
    end_percent: float = 1.0,
    overlap: str = "shifted",
    memory_budget: str = AUTO,
    attention: str = AUTO,
    keep_blocks: int = 0,
    guide_lora: GuideLora | None = None,
    guide_weight: str | float = 1.0,
    guide_margin: int = 0,
    target_lora: GuideLora | None = None,
) -> Any:
    """A clone of `model` that samples the plan's target with the detail branch.

    It has as many parameters as the node has inputs.

    Args:
        proxy: ComfyUI latent [B, C, F_g, H_g, W_g], or None for windowed attention alone.
        window: tokens per window.
        guide_noise: `matched` (re-noised to every step's sigma), `clean` (timestep 0) or `joint`
            (denoised beside the target).
        start_percent, end_percent: part of the sampling in which the branch is active.
        overlap: `shifted` (disjoint windows that move between blocks) or `sliding` (every tile of
            queries reads a window centred on it).
        memory_budget: device memory beside the weights: `auto` or a size such as `4 GB`.
        attention: kernel, see `branch.attention`.
        keep_blocks: blocks of 128 keys that a window reads, 0 for all (FlashVSR's sparsity).
        guide_lora: acts on the guide's tokens only.
        target_lora: acts on the target's tokens only.
        guide_weight: how often each of the guide's keys counts in the softmax; 0 leaves the proxy
            out. `auto`: see `preset_guide_weight`.
        guide_margin: guide tokens that a window reads on every side beside its aligned ones; the
            whole guide where that is more than there are.

    Raises:
        ValueError: unsupported model, another latent space than the plan's, a proxy or a guide
            LoRA that does not match the plan or the model, or a value that is not allowed.
    """
    family = family_of(model)
    _require_same_space(family.latent_space(model), plan)
    require_choice("overlap", overlap, OVERLAPS)
    require_choice("guide_noise", guide_noise, GUIDE_NOISE)
    if start_percent > end_percent:
        raise ValueError(
            f"start_percent {start_percent} is after end_percent {end_percent}; swap them."
        )
    if guide_margin < 0:
        raise ValueError(f"guide_margin is {guide_margin}; give 0 or more guide tokens.")
    if keep_blocks < 0:
        raise ValueError(f"keep_blocks is {keep_blocks}; give 0 for all, or more.")
    layout = Layout(plan, window, overlap, guide_margin)
    loras = {"guide": guide_lora, "target": target_lora}
    weight = preset_guide_weight(guide_weight, habits_of(*loras.values()), *layout.keys)
    if proxy is not None:
        require_proxy(proxy, plan)
        proxy = models.process_latent_in(model, proxy.cpu().float())
    if guide_lora is not None and proxy is None:
        raise ValueError("A guide LoRA acts on the guide: connect the sampled proxy too.")
    net = model.model.diffusion_model
    for stream, lora in loras.items():
        if lora is not None:
            lora.require_stream(stream)
            lora.require_base(family.shape(net))
            lora.changes_of(net)
            lora.warn_of_mismatch(plan, window, guide_noise, weight)
    override_for(attention, model.load_device)  # a kernel that is not installed is refused here
    if weight == 0:  # what nobody reads need not be computed
        proxy = guide_lora = None
    settings = DetailSettings(
        layout=layout,
        guide_noise=guide_noise,
        proxy=proxy,
        sigma_start=models.percent_to_sigma(model, start_percent),
        sigma_end=models.percent_to_sigma(model, end_percent),
        budget=parse_budget(memory_budget),
        attention=attention,
        keep_blocks=keep_blocks,
        guide_lora=guide_lora,
        target_lora=target_lora,
        guide_weight=weight,
    )
    branch, clone = DetailBranch(family, settings), model.clone()
    forward = torch.compiler.disable(branch.forward)  # parts of a block are compiled instead
    for kind, wrapper in (
        (models.Wrappers.PREPARE_SAMPLING, branch.prepare),
        (models.Wrappers.DIFFUSION_MODEL, forward),
        (models.Wrappers.OUTER_SAMPLE, open_run),
    ):
        clone.remove_wrappers_with_key(kind, KEY)
        clone.add_wrapper_with_key(kind, KEY, wrapper)
    return clone


class DetailBranch:
    """What stands around a model's forward, and around the loading of its weights."""

    def __init__(self, family: Family, settings: DetailSettings):
        self.family = family
        self.settings = settings

    def forward(
        self, executor: Any, x: Tensor, timestep: Tensor, context: Tensor, *args: Any, **kw: Any
    ) -> Tensor:
        """DIFFUSION_MODEL wrapper: the windowed forward in the part of sampling it is for."""
        given = self.family.conditioning(context, args, kw)
        if not self.settings.is_active(given.options.get("sigmas")):
            return executor(x, timestep, context, *args, **kw)
        given.require_known()
        with run_of(given.options) as run:
            run.require_finite()
            net = executor.class_obj
            branch = DetailForward(net, self.family, self.settings, run, given.options)
            predicted = branch(x, timestep, given)
            run.watch(x, predicted)
            return predicted

    def prepare(self, executor: Any, patcher: Any, noise_shape: Any, *args: Any, **kw: Any) -> Any:
        """PREPARE_SAMPLING wrapper: loads weights beside what this forward needs, no more."""
        settings = self.settings
        if not settings.is_always_active:
            return executor(patcher, noise_shape, *args, **kw)
        shape = self.family.shape(patcher.model.diffusion_model)
        itemsize = management.inference_itemsize(patcher)
        work = settings.workload(shape, itemsize, noise_shape[0], keep_guide=True)
        latent = 4 * math.prod(noise_shape)
        wanted = room_to_ask_for(work, latent, management.beside_weights(patcher))
        if settings.budget is not None:
            wanted = min(wanted, settings.budget)
        return executor(patcher, management.noise_shape_for(patcher, wanted), *args, **kw)


def _require_same_space(space: LatentSpace, plan: Plan) -> None:
    if space != plan.space:
        raise ValueError(
            f"The plan was made for a model with {plan.space.channels}-channel latents at 1/"
            f"{plan.space.spatial} size; this model has {space.channels} channels at 1/"
            f"{space.spatial}. Connect the same model to the plan."
        )

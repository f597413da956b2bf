"""Sampling with the stock samplers, small enough to be stopped after every call of the model."""

from contextlib import contextmanager

import comfy.ldm.wan.model
import comfy.model_management
import comfy.sample
import torch
from torch.nn.modules.module import register_module_forward_pre_hook
from wan import rand

SHAPE = (1, 16, 3, 8, 8)


class Stopped(BaseException):
    """In place of a crash or a cancel: nothing in between catches it."""


@contextmanager
def calls(stop_before: int | None = None):
    """Counts real forwards of a Wan; the one of the given number is not reached."""
    made = []

    def count(module, _):
        if isinstance(module, comfy.ldm.wan.model.WanModel):
            if len(made) == stop_before:
                raise Stopped
            made.append(module)

    handle = register_module_forward_pre_hook(count)  # of all modules: none carries it
    try:
        yield made
    finally:
        handle.remove()


def conditioning(seed, **more):
    return [[rand(1, 16, 4096, seed=seed), more]]


def sample(
    model,
    *,
    sampler="euler",
    steps=4,
    cfg=1.0,
    seed=7,
    latent=None,
    positive=None,
    negative=None,
    **more,
):
    """The stock KSampler's own way, on the stock noise."""
    latent = torch.zeros(SHAPE) if latent is None else latent
    noise = comfy.sample.prepare_noise(latent, seed)
    if more.get("disable_noise"):
        noise = torch.zeros_like(noise)
    with torch.inference_mode():
        return comfy.sample.sample(
            model,
            noise,
            steps,
            cfg,
            sampler,
            "simple",
            positive or conditioning(1),
            negative or conditioning(2),
            latent,
            seed=seed,
            disable_pbar=True,
            **more,
        )

"""What lives for one sampling run and is freed with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import Tensor

from ..comfyui import models
from ..device import copies
from ..device.tokens import HostTokens
from .progress import RunProgress

KEY = "atlasvid"
T = TypeVar("T")


class SamplingRun:
    """State of one call of a sampler: the guide's noise, its keys, geometry, progress.

    Created when sampling starts, reachable by the forward through `transformer_options`, emptied
    when sampling ends, fails or is cancelled.

    Args:
        seed: the sampler's.
        keep_guide: whether one conditioning has the same weights in every step.
        compile_choices: arguments of torch.compile, or None to compile nothing.
        model: the ModelPatcher that is sampled.
        cfg: scale of classifier-free guidance.
    """

    def __init__(
        self,
        seed: int,
        keep_guide: bool = True,
        compile_choices: dict[str, Any] | None = None,
        model: Any = None,
        cfg: float = 1.0,
    ):
        self.seed = seed
        self.cfg = cfg
        self.model = model
        self.keep_guide = keep_guide
        self.compile_choices = compile_choices
        self.guide_keys: dict[tuple, list[tuple[Tensor, Tensor]]] = {}
        self._progress: RunProgress | None = None
        self._finite: Tensor | None = None
        self._noise: Tensor | None = None
        self._made: dict[tuple, Any] = {}

    def identity(self) -> tuple:
        """What a forward's result depends on; all else here is made from it."""
        return self.seed, self.keep_guide, self.compile_choices

    def once(self, key: tuple, make: Callable[[], T]) -> T:
        """What `make` gave the first time it was asked for under this key in this run."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def keep_guide_keys(self, key: tuple, keys: list[tuple[Tensor, Tensor]]) -> None:
        """Keep keys and values per block, in place of those of the same conditionings.

        ComfyUI may evaluate two conditionings together in one step and one by one in the next.
        """
        (*branch, together) = key
        for old in list(self.guide_keys):
            if [*old[:-1]] == branch and set(old[-1]) & set(together):
                del self.guide_keys[old]
        self.guide_keys[key] = keys

    def progress(self, schedule: tuple[float, ...], blocks: int, tokens: int) -> RunProgress:
        """The run's one progress report."""
        if self._progress is None:
            self._progress = RunProgress(schedule, blocks, tokens)
        return self._progress

    def watch(self, x: Tensor, predicted: Tensor) -> None:
        """Note whether a forward's result is finite, without waiting for the device."""
        self._finite = predicted.isfinite().all() | ~x.isfinite().all()

    def require_finite(self) -> None:
        """Look at the forward before, which the device has finished long since.

        Raises:
            ValueError: its result was not finite, though it was given finite values.
        """
        if self._finite is not None and not self._finite:
            raise ValueError(
                "The model's prediction contains NaN or infinite values, so the video would be of "
                "one colour. Check the model's file, its precision and the strengths of its LoRAs "
                "and of the guide's."
            )

    def finish(self) -> None:
        """The sampler came to its end."""
        self.require_finite()
        if self._progress is not None:
            self._progress.done()

    def noise_like(self, latent: Tensor) -> Tensor:
        """The run's one noise for the guide latent, the stock sampler's for the same seed."""
        if self._noise is None:
            self._noise = models.seeded_noise(latent, self.seed)
        return self._noise

    def close(self) -> None:
        """Drop every tensor."""
        self.guide_keys.clear()
        for made in self._made.values():
            if isinstance(made, HostTokens):
                made.close()
        self._made.clear()
        self._noise = None
        copies.release_pinned()


@contextmanager
def run_of(options: dict) -> Iterator[SamplingRun]:
    """The run that a forward belongs to; a forward outside of sampling gets one of its own."""
    run = options.get(KEY)
    if run is not None:
        yield run
        return
    run = SamplingRun(seed=0, keep_guide=False)
    try:
        yield run
    finally:
        run.close()


def open_run(executor: Any, noise: Tensor, latent_image: Tensor, *args: Any, **kwargs: Any) -> Any:
    """OUTER_SAMPLE wrapper: gives the sampling call a run and frees it whatever happens.

    Raises:
        ValueError: the latent to start from is not finite.
    """
    if not latent_image.isfinite().all():
        raise ValueError(
            "The latent to sample from contains NaN or infinite values. An earlier stage broke: "
            "check its model, precision and LoRA strengths."
        )
    guider = executor.class_obj
    seed = kwargs.get("seed", args[5] if len(args) > 5 else None)
    run = SamplingRun(
        seed or 0,
        keep_guide=not models.has_scheduled_weights(guider.model_patcher),
        compile_choices=models.compile_choices(guider.model_options),
        model=guider.model_patcher,
        cfg=float(getattr(guider, "cfg", 1.0)),
    )
    options = guider.model_options.setdefault("transformer_options", {})
    options[KEY] = run
    models.make_innermost(options, KEY)
    try:
        result = executor(noise, latent_image, *args, **kwargs)
        run.finish()
        return result
    finally:
        options.pop(KEY, None)
        run.close()

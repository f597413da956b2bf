"""The training loop of both stages."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import save_on_cpu

from ..branch.settings import DetailSettings
from ..comfyui import management, models
from ..device.chunks import ChunkSize
from ..families.family import family_of
from ..geometry.grid import Grid
from ..geometry.layout import Layout
from ..geometry.plan import Plan
from ..log import log
from ..lora.files import read_lora
from ..lora.guide import match
from ..lora.recipe import DETAIL_STAGES, STAGES, Recipe, pack_version
from .adapters import TARGETS, Adapters, build_adapters, require_rank
from .cache import Dataset, Sample, file_fingerprint
from .curve import save_losses
from .files import save_tensors
from .forward import CARD_CHUNK, HOST_CHUNK, Nets, guide_forward, proxy_forward
from .frozen import frozen_view
from .objective import NoiseLevels, flow_loss, noised, sample_order, step_generator
from .state import TrainingState

OPTIMIZERS = ("AdamW", "Prodigy")
USUAL_RATES = {"AdamW": 1e-4, "Prodigy": 1.0}
PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32}
GRADIENT_NORM = 1.0
"""Gradients are scaled down to this norm, so that one odd clip cannot undo the rest."""
KEY_PREFIX = {
    "proxy": "diffusion_model.",
    "guide": "base_model.model.",
    "target": "base_model.model.",
}
"""Stock loaders match every key of the first, and none of the others, which are not for them."""


@dataclass(frozen=True)
class TrainSettings:
    """What the artist chose; sizes and lengths are the plan's."""

    stage: str
    steps: int
    rank: int = 16
    alpha: float = 16.0
    targets: str = "attention and feed-forward"
    optimizer: str = "AdamW"
    learning_rate: float = 0.0
    """0 is the optimizer's usual one."""
    window: Grid | None = None
    """Tokens per window, in the stages of the detail branch."""
    noise: NoiseLevels = field(default_factory=NoiseLevels)
    caption_dropout: float = 0.1
    """Share of steps that learn without words, for classifier-free guidance."""
    accumulate: int = 1
    """Samples per step and card."""
    precision: str = "bf16"
    seed: int = 0
    save_every: int = 250
    guide_weight: float = 1.0
    """How often each of the guide's keys counts in the softmax, in those stages."""

    init: str = ""
    """A LoRA file to start from, perhaps trained at another size; empty: from the base model."""

    def __post_init__(self) -> None:
        for name, allowed in (
            ("stage", STAGES),
            ("optimizer", OPTIMIZERS),
            ("precision", tuple(PRECISIONS)),
            ("targets", tuple(TARGETS)),
        ):
            if getattr(self, name) not in allowed:
                value = getattr(self, name)
                raise ValueError(f"{name} is {value!r}; allowed are {', '.join(allowed)}.")
        for name in ("steps", "accumulate", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if not 0 <= self.learning_rate < math.inf:
            raise ValueError(
                f"learning_rate is {self.learning_rate:g}; give a number from 0 on; 0 is the "
                "optimizer's usual one."
            )
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha is {self.alpha:g}; give a number above 0, such as the rank.")
        if not 0 <= self.caption_dropout <= 1:
            raise ValueError(f"caption_dropout is {self.caption_dropout:g}; allowed is 0 to 1.")
        if not (math.isfinite(self.guide_weight) and self.guide_weight > 0):
            raise ValueError(
                f"guide_weight is {self.guide_weight:g}; give a number above 0: 1 reads the "
                "guide's keys as they are, and a guide that is not read cannot be learned."
            )

    @property
    def is_detail(self) -> bool:
        """Whether the LoRA is for the detail branch."""
        return self.stage in DETAIL_STAGES

    @property
    def rate(self) -> float:
        return self.learning_rate or USUAL_RATES[self.optimizer]


@dataclass(frozen=True)
class TrainResult:
    """A finished run."""

    path: Path
    """The LoRA."""
    curve: Path
    losses: tuple[float, ...]
    resumed_at: int


@dataclass(frozen=True)
class Cards:
    """How several processes share the work; one process by default."""

    accelerator: Any = None

    @property
    def count(self) -> int:
        return self.accelerator.num_processes if self.accelerator else 1

    @property
    def index(self) -> int:
        return self.accelerator.process_index if self.accelerator else 0

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean of a tensor over all processes."""
        return self.accelerator.reduce(tensor, "mean") if self.accelerator else tensor

    def wait(self) -> None:
        """Until every process is here."""
        if self.accelerator:
            self.accelerator.wait_for_everyone()


ONE_CARD = Cards()
NO_DATA = Dataset((), Path(), ())


def make_optimizer(name: str, weights: list[Any], rate: float) -> torch.optim.Optimizer:
    """An optimizer over the adapters' weights.

    Raises:
        RuntimeError: Prodigy's package is not installed.
    """
    if name == "AdamW":
        return torch.optim.AdamW(weights, lr=rate, weight_decay=0.01)
    try:
        import prodigyopt  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise RuntimeError(
            "The optimizer Prodigy needs the package prodigyopt. Install it into ComfyUI's "
            "Python: python -m pip install prodigyopt, or choose AdamW."
        ) from error
    make: Any = prodigyopt.Prodigy
    return make(
        weights, lr=rate, weight_decay=0.01, safeguard_warmup=True, use_bias_correction=True
    )


def require_trainable(model: Any, plan: Plan, settings: TrainSettings) -> None:
    """Refuse what cannot be trained, before anything is encoded.

    Raises:
        ValueError: says what was given and what to change.
    """
    family = family_of(model)
    space = family.latent_space(model)
    if space != plan.space:
        raise ValueError(
            "The plan was made for another kind of model. Connect the same model to the plan."
        )
    net = model.model.diffusion_model
    in_dim = family.shape(net).in_dim
    if in_dim != space.channels:
        raise ValueError(
            f"This model takes {in_dim} input channels, {in_dim - space.channels} of "
            "them for an image. Train on a text-to-video model (Wan 2.1 T2V, 2.2 T2V A14B or "
            "2.2 TI2V-5B)."
        )
    if settings.is_detail and settings.window is None:
        raise ValueError(f"Stage {settings.stage} needs a window.")
    require_rank(net, settings.rank)


def initial_weights(settings: TrainSettings, adapters: Adapters, net: Any) -> dict[str, Tensor]:
    """The adapters' weights with those of the LoRA to start from in their place.

    Layers that it does not change start anew.

    Raises:
        ValueError: it is unreadable, of another stage, base model or rank, or changes no layer.
    """
    file = read_lora(settings.init)
    recipe = file.recipe
    if recipe and recipe.stage != settings.stage:
        raise ValueError(
            f"{file.name} was trained for stage {recipe.stage}, and this is stage "
            f"{settings.stage}. Start from a LoRA of the same stage."
        )
    weights, scale = adapters.tensors(), settings.alpha / settings.rank
    found = {name: c for name, c in match(file.changes, net)[0].items() if name in adapters.layers}
    if not found:
        raise ValueError(f"{file.name} changes none of the layers that are trained here.")
    for name, change in found.items():
        if len(change.down) != settings.rank:
            raise ValueError(
                f"{file.name} has rank {len(change.down)}, and rank is {settings.rank}. Set rank "
                f"to {len(change.down)}."
            )
        weights[f"{name}.lora_A.weight"] = change.down.float()
        weights[f"{name}.lora_B.weight"] = change.up.float() * (change.scale / scale)
    log.info("Starting from %s: %d of %d layers.", file.name, len(found), len(adapters.layers))
    return weights


class Trainer:
    """One training run: a LoRA in `path`, its curve beside it, and its state in `folder`.

    Args:
        model: ComfyUI MODEL of a Wan text-to-video model; it is not changed.
        path: the LoRA to write, <name>.safetensors.
        folder: for what a resumed run needs and the LoRAs of earlier steps.

    Raises:
        ValueError: model, plan or settings that cannot be trained.
    """

    def __init__(
        self,
        model: Any,
        plan: Plan,
        settings: TrainSettings,
        path: Path,
        folder: Path,
        cards: Cards = ONE_CARD,
    ):
        require_trainable(model, plan, settings)
        self.family = family_of(model)
        self.plan = plan
        self.settings = settings
        self.path = path
        self.folder = folder
        self.cards = cards
        self.dtype = PRECISIONS[settings.precision]
        self.state_path = folder / "state.safetensors"
        self.base = self.family.shape(model.model.diffusion_model)
        self.patcher = management.load_for_training(model, self.dtype, self.activation_bytes())
        self.device = management.load_device(self.patcher)
        self.chunk = ChunkSize(HOST_CHUNK if self.device.type == "cpu" else CARD_CHUNK)
        net = self.patcher.model.diffusion_model
        with torch.inference_mode(False):
            self.adapters = build_adapters(
                net,
                settings.rank,
                settings.alpha,
                settings.targets,
                settings.seed,
                self.device,
            )
            if settings.init:
                self.adapters.load(initial_weights(settings, self.adapters, net))
            self.optimizer = make_optimizer(
                settings.optimizer, self.adapters.parameters(), settings.rate
            )
            self.frozen = frozen_view(net)
        self.inputs_on_host = self.device.type != "cpu" and self.activation_bytes() > int(
            0.9 * management.free_memory(self.device)
        )
        self.dataset = NO_DATA
        self.losses: list[float] = []
        self.step = 0

    def activation_bytes(self) -> int:
        """About what a step keeps: every block's input, and a chunk's activations."""
        width = self.dtype.itemsize * self.base.dim
        tokens = self.plan.proxy_tokens.count
        chunk = tokens
        if self.settings.is_detail:
            tokens, chunk = tokens + self.plan.tokens.count, max(tokens, CARD_CHUNK)
        return (self.base.layers + 8) * tokens * width + 60 * chunk * width

    # --- One step ---------------------------------------------------------------------------

    def run(
        self,
        dataset: Dataset,
        resume: bool = True,
        on_step: Callable[[int, list[float]], None] = lambda step, losses: None,
    ) -> TrainResult:
        """Train to the last step, from the saved state where there is one.

        Args:
            on_step: called with the step and all losses after every step.

        Raises:
            ValueError: the saved state is of another run, or the loss is not finite.
            RuntimeError: a file cannot be written; the last one written stays.
        """
        self.dataset = dataset
        management.empty_cache()  # a run that failed before may have left hooks of autograd behind
        with torch.inference_mode(False):  # what is made in it could not be trained on
            resumed_at = self.resume() if resume else 0
            self._run(on_step)
        return TrainResult(self.path, self.curve_path, tuple(self.losses), resumed_at)

    def _run(self, on_step: Callable[[int, list[float]], None]) -> None:
        saved_at = self.step
        try:
            with management.training():
                while self.step < self.settings.steps:
                    management.raise_if_cancelled()
                    self.losses.append(self.learn())
                    self.step += 1
                    if self.step % self.settings.save_every == 0:
                        self.save(keep_lora=True)
                        saved_at = self.step
                    on_step(self.step, self.losses)
        except BaseException:
            # Cancelled or failed: what was learned so far is kept. A second error would hide it.
            if self.step > saved_at:
                self.save_quietly()
            raise
        if self.step > saved_at or not self.path.exists():
            self.save()

    def learn(self) -> float:
        """One optimizer step; returns its loss.

        Raises:
            ValueError: the loss or a gradient is not finite. Nothing was changed.
            RuntimeError: out of memory. Nothing was changed.
        """
        settings, weights = self.settings, self.adapters.parameters()
        total = self.gradients()
        for weight in weights:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
            weight.grad = self.cards.mean(weight.grad)
        total = float(self.cards.mean(torch.tensor(total, device=self.device)))
        norm = float(torch.nn.utils.clip_grad_norm_(weights, GRADIENT_NORM))
        if not (math.isfinite(total) and math.isfinite(norm)):
            raise ValueError(
                f"The loss became {total:g} (gradient norm {norm:g}) at step {self.step + 1}; "
                f"training stopped, and the state after step {self.step} is kept. Use a smaller "
                f"learning_rate than {settings.rate:g}, or precision fp32; check the clips, the "
                "VAE and the LoRAs on the model."
            )
        self.optimizer.step()
        return total

    def gradients(self) -> float:
        """The loss of this step's samples, and its gradients; fewer windows at a time if need be.

        Raises:
            RuntimeError: out of memory with one window at a time, or in stage proxy.
        """
        while True:
            self.optimizer.zero_grad(set_to_none=True)
            total = 0.0
            try:
                for part in range(self.settings.accumulate):
                    loss = self.loss(part) / self.settings.accumulate
                    loss.backward()
                    total += float(loss.detach())
                return total
            except Exception as error:
                if not management.is_out_of_memory(error):
                    raise
            # Outside the handler, whose traceback keeps tensors and autograd's hooks alive.
            management.empty_cache()
            if self.settings.is_detail and not self.inputs_on_host:
                self.inputs_on_host = True
                continue
            least = self.settings.window.count if self.settings.window else self.chunk.tokens
            if self.chunk.tokens <= least:
                raise RuntimeError(
                    f"The memory ran out at step {self.step + 1}; the state before it is kept. "
                    "Plan a smaller or shorter video to train on, or close other programs."
                )
            self.chunk.tokens = max(least, self.chunk.tokens // 2)

    def loss(self, part: int) -> Tensor:
        """The flow-matching loss of one sample of this step."""
        settings = self.settings
        # Numbered through all processes: two cards learn what one learns that accumulates two.
        generator = step_generator(
            settings.seed, self.step, part * self.cards.count + self.cards.index
        )
        sample = self.dataset.sample(self.sample_index(len(self.dataset.files), part))
        uniform = torch.rand(2, generator=generator).tolist()
        text = sample.text
        if uniform[1] < settings.caption_dropout:
            text = self.dataset.without_words()
        sigma = settings.noise.sigma(uniform[0])
        learned = sample.guide if settings.stage == "proxy" else sample.target
        assert learned is not None
        latent = models.process_latent_in(self.patcher, learned)
        x, velocity = noised(latent, sigma, generator)
        predicted = self.predict(x, sigma, text, sample)
        return flow_loss(predicted, velocity.to(self.device))

    def sample_index(self, count: int, part: int) -> int:
        """Which sample this process takes: every epoch visits each once, in an order of its own."""
        settings, cards = self.settings, self.cards
        drawn = (self.step * settings.accumulate + part) * cards.count + cards.index
        return sample_order(count, settings.seed, drawn // count)[drawn % count]

    def predict(self, x: Tensor, sigma: float, text: Tensor, sample: Sample) -> Tensor:
        """The model's velocity for x [1, C, T, H, W]."""
        x, text = (tensor.to(self.device, self.dtype) for tensor in (x, text))
        timestep = torch.tensor([self.family.TIMESTEPS * sigma], device=self.device)
        if self.settings.stage == "proxy":
            return proxy_forward(self.adapters.view, self.plan, x, timestep, text)
        window = self.settings.window
        assert window is not None
        detail = DetailSettings(
            Layout(self.plan, window),
            "clean",
            models.process_latent_in(self.patcher, sample.guide),
            guide_weight=self.settings.guide_weight,
        )
        nets = Nets(target=self.frozen, guide=self.adapters.view)
        if self.settings.stage == "target":
            nets = Nets(target=self.adapters.view, guide=self.frozen)
        keep = save_on_cpu(pin_memory=self.device.type == "cuda")
        with keep if self.inputs_on_host else nullcontext():
            return guide_forward(nets, self.family, detail, (x, timestep, text), self.chunk)

    # --- Files ------------------------------------------------------------------------------

    @property
    def curve_path(self) -> Path:
        return self.path.with_suffix(".png")

    def recipe(self) -> Recipe:
        """What the saved LoRA says of itself."""
        settings, guide = self.settings, self.settings.is_detail
        return Recipe(
            stage=settings.stage,
            temporal_stride=self.plan.temporal_stride,
            window=settings.window if guide else None,
            guide_noise="clean" if guide else None,
            rank=settings.rank,
            alpha=settings.alpha,
            base=self.base,
            steps=self.step,
            version=pack_version(),
            guide_weight=settings.guide_weight if guide else None,
            ratio=self.plan.ratio if guide else None,
        )

    def lora_tensors(self) -> dict[str, Tensor]:
        """The adapters as a LoRA file holds them, alpha beside each pair."""
        prefix = KEY_PREFIX[self.settings.stage]
        tensors = {f"{prefix}{name}": tensor for name, tensor in self.adapters.tensors().items()}
        for name in self.adapters.layers:
            tensors[f"{prefix}{name}.alpha"] = torch.tensor(float(self.settings.alpha))
        return tensors

    def identity(self) -> dict[str, Any]:
        """What must be the same for a resumed run to go on exactly."""
        settings = asdict(self.settings)
        for name in ("steps", "save_every"):
            del settings[name]
        if settings["init"]:  # by its content: the file may be moved, but not be another
            settings["init"] = file_fingerprint(settings["init"])
        plan = {name: value for name, value in asdict(self.plan).items() if name != "notes"}
        samples = [file.stem for file in self.dataset.files]
        return {
            **settings,
            "plan": plan,
            "base": asdict(self.base),
            "samples": samples,
            "processes": self.cards.count,
        }

    def resume(self) -> int:
        """Take up the saved state where there is one; returns its step.

        Raises:
            ValueError: it is damaged or of another run.
        """
        if not self.state_path.is_file():
            return 0
        state = TrainingState.load(self.state_path)
        state.require_same(self.identity(), self.state_path)
        self.adapters.load(state.adapters)
        self.optimizer.load_state_dict(dict(state.optimizer))
        self.step, self.losses = state.step, list(state.losses)
        return self.step

    def save(self, keep_lora: bool = False) -> None:
        """Write state, LoRA and curve; with `keep_lora` also this step's LoRA for good.

        Raises:
            RuntimeError: one cannot be written; the one before it stays whole.
        """
        if self.cards.index:
            return
        TrainingState(
            self.step,
            tuple(self.losses),
            self.adapters.tensors(),
            self.optimizer.state_dict(),
            self.identity(),
        ).save(self.state_path)
        metadata = self.recipe().to_metadata()
        paths = [self.path]
        if keep_lora:
            paths.append(self.folder / f"step-{self.step:06}.safetensors")
        for path in paths:
            save_tensors(path, self.lora_tensors(), metadata)
        save_losses(self.losses, self.curve_path)

    def save_quietly(self) -> None:
        """`save` while another error is on its way, which must not be hidden."""
        try:
            self.save()
        except RuntimeError as error:
            log.warning("%s", error)

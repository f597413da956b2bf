"""Renders that go on: the model's answers are kept, and given again when the same is asked.

The state of a sampler is never saved. When a render is asked for again, its sampler runs from the
start, answered from disk until the first answer that is missing. So multi-step, ancestral and
two-model sampling go on bit by bit as if they had not stopped.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from ..branch.progress import duration
from ..comfyui import management, models, origins, server
from ..estimate.cost import size
from ..log import log
from . import store
from .ending import ENDING, KEEP, WHEN_DONE, settle
from .identity import (
    DIGEST_BYTES,
    TensorDigests,
    Unstable,
    digest,
    layers,
    sources_digest,
    tensor_digest,
    weights_digest,
)
from .needs import disk_needs
from .store import IN_USE, Answer, Facts, Render
from .writer import Writer

KEY = "atlasvid_resume"
GB = 10**9
MIN_LIMIT_GB = 0.001


@dataclass(frozen=True)
class ResumeSettings:
    """What the artist chose, and where the node stands.

    None of it changes an answer.
    """

    name: str = ""
    limit: int = 20 * GB
    """Bytes that kept renders may take."""
    when_done: str = KEEP
    node_id: str | None = None
    """Of the node that shows what was done."""
    titles: Mapping[str, str] = field(default_factory=dict)
    """Of the nodes in the prompt, by their id: what a render is called without a name."""


def apply_resume(
    model: Any,
    *,
    name: str = "",
    disk_limit_gb: float = 20.0,
    when_done: str = KEEP,
    node_id: str | None = None,
    prompt: Mapping[str, Any] | None = None,
) -> Any:
    """A clone of `model` whose answers are kept, and given again when the same is asked.

    Args:
        name: of the render in the list; empty: the title of the sampler.
        disk_limit_gb: room for all kept renders together, in 10^9 bytes.
        when_done: `keep` or `delete` the answers once the whole prompt has ended well.
        node_id: of the node that shows what was done.
        prompt: in API format, for the titles of its nodes.

    Raises:
        ValueError: a limit that is too small, or another choice for `when_done`.
    """
    if not disk_limit_gb >= MIN_LIMIT_GB:
        raise ValueError(f"disk_limit_gb is {disk_limit_gb}; give at least {MIN_LIMIT_GB}.")
    if when_done not in WHEN_DONE:
        raise ValueError(f"when_done is {when_done!r}; allowed are {', '.join(WHEN_DONE)}.")
    titles = {
        name: (node.get("_meta") or {}).get("title") or node["class_type"]
        for name, node in (prompt or {}).items()
    }
    settings = ResumeSettings(name, int(disk_limit_gb * GB), when_done, node_id, titles)
    wrappers, clone = _Wrappers(settings), model.clone()
    for kind, wrapper in (
        (models.Wrappers.OUTER_SAMPLE, wrappers.sample),
        (models.Wrappers.PREDICT_NOISE, wrappers.predict),
    ):
        clone.remove_wrappers_with_key(kind, KEY)
        clone.add_wrapper_with_key(kind, KEY, wrapper)
    return clone


class _Wrappers:
    """What stands around a sampling, and around each question to the model."""

    def __init__(self, settings: ResumeSettings):
        self.settings = settings

    def sample(
        self,
        executor: Any,
        noise: Tensor,
        latent: Tensor,
        sampler: Any,
        sigmas: Tensor,
        *args,
        **kw,
    ) -> Any:
        """OUTER_SAMPLE wrapper: opens a run and closes it whatever happens."""
        options = executor.class_obj.model_options.setdefault("transformer_options", {})
        schedule = tuple(sigmas.tolist())
        run = options[KEY] = ResumeRun(self.settings, sampler, schedule, tuple(latent.shape))
        try:
            result = executor(noise, latent, sampler, sigmas, *args, **kw)
            run.finish()
            return result
        finally:
            options.pop(KEY, None)
            run.close()

    def predict(
        self,
        executor: Any,
        x: Tensor,
        timestep: Tensor,
        model_options: dict | None = None,
        seed: int | None = None,
    ) -> Tensor:
        """PREDICT_NOISE wrapper: the kept answer, or the model's."""
        options = executor.class_obj.model_options.get("transformer_options", {})
        run: ResumeRun | None = options.get(KEY)
        if run is None:  # asked outside of a sampling
            return executor(x, timestep, model_options, seed)
        asked = Question(executor.class_obj, x, timestep, model_options or {}, seed)
        return run.answer(asked, lambda: executor(x, timestep, model_options, seed))


@dataclass(frozen=True)
class Question:
    """One call of the model by a sampler."""

    guider: Any
    x: Tensor
    sigma: Tensor
    options: dict
    seed: int | None


class ResumeRun:
    """One call of a sampler: what it asks, which answers are kept, and what is said of it.

    Args:
        sampler: the stock SAMPLER.
        schedule: noise levels, falling.
        latent: shape of what is sampled.
    """

    def __init__(
        self,
        settings: ResumeSettings,
        sampler: Any,
        schedule: tuple[float, ...],
        latent: tuple[int, ...],
    ):
        self.settings = settings
        self.sampler = origins.sampler_label(sampler)
        self.schedule = schedule
        self.latent = latent
        self.steps = max(0, len(schedule) - 1)
        self.off: str | None = None
        """Why nothing more is kept."""
        self._unseen = False
        self.render: Render | None = None
        self._fixed: bytes | None = None
        self._tensors = TensorDigests()
        self._writer = Writer()
        self._spare = 0
        self._saved = 0.0
        self._went_on: int | None = None
        self._told: str | None = None

    # --- What is asked ---

    def answer(self, asked: Question, model: Callable[[], Tensor]) -> Tensor:
        """The kept answer, or the model's, which is then kept."""
        management.raise_if_cancelled()
        key = self._key(asked)
        if key is None or self.render is None:
            return model()
        step = self._step(asked.sigma)
        kept = self.render.read(key)
        if kept is not None:
            self._saved += kept.seconds
            self._show(f"step {step} of {self.steps} was kept")
            return kept.tensor.to(asked.x.device)
        self._say_where(step, asked)
        begun = time.monotonic()
        result = model()
        if self.off is None:
            copy = result.detach().to("cpu", copy=True)  # on a card this waits for the result
            answer = Answer(copy, time.monotonic() - begun)
            self._writer.put(lambda: self._keep(key, step, answer))
        return result

    def _key(self, asked: Question) -> str | None:
        """What is asked, as a hash; None where it cannot be told."""
        if self._unseen:
            return None
        try:
            named = self._identity(asked)
        except Unstable as found:
            self._unseen = True
            self._stop(
                f"keeps nothing: {found} may change an answer in a way that cannot be seen. "
                "Remove that, or this node."
            )
            return None
        if self.render is None:
            self._open(named.hex())
        made = hashlib.blake2b(named, digest_size=DIGEST_BYTES)
        made.update(tensor_digest(asked.x) + tensor_digest(asked.sigma))
        return made.hexdigest()

    def _identity(self, asked: Question) -> bytes:
        """All that an answer depends on but the latent and its noise level."""
        if self._fixed is None:
            self._fixed = self._model_identity(asked.guider.model_patcher)
        guider = type(asked.guider)
        return digest(
            {
                "model": self._fixed,
                "guider": guider,
                "state": origins.guider_state(asked.guider),
                "options": origins.options(asked.options, own=(KEY,)),
                "seed": asked.seed,
                "sampler": self.sampler,
                "latent": self.latent,
            },
            self._tensors,
        )

    def _model_identity(self, model: Any) -> bytes:
        """Weights, LoRAs and code. Every byte is read: seconds, where sampling takes hours."""
        if foreign := origins.replaced_functions(model):
            raise Unstable(foreign[0])
        environment = origins.environment()
        if environment["attention"] is None:
            raise Unstable("another pack's attention")
        parts = {
            "environment": environment,
            "sources": sources_digest(),
            "layers": layers(model.model),
            "patches": origins.patches(model),
        }
        named = digest(parts, self._tensors)
        weights = weights_digest(origins.weights(model), self._show_reading)
        return digest([named, weights])

    def _step(self, sigma: Tensor) -> int:
        """The step that a noise level belongs to, from 1 on."""
        level = float(sigma.max())
        reached = sum(each >= level * (1 - 1e-4) for each in self.schedule[:-1])
        return max(1, reached)

    # --- What is kept ---

    def _open(self, render_id: str) -> None:
        """Find the render's folder, and hold it until its prompt has ended."""
        ENDING.settle_left()
        self.render = Render(store.folder() / render_id)
        IN_USE.hold(render_id, self)
        context = server.executing()
        if context is not None:
            ENDING.expect(*context, self.render, self.settings.when_done)
        try:
            self.render.set_facts(self._facts(context))
        except (OSError, SafetensorError) as error:
            self._stop(f"keeps nothing: {store.folder()} cannot be written ({error})")

    def _facts(self, context: tuple[str, str] | None) -> Facts:
        title = self.settings.titles.get(context[1]) if context else None
        before = self.render.facts if self.render else None
        finished = bool(before and before.finished)
        name = self.settings.name.strip() or title or self.sampler
        return Facts(name[:200], self.steps, self.latent, finished)

    def _keep(self, key: str, step: int, answer: Answer) -> None:
        """In the writer's thread: room, then the file. A full disk ends the keeping alone."""
        if self.off is not None or self.render is None:
            return
        needed = answer.tensor.nbytes
        try:
            if not store.make_room(needed, self.settings.limit, self._spare):
                self._stop(
                    f"no room for more steps (limit {size(self.settings.limit)}, free disk "
                    f"{size(server.free_disk())}): sampling goes on, {self.render.step} of "
                    f"{self.steps} steps are kept"
                )
                return
            self.render.write(key, step, answer)
        except (OSError, SafetensorError) as error:
            self._stop(
                f"the disk does not take more steps ({error}): sampling goes on, "
                f"{self.render.step} of {self.steps} steps are kept"
            )

    def _stop(self, reason: str) -> None:
        self.off = reason
        log.warning("AtlasVid Resume %s.", reason)
        self._show(reason)

    def finish(self) -> None:
        """The sampler came to its end."""
        self._writer.close()
        if self.render is None:
            return
        if self._went_on is None:
            self._say(f"all {self.steps} steps were kept (saved {duration(self._saved)})")
        elif self.off is None:
            self._told = self._told or "sampled"
            log.info("AtlasVid Resume: %s, %s kept.", self._told, size(self.render.bytes))
        self._show(self.off or f"{self._told}; {size(self.render.bytes)} kept")
        if server.executing() is None:
            settle(self.render, self.settings.when_done)

    def close(self) -> None:
        """Write what waits, let go of everything."""
        self._writer.close()
        if self.render is not None:
            if not self.render.answers:
                self.render.delete()
            IN_USE.release(self.render.id, self)
        self._tensors = TensorDigests()

    # --- What is said ---

    def _say_where(self, step: int, asked: Question) -> None:
        """At the first answer that is missing: where it goes on, and whether the disk suffices."""
        if self._went_on is not None:
            self._show(self.off or self._told or f"keeping step {step} of {self.steps}")
            return
        self._went_on = step
        assert self.render is not None
        total = self.steps * asked.x.nbytes
        missing = max(0, self.steps - step + 1)
        needs = disk_needs(asked.guider.model_patcher, self.latent, missing, asked.x.nbytes)
        self._spare = needs.spare
        problem = needs.problem(total, self.settings.limit)
        if self._saved:
            self._say(f"went on at step {step} of {self.steps} (saved {duration(self._saved)})")
        if problem:
            log.warning("AtlasVid Resume: %s", problem)
        self._show("\n".join(filter(None, (self._told, problem, self.off))) or "keeping every step")

    def _say(self, text: str) -> None:
        self._told = text
        log.info("AtlasVid Resume: %s", text)

    def _show(self, text: str) -> None:
        server.show_progress(text, self.settings.node_id)

    def _show_reading(self, share: float) -> None:
        self._show(f"reading the weights: {share:.0%}")

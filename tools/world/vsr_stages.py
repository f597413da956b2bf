"""The stages of the world's training that make its FlashVSR."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from atlasvid.engine.flashvsr.tc_decoder import TCDecoder
from atlasvid.engine.training.cache import fingerprint
from torch import Tensor
from tqdm import tqdm

from . import tc, vsr_files
from .sheets import save_sheet
from .training import save_whole, train
from .vsr import Student, StudentRecipe, StudentTraining, student_latents
from .vsr_pairs import PairSizes, Shard, as_pixels, enlarged, read_shard, render_shards, shard_paths
from .vsr_start import Example, begin
from .work import Shown, Work

PAIRS, LATENTS = "pairs", "student_latents"
STUDENT, DECODER, FINISHED = "student.pt", "tc_decoder.pt", "tc_decoder_on_student.pt"
EXAMPLE_SHARDS, EXAMPLE_EVERY = 8, 3
"""The student's start is found from every third clip of the first files that are trained on."""
PICTURED = 3
"""Clips of a sheet, of the file that is held out."""


def render_pairs(work: Work, sizes: PairSizes | None = None) -> None:
    """Large clips beside small ones."""
    sizes = sizes or PairSizes()
    sizes = replace(sizes, shards=work.share(sizes.shards, least=2))
    render_shards(work.folder / PAIRS, work.code, sizes)


def train_student(work: Work, recipe: StudentRecipe | None = None) -> None:
    """The transformer and its LQ projection."""
    recipe = work.asked(recipe or StudentRecipe())
    held, *shards = (read_shard(path) for path in shard_paths(work.folder / PAIRS))
    student, checkpoint = Student.new(recipe.seed), work.folder / STUDENT
    if not checkpoint.exists() and not work.start:
        error = begin(student, list(examples(shards)), recipe.seed)
        print(f"[world] the student begins with {error:.3f} of the latents' variance")
    training = StudentTraining(student.to(work.device), recipe, work.code)
    if checkpoint.exists():
        training.load(checkpoint)
    elif work.start:
        training.start_from(vsr_files.load(work.start)[0])

    def picture(step: int) -> None:
        given = work.code.decode(student_latents(training.average, held.small[:PICTURED]))
        save_pictures(work.folder / f"student_{step:05d}.png", held, given)

    if not training.step:
        picture(0)
    with Shown(training, checkpoint, picture) as shown:
        train(training, lambda *at: recipe.batch_of(shards, *at), checkpoint, shown)


def save_pictures(path: Path, held: Shard, given: Tensor) -> None:
    """Clips as they are shown, as they are `given` [N, 3, F, H, W], and as they are drawn."""
    shown, drawn = enlarged(held.small[: len(given)]), as_pixels(held.large[: len(given)])
    columns = (shown[:, :, : drawn.shape[2]], given, drawn)
    save_sheet(path, torch.cat(columns, dim=-1), shown=2)


def examples(shards: list[Shard]) -> Iterator[Example]:
    """What the student's start is found from."""
    for shard in shards[:EXAMPLE_SHARDS]:
        yield from zip(shard.small[::EXAMPLE_EVERY], shard.latents[::EXAMPLE_EVERY], strict=True)


def train_decoder(work: Work, recipes: tuple[tc.DecoderRecipe, ...] | None = None) -> None:
    """The Tiny Conditional decoder: on the drawn clips' own latents, then on the student's."""
    first, second = (
        work.asked(recipe) for recipe in recipes or (tc.DecoderRecipe(), tc.ON_STUDENT)
    )
    shards = [read_shard(path) for path in shard_paths(work.folder / PAIRS)]
    student = averaged(work.folder / STUDENT)
    own = [shard.latents for shard in shards]
    begun = train_part(work, first, DECODER, shards, own, None)
    its = latents_by_student(work, student, shards)
    train_part(work, second, FINISHED, shards, its, begun)


def train_part(
    work: Work,
    recipe: tc.DecoderRecipe,
    name: str,
    shards: list[Shard],
    latents: list[Tensor],
    weights: dict[str, Tensor] | None,
) -> dict[str, Tensor]:
    """One part of the decoder's training, its checkpoint `name`; returns its averaged weights.

    Args:
        weights: to begin with; None: a finished family's, or ones that let colours through.
    """
    decoder, checkpoint = TCDecoder(tc.WIDTHS), work.folder / name
    if not checkpoint.exists():
        if weights is None and work.start:
            weights = vsr_files.load(work.start)[1]
        if weights is None:
            tc.begin(decoder, [small for small, _ in examples(shards[1:])], recipe.seed)
    training = tc.DecoderTraining(decoder.to(work.device), recipe)
    if checkpoint.exists():
        training.load(checkpoint)
    elif weights is not None:
        training.start_from(weights)
    squares = tc.Squares(shards[1:], latents[1:])

    def picture(_: int) -> None:
        small = shards[0].small[:PICTURED]
        given = tc.decoded(training.average, latents[0][:PICTURED], small)
        save_pictures(checkpoint.with_suffix(".png"), shards[0], given)

    with Shown(training, checkpoint, picture) as shown:
        train(training, lambda _, at: squares.draw(recipe.batch, at), checkpoint, shown)
    return training.average.state_dict()


def latents_by_student(work: Work, weights: dict[str, Tensor], shards: list[Shard]) -> list[Tensor]:
    """The student's latents of every file's clips, kept in files until the student is another."""
    name = fingerprint(weights)
    student = Student.new(0)
    student.load_state_dict(weights)
    student.to(work.device)
    folder, made = work.folder / LATENTS, []
    folder.mkdir(exist_ok=True)
    for number, shard in enumerate(tqdm(shards, desc="the student's latents")):
        path = folder / f"{number:04d}.pt"
        kept = torch.load(path, weights_only=True) if path.exists() else {}
        if kept.get("student") != name:
            kept = {"student": name, "latents": student_latents(student, shard.small).half()}
            save_whole(kept, path)
        made.append(kept["latents"])
    return made


def averaged(checkpoint: Path) -> dict[str, Tensor]:
    """The averaged weights of a training.

    Raises:
        FileNotFoundError: it has not begun; names its stage.
    """
    if not checkpoint.exists():
        stage = "student" if checkpoint.name == STUDENT else "tc-decoder"
        raise FileNotFoundError(f"{checkpoint} is missing: run stage {stage}")
    return torch.load(checkpoint, weights_only=True, map_location="cpu")["average"]


def pack_flashvsr(work: Work) -> None:
    """The finished files, once there is a student."""
    if (work.folder / STUDENT).exists():
        parts = (averaged(work.folder / name) for name in (STUDENT, FINISHED))
        vsr_files.save(work.output, *parts)

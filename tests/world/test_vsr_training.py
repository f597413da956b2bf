"""The stages that make the tiny world's FlashVSR, against the pack's own FlashVSR."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from atlasvid.engine.comfyui import models
from atlasvid.engine.families.tiny import random_weights
from atlasvid.engine.flashvsr import tiny
from atlasvid.engine.flashvsr.bundle import FlashVSR
from atlasvid.engine.flashvsr.source import Footage, LowQuality, Upscale
from atlasvid.engine.flashvsr.tc_decoder import TCDecoder
from atlasvid.engine.flashvsr.upscale import Job, Progress, denoised
from atlasvid.engine.flashvsr.video import upscaled_video
from atlasvid.engine.training.tc_decoder import initialise
from atlasvid.engine.vae.sources import ImageFrames
from torch import Tensor
from world import tc, vsr_files, vsr_stages
from world.clips import random_clips
from world.latents import fit
from world.training import train
from world.vsr import SPARSITY, Student, StudentRecipe, student_latents
from world.vsr_pairs import PairSizes, enlarged, read_shard, shard_paths
from world.vsr_start import begin
from world.work import Shown, Work

SMALL = PairSizes(shards=4, clips=4, side=128, frames=25)
CPU = torch.device("cpu")
STUDENT = StudentRecipe(steps=2, cooldown=1, warmup=1)
DECODER = tc.DecoderRecipe(steps=2, cooldown=1, warmup=1)
SECOND = replace(tc.ON_STUDENT, steps=2, cooldown=1, warmup=1)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    """A folder with a latent space and drawn pairs."""
    folder = tmp_path_factory.mktemp("world")
    work = Work(folder, folder / "family", CPU)
    fit(random_clips(0, 12, 64, 64, frames=5)[0], steps=60, batch=4).save(
        folder / "code.safetensors"
    )
    vsr_stages.render_pairs(work, SMALL)
    return work


# --- The student is the pack's --------------------------------------------------------------


def bundle(student: Student) -> FlashVSR:
    """The pack's FlashVSR with a student's weights."""
    return FlashVSR(
        models.load_diffusion_model(dict(student.net.state_dict())),
        models.patcher(student.projection),
        student.prompt,
        None,
        tiny.VERSION,
    )


def randomised(student: Student) -> Student:
    """Weights at which every path counts, attention above all."""
    student.net.load_state_dict(random_weights(student.net, 1))
    student.projection.load_state_dict(random_weights(student.projection, 2))
    return student


def trained() -> Student:
    student = Student.new(0)
    student.load_state_dict(vsr_files.load(tiny.WORLD)[0])
    return student


@pytest.mark.parametrize("made", [trained, lambda: randomised(Student.new(0))])
def test_a_whole_clip_is_what_the_nodes_make_of_it_chunk_by_chunk(made):
    """2 x 2 blocks, four chunks: the last ones have forgotten the first slots."""
    student = made().eval()
    frames, latents = 45, 12
    generator = torch.Generator().manual_seed(0)
    footage = Footage.of(ImageFrames(torch.rand(frames, 64, 64, 3, generator=generator)))
    upscale = Upscale.by(footage.size, 4)
    noise = torch.randn(1, 16, latents, 32, 32, generator=generator)
    job = Job(footage, upscale, SPARSITY, noise=lambda t: noise[0, :, t])
    flashvsr = bundle(student)
    with torch.inference_mode():
        slots = denoised(flashvsr, job, Progress(flashvsr, job.schedule))
        in_use = torch.cat([latent for _, latent in slots], dim=2)
        shown = LowQuality(footage, upscale, behind=64).frames(0, job.schedule.read)
        at_once = student(noise, shown.movedim(1, 0)[None])
    assert in_use.shape == noise.shape
    torch.testing.assert_close(at_once, in_use, atol=1e-3, rtol=0)


def test_enlarged_clips_are_those_that_the_networks_read_in_use(work: Work):
    small = read_shard(shard_paths(work.folder / vsr_stages.PAIRS)[0]).small[0]
    images = small.permute(1, 2, 3, 0).float() / 255
    footage = Footage.of(ImageFrames(images))
    read = LowQuality(footage, Upscale.by(footage.size, 4)).frames(0, len(images))
    levels = (enlarged(small[None])[0].movedim(1, 0) - read).abs() * 127.5
    assert levels.max() < 1.01
    assert levels.mean() < 0.1


# --- Its start ------------------------------------------------------------------------------


def test_the_student_begins_with_a_fit_that_holds_for_clips_it_never_saw(work: Work):
    shards = [read_shard(path) for path in shard_paths(work.folder / vsr_stages.PAIRS)]
    student = Student.new(0)
    held, *shards = shards
    clips = [pair for s in shards for pair in zip(s.small, s.latents, strict=True)]
    assert begin(student, clips) < 0.2
    latents = held.latents.float()
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        given = student(noise, enlarged(held.small))
    assert (given - latents).square().mean() < 0.5 * latents.var()


def untold(decoder: TCDecoder, small: Tensor, latents: Tensor) -> float:
    """What a linear map cannot tell of 8 x 8 pixels' colours from the decoder's last features."""
    features = []
    last = decoder[tc.TAIL[1]]
    hook = last.register_forward_hook(lambda _, inputs, __: features.append(inputs[0]))
    tc.decoded(decoder, latents[None], small[None])
    hook.remove()
    seen = features[0][3:]  # the first latent frame gives one frame
    frames = enlarged(small[None])[0, :, : len(seen)].transpose(0, 1)
    x, y = (F.avg_pool2d(part, 8).movedim(1, -1).flatten(0, -2) for part in (seen, frames))
    x = torch.cat([x, torch.ones(len(x), 1)], dim=1)
    left = y - x @ torch.linalg.lstsq(x, y).solution
    return float(left.square().mean() / y.var(0).mean())


def test_the_decoder_begins_by_letting_the_colours_through(work: Work):
    held, *shards = (read_shard(path) for path in shard_paths(work.folder / vsr_stages.PAIRS))
    clip = held.small[0], held.latents[0]
    decoder = TCDecoder(tc.WIDTHS)
    initialise(decoder, 1)
    assert untold(decoder, *clip) > 0.3
    tc.begin(decoder, [small for small, _ in vsr_stages.examples(shards)], 1)
    assert untold(decoder, *clip) < 0.1


# --- Stages ---------------------------------------------------------------------------------


class StoppedError(Exception):
    pass


def beside(work: Work, folder: Path, **changes: object) -> Work:
    """Another work folder with the same latent space and pairs."""
    folder.mkdir()
    for name in ("code.safetensors", vsr_stages.PAIRS):
        (folder / name).symlink_to(work.folder / name)
    return replace(work, folder=folder, output=folder / "family", **changes)


def run(work: Work) -> None:
    vsr_stages.train_student(work, STUDENT)
    vsr_stages.train_decoder(work, (DECODER, SECOND))
    work.output.mkdir(exist_ok=True)
    vsr_stages.pack_flashvsr(work)


@pytest.fixture(scope="module")
def finished(work: Work) -> Work:
    run(work)
    return work


def test_files_are_a_flashvsr_that_the_pack_loads_and_uses(finished: Work):
    family = tiny.trained_flashvsr(finished.output)
    shard = read_shard(shard_paths(finished.folder / vsr_stages.PAIRS)[0])
    images = shard.small[0].permute(1, 2, 3, 0)[:9].float() / 255
    video, _ = upscaled_video(
        family, images, width=128, height=128, sparsity=SPARSITY, seed=0, decoder="tiny conditional"
    )
    made = video.get_components().images
    wanted = shard.large[0, :, :9].permute(1, 2, 3, 0).float() / 255
    assert made.shape == wanted.shape
    assert (made - wanted).square().mean() < wanted.var()
    pictures = {path.name for path in finished.folder.glob("*.png")}
    assert {
        "student_00000.png",
        "student_00002.png",
        "student_loss.png",
        "tc_decoder.png",
    } <= pictures


def test_files_hold_the_student_in_fewer_bits(finished: Work):
    student, again = Student.new(0), Student.new(0)
    student.load_state_dict(vsr_stages.averaged(finished.folder / vsr_stages.STUDENT))
    again.load_state_dict(vsr_files.load(finished.output)[0])
    shard = read_shard(shard_paths(finished.folder / vsr_stages.PAIRS)[0])
    wanted, given = (student_latents(net, shard.small[:1]) for net in (student, again))
    assert (given - wanted).square().mean() < 0.03 * wanted.var()
    for name, weight in student.state_dict().items():
        error = again.state_dict()[name] - weight
        assert error.norm() <= 0.05 * weight.norm() + 1e-6, name


def test_stopped_stages_go_on_exactly(
    finished: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    stopped = beside(finished, tmp_path / "stopped")
    shown, met = vsr_stages.Shown.__call__, set()

    def stopping(self: Shown, step: int, loss: float) -> None:
        """Once in every training, before its second step is saved."""
        if step == 1 and self.bar.desc not in met:
            met.add(self.bar.desc)
            raise StoppedError
        shown(self, step, loss)

    monkeypatch.setattr(vsr_stages, "train", partial(train, save_every=-1))
    monkeypatch.setattr(vsr_stages.Shown, "__call__", stopping)
    for _ in range(3):
        with pytest.raises(StoppedError):
            run(stopped)
    run(stopped)
    assert len(met) == 3
    for checkpoint in (vsr_stages.STUDENT, vsr_stages.DECODER, vsr_stages.FINISHED):
        whole, resumed = (
            torch.load(at.folder / checkpoint, weights_only=True) for at in (finished, stopped)
        )
        assert resumed["losses"] == whole["losses"]
        pairs = zip(resumed["average"].values(), whole["average"].values(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs), checkpoint


def test_training_can_begin_with_a_finished_family(finished: Work, tmp_path: Path):
    again = beside(finished, tmp_path / "again", start=finished.output, steps=1)
    run(again)
    for load, name in ((0, vsr_stages.STUDENT), (1, vsr_stages.DECODER)):
        begun = vsr_files.load(finished.output)[load]
        average = vsr_stages.averaged(again.folder / name)
        for key, weight in average.items():
            assert torch.allclose(weight, begun[key], atol=2e-3), key


def test_a_stage_that_lacks_an_earlier_one_names_it(work: Work, tmp_path: Path):
    empty = replace(work, folder=tmp_path, output=tmp_path)
    with pytest.raises(FileNotFoundError, match="run stage pairs"):
        vsr_stages.train_student(empty)
    with pytest.raises(FileNotFoundError, match="run stage student"):
        vsr_stages.train_decoder(beside(work, tmp_path / "none"), (DECODER, SECOND))

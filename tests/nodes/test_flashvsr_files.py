"""AtlasVid FlashVSR from a video file to a video file: sound, rate, rotation, cancel, memory."""

import os
import struct
import subprocess
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path

import av
import comfy.model_management
import folder_paths
import pytest
import torch
from atlasvid.engine.flashvsr.tc_decoder import TCRun
from atlasvid.engine.flashvsr.tiny import random_flashvsr
from atlasvid.engine.flashvsr.upscale import Progress
from atlasvid.nodes.flashvsr import AtlasVidFlashVSR
from clips import render
from comfy_api.latest import InputImpl
from stock_nodes import create_video, save_video
from wan import rand


@pytest.fixture(scope="module")
def flashvsr():
    return random_flashvsr(0)


@pytest.fixture(autouse=True)
def temp_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path / "temp"))
    return tmp_path / "temp"


def upscale(flashvsr, video, scale=2.0, **more):
    chosen = {"seed": 0, "decoder": "tiny conditional", "colour": "adain", **more}
    return AtlasVidFlashVSR.execute(flashvsr, video, scale, **chosen)[0]


def test_sound_and_frame_rate_are_the_files(flashvsr, tmp_path):
    sound = {"waveform": rand(1, 2, 44100, seed=1) * 0.1, "sample_rate": 44100}
    file = save_video(create_video(rand(9, 48, 64, 3).sigmoid(), 23.976, sound), tmp_path / "in")
    given = InputImpl.VideoFromFile(str(file))
    video = upscale(flashvsr, given)
    assert video.get_frame_rate() == given.get_frame_rate()
    components, theirs = video.get_components(), given.get_components()
    assert torch.equal(components.audio["waveform"], theirs.audio["waveform"])
    assert components.audio["sample_rate"] == 44100
    assert components.images.shape == (9, 96, 128, 3)
    with av.open(str(save_video(video, tmp_path / "out"))) as container:
        assert container.streams.audio
        assert container.streams.video[0].average_rate == given.get_frame_rate()
        assert sum(1 for _ in container.decode(video=0)) == 9
    assert upscale(flashvsr, given, fps=12.0).get_frame_rate() == Fraction(12)


def test_a_quarter_turned_file_is_read_upright(flashvsr, tmp_path):
    """As the stock node reads it: the pixels equal those of its images."""
    file = render(tmp_path / "lying.mp4", 3, width=64, height=48)
    content = bytearray(file.read_bytes())
    matrix = content.index(b"tkhd") + 44
    content[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
    file.write_bytes(content)
    given = InputImpl.VideoFromFile(str(file))
    pixels = given.get_components().images
    if pixels.shape[1:3] == (48, 64):
        pytest.skip("this ComfyUI does not turn videos upright")
    assert pixels.shape[1:3] == (64, 48)
    video = upscale(flashvsr, given)
    assert video.get_dimensions() == (96, 128)
    expected = upscale(flashvsr, pixels).get_components().images
    assert torch.equal(video.get_components().images, expected)


def interrupted_at(call, monkeypatch, owner, name):
    """Runs `call`, cancelled from another thread once `owner.name` runs; seconds that it takes."""
    original, begun = getattr(owner, name), threading.Event()
    posted = []

    def watched(*args):
        begun.set()
        return original(*args)

    def cancel():
        begun.wait(60)
        time.sleep(0.3)
        posted.append(time.monotonic())
        comfy.model_management.interrupt_current_processing(True)

    monkeypatch.setattr(owner, name, watched)
    other = threading.Thread(target=cancel)
    other.start()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        call()
    ended = time.monotonic()
    other.join()
    return ended - posted[0]


@pytest.mark.parametrize("budget", ["auto", "1 GB"])
def test_a_cancel_during_the_transformer_ends_it(flashvsr, temp_folder, monkeypatch, budget):
    pixels = rand(200, 32, 48, 3).sigmoid()
    run = lambda: upscale(flashvsr, pixels, 8.0, memory_budget=budget)  # noqa: E731
    assert interrupted_at(run, monkeypatch, Progress, "at_block") < 2
    assert list(temp_folder.iterdir()) == []


def test_a_cancel_during_the_decode_ends_it(flashvsr, tmp_path, temp_folder, monkeypatch):
    video = upscale(flashvsr, rand(41, 32, 48, 3).sigmoid(), 8.0)
    run = lambda: save_video(video, tmp_path / "out")  # noqa: E731
    assert interrupted_at(run, monkeypatch, TCRun, "step") < 2
    assert list((tmp_path / "out").rglob("*")) == []
    assert list(temp_folder.iterdir()) == []


GROWTH = """
import sys, threading
from pathlib import Path
sys.path[:0] = [{tests!r}, {tools!r}]
import conftest, folder_paths
from measure import resident_bytes
from atlasvid.engine.flashvsr.tiny import random_flashvsr
from atlasvid.nodes.flashvsr import AtlasVidFlashVSR
from clips import render
from comfy_api.latest import InputImpl
folder = Path({folder!r})
folder_paths.temp_directory = str(folder / "temp")
flashvsr = random_flashvsr(0)
def run(frames):
    given = InputImpl.VideoFromFile(str(folder / (str(frames) + ".mp4")))
    out = AtlasVidFlashVSR.execute(flashvsr, given, 2.0, 0, "tiny conditional", "adain")[0]
    out.save_to(str(folder / "out.mp4"))
def peak(frames):
    done, highest = threading.Event(), [0]
    def watch():
        while not done.wait(0.01):
            highest[0] = max(highest[0], resident_bytes("RssAnon"))
    before = resident_bytes("RssAnon")
    watching = threading.Thread(target=watch)
    watching.start()
    run(frames)
    done.set()
    watching.join()
    return highest[0] - before
for frames in (33, 161):
    render(folder / (str(frames) + ".mp4"), frames, width=64, height=64)
run(33)
for frames in (33, 161):
    print(peak(frames))
"""


def test_memory_does_not_grow_with_the_frames(tmp_path):
    """33 and 161 frames in a process of its own; 161 as one float batch would be 30 MiB.

    The encoder looks further ahead than 33 frames, which is memory too.
    """
    here = Path(__file__).resolve().parent.parent
    code = GROWTH.format(tests=str(here), tools=str(here.parent / "tools"), folder=str(tmp_path))
    # Else the C library keeps freed memory for later, more of it the longer a process runs.
    give_back = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **give_back},
    )
    short, long = (int(line) / 2**20 for line in done.stdout.splitlines()[-2:])
    assert long - short < 10, f"{short:.0f} MiB for 33 frames, {long:.0f} MiB for 161"

"""Real MP4 files, rendered."""

import av
import numpy as np


def picture(time, width, height, seed=0):
    """One RGB frame: coloured waves that drift, other ones for another seed."""
    y, x = np.mgrid[0:height, 0:width] / 32
    turn = np.random.default_rng(seed).uniform(0, 6, 3)
    waves = [
        np.sin(x * (1 + 0.2 * c) + turn[c] + 2 * time) + np.cos(y + c * time) for c in range(3)
    ]
    return (np.stack(waves, -1) * 60 + 128).clip(0, 255).astype(np.uint8)


def render(path, frames, fps=16, width=128, height=128, seed=0, caption="drifting coloured waves"):
    """Writes an H.264 clip, and its caption beside it unless that is None."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "12"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(picture(i / fps, width, height, seed), "rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)
    return path

"""Prints what a video file holds, as one line of JSON. Run by ComfyUI's Python, which has PyAV."""

import json
import sys

import av

with av.open(sys.argv[1]) as container:
    stream = container.streams.video[0]
    frames = sum(1 for _ in container.decode(stream))
    facts = {
        "width": stream.width,
        "height": stream.height,
        "frames": frames,
        "fps": float(stream.average_rate or 0),
    }
print(json.dumps(facts))

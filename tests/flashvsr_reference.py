"""FlashVSR written down once more: functional, whole clips, nothing streamed, nothing shared.

Straight from the published code's definitions, without imports from the pack.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

# --- Frames -----------------------------------------------------------------------------------


def clip_length(frames):
    """Low-quality frames that are read for a clip of so many."""
    return next(n for n in range(25, 10**6, 8) if n % 8 == 1 and n >= frames + 4)


def upscaled(images, height, width):
    """uint8 [n, h, w, 3] -> float64 [n, 3, height, width] in [-1, 1]."""
    pictures = [np.asarray(Image.fromarray(i).resize((width, height), 3)) for i in images]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).double() / 255 * 2 - 1


def edge_padded(frames, height, width):
    rows = torch.arange(height).clamp(max=frames.shape[-2] - 1)
    cols = torch.arange(width).clamp(max=frames.shape[-1] - 1)
    return frames[..., rows, :][..., cols]


# --- Tiny Conditional decoder -------------------------------------------------------------------

TC_WIDTHS = (512, 256, 128, 128)


def tc_shapes(widths=TC_WIDTHS):
    """Shapes of the file's weights by key."""
    a, b, c, d = widths
    shapes = {
        "1.weight": (a, 784, 3, 3),
        "1.bias": (a,),
        "3.weight": (a, a, 3, 3),
        "9.conv.weight": (a, a, 1, 1),
        "10.weight": (b, a, 3, 3),
        "15.conv.weight": (2 * b, b, 1, 1),
        "16.weight": (c, b, 3, 3),
        "21.conv.weight": (2 * c, c, 1, 1),
        "22.weight": (d, c, 3, 3),
        "24.weight": (d, d, 3, 3),
        "26.weight": (3, d, 3, 3),
        "26.bias": (3,),
    }
    for width, blocks in ((a, (5, 6, 7)), (b, (11, 12, 13)), (c, (17, 18, 19))):
        for n in blocks:
            for conv in (0, 2, 4):
                inputs = 2 * width if conv == 0 else width
                shapes[f"{n}.conv.{conv}.weight"] = (width, inputs, 3, 3)
                shapes[f"{n}.conv.{conv}.bias"] = (width,)
    return {f"decoder.{key}": shape for key, shape in shapes.items()}


def tc_weights(widths, seed=0):
    """Random weights that keep activations near unit variance, so that every layer matters."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for key, shape in tc_shapes(widths).items():
        noise = torch.randn(shape, generator=generator)
        weights[key] = noise * (math.sqrt(2 / math.prod(shape[1:])) if len(shape) > 1 else 0.1)
    weights["decoder.26.weight"] *= 0.2  # pixels that mostly need no clamping
    return weights


def tc_condition(frames):
    """Low-quality frames 0 to 4 T - 4 [4 T - 3, 3, H, W] -> [T, 768, H / 8, W / 8]."""
    frames = torch.cat([frames[:1]] * 3 + [frames])
    count, _, height, width = frames.shape
    x = frames.reshape(count // 4, 4, 3, height // 8, 8, width // 8, 8)
    x = x.permute(0, 2, 1, 4, 6, 3, 5)  # time; colour, frame, row, column; place
    return x.reshape(count // 4, 768, height // 8, width // 8)


def tc_decode(weights, latents, frames):
    """The whole clip at once, in float64.

    latents [1, 16, T, h, w], normalised; frames [4 T - 3, 3, 8 h, 8 w] -> the same shape.
    """
    w = {key.removeprefix("decoder."): value.double() for key, value in weights.items()}

    def conv(x, n):
        return F.conv2d(x, w[f"{n}.weight"], w.get(f"{n}.bias"), padding=1)

    def block(x, n):
        before = torch.cat([torch.zeros_like(x[:1]), x[:-1]])
        y = conv(torch.cat([x, before], 1), f"{n}.conv.0").relu()
        return (x + conv(conv(y, f"{n}.conv.2").relu(), f"{n}.conv.4")).relu()

    def grown(x, n, times):
        x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        kernel = w[f"{n}.conv.weight"][-times * x.shape[1] :]
        parts = F.conv2d(x, kernel).chunk(times, dim=1)
        return torch.stack(parts, 1).flatten(0, 1)

    x = torch.cat([tc_condition(frames.double()), latents[0].double().transpose(0, 1)], 1)
    x = conv(conv((x / 3).tanh() * 3, 1).relu(), 3).relu()
    for n in (5, 6, 7):
        x = block(x, n)
    x = conv(grown(x, 9, 1), 10)
    for n in (11, 12, 13):
        x = block(x, n)
    x = conv(grown(x, 15, 2), 16)
    for n in (17, 18, 19):
        x = block(x, n)
    x = conv(conv(grown(x, 21, 2), 22).relu(), 24).relu()
    return (conv(x, 26) * 2 - 1)[3:]


# --- Colour -------------------------------------------------------------------------------------


def adain(frames, reference):
    """[n, 3, H, W] each, frame by frame and channel by channel."""
    out = frames.double().clone()
    for frame, wanted in zip(out, reference.double(), strict=True):
        for c in range(3):
            x, y = frame[c], wanted[c]
            deviation = (((x - x.mean()) ** 2).mean() + 1e-5).sqrt()
            target = (((y - y.mean()) ** 2).mean() + 1e-5).sqrt()
            frame[c] = (x - x.mean()) / deviation * target + y.mean()
    return out.clamp(-1, 1)


def low(x):
    kernel = torch.tensor([[1, 2, 1], [2, 4, 2], [1, 2, 1]]).double()[None, None] / 16
    for dilation in (1, 2, 4, 8, 16):
        padded = F.pad(x, (dilation,) * 4, mode="replicate")
        planes = padded.flatten(0, 1)[:, None]
        x = F.conv2d(planes, kernel, dilation=dilation).view(x.shape)
    return x


def wavelet(frames, reference):
    frames, reference = frames.double(), reference.double()
    return (frames - low(frames) + low(reference)).clamp(-1, 1)

"""Pictures with known truth: 1/f noise, like the spectrum of photographs, moved exactly."""

import torch


def pink_noise(height, width, seed=0, contrast=0.15):
    """A picture [H, W, 3] without borders whose amplitudes fall as 1/f, around a middle grey."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(3, height, width, generator=generator, dtype=torch.float64)
    y, x = _frequencies(height, width)
    f = (y.square() + x.square()).sqrt()
    amplitude = 1 / f.clamp(min=1 / max(height, width))
    amplitude[f > 0.35] = 0  # so that interpolation has something to go by
    amplitude[0, 0] = 0
    picture = torch.fft.irfft2(torch.fft.rfft2(noise) * amplitude, s=(height, width))
    picture = 0.5 + contrast * picture / picture.std()
    return picture.movedim(0, -1).float()


def moved(picture, x, y):
    """A picture without borders moved by any part of a pixel, exactly: its phases turn."""
    height, width = picture.shape[:2]
    fy, fx = _frequencies(height, width)
    turn = torch.exp(-2j * torch.pi * (fx * x + fy * y))
    spectrum = torch.fft.rfft2(picture.double().movedim(-1, 0))
    return torch.fft.irfft2(spectrum * turn, s=(height, width)).movedim(0, -1).float()


def panned(frames, height, width, speed, seed=0):
    """A video of texture that moves by `speed` (x, y) pixels per frame, and its flow."""
    picture = pink_noise(height, width, seed)
    video = torch.stack([moved(picture, speed[0] * t, speed[1] * t) for t in range(frames)])
    flow = torch.tensor(speed, dtype=torch.float32).expand(frames - 1, height, width, 2)
    return video, flow


def _frequencies(height, width):
    return torch.meshgrid(
        torch.fft.fftfreq(height, dtype=torch.float64),
        torch.fft.rfftfreq(width, dtype=torch.float64),
        indexing="ij",
    )

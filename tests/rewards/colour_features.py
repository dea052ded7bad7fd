"""Pictures, sounds and encoders so small that their features are known: what tests of distribution rewards share."""

import torch

from visalign.maths.frechet import Gaussian
from visalign.rewards.encoders import as_encoder
from visalign.rewards.exemplars import Exemplars, reference_statistics, save_exemplars
from visalign.types import Media, Prompt


def colour(media):
    """Mean colour of an image, (n, 3) in [0, 1]."""
    return torch.stack([sample.data.double().mean(dim=(1, 2)) / 255 for sample in media])


def colours(media):
    """Mean colour of every frame of a video, n arrays (frames, 3)."""
    return [sample.data.double().mean(dim=(2, 3)).numpy() / 255 for sample in media]


class Plane:
    """The first sample of a waveform's channels as a feature; what an encoder object of one's own looks like."""

    name, hash, modality = "plane", "0123456789abcdef", frozenset({"audio"})

    def encode(self, media):
        return [sample.data[:, :1].T.double() for sample in media]


def images(n, seed=0, size=8):
    generator = torch.Generator().manual_seed(seed)
    base = torch.randint(0, 256, (n, 3, 1, 1), generator=generator)
    return [Media("image", one) for one in base.expand(n, 3, size, size).to(torch.uint8)]


def audio(points):
    return [Media("audio", torch.tensor(point, dtype=torch.float32)[:, None].repeat(1, 4), rate=8000) for point in points]


def prompts(n):
    return [Prompt(f"prompt {i}") for i in range(n)]


def save_reference(folder, n=60, seed=1, **settings):
    """Statistics of n random images under ``colour``, as a file."""
    path = folder / "reference.safetensors"
    save_exemplars(reference_statistics(images(n, seed=seed), as_encoder(colour), **settings), path)
    return path


def save_standard(folder):
    """N(0, 1) for the encoder ``Plane``, as a file."""
    path = folder / "standard.safetensors"
    gaussian = Gaussian(torch.zeros(1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64))
    save_exemplars(Exemplars(gaussian, 100, 100, "sample", Plane.name, Plane.hash), path)
    return path

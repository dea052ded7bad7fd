"""A learned reward of latents: a noise-aware head asked at one noise level, without decoding anything.

    r(x0, c) = scale head(alpha x0 + sigma noise, alpha, sigma, c) + bias        sigma = level, alpha = 1 - level

Every sample gets the same noise, drawn once from a fixed seed, so that equal latents have equal scores and siblings differ by what they
are. ``visalign.samplers.reward_head.fit_reward_head`` trains a head and ``RewardHead.save`` writes its file.
Source of the protocol (clean latents, level 0.4, fixed noise): DiNa-LRM, github.com/HKUST-C4G/diffusion-rm.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from visalign.nn.reward_head import RewardHead
from visalign.protocols import RewardSpec
from visalign.types import Media, Prompt, Scores

ANY = "any"


class LatentHead:
    """Scores latents by a ``RewardHead`` file."""

    spec = RewardSpec(name="latent_head", modality=frozenset({"latent"}))

    def __init__(self, head: str | Path, level: float = 0.4, seed: int = 0, scale: float = 1.0, bias: float = 0.0,
                 convention: str | None = None, device: str = "cpu", batch_size: int = 64, name: str = "latent_head") -> None:
        """
        Args:
            head: the head's .safetensors file.
            level: the noise level it is asked at, 0 (clean) to just below 1.
            seed: of the noise.
            scale, bias: affine map of what the head says.
            convention: which latents it reads, where the file does not say; "any" does not check.
            device: where the head computes.
            batch_size: samples per forward pass.
            name: key of its logs.
        Raises:
            ValueError: a number out of range, a file that is no head, or nobody says which latents it reads.
        """
        if not 0 <= level < 1:
            raise ValueError(f"{name}: level {level} must lie in [0, 1); 0.4 is usual, 1 would be noise alone")
        if batch_size < 1:
            raise ValueError(f"{name}: batch_size {batch_size} must be at least 1")
        file = Path(head).expanduser()
        self.head = RewardHead.load(file).to(device)
        known = self.head.convention or convention
        if not known:
            raise ValueError(f"{name}: {head} does not say which latents it was trained on, and latents of another autoencoder or scale "
                             "would be scored without an error; set convention to that of the run (it is named in the error for a wrong "
                             "one), or to 'any'")
        if convention not in (None, ANY, known):
            raise ValueError(f"{name}: {head} was trained on latents '{known}', not '{convention}'; leave convention out")
        self.level, self.scale, self.bias = level, scale, bias
        self.device, self.batch_size = torch.device(device), batch_size
        noise = torch.randn(self.head.latent_shape, generator=torch.Generator().manual_seed(seed))
        self._noise = noise.to(self.device)
        self.spec = replace(
            self.spec, name=name, requires=frozenset({"prompt_embeds"} if self.head.prompt_dim else ()),
            model_ids=(str(head),), convention="" if ANY in (known, convention) else known,
            version=f"{hashlib.sha256(file.read_bytes()).hexdigest()[:12]}-level-{level}-seed-{seed}-{scale}x+{bias}")

    @torch.no_grad()
    def score(self, media: Sequence[Media], prompts: Sequence[Prompt], group_id: Sequence[int]) -> Scores:
        """One score per latent, "nonfinite" where the head gave no number.

        Raises:
            ValueError: latents or embeddings of another shape than the head's.
        """
        values: list[float | None] = []
        for start in range(0, len(media), self.batch_size):
            part = media[start:start + self.batch_size]
            values += (self.scale * self._ask(part) + self.bias).tolist()
        return Scores.from_values(values)

    def _ask(self, part: Sequence[Media]) -> Tensor:
        shapes = {tuple(sample.data.shape) for sample in part}
        if shapes != {self.head.latent_shape}:
            raise ValueError(f"{self.spec.name}: this head takes latents {self.head.latent_shape}, got {sorted(shapes)}; use the size it "
                             "was trained at")
        latents = torch.stack([sample.data for sample in part]).to(self.device)
        sigma = torch.full((len(part),), self.level, device=self.device)
        prompt = None
        if self.head.prompt_dim:
            prompt = torch.stack([sample.prompt_embeds for sample in part if sample.prompt_embeds is not None]).to(self.device)
        return self.head((1 - self.level) * latents + self.level * self._noise, 1 - sigma, sigma, prompt).float().cpu()

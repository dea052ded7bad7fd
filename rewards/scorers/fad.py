"""Fréchet audio distance of every single clip to a background, by an encoder of ``fadtk`` 1.1.0.

A clip's frames make a Gaussian of low rank unless they outnumber the encoder's dimensions: an outlier score, meant for encoders of few
dimensions (vggish, encodec-emb: 128). Distances of whole sets are ``frechet_distance``. The package would write folders beside the
data and switch gradients off for the whole process; only its encoders are used here. Source: FAD, arXiv:1812.08466.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from visalign.maths.frechet import Gaussian, Moments, frechet_distance
from visalign.protocols import RewardSpec
from visalign.rewards.scorers.upstream import upstream
from visalign.types import Media, Prompt, Scores

# Encoders of 128 dimensions, by fadtk's names: its class and what it is made with. Its own list of all would fetch weights to be made.
ENCODERS = {"vggish": ("VGGishModel", {}), "encodec-emb": ("EncodecEmbModel", {"variant": "24k"}),
            "encodec-emb-48k": ("EncodecEmbModel", {"variant": "48k"})}


class ClipFAD:
    """Distance of each clip's frames to the background's; smaller is better."""

    def __init__(self, background: str = "fma_pop", encoder: str = "vggish") -> None:
        """
        Args:
            background: a statistics file (.npz) of fadtk, or the name of one that it ships.
            encoder: "vggish", "encodec-emb" or "encodec-emb-48k".
        Raises:
            ValueError: an unknown encoder, or no statistics of it.
        """
        if encoder not in ENCODERS:
            raise ValueError(f"encoder '{encoder}' is none of {', '.join(ENCODERS)}: a clip has too few frames for more dimensions")
        kind, options = ENCODERS[encoder]
        shipped = Path(upstream("fadtk", "fadtk").__file__).parent / "stats" / f"{background}.npz"
        self.background = read_background(shipped if shipped.is_file() else Path(background), encoder)
        self.encoder: Any = getattr(upstream("fadtk.model_loader", "fadtk"), kind)(**options)
        self.encoder.load_model()
        self.resample: Any = upstream("torchaudio.functional", "fadtk").resample
        self.spec = RewardSpec(name="fad", modality=frozenset({"audio"}), direction=-1, raw_range=(0.0, float("inf")),
                               model_ids=(encoder, background), version="1.1.0")

    @torch.no_grad()
    def score(self, media: Sequence[Media], prompts: Sequence[Prompt], group_id: Sequence[int]) -> Scores:
        """One distance per clip; ``frames`` says how many it is made of. A clip of a single frame has no covariance and no score."""
        rows = [self._embed(sample) for sample in media]
        values = [clip_distance(frames, self.background) for frames in rows]
        return Scores.from_values(values, direction=-1, reason="too short",
                                  details={"frames": torch.tensor([float(len(frames)) for frames in rows])})

    def _embed(self, sample: Media) -> Tensor:
        """Features of the clip's frames (n, 128), without the 16-bit file and the half precision between which fadtk keeps them."""
        mono = self.resample(sample.data.mean(dim=0), round(sample.rate or 0), self.encoder.sr).clamp(-1, 1)
        if self.encoder.name == "vggish":
            return torch.as_tensor(self.encoder._get_embedding(self.encoder.enforce_min_len(mono.numpy()))).detach().cpu().double()
        channels = mono.expand(1, self.encoder.model.channels, -1).to(self.encoder.device)
        return torch.as_tensor(self.encoder._get_embedding(channels)).detach().cpu().double()


def clip_distance(frames: Tensor, background: Gaussian) -> float | None:
    """Fréchet distance of frames (n, d) to the background; ``None`` for fewer than two."""
    return frechet_distance(Moments.of(frames).gaussian(), background) if len(frames) > 1 else None


def read_background(path: Path, encoder: str) -> Gaussian:
    """Mean and covariance of an encoder's frames, as fadtk stores them.

    Raises:
        ValueError: there is no such file, or it has none of this encoder.
    """
    if not path.is_file():
        raise ValueError(f"background '{path}': no such file; give statistics that fadtk has written, or fma_pop")
    with np.load(path, allow_pickle=False) as stored:
        if f"{encoder}.mu" not in stored:
            raise ValueError(f"{path} has no statistics of '{encoder}'; it has {', '.join(sorted({n.rpartition('.')[0] for n in stored}))}")
        return Gaussian(torch.as_tensor(stored[f"{encoder}.mu"]).double(), torch.as_tensor(stored[f"{encoder}.cov"]).double())

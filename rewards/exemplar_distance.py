"""One sample against exemplars: per-song FAD and its relatives.

Source: FAD of single songs, arXiv:2311.01616; DRAGON, arXiv:2504.15217.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from visalign.maths.frechet import Gaussian, Moments, frechet_distance, mahalanobis, point_distances
from visalign.protocols import ALL_MEDIA, RewardSpec
from visalign.rewards.encoders import as_encoder
from visalign.rewards.exemplars import Exemplars, load_exemplars
from visalign.types import Media, MediaKind, Prompt, Scores


class ExemplarDistance:
    """Distance of one sample from the exemplars' Gaussian N(mu, C); raw is the distance, smaller is better.

        "frechet"        FD(N(m, S), N(mu, C)) with mean m and covariance S of the sample's own frames or windows (per-song FAD);
                         a sample of one frame, such as an image, has S = 0:  |x - mu|^2 + tr C
        "mahalanobis"    mean over frames of (x - mu)^T C^{-1} (x - mu), minus twice the log-density without its constant
    """

    spec = RewardSpec(name="exemplar_distance", modality=ALL_MEDIA, direction=-1, raw_range=(0.0, float("inf")))

    def __init__(self, encoder: Any, reference: str | Path, *, distance: Literal["frechet", "mahalanobis"] = "frechet",
                 shrinkage: float = 0.0, modality: Sequence[MediaKind] | None = None, name: str = "exemplar_distance") -> None:
        """
        Args:
            encoder, modality: as for ``FrechetDistance``.
            reference: a folder of media, or statistics of *frames* made with the same encoder.
            shrinkage: added to the diagonal of both covariances, S and C, where a sample has several frames, and to C for
                "mahalanobis".
        Raises:
            ValueError: the reference is missing or was made otherwise, or C is singular and ``distance`` is "mahalanobis".
        """
        if distance not in ("frechet", "mahalanobis"):
            raise ValueError(f"distance '{distance}' is neither 'frechet' nor 'mahalanobis'")
        self.encoder = as_encoder(encoder, modality)
        self.exemplars: Exemplars = load_exemplars(reference, self.encoder, "frame")
        self.reference: Gaussian = self.exemplars.gaussian.shrunk(shrinkage)
        if distance == "mahalanobis":
            mahalanobis(self.reference.mean[None], self.reference)  # refuse a singular covariance now
        self.distance = distance
        self.shrinkage = shrinkage
        self.spec = RewardSpec(name=name, modality=self.encoder.modality, direction=-1, raw_range=(0.0, float("inf")),
                               model_ids=(self.encoder.name,), version=f"{distance}-{self.encoder.hash[:12]}")

    def score(self, media: Sequence[Media], prompts: Sequence[Prompt], group_id: Sequence[int]) -> Scores:
        """One distance per sample; features that are not finite make it invalid."""
        return Scores.from_values([self._distance(rows) for rows in self.encoder.encode(media)], direction=-1)

    def _distance(self, rows: Tensor) -> float:
        if not bool(torch.isfinite(rows).all()):
            return float("nan")
        if self.distance == "mahalanobis":
            return float(mahalanobis(rows, self.reference).mean())
        if len(rows) == 1:
            return float(point_distances(rows, self.exemplars.gaussian)[0])
        return frechet_distance(Moments.of(rows).gaussian(self.shrinkage), self.reference)

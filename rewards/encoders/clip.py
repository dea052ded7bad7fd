"""The image tower of a ``ClipScore`` as an encoder, with the score's own preprocessing."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from visalign.rewards.clip import ClipScore
from visalign.rewards.encoders import ImageEncoder
from visalign.rewards.weights import weights_hash


class ClipEncoder(ImageEncoder):
    """Unit image embeddings; a video gives one row per frame the score looks at."""

    def __init__(self, clip: ClipScore) -> None:
        super().__init__(clip.video_frames)
        self.clip = clip
        self.name = "clip:" + ":".join(clip.spec.model_ids)
        tower = clip.model.visual
        self.hash = weights_hash(f"{sorted(tower.preprocess_cfg.items())} {clip.video_frames}", tower.state_dict())

    def encode_images(self, images: Sequence[Tensor]) -> Tensor:
        return self.clip.encoder.images(images)

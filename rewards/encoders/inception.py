"""Inception v3 as FID and KID are defined on it, through torch-fidelity.

2048 numbers per image from the last pooling layer of the network converted from TensorFlow, after the original's own bilinear resize to
299 x 299; uint8 in. Weights are a file of yours and are never downloaded: torch-fidelity publishes them as
``weights-inception-2015-12-05-6726825d.pth`` with its release v0.2.0. (Its wheel also installs a package named ``tests``, which hides
folders of that name without an ``__init__.py``.)

Source: FID, arXiv:1706.08500; torch-fidelity's extractor agrees with the TensorFlow original to its last digits.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visalign.rewards.dual_encoder import default_device
from visalign.rewards.encoders import ImageEncoder, by_shape
from visalign.rewards.weights import read_tensors, weights_hash

WEIGHTS = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"


class InceptionEncoder(ImageEncoder):
    """2048 features per image."""

    def __init__(self, weights: str, *, video_frames: int = 0, batch_size: int = 32, device: str | torch.device | None = None) -> None:
        """
        Args:
            weights: the extractor's state dict, a torch checkpoint of tensors or safetensors.
            video_frames: 0 refuses video; k encodes k evenly spaced frames.
            batch_size: images per forward pass.
            device: ``None`` takes the process's current CUDA device, or the CPU where there is none.
        Raises:
            ValueError: no such file, other tensors in it, or no torch-fidelity.
        """
        super().__init__(video_frames)
        self.name = "inception"
        path = Path(weights).expanduser()
        if not path.is_file():
            raise ValueError(f"encoder inception: no weights at {path}; nothing is downloaded for you, get {WEIGHTS} and give its path")
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError:
            raise ValueError("encoder inception needs torch-fidelity: pip install 'visalign[distributional]'") from None
        tensors, buffer = read_tensors(path), io.BytesIO()
        # The extractor unpickles whatever it is given, so it gets tensors that were read without that.
        torch.save(tensors, buffer)
        buffer.seek(0)
        try:
            self.model: Any = FeatureExtractorInceptionV3("inception-v3", ["2048"], buffer)
        except RuntimeError as error:
            raise ValueError(f"{path} holds no weights of torch-fidelity's Inception v3 ({str(error).splitlines()[0]}); get "
                             f"{WEIGHTS}") from error
        self.batch_size, self.device = batch_size, default_device(device)
        self.model.to(self.device)
        self.hash = weights_hash(f"torch-fidelity inception 2048 {video_frames}", self.model.state_dict())

    @torch.no_grad()
    def encode_images(self, images: Sequence[Tensor]) -> Tensor:
        return torch.stack(by_shape(images, self.batch_size, self._features))

    def _features(self, images: Tensor) -> Tensor:
        with torch.autocast(self.device.type, enabled=False):
            return self.model(images.to(self.device))[0]

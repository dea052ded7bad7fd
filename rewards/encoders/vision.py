"""Any image model of transformers as an encoder, by its path: DINOv2, ViT, the image tower of CLIP or SigLIP, ResNet, Swin, ...

    cls       the class token of the last layer
    mean      the mean of the last layer's patch tokens or positions, without class and register tokens
    pooled    the model's own ``pooler_output``: for CLIP the normalised class token before its projection

Images go through the model's own processor. It is given uint8 and must divide by 255 once; whether it does is checked when the encoder
is made, because a processor saved with ``do_rescale: false``, or floats in [0, 1] that are rescaled again, give plausible features of
nearly black pictures and no warning.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoImageProcessor

from visalign.rewards.dual_encoder import default_device
from visalign.rewards.encoders import ImageEncoder, by_shape
from visalign.rewards.encoders.pretrained import load_model
from visalign.rewards.pretrained import pretrained
from visalign.rewards.weights import weights_hash

Pooling = Literal["cls", "mean", "pooled"]


class VisionEncoder(ImageEncoder):
    """One feature per image, float32 inside, from any image model with a processor."""

    def __init__(self, path: str, pooling: Pooling = "pooled", *, video_frames: int = 0, batch_size: int = 32,
                 device: str | torch.device | None = None, cache_dir: str | None = None) -> None:
        """
        Args:
            path: a folder with weights and ``preprocessor_config.json``, or a hub id.
            pooling: see the module.
            video_frames: 0 refuses video; k encodes k evenly spaced frames.
            batch_size: images per forward pass.
            device: ``None`` takes the process's current CUDA device, or the CPU where there is none.
        Raises:
            ValueError: the model lacks what the pooling takes or weights for it, or its processor scales pictures otherwise.
        """
        super().__init__(video_frames)
        if pooling not in ("cls", "mean", "pooled"):
            raise ValueError(f"pooling '{pooling}' is neither 'cls', 'mean' nor 'pooled'")
        self.name = f"hf:{path}:{pooling}"
        self.pooling, self.batch_size, self.device = pooling, batch_size, default_device(device)
        # Everything but pooled features does without a pooler; texts are never read.
        unused = ("text_model.", "text_projection.", "logit_", "visual_projection.", *(() if pooling == "pooled" else ("pooler.",)))
        model = load_model(path, unused=unused, cache_dir=cache_dir)
        self.model: Any = (model.vision_model if hasattr(model.config, "vision_config") else model).to(self.device)
        self.processor: Any = pretrained(AutoImageProcessor, path, owner="encoder", cache_dir=cache_dir)
        self._check_scale()
        self.encode_images([torch.full((3, 64, 64), 128, dtype=torch.uint8)])  # refuse a pooling that the model does not have now
        declared = f"{type(self.model).__name__} {pooling} {video_frames} {type(self.processor).__name__} {self.processor.to_json_string()}"
        self.hash = weights_hash(declared, self.model.state_dict())

    @torch.no_grad()
    def encode_images(self, images: Sequence[Tensor]) -> Tensor:
        return torch.stack(by_shape([self._pixels(image) for image in images], self.batch_size, self._pool))

    def _pixels(self, image: Tensor) -> Tensor:
        """What the model is fed for one uint8 image (3, H, W)."""
        return self.processor(images=image.cpu().numpy(), input_data_format="channels_first", return_tensors="pt")["pixel_values"][0]

    def _pool(self, pixels: Tensor) -> Tensor:
        with torch.autocast(self.device.type, enabled=False):
            out = self.model(pixel_values=pixels.float().to(self.device))
        tokens = out.last_hidden_state
        if self.pooling == "pooled":
            if getattr(out, "pooler_output", None) is None:
                raise ValueError(f"{self.name}: {type(self.model).__name__} has no pooled output; use pooling: mean or cls")
            return out.pooler_output.flatten(1)
        if tokens.dim() == 4:  # a convolutional network's (n, d, h, w)
            tokens = tokens.flatten(2).transpose(1, 2)
            num_prefix = 0
        else:
            num_prefix = self._num_prefix(tokens.shape[1], pixels.shape[-2:])
        if self.pooling == "mean":
            return tokens[:, num_prefix:].mean(dim=1)
        if num_prefix == 0:
            raise ValueError(f"{self.name}: {type(self.model).__name__} has no class token; use pooling: mean or pooled")
        return tokens[:, 0]

    def _num_prefix(self, num_tokens: int, size: Sequence[int]) -> int:
        """Class and register tokens before the patches; 0 for models that merge patches and have none."""
        patch = getattr(self.model.config, "patch_size", None)
        if patch is None:
            raise ValueError(f"{self.name}: the configuration of {type(self.model).__name__} has no patch_size to tell class tokens from "
                             "patches by; use pooling: pooled")
        height, width = (patch, patch) if isinstance(patch, int) else patch
        return max(num_tokens - (size[0] // height) * (size[1] // width), 0)

    def _check_scale(self) -> None:
        """
        Raises:
            ValueError: white minus black is not 1 before the division by ``image_std``.
        """
        white, black = (self._pixels(torch.full((3, 64, 64), value, dtype=torch.uint8)).double() for value in (255, 0))
        std = torch.tensor(self.processor.image_std if self.processor.do_normalize else [1.0, 1.0, 1.0], dtype=torch.float64)
        span = (white - black).amax(dim=(1, 2)) * std
        if not bool(((span - 1).abs() < 0.02).all()):
            told = ", ".join(f"{value:.4g}" for value in span.tolist())
            raise ValueError(f"{self.name}: from black to white its processor goes over {told} "
                             "before it divides by image_std; expected 1 each. Set do_rescale: true and rescale_factor: 1/255 in "
                             "preprocessor_config.json")

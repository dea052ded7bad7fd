"""Image and text embeddings of one CLIP-like model: the part that CLIP score, PickScore, HPS and their relatives share.

Media go through the model's own preprocessing on PIL images; tensors go through the same steps differentiably. What is missing there is
PIL's rounding to 8 bits after the resize, which moves cosines by less than 1e-3 (2e-3 on hard edges), and not at all where no resize is
needed.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from open_clip.transform import PreprocessCfg, ResizeKeepRatio, image_transform_v2
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize
from torchvision.transforms.functional import resize

from visalign.types import Prompt

logger = logging.getLogger(__name__)


class Tokenizer(Protocol):
    """Texts to token ids, int64 (n, context_length), cut where they are longer."""

    context_length: int

    def __call__(self, texts: list[str], context_length: int | None = None) -> Tensor: ...


class Preprocessing:
    """Images to the normalised pixels a network takes: on PIL images, and the same steps on tensors."""

    def __init__(self, config: PreprocessCfg, name: str) -> None:
        """
        Args:
            config: size, resize mode, interpolation, mean and std.
            name: of the reward it works for, in errors.
        """
        self.name = name
        self.of_pil = image_transform_v2(config, is_train=False)
        # On tensors the padding colour is a fraction of 1 instead of 255.
        self._tensor_steps = image_transform_v2(
            replace(config, fill_color=config.fill_color / 255), is_train=False).transforms  # type: ignore[arg-type]

    def of_image(self, image: Tensor) -> Tensor:
        """Pixels of one uint8 image (3, H, W), through PIL."""
        return self.of_pil(Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy()))

    def of_pixels(self, images: Tensor) -> Tensor:
        """Pixels with gradients to the images, float (B, 3, H, W) in [0, 1].

        Raises:
            ValueError: not of that shape or type.
        """
        if images.dim() != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(f"{self.name}: media are {images.dtype} {tuple(images.shape)}; expected float (B, 3, H, W) in [0, 1]")
        pixels = images.float()
        *geometry, normalise = self._tensor_steps
        for step in geometry:
            pixels = _resize_keep_ratio(pixels, step) if isinstance(step, ResizeKeepRatio) else step(pixels)
        # Bicubic overshoots at edges; PIL clips there, so does this path.
        return normalise(pixels.clamp(0, 1))


class DualEncoder:
    """Unit embeddings, float32 even inside a caller's autocast. Weights are frozen; gradients reach pixels, and adapters in ``model``.

    Attributes:
        model, tokenizer, preprocess: as given.
        device: where embeddings come from.
    """

    def __init__(self, model: Any, tokenizer: Any, preprocess: PreprocessCfg, *, name: str, batch_size: int = 64,
                 device: str | torch.device | None = None) -> None:
        """
        Args:
            model: a module with ``encode_image(pixels)`` and ``encode_text(tokens)``, embeddings of any length.
            tokenizer: see ``Tokenizer``; used by ``texts`` alone.
            preprocess: size, resize mode, interpolation, mean and std.
            name: of the reward it works for, in log messages and errors.
            batch_size: images per forward pass; does not change the embeddings.
            device: ``None`` takes the process's current CUDA device, or the CPU where there is none.
        Raises:
            ValueError: the tokenizer turns different texts into the same tokens.
        """
        self.device = default_device(device)
        self.model = model.to(self.device).requires_grad_(False).eval()
        self.tokenizer = tokenizer
        self.name = name
        self.batch_size = batch_size
        _check_tokenizer(tokenizer, name)
        self.preprocess = preprocess
        self.preprocessing = Preprocessing(preprocess, name)
        self._warned = False

    @torch.no_grad()
    def images(self, images: Sequence[Tensor]) -> Tensor:
        """Embeddings of uint8 images (3, H, W) of any sizes, on the encoder's device, (n, d)."""
        return self.embed_images(images)

    def embed_images(self, images: Sequence[Tensor]) -> Tensor:
        """``images`` with gradients to an adapter in the network."""
        return torch.cat([self.embed(torch.stack([self.preprocessing.of_image(image) for image in images[i:i + self.batch_size]]))
                          for i in range(0, len(images), self.batch_size)])

    def pixels(self, images: Tensor) -> Tensor:
        """Embeddings with gradients to the images, float (B, 3, H, W) in [0, 1]; (B, d).

        Raises:
            ValueError: not of that shape or type.
        """
        return self.embed(self.preprocessing.of_pixels(images))

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Embeddings of the texts, one row each, every distinct text encoded once, (n, d)."""
        return self.embed_texts(texts)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """``texts`` with gradients to an adapter in the network."""
        row = {text: index for index, text in enumerate(dict.fromkeys(texts))}
        self._warn_truncation(list(row))
        with torch.autocast(self.device.type, enabled=False):
            distinct = normalize(self.model.encode_text(self.tokenizer(list(row)).to(self.device)), dim=-1)
        return distinct[torch.tensor([row[text] for text in texts], device=self.device)]

    def cosines(self, images: Sequence[Tensor], prompts: Sequence[Prompt]) -> Tensor:
        """Cosine of each uint8 image with its own prompt, on the CPU, (n,)."""
        return (self.images(images) * self.texts([prompt.text for prompt in prompts])).sum(dim=-1).cpu()

    def cosines_of_pixels(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """``cosines`` with gradients to the images, float (B, 3, H, W) in [0, 1]; (B,)."""
        return (self.pixels(images) * self.texts([prompt.text for prompt in prompts])).sum(dim=-1)

    def embed(self, pixels: Tensor) -> Tensor:
        """Embeddings of preprocessed, normalised pixels."""
        with torch.autocast(self.device.type, enabled=False):
            return normalize(self.model.encode_image(pixels.to(self.device)), dim=-1)

    def _warn_truncation(self, texts: list[str]) -> None:
        """Long texts are cut silently; say so once."""
        if self._warned:
            return
        limit = self.tokenizer.context_length
        kept, full = self.tokenizer(texts), self.tokenizer(texts, context_length=16 * limit)
        # A truncated text ends in a forced end-of-text token where the full one goes on.
        num_cut = int((kept != full[:, :limit]).any(dim=-1).sum())
        if num_cut:
            self._warned = True
            logger.warning("%s: %d of %d distinct prompts exceed the model's %d tokens; what comes after is ignored",
                           self.name, num_cut, len(texts), limit)


def default_device(device: str | torch.device | None) -> torch.device:
    """``device``, or the process's current CUDA device, or the CPU where there is none."""
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _resize_keep_ratio(pixels: Tensor, step: ResizeKeepRatio) -> Tensor:
    """open_clip's ``ResizeKeepRatio``, which reads PIL sizes only, for tensors."""
    ratios = [side / target for side, target in zip(pixels.shape[-2:], step.size, strict=True)]
    ratio = max(ratios) * step.longest + min(ratios) * (1 - step.longest)
    return resize(pixels, [round(side / ratio) for side in pixels.shape[-2:]], step.interpolation, antialias=True)


def _check_tokenizer(tokenizer: Any, name: str) -> None:
    """An offline tokenizer may load without its vocabulary (2 to 5 entries, no error) and map every text to the same tokens."""
    size = tokenizer.vocab_size if hasattr(tokenizer, "vocab_size") else len(tokenizer.tokenizer)
    probes = tokenizer(["a red circle", "two blue squares"])
    if size < 32 or bool((probes[0] == probes[1]).all()):
        raise ValueError(f"the tokenizer of '{name}' is empty ({size} entries): its files were not found; put the vocabulary "
                         "files beside the weights or connect to the hub once")

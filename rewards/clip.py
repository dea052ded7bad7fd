"""CLIP score: cosine of image and text embedding, from any open_clip model.

    raw = <image / |image|, text / |text|>     in [-1, 1], typically 0.15 to 0.40; never multiplied by the logit scale

Source: CLIPScore, arXiv:2104.08718 (without its 2.5 max(., 0), which only flattens low scores).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import open_clip
import torch
from open_clip.transform import PreprocessCfg, ResizeKeepRatio, image_transform_v2
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize
from torchvision.transforms.functional import resize

from visalign.protocols import RewardSpec
from visalign.types import Media, Prompt, Scores

logger = logging.getLogger(__name__)


class ClipScore:
    """Prompt-image agreement of one open_clip model, in float32."""

    def __init__(self, model: str = "ViT-L-14", pretrained: str | None = "openai", *,
                 resize_mode: Literal["shortest", "longest", "squash"] | None = None, video_frames: int = 0, batch_size: int = 64,
                 device: str | torch.device | None = None, cache_dir: str | None = None, name: str = "clip") -> None:
        """
        Args:
            model: an open_clip architecture ("ViT-H-14"), a folder with ``open_clip_config.json`` and weights (its path, or
                "local-dir:PATH"), or "hf-hub:ORG/REPO".
            pretrained: weights of an architecture: an open_clip tag ("laion2b_s32b_b79k") or a checkpoint file. Folders and hub
                repositories bring their own.
            resize_mode: ``None`` keeps the model's own: most models resize the shortest side and crop the centre, which drops the
                ends of a 16:9 image; "longest" pads with black, "squash" changes the aspect.
            video_frames: 0 refuses video; k scores k evenly spaced frames and takes the mean.
            batch_size: images per forward pass; does not change the scores.
            device: ``None`` takes the process's current CUDA device, or the CPU where there is none.
        Raises:
            ValueError: no weights were named, or the tokenizer turns different texts into the same tokens.
        """
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if os.path.isdir(model):
            model = f"local-dir:{model}"
        bundled = model.startswith(("local-dir:", "hf-hub:"))
        if not bundled and not pretrained:
            raise ValueError(f"model '{model}' without pretrained would be random weights; name a tag of "
                             f"{open_clip.list_pretrained_tags_by_model(model)} or a checkpoint file")
        tag = {} if bundled or pretrained is None else open_clip.get_pretrained_cfg(model, pretrained) or {}
        # A tag trained with QuickGELU loads into a plain GELU architecture with no more than a warning, and scores differ.
        self.model = open_clip.create_model(
            model, pretrained=None if bundled else pretrained, precision="fp32", device=self.device, cache_dir=cache_dir,
            require_pretrained=True, force_quick_gelu=bool(tag.get("quick_gelu", False)),
            force_preprocess_cfg={"resize_mode": resize_mode} if resize_mode else None)
        self.model.requires_grad_(False).eval()
        self.tokenizer: Any = open_clip.get_tokenizer(model, cache_dir=cache_dir)
        _check_tokenizer(self.tokenizer, model)

        config = PreprocessCfg(**self.model.visual.preprocess_cfg)
        self.preprocess = image_transform_v2(config, is_train=False)
        # The same steps on tensors, whose padding colour is a fraction of 1 instead of 255.
        self._tensor_steps = image_transform_v2(replace(config, fill_color=config.fill_color / 255), is_train=False).transforms  # type: ignore[arg-type]
        self.batch_size = batch_size
        self.video_frames = video_frames
        self._warned = False
        self.spec = RewardSpec(
            name=name, modality=frozenset({"image", "video"} if video_frames else {"image"}), requires=frozenset({"prompt"}),
            differentiable=True, raw_range=(-1.0, 1.0), model_ids=(model,) if bundled else (model, str(pretrained)),
            version=f"{config.resize_mode}-{config.interpolation}")

    @torch.no_grad()
    def score(self, media: Sequence[Media], prompts: Sequence[Prompt], group_id: Sequence[int]) -> Scores:
        """Cosine of each sample with its own prompt; each distinct prompt is encoded once."""
        frames = [_frames(sample, self.video_frames) for sample in media]
        pixels = [self.preprocess(Image.fromarray(frame.permute(1, 2, 0).contiguous().cpu().numpy()))
                  for sample in frames for frame in sample]
        image = torch.cat([self._encode_image(torch.stack(pixels[i:i + self.batch_size]))
                           for i in range(0, len(pixels), self.batch_size)])
        counts = torch.tensor([len(sample) for sample in frames])
        text = self._encode_text(prompts).repeat_interleave(counts.to(self.device), dim=0)
        cosines = (image * text).sum(dim=-1).cpu().split(counts.tolist())
        return Scores.from_values([cosine.mean().item() for cosine in cosines])

    def score_tensor(self, media: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Raw scores with gradients to the pixels, float32 (B,): ``protocols.DifferentiableReward``.

        The same preprocessing on tensors, with antialiased resizing and PIL's clamping. What is missing is PIL's rounding to 8 bits after
        the resize, which moves scores by less than 1e-3 (2e-3 on hard edges), and not at all where no resize is needed.

        Args:
            media: images, float (B, 3, H, W), or with ``video_frames`` video, float (B, frames, 3, H, W), in [0, 1].
        Raises:
            ValueError: not of that shape or type, or video without ``video_frames``.
        """
        wanted = "(B, 3, H, W)" + (" or (B, frames, 3, H, W)" if self.video_frames else "")
        if media.dim() not in ((4, 5) if self.video_frames else (4,)) or media.shape[-3] != 3 or not media.is_floating_point():
            raise ValueError(f"media are {media.dtype} {tuple(media.shape)}; expected float {wanted} in [0, 1]")
        if media.dim() == 5:
            frames = media[:, _evenly_spaced(media.shape[1], self.video_frames)]
            repeated = [prompt for prompt in prompts for _ in range(frames.shape[1])]
            return self.score_tensor(frames.flatten(0, 1), repeated).unflatten(0, frames.shape[:2]).mean(dim=1)
        pixels = media.float()
        *geometry, normalise = self._tensor_steps
        for step in geometry:
            pixels = _resize_keep_ratio(pixels, step) if isinstance(step, ResizeKeepRatio) else step(pixels)
        # Bicubic overshoots at edges; PIL clips there, so does this path.
        image = self._encode_image(normalise(pixels.clamp(0, 1)))
        with torch.no_grad():
            text = self._encode_text(prompts)
        return (image * text).sum(dim=-1)

    def _encode_image(self, pixels: Tensor) -> Tensor:
        """Unit embeddings of normalised pixels; float32 even inside a caller's autocast."""
        with torch.autocast(self.device.type, enabled=False):
            return normalize(self.model.encode_image(pixels.to(self.device)), dim=-1)

    def _encode_text(self, prompts: Sequence[Prompt]) -> Tensor:
        """Unit embeddings of the prompts, one row per prompt, each distinct text encoded once."""
        row = {text: index for index, text in enumerate(dict.fromkeys(prompt.text for prompt in prompts))}
        self._warn_truncation(list(row))
        with torch.autocast(self.device.type, enabled=False):
            distinct = normalize(self.model.encode_text(self.tokenizer(list(row)).to(self.device)), dim=-1)
        return distinct[torch.tensor([row[prompt.text] for prompt in prompts], device=self.device)]

    def _warn_truncation(self, texts: Sequence[str]) -> None:
        """open_clip cuts long texts silently; say so once."""
        if self._warned:
            return
        limit = self.tokenizer.context_length
        kept, full = self.tokenizer(texts), self.tokenizer(texts, context_length=16 * limit)
        # A truncated text ends in a forced end-of-text token where the full one goes on.
        num_cut = int((kept != full[:, :limit]).any(dim=-1).sum())
        if num_cut:
            self._warned = True
            logger.warning("%s: %d of %d distinct prompts exceed the model's %d tokens; what comes after is ignored",
                           self.spec.name, num_cut, len(texts), limit)


def _frames(sample: Media, num_frames: int) -> Tensor:
    """The frames to score, uint8 (k, 3, H, W): the image itself, or evenly spaced frames from the first to the last."""
    if sample.kind == "image":
        return sample.data[None]
    if not num_frames:
        raise ValueError("clip scores images; set video_frames=8 to score a video as the mean over 8 evenly spaced frames")
    return sample.data[_evenly_spaced(sample.data.shape[0], num_frames)]


def _evenly_spaced(length: int, num_frames: int) -> Tensor:
    """Indices of at most ``num_frames`` of ``length`` frames, the first and the last among them."""
    return torch.linspace(0, length - 1, min(num_frames, length)).round().long()


def _resize_keep_ratio(pixels: Tensor, step: ResizeKeepRatio) -> Tensor:
    """open_clip's ``ResizeKeepRatio``, which reads PIL sizes only, for tensors."""
    ratios = [side / target for side, target in zip(pixels.shape[-2:], step.size, strict=True)]
    ratio = max(ratios) * step.longest + min(ratios) * (1 - step.longest)
    return resize(pixels, [round(side / ratio) for side in pixels.shape[-2:]], step.interpolation, antialias=True)


def _check_tokenizer(tokenizer: Any, model: str) -> None:
    """An offline tokenizer may load without its vocabulary (2 to 5 entries, no error) and map every text to the same tokens."""
    size = tokenizer.vocab_size if hasattr(tokenizer, "vocab_size") else len(tokenizer.tokenizer)
    probes = tokenizer(["a red circle", "two blue squares"])
    if size < 32 or bool((probes[0] == probes[1]).all()):
        raise ValueError(f"the tokenizer of '{model}' is empty ({size} entries): its files were not found; put the vocabulary "
                         "files beside the weights or connect to the hub once")

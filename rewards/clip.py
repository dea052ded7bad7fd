"""CLIP score: cosine of image and text embedding, from any open_clip model.

    raw = <image / |image|, text / |text|>     in [-1, 1], typically 0.15 to 0.40; never multiplied by the logit scale

Source: CLIPScore, arXiv:2104.08718 (without its 2.5 max(., 0), which only flattens low scores).
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import open_clip
import torch
from open_clip.transform import PreprocessCfg
from torch import Tensor

from visalign.media import evenly_spaced
from visalign.protocols import RewardSpec
from visalign.rewards.dual_encoder import DualEncoder, default_device
from visalign.rewards.licences import licence_of
from visalign.rewards.weights import fetching, tensors_alone
from visalign.types import Media, Prompt, Scores

ResizeMode = Literal["shortest", "longest", "squash"]


def open_clip_encoder(model: str, pretrained: str | None, *, name: str, resize_mode: ResizeMode | None = None, batch_size: int = 64,
                      device: str | torch.device | None = None, cache_dir: str | None = None) -> DualEncoder:
    """Image and text encoder of an open_clip model, in float32.

    Args:
        model: an open_clip architecture ("ViT-H-14"), a folder with ``open_clip_config.json`` and weights (its path, or
            "local-dir:PATH"), or "hf-hub:ORG/REPO".
        pretrained: weights of an architecture: an open_clip tag ("laion2b_s32b_b79k") or a checkpoint file. Folders and hub
            repositories bring their own.
        name: of the reward, in log messages and errors.
        resize_mode: ``None`` keeps the model's own: most models resize the shortest side and crop the centre, which drops the
            ends of a 16:9 image; "longest" pads with black, "squash" changes the aspect.
        batch_size: images per forward pass; does not change the scores.
        device: ``None`` takes the process's current CUDA device, or the CPU where there is none.
    Raises:
        ValueError: no such model or weights, none named, the hub out of reach, or a tokenizer that turns different texts into the same
            tokens.
    """
    model, bundled = _location(model)
    owner = f"reward '{name}'"
    if not bundled:
        _check_names(model, pretrained, owner)
    device = default_device(device)
    tag = {} if bundled or pretrained is None else open_clip.get_pretrained_cfg(model, pretrained) or {}
    # A tag trained with QuickGELU loads into a plain GELU architecture with no more than a warning, and scores differ.
    location = model.partition(":")[2] if bundled else f"{model} with pretrained {pretrained}"
    command = f"hf download {location}" if bundled else "this same command"
    with fetching(owner, location, command), tensors_alone(location):
        network = open_clip.create_model(
            model, pretrained=None if bundled else pretrained, precision="fp32", device=device, cache_dir=cache_dir,
            require_pretrained=True, force_quick_gelu=bool(tag.get("quick_gelu", False)),
            force_preprocess_cfg={"resize_mode": resize_mode} if resize_mode else None)
        tokenizer = open_clip.get_tokenizer(model, cache_dir=cache_dir)
    return DualEncoder(network, tokenizer, PreprocessCfg(**network.visual.preprocess_cfg), name=name, batch_size=batch_size, device=device)


def _check_names(model: str, pretrained: str | None, owner: str) -> None:
    """Refuse an architecture, a tag or a file that open_clip does not know, before anything is fetched."""
    known = open_clip.list_models()
    if model not in known:
        close = difflib.get_close_matches(model, known, n=3)
        raise ValueError(f"{owner}: '{model}' is neither a folder nor an architecture of open_clip"
                         f"{f', did you mean {close[0]}?' if close else ''}; give a folder with open_clip_config.json and weights, "
                         "hf-hub:ORG/REPO, or an architecture such as ViT-L-14 with pretrained")
    tags = open_clip.list_pretrained_tags_by_model(model)
    if not pretrained:
        raise ValueError(f"{owner}: model '{model}' without pretrained would be random weights; name a checkpoint file or a tag: "
                         f"{', '.join(tags)}")
    if not open_clip.get_pretrained_cfg(model, pretrained) and not os.path.isfile(pretrained):
        close = difflib.get_close_matches(pretrained, tags, n=1)
        raise ValueError(f"{owner}: '{pretrained}' is neither a file nor weights that open_clip has for {model}"
                         f"{f', did you mean {close[0]}?' if close else ''}; tags: {', '.join(tags) or 'none'}")


def model_ids(model: str, pretrained: str | None) -> tuple[str, ...]:
    """What ``RewardSpec.model_ids`` says of an open_clip model."""
    model, bundled = _location(model)
    return (model,) if bundled else (model, str(pretrained))


def licence(model: str, pretrained: str | None) -> str:
    """What ``RewardSpec.licence`` says of an open_clip model's weights."""
    return licence_of(model_ids(model, pretrained)[-1])


def _location(model: str) -> tuple[str, bool]:
    """The name open_clip takes, and whether it brings its weights along."""
    model = f"local-dir:{model}" if os.path.isdir(model) else model
    return model, model.startswith(("local-dir:", "hf-hub:"))


class ClipScore:
    """Prompt-image agreement of one open_clip model, in float32."""

    spec = RewardSpec(name="clip", modality=frozenset({"image", "video"}), requires=frozenset({"prompt"}), differentiable=True,
                      raw_range=(-1.0, 1.0), model_ids=("ViT-L-14", "openai"), licence=licence_of("openai"))

    def __init__(self, model: str = "ViT-L-14", pretrained: str | None = "openai", *, resize_mode: ResizeMode | None = None,
                 video_frames: int = 0, batch_size: int = 64, device: str | torch.device | None = None,
                 cache_dir: str | None = None, name: str = "clip") -> None:
        """
        Args:
            model, pretrained, resize_mode, batch_size, device, cache_dir: see ``open_clip_encoder``.
            video_frames: 0 refuses video; k scores k evenly spaced frames and takes the mean.
        Raises:
            ValueError: no weights were named, or the tokenizer turns different texts into the same tokens.
        """
        self.encoder = open_clip_encoder(model, pretrained, name=name, resize_mode=resize_mode, batch_size=batch_size, device=device,
                                         cache_dir=cache_dir)
        self.model = self.encoder.model
        self.video_frames = video_frames
        config = PreprocessCfg(**self.model.visual.preprocess_cfg)
        self.spec = replace(
            self.spec, name=name, modality=frozenset({"image", "video"} if video_frames else {"image"}),
            model_ids=model_ids(model, pretrained), licence=licence(model, pretrained),
            version=f"{config.resize_mode}-{config.interpolation}")

    def score(self, media: Sequence[Media], prompts: Sequence[Prompt], group_id: Sequence[int]) -> Scores:
        """Cosine of each sample with its own prompt; each distinct prompt is encoded once."""
        frames = [_frames(sample, self.video_frames) for sample in media]
        counts = [len(sample) for sample in frames]
        repeated = [prompt for prompt, count in zip(prompts, counts, strict=True) for _ in range(count)]
        cosines = self.encoder.cosines([frame for sample in frames for frame in sample], repeated)
        return Scores.from_values([of_sample.mean().item() for of_sample in cosines.split(counts)])

    def score_tensor(self, media: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Raw scores with gradients to the pixels, float32 (B,): ``protocols.DifferentiableReward``.

        Args:
            media: images, float (B, 3, H, W), or with ``video_frames`` video, float (B, frames, 3, H, W), in [0, 1].
        Raises:
            ValueError: not of that shape or type, or video without ``video_frames``.
        """
        wanted = "(B, 3, H, W)" + (" or (B, frames, 3, H, W)" if self.video_frames else "")
        if media.dim() not in ((4, 5) if self.video_frames else (4,)) or media.shape[-3] != 3 or not media.is_floating_point():
            raise ValueError(f"media are {media.dtype} {tuple(media.shape)}; expected float {wanted} in [0, 1]")
        if media.dim() == 5:
            frames = media[:, evenly_spaced(media.shape[1], self.video_frames)]
            repeated = [prompt for prompt in prompts for _ in range(frames.shape[1])]
            return self.score_tensor(frames.flatten(0, 1), repeated).unflatten(0, frames.shape[:2]).mean(dim=1)
        return self.encoder.cosines_of_pixels(media, prompts)


def _frames(sample: Media, num_frames: int) -> Tensor:
    """The frames to score, uint8 (k, 3, H, W): the image itself, or evenly spaced frames from the first to the last."""
    if sample.kind == "image":
        return sample.data[None]
    if not num_frames:
        raise ValueError("clip scores images; set video_frames=8 to score a video as the mean over 8 evenly spaced frames")
    return sample.data[evenly_spaced(sample.data.shape[0], num_frames)]

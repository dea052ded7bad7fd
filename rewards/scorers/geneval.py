"""GenEval itself: its Mask2Former in mmdet 2.x, its colours by CLIP, and its verdict, all or nothing.

A request is right if of every class at least the asked number is there, the most confident of them have the asked colour, each of them
stands in the asked relation to each of its anchor's, and what is excluded is not there. Unlike ``objects`` the score is 0 or 1 and its
numbers are comparable with published ones, up to the rounding of crops. GenEval names three classes otherwise than COCO.
Source: arXiv:2310.11513.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from visalign.protocols import RewardSpec
from visalign.rewards.detector import DetectedObjects, correct
from visalign.rewards.detectors import Detection
from visalign.rewards.scorers.upstream import upstream
from visalign.types import Media, Prompt, Scores

RENAMED = {"mouse": "computer mouse", "keyboard": "computer keyboard", "remote": "tv remote"}


class MmdetDetector:
    """A detector of mmdet 2.x, which answers with a list of boxes (n, 5) per class, and of masks if it has them."""

    def __init__(self, config: str, checkpoint: str, device: str = "cuda") -> None:
        """
        Args:
            config, checkpoint: files, for GenEval those of mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco.
        """
        self._mmdet = upstream("mmdet.apis", "geneval")
        self.model: Any = self._mmdet.init_detector(config, checkpoint, device=device)
        self.labels: Sequence[str] = tuple(RENAMED.get(name, name) for name in self.model.CLASSES)
        self.model_id = checkpoint

    def __call__(self, image: Tensor, threshold: float) -> list[Detection]:
        """Objects above the threshold; the image goes in as mmdet reads files, BGR."""
        found = self._mmdet.inference_detector(self.model, image.flip(0).permute(1, 2, 0).contiguous().numpy())
        boxes, masks = found if isinstance(found, tuple) else (found, None)
        return [Detection(label, float(box[4]), (float(box[0]), float(box[1]), float(box[2]), float(box[3])),
                          None if masks is None else torch.as_tensor(masks[index][row]).bool())
                for index, label in enumerate(self.labels) for row, box in enumerate(boxes[index]) if box[4] > threshold]


class GenEval:
    """1 where the image shows all of the request, else 0."""

    def __init__(self, config: str, checkpoint: str, clip: str = "ViT-L-14", clip_pretrained: str | None = "openai",
                 device: str = "cuda") -> None:
        """
        Args:
            config, checkpoint: of the detector, see ``MmdetDetector``.
            clip, clip_pretrained: the open_clip model that names colours.
        """
        self.objects = DetectedObjects(MmdetDetector(config, checkpoint, device), clip=clip, clip_pretrained=clip_pretrained, device=device)
        self.spec = RewardSpec(name="geneval", requires=frozenset({"include"}), raw_range=(0.0, 1.0), licence="MIT",
                               model_ids=self.objects.spec.model_ids)

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Refuse requests that cannot be judged."""
        self.objects.check_prompts(prompts)

    def score(self, media: Sequence[Media], prompts: Sequence[Prompt], group_id: Sequence[int]) -> Scores:
        """One verdict per image."""
        requests = [self.objects.request(prompt) for prompt in prompts]
        return Scores.from_values([float(correct(request, self.objects.see(sample.data, request)))
                                   for sample, request in zip(media, requests, strict=True)])

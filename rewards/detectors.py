"""Object detectors of transformers behind one call: boxes or instance masks in, labelled detections out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from visalign.rewards.dual_encoder import default_device
from visalign.rewards.pretrained import pretrained, pretrained_model


@dataclass(frozen=True)
class Detection:
    """One object: ``box`` (x0, y0, x1, y1) in pixels, ``mask`` bool (H, W) where the detector gives one."""

    label: str
    score: float
    box: tuple[float, float, float, float]
    mask: Tensor | None = field(default=None, compare=False)


class SeesObjects(Protocol):
    """What sees objects in an image; ``labels`` are the classes it knows, in lower case, ``model_id`` what it was loaded from."""

    labels: Sequence[str]
    model_id: str

    def __call__(self, image: Tensor, threshold: float) -> list[Detection]:
        """Objects with at least that confidence in an image, uint8 (3, H, W)."""


class Detector:
    """A detector with boxes or with instance masks; which one, its configuration says."""

    def __init__(self, model: str, *, owner: str = "detector", device: str | torch.device | None = None,
                 cache_dir: str | None = None) -> None:
        """
        Args:
            model: folder or hub id.
            owner: whom it is for, in errors.
        Raises:
            ValueError: no such folder and the hub out of reach, no detector, or one whose checkpoint is incomplete.
        """
        from transformers import AutoConfig, AutoImageProcessor, AutoModelForObjectDetection, AutoModelForUniversalSegmentation
        from transformers.models.auto.modeling_auto import (
            MODEL_FOR_OBJECT_DETECTION_MAPPING,
            MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING,
        )

        self.model_id = model
        config = pretrained(AutoConfig, model, owner=owner, cache_dir=cache_dir)
        self.segments = type(config) in MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING and type(config) not in MODEL_FOR_OBJECT_DETECTION_MAPPING
        if not self.segments and type(config) not in MODEL_FOR_OBJECT_DETECTION_MAPPING:
            raise ValueError(f"{owner}: {model} is a {config.model_type}; expected an object detector (detr, rt_detr, yolos, ...) or an "
                             "instance segmenter (mask2former)")
        auto: Any = AutoModelForUniversalSegmentation if self.segments else AutoModelForObjectDetection
        self.device = default_device(device)
        self.model = pretrained_model(auto, model, owner=owner, cache_dir=cache_dir).to(self.device)
        self.processor = pretrained(AutoImageProcessor, model, owner=owner, cache_dir=cache_dir)
        self.names = {int(index): str(label).lower() for index, label in config.id2label.items()}
        self.labels: Sequence[str] = tuple(dict.fromkeys(self.names.values()))

    @torch.no_grad()
    def __call__(self, image: Tensor, threshold: float) -> list[Detection]:
        """What is seen with at least that confidence in an image, uint8 (3, H, W); one image at a time, so nothing is padded."""
        inputs = self.processor(images=[image.permute(1, 2, 0).contiguous().cpu().numpy()], return_tensors="pt")
        outputs = self.model(**{key: value.to(self.device) for key, value in inputs.items() if isinstance(value, Tensor)})
        size = [tuple(image.shape[-2:])]
        if self.segments:
            (found,) = self.processor.post_process_instance_segmentation(outputs, threshold=threshold, target_sizes=size,
                                                                         return_binary_maps=True)
            masks = [mask.cpu().bool() for mask in found["segmentation"]] if found["segments_info"] else []
            return [Detection(self.names[info["label_id"]], float(info["score"]), _box(mask), mask)
                    for info, mask in zip(found["segments_info"], masks, strict=True) if mask.any()]
        (found,) = self.processor.post_process_object_detection(outputs, threshold=threshold, target_sizes=size)
        return [Detection(self.names[label], score, (box[0], box[1], box[2], box[3])) for label, score, box in zip(
            found["labels"].tolist(), found["scores"].tolist(), found["boxes"].tolist(), strict=True)]


def _box(mask: Tensor) -> tuple[float, float, float, float]:
    """The smallest box around a mask, its far edges included."""
    rows, columns = mask.any(dim=1).nonzero(), mask.any(dim=0).nonzero()
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)

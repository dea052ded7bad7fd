"""Objects, counts, colours and positions, counted by an object detector: compositional prompts with a checkable request.

A request is ``Prompt.metadata`` in GenEval's form, one term per thing asked for:

    {"include": [{"class": "dog", "count": 2, "color": "red"}, {"class": "cat", "count": 1, "position": ["left of", 0]}],
     "exclude": [{"class": "dog", "count": 3}], "tag": "counting"}

    count     1 - min(1, |n - N| / N)              n found, N wanted; with counts="at_least" min(1, n / N)
    color     min(1, n_c / N)                      n_c of the colour
    position  share of pairs (object, anchor) in that relation; 0 where one of them is missing
    exclude   1 if fewer than ``count`` are found, else 0
    raw       mean of all terms ("soft"), or 1 if every term is 1, else 0 ("strict")
    correct   GenEval's own verdict, 1 or 0, whatever ``counts`` says

This is *like* GenEval, with its thresholds, geometry and colours, but with whatever detector of transformers is given instead of its
Mask2Former in mmdet, so the numbers do not belong on its leaderboard.

Source: GenEval, arXiv:2310.11513.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from visalign.protocols import RewardSpec
from visalign.rewards.clip import model_ids, open_clip_encoder
from visalign.rewards.detectors import Detection, Detector, SeesObjects
from visalign.types import Media, Prompt, Scores

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
COLOR_TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
RELATIONS = ("left of", "right of", "above", "below")
MAX_OBJECTS = 16
POSITION_MARGIN = 0.1  # of the boxes' sizes, by which centres must differ
COUNTING_THRESHOLD = 0.9
Terms = Mapping[str, Sequence[float]]
Counts = Literal["exact", "at_least"]


@dataclass(frozen=True)
class Wanted:
    """One entry of a request: ``count`` objects of a class, their colour, and where they are relative to the entry ``anchor``."""

    name: str
    count: int = 1
    color: str | None = None
    relation: str | None = None
    anchor: int | None = None


@dataclass(frozen=True)
class Request:
    include: tuple[Wanted, ...]
    exclude: tuple[Wanted, ...]
    counting: bool


@dataclass(frozen=True)
class Seen:
    """What the detector found by class, and the colours of the detections of classes for which a colour is asked."""

    found: Mapping[str, Sequence[Detection]]
    colors: Mapping[Detection, str]


class DetectedObjects:
    """How far an image shows the objects asked for. Details: ``count``, ``color``, ``position``, ``exclude`` (NaN where not asked for),
    ``strict`` and ``correct``."""

    spec = RewardSpec(name="objects", requires=frozenset({"include"}), raw_range=(0.0, 1.0))

    def __init__(self, detector: str | SeesObjects, *, clip: str = "ViT-L-14", clip_pretrained: str | None = "openai",
                 reward: Literal["soft", "strict"] = "soft", counts: Counts = "exact", threshold: float = 0.3,
                 device: str | torch.device | None = None, cache_dir: str | None = None, name: str = "objects") -> None:
        """
        Args:
            detector: folder or hub id of a detector in transformers: boxes (DETR, RT-DETR, YOLOS, ...) or instance masks
                (facebook/mask2former-swin-small-coco-instance); with masks, colours are judged without the background. Or any object
                that sees, such as a detector of another library.
            clip, clip_pretrained: the open_clip model that names colours.
            reward: mean of the terms, or all or nothing.
            counts: "at_least" is GenEval's own, which leaves "no more" to ``exclude``.
            threshold: confidence that counts as an object; 0.9 where the request's tag is "counting".
        Raises:
            ValueError: an unknown setting, or an incomplete detector.
        """
        if reward not in ("soft", "strict") or counts not in ("exact", "at_least") or not 0 < threshold < 1:
            raise ValueError(f"reward '{reward}' must be soft or strict, counts '{counts}' exact or at_least, threshold {threshold} "
                             "between 0 and 1")
        self.detector: SeesObjects = (Detector(detector, owner=f"reward '{name}'", device=device, cache_dir=cache_dir)
                                      if isinstance(detector, str) else detector)
        self.encoder = open_clip_encoder(clip, clip_pretrained, name=name, device=device, cache_dir=cache_dir)
        self.reward = reward
        self.counts: Counts = counts
        self.threshold = threshold
        self.spec = replace(self.spec, name=name, model_ids=(self.detector.model_id, *model_ids(clip, clip_pretrained)),
                            version=f"{reward}-{counts}-{threshold:g}")

    def score(self, media: Sequence[Media], prompts: Sequence[Prompt], group_id: Sequence[int]) -> Scores:
        """One score per image.

        Raises:
            ValueError: a request that is not of GenEval's form, or a class the detector does not know.
        """
        requests = [self.request(prompt) for prompt in prompts]
        seen = [self.see(sample.data, request) for sample, request in zip(media, requests, strict=True)]
        rows = [judge(request, one.found, one.colors, self.counts) for request, one in zip(requests, seen, strict=True)]
        details = {key: torch.tensor([_mean(terms[key]) for terms in rows]) for key in ("count", "color", "position", "exclude")}
        flat = [_flat(terms) for terms in rows]
        details["strict"] = torch.tensor([float(min(terms) == 1) for terms in flat])
        details["correct"] = torch.tensor([float(correct(*pair)) for pair in zip(requests, seen, strict=True)])
        values = [_mean(terms) for terms in flat] if self.reward == "soft" else details["strict"].tolist()
        return Scores.from_values(values, details=details)

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Refuse requests that cannot be judged, before anything is generated."""
        for row, prompt in enumerate(prompts):
            try:
                self.request(prompt)
            except ValueError as error:
                raise ValueError(f"reward '{self.spec.name}', prompt {row} ({prompt.text[:60]!r}): {error}") from error

    def request(self, prompt: Prompt) -> Request:
        """What a prompt asks for.

        Raises:
            ValueError: it is not of GenEval's form, or names a class the detector does not know.
        """
        request = parse_request(prompt.metadata)
        for wanted in (*request.include, *request.exclude):
            if wanted.name not in self.detector.labels:
                known = difflib.get_close_matches(wanted.name, self.detector.labels, n=3) or self.detector.labels[:8]
                raise ValueError(f"the detector does not know '{wanted.name}'; it knows {', '.join(known)}, ...")
        return request

    def see(self, image: Tensor, request: Request) -> Seen:
        """Detections by class, the most confident first, and the colours of those whose colour is asked for."""
        image = image.cpu()
        detections = self.detector(image, max(self.threshold, COUNTING_THRESHOLD) if request.counting else self.threshold)
        found = by_class(detections)
        colored = {wanted.name for wanted in request.include if wanted.color}
        colors = {detection: self._color(image, detection) for name in colored for detection in found.get(name, ())}
        return Seen(found, colors)

    def _color(self, image: Tensor, detection: Detection) -> str:
        """The colour whose descriptions are nearest to the cut-out object, its background painted grey."""
        shown = image if detection.mask is None else torch.where(detection.mask, image, torch.tensor(153, dtype=torch.uint8))
        crop = crop_box(shown, detection.box)
        texts = [template.format(color=color, name=detection.label) for color in COLORS for template in COLOR_TEMPLATES]
        colors = torch.nn.functional.normalize(self.encoder.texts(texts).unflatten(0, (len(COLORS), -1)).mean(dim=1), dim=-1)
        return COLORS[int((colors @ self.encoder.images([crop])[0]).argmax())]


def judge(request: Request, found: Mapping[str, Sequence[Detection]], colors: Mapping[Detection, str],
          counts: Counts) -> Terms:
    """Terms of the score by kind, each in [0, 1].

    Args:
        found: detections by class, the most confident first.
        colors: of the detections of classes for which a colour is asked.
    """
    terms: dict[str, list[float]] = {"count": [], "color": [], "position": [], "exclude": []}
    matching: list[Sequence[Detection]] = []
    for wanted in request.include:
        objects = found.get(wanted.name, ())
        error = abs(len(objects) - wanted.count) if counts == "exact" else max(0, wanted.count - len(objects))
        terms["count"].append(1 - min(1.0, error / wanted.count))
        if wanted.color:
            objects = [detection for detection in objects if colors[detection] == wanted.color]
            terms["color"].append(min(1.0, len(objects) / wanted.count))
        matching.append(objects[:wanted.count])
    for wanted, objects in zip(request.include, matching, strict=True):
        if wanted.relation and wanted.anchor is not None:
            pairs = [wanted.relation in relations(one, other) for one in objects for other in matching[wanted.anchor]]
            terms["position"].append(sum(pairs) / len(pairs) if pairs else 0.0)
    terms["exclude"] = [float(len(found.get(unwanted.name, ())) < unwanted.count) for unwanted in request.exclude]
    return terms


def correct(request: Request, seen: Seen) -> bool:
    """GenEval's own verdict: of every class the asked number of the most confident objects, more may be there; all of those of the asked
    colour and in the asked relation to each of the anchor's; nothing excluded."""
    matched: list[Sequence[Detection] | None] = []
    for wanted in request.include:
        objects = seen.found.get(wanted.name, ())[:wanted.count]
        right = len(objects) == wanted.count and (wanted.color is None or all(seen.colors[one] == wanted.color for one in objects))
        if right and wanted.relation is not None and wanted.anchor is not None:
            anchors = matched[wanted.anchor] if wanted.anchor < len(matched) else None
            right = anchors is not None and all(wanted.relation in relations(one, other) for one in objects for other in anchors)
        matched.append(objects if right else None)
    excluded = all(len(seen.found.get(unwanted.name, ())) < unwanted.count for unwanted in request.exclude)
    return excluded and all(objects is not None for objects in matched)


def relations(first: Detection, second: Detection) -> set[str]:
    """Where the first object is, seen from the second: at most one of left/right and one of above/below.

    The offset of the centres is shrunk by a tenth of the boxes' added sizes; a component counts when it is more than half of the
    unshrunk distance.
    """
    axes = [((first.box[axis] + first.box[axis + 2] - second.box[axis] - second.box[axis + 2]) / 2,
             POSITION_MARGIN * (first.box[axis + 2] - first.box[axis] + second.box[axis + 2] - second.box[axis])) for axis in (0, 1)]
    distance = math.hypot(*(offset for offset, _ in axes))
    if distance == 0:
        return set()
    dx, dy = (math.copysign(max(abs(offset) - margin, 0.0), offset) / distance for offset, margin in axes)
    named = zip(RELATIONS, (dx < -0.5, dx > 0.5, dy < -0.5, dy > 0.5), strict=True)
    return {name for name, holds in named if holds}


def crop_box(image: Tensor, box: tuple[float, float, float, float]) -> Tensor:
    """The pixels a box touches, at least one, (3, h, w)."""
    height, width = image.shape[-2:]
    x0, y0 = (min(max(math.floor(low), 0), side - 1) for low, side in zip(box[:2], (width, height), strict=True))
    return image[:, y0:max(math.ceil(box[3]), y0 + 1), x0:max(math.ceil(box[2]), x0 + 1)]


def by_class(detections: Sequence[Detection]) -> dict[str, list[Detection]]:
    """At most 16 detections of each class, the most confident first."""
    found: dict[str, list[Detection]] = {}
    for detection in sorted(detections, key=lambda one: -one.score):
        found.setdefault(detection.label, []).append(detection)
    return {name: objects[:MAX_OBJECTS] for name, objects in found.items()}


def parse_request(metadata: Mapping[str, Any]) -> Request:
    """A prompt's request.

    Raises:
        ValueError: something in it is not of the form at the head of this file.
    """
    include, exclude = (tuple(_wanted(entry, key) for entry in metadata.get(key) or ()) for key in ("include", "exclude"))
    if not include and not exclude:
        raise ValueError('nothing is asked for; give "include": [{"class": "dog", "count": 1}] in the prompt file')
    for wanted in include:
        if wanted.anchor is not None and not (0 <= wanted.anchor < len(include) and include[wanted.anchor] is not wanted):
            raise ValueError(f"the position of '{wanted.name}' refers to entry {wanted.anchor}; expected another of the {len(include)} "
                             "included entries, counted from 0")
    return Request(include, exclude, metadata.get("tag") == "counting")


def _wanted(entry: Any, key: str) -> Wanted:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("class"), str):
        raise ValueError(f'{key} has the entry {entry!r}; expected {{"class": "dog", "count": 1}}')
    count, color, position = entry.get("count", 1), entry.get("color"), entry.get("position")
    if not isinstance(count, int) or count < 1:
        raise ValueError(f"{key} wants {count!r} of '{entry['class']}'; expected a whole number from 1 on (none: exclude with count 1)")
    if color is not None and color not in COLORS:
        raise ValueError(f"{key} wants the colour {color!r}; known: {', '.join(COLORS)}")
    if position is None:
        return Wanted(entry["class"], count, color)
    if not isinstance(position, Sequence) or len(position) != 2 or position[0] not in RELATIONS or not isinstance(position[1], int):
        raise ValueError(f'{key} wants the position {position!r}; expected ["left of", 0] with one of {", ".join(RELATIONS)}')
    return Wanted(entry["class"], count, color, position[0], position[1])


def _flat(terms: Terms) -> list[float]:
    return [term for of_kind in terms.values() for term in of_kind]


def _mean(terms: Sequence[float]) -> float:
    return sum(terms) / len(terms) if terms else float("nan")

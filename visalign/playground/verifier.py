"""The exact verifier of the embedded world: does a picture show what its caption says?

Pixels are given to the nearest palette colour by direction from the background, connected components of one colour are found, and
each component is compared with the three outlines of the same area and centroid. No learning, no thresholds tuned to a generator.

Skills, each a yes or no per picture:

    colour    the set of colours shown is the set named
    count     as many components as the caption has objects
    shape     every component has a shape the caption gives to its colour (any named shape if the colour is not named), and every
              named shape is there; a component that fits no outline is no shape
    size      the extent of the largest component of the named colour lies in the range of the size word
    relation  the two components that best match the two things stand as the caption says, and more along that axis than across it

``mean`` averages the skills a caption tests, ``strict`` asks for all of them. Report both: ``mean`` can rise alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from visalign.playground import world

SKILLS: tuple[str, ...] = ("colour", "count", "shape", "size", "relation")
MAX_COMPONENTS = 4
NO_COLOUR = -1
NO_SHAPE = -1

_MIN_AREA = 14
# Direction: a pixel blended with the background keeps its hue, so colours are compared as unit vectors from the background.
_MIN_COSINE = 0.93
_MIN_COVERAGE = 0.5
# Overlap with the best outline of the same area and centroid, and its lead over the second: circle and square of one area overlap
# by 0.83, clean renders fit at 0.95 or more.
_MIN_FIT = 0.87
_MIN_LEAD = 0.03
# What an observer may call small and large: the drawn ranges (8.5-10.5 and 18-21) with a margin; 12-16 is neither.
_SIZE_RANGES: dict[str, tuple[float, float]] = {"small": (7.0, 11.3), "large": (17.0, 23.0)}


@dataclass(frozen=True)
class Components:
    """The up to ``MAX_COMPONENTS`` largest connected components of each picture; absent ones have colour ``NO_COLOUR``.

    colour, shape: int64 (B, K), indices into ``world.COLOURS`` and ``world.SHAPES``.
    x, y, extent: float32 (B, K), centroid and extent of the best outline, in pixels of a 32x32 picture.
    num: int64 (B,), the number of components found.
    """

    colour: Tensor
    shape: Tensor
    x: Tensor
    y: Tensor
    extent: Tensor
    num: Tensor


@dataclass(frozen=True)
class Verdict:
    """Per picture: which skills are right.

    skills: for every name in ``SKILLS`` float32 (B,), 1 right, 0 wrong, NaN where the caption does not test it.
    mean, strict: float32 (B,), in [0, 1].
    """

    skills: dict[str, Tensor]
    mean: Tensor
    strict: Tensor


@torch.no_grad()
def verify(images: Tensor, captions: Sequence[str | world.Caption]) -> Verdict:
    """Judge pictures against their captions.

    Args:
        images: uint8, shape (B, 3, H, W) with H = W; sizes other than 32 are resampled to 32.
        captions: B captions of the grammar, as text or parsed.
    Raises:
        ValueError: wrong dtype, shape or number of captions, or a caption outside the grammar.
    """
    if len(captions) != len(images):
        raise ValueError(f"{len(images)} images but {len(captions)} captions; give one caption per image")
    parsed = [world.parse(caption) if isinstance(caption, str) else caption for caption in captions]
    found = find_components(images)
    columns = [found.colour.tolist(), found.shape.tolist(), found.x.tolist(), found.y.tolist(), found.extent.tolist()]
    rows = [_judge(caption, list(zip(*row, strict=True))) for caption, row in zip(parsed, zip(*columns, strict=True), strict=True)]
    table = torch.tensor([[row.get(skill, float("nan")) for skill in SKILLS] for row in rows], dtype=torch.float32).view(-1, len(SKILLS))
    skills = dict(zip(SKILLS, table.unbind(1), strict=True))
    return Verdict(skills, mean=table.nanmean(1), strict=(table != 0).all(1).float())


_Component = tuple[int, int, float, float, float]


def _judge(caption: world.Caption, row: list[_Component]) -> dict[str, float]:
    components = [component for component in row if component[0] != NO_COLOUR]
    things = [(world.COLOURS.index(thing.colour), world.SHAPES.index(thing.shape)) for thing in caption.things]
    named_colours = {colour for colour, _ in things}
    named_shapes = {shape for _, shape in things}
    skills = {
        "colour": {component[0] for component in components} == named_colours,
        "count": len(components) == len(caption.objects),
        "shape": {component[1] for component in components} == named_shapes
        and all(colour not in named_colours or (colour, shape) in things for colour, shape, *_ in components),
    }
    if size := caption.things[0].size:
        extents = [component[4] for component in components if component[0] == things[0][0]]
        low, high = _SIZE_RANGES[size]
        skills["size"] = bool(extents) and low <= max(extents) <= high
    if caption.relation:
        skills["relation"] = _stands(caption.relation, things, components)
    return {skill: float(right) for skill, right in skills.items()}


def _stands(relation: str, things: list[tuple[int, int]], components: list[_Component]) -> bool:
    """Whether the best match of the first thing stands in ``relation`` to the best match of the second."""

    def match(thing: tuple[int, int], component: _Component) -> int:
        return 2 * (component[0] == thing[0]) + (component[1] == thing[1])

    pairs = [(first, second) for first in components for second in components if first is not second]
    if not pairs:
        return False
    first, second = max(pairs, key=lambda pair: match(things[0], pair[0]) + match(things[1], pair[1]))
    right, down = second[2] - first[2], second[3] - first[3]
    along, across = {"above": (down, right), "below": (-down, right), "left of": (right, down), "right of": (-right, down)}[relation]
    return along >= 4 and along > abs(across)


def find_components(images: Tensor) -> Components:
    """Connected components (8-neighbourhood, one colour, at least 14 pixels) with their best fitting shape.

    Raises:
        ValueError: images are not uint8 (B, 3, S, S).
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or images.shape[2] != images.shape[3]:
        raise ValueError(
            f"images must be uint8 of shape (B, 3, S, S), got {images.dtype} {tuple(images.shape)}; "
            "scale floats in [0, 1] by (255 * x).round().clamp(0, 255).to(torch.uint8)"
        )
    pixels = images.float()
    if images.shape[-1] != world.IMAGE_SIZE:
        pixels = F.interpolate(pixels, size=(world.IMAGE_SIZE,) * 2, mode="area" if images.shape[-1] > world.IMAGE_SIZE else "bilinear")
    colour_map, coverage = _classify(pixels)
    colour = colour_map.flatten(1)
    label = _connected(colour)
    batch, num_pixels = label.shape
    area = torch.zeros(batch, num_pixels + 1, dtype=torch.int64).scatter_add_(1, label, torch.ones_like(label))[:, :num_pixels]
    num = (area >= _MIN_AREA).sum(1)
    size, root = area.topk(MAX_COMPONENTS, dim=1)
    present = size >= _MIN_AREA
    mask = (label.unsqueeze(1) == root.unsqueeze(2)) & present.unsqueeze(2)
    grid = (batch, MAX_COMPONENTS, world.IMAGE_SIZE, world.IMAGE_SIZE)
    shape, x, y, extent = _fit(_soften(mask.view(grid).float(), coverage))
    colour_of_root = colour.gather(1, root).where(present, torch.tensor(NO_COLOUR))
    return Components(colour_of_root, shape.where(present, torch.tensor(NO_SHAPE)), x, y, extent, num)


def _classify(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Palette index per pixel or NO_COLOUR, int64, and coverage in [0, 1], both (B, H, W): nearest direction from the background."""
    background = torch.tensor(world.BACKGROUND, dtype=torch.float32)
    palette = torch.tensor(list(world.PALETTE.values()), dtype=torch.float32) - background
    offset = pixels.permute(0, 2, 3, 1) - background
    projection = offset @ palette.T
    length = palette.norm(dim=1)
    cosine, index = (projection / (length * offset.norm(dim=-1, keepdim=True).clamp_min(1e-6))).max(-1)
    coverage = (projection / length.square()).gather(-1, index.unsqueeze(-1)).squeeze(-1)
    return index.where((cosine >= _MIN_COSINE) & (coverage >= _MIN_COVERAGE), torch.tensor(NO_COLOUR)), coverage.clamp(0, 1)


def _soften(mask: Tensor, coverage: Tensor) -> Tensor:
    """Coverage by each component, (B, K, H, W): its own pixels and the half-covered ones around it that no component owns."""
    around = F.max_pool2d(mask, 3, stride=1, padding=1) * (1 - mask.sum(1, keepdim=True))
    return (mask + around) * coverage.unsqueeze(1)


def _connected(colour: Tensor) -> Tensor:
    """Label per pixel: the smallest pixel index of its component, H*W for pixels without colour; int64 (B, H*W).

    Minimum over the neighbours of the same colour, then pointer jumping, until nothing changes.
    """
    batch, num_pixels = colour.shape
    side = world.IMAGE_SIZE
    grid = F.pad(colour.view(batch, side, side), (1, 1, 1, 1), value=NO_COLOUR)
    steps = [(dy, dx) for dy in (0, 1, 2) for dx in (0, 1, 2) if (dy, dx) != (1, 1)]
    centre = grid[:, 1:-1, 1:-1]
    same = [(grid[:, dy : dy + side, dx : dx + side] == centre) & (centre != NO_COLOUR) for dy, dx in steps]
    background = torch.tensor(num_pixels)
    label = torch.arange(num_pixels).view(1, side, side).expand(batch, -1, -1).where(centre != NO_COLOUR, background)
    while True:
        padded = F.pad(label, (1, 1, 1, 1), value=num_pixels)
        lowest = label
        for (dy, dx), joined in zip(steps, same, strict=True):
            lowest = torch.minimum(lowest, padded[:, dy : dy + side, dx : dx + side].where(joined, background))
        flat = F.pad(lowest.flatten(1), (0, 1), value=num_pixels)
        for _ in range(3):
            flat = flat.gather(1, flat)
        lowest = flat[:, :num_pixels].view_as(label)
        if torch.equal(lowest, label):
            return label.flatten(1)
        label = lowest


def _fit(coverage: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Best outline (index or NO_SHAPE), centroid x, y and extent of each soft mask (B, K, H, W), each (B, K).

    Area and centroid fix an outline of each kind: circle pi e^2 / 4, square e^2, triangle e^2 / 2 with its centroid e / 6 below the
    middle. Overlap = sum min / sum max. Empty masks give meaningless rows.
    """
    position = torch.arange(coverage.shape[-1]) + 0.5
    area = coverage.sum((2, 3)).clamp_min(1)
    x = (coverage.sum(2) * position).sum(2) / area
    y = (coverage.sum(3) * position).sum(2) / area
    overlaps, extents = [], []
    flat = coverage.flatten(0, 1)
    for kind, (share, drop) in enumerate(((math.pi / 4, 0.0), (1.0, 0.0), (0.5, 1 / 6))):
        extent = (area / share).sqrt()
        dx = position.view(1, 1, -1) - x.view(-1, 1, 1)
        dy = position.view(1, -1, 1) - (y - drop * extent).view(-1, 1, 1)
        outline = world.outline_coverage(torch.full((len(flat),), kind), dx, dy, extent.view(-1, 1, 1))
        overlap = torch.minimum(outline, flat).sum((1, 2)) / torch.maximum(outline, flat).sum((1, 2))
        overlaps.append(overlap.view_as(area))
        extents.append(extent)
    fit, order = torch.stack(overlaps, 2).sort(dim=2, descending=True)
    extent = torch.stack(extents, 2).gather(2, order[..., :1]).squeeze(2)
    good = (fit[..., 0] >= _MIN_FIT) & (fit[..., 0] - fit[..., 1] >= _MIN_LEAD)
    return order[..., 0].where(good, torch.tensor(NO_SHAPE)), x, y, extent

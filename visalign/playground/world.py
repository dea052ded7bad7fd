"""The embedded world: captions about coloured shapes, the scenes they describe and a renderer.

A caption names one to three flat shapes on a dark background:

    a red circle | a small red circle | two blue squares | three white triangles
    a green circle above a cyan square   (above, below, left of, right of)
    a red circle and a blue square

A ``Caption`` is what the text says, a ``Scene`` is one picture of it: the caption leaves position and (mostly) size free.
``render`` turns scenes into uint8 images, anti-aliased by the signed distance to each outline.

Compositional generalisation: the colour-shape pairs in ``HELD_OUT_COMBINATIONS`` appear in no training prompt. Besides, one in five
of the captions made of *seen* pairs is kept for evaluation, so that held-out prompts come in two labelled kinds.
"""

import hashlib
import itertools
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

IMAGE_SIZE = 32
BACKGROUND: tuple[int, int, int] = (26, 26, 34)
PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (232, 52, 52),
    "green": (56, 190, 72),
    "blue": (62, 92, 246),
    "yellow": (246, 222, 60),
    "purple": (196, 70, 226),
    "cyan": (64, 214, 226),
    "white": (242, 242, 242),
}
COLOURS: tuple[str, ...] = tuple(PALETTE)
SHAPES: tuple[str, ...] = ("circle", "square", "triangle")
SIZES: tuple[str, ...] = ("small", "large")
RELATIONS: tuple[str, ...] = ("above", "below", "left of", "right of")
HELD_OUT_COMBINATIONS: frozenset[tuple[str, str]] = frozenset(
    {("yellow", "circle"), ("cyan", "square"), ("purple", "triangle")}
)
# Extent of one shape in pixels (diameter, side, base): what each size word means when it is drawn.
EXTENTS: dict[str | None, tuple[float, float]] = {"small": (8.5, 10.5), None: (12.0, 16.0), "large": (18.0, 21.0)}
_PAIR_EXTENT = (11.0, 13.0)
_COUNT_WORDS: dict[str, int] = {"two": 2, "three": 3}

SizeWord = Literal["small", "large"]


@dataclass(frozen=True)
class Thing:
    """A coloured shape as a caption names it; ``size`` is None where the caption leaves it open."""

    colour: str
    shape: str
    size: str | None = None

    @property
    def combination(self) -> tuple[str, str]:
        return self.colour, self.shape


@dataclass(frozen=True)
class Caption:
    """What a caption says: one thing, ``count`` copies of one thing, or two things with or without a relation.

    ``relation`` reads from the first thing to the second: ``things[0]`` is above / below / left of / right of ``things[1]``.
    """

    things: tuple[Thing, ...]
    count: int = 1
    relation: str | None = None

    @property
    def objects(self) -> tuple[Thing, ...]:
        """The things a faithful image shows, one entry each."""
        return self.things * self.count

    @property
    def skills(self) -> tuple[str, ...]:
        """The skills this caption puts to the test (see ``verifier``)."""
        sized = any(thing.size for thing in self.things)
        return ("colour", "count", "shape", *(("size",) if sized else ()), *(("relation",) if self.relation else ()))

    @property
    def text(self) -> str:
        first = self.things[0]
        if self.count > 1:
            words = {number: word for word, number in _COUNT_WORDS.items()}
            return f"{words[self.count]} {first.colour} {first.shape}s"
        joint = "and" if self.relation is None else self.relation
        return f" {joint} ".join(f"a {thing.size + ' ' if thing.size else ''}{thing.colour} {thing.shape}" for thing in self.things)


@dataclass(frozen=True)
class Shape:
    """One drawn shape: centre (x right, y down) and extent in pixels of a 32x32 image."""

    colour: str
    shape: str
    x: float
    y: float
    extent: float


@dataclass(frozen=True)
class Scene:
    """One picture: its shapes, drawn in order on the plain background."""

    shapes: tuple[Shape, ...]


_THING = rf"a (?:(?P<size{{i}}>{'|'.join(SIZES)}) )?(?P<colour{{i}}>{'|'.join(COLOURS)}) (?P<shape{{i}}>{'|'.join(SHAPES)})"
_SINGLE_OR_PAIR = re.compile(_THING.format(i=0) + rf"(?: (?P<joint>and|{'|'.join(RELATIONS)}) " + _THING.format(i=1) + ")?")
_COUNTED = re.compile(rf"(?P<count>{'|'.join(_COUNT_WORDS)}) (?P<colour>{'|'.join(COLOURS)}) (?P<shape>{'|'.join(SHAPES)})s")


def parse(caption: str) -> Caption:
    """Read a caption of the world.

    Raises:
        ValueError: the caption is not in the grammar; the message lists the words and the forms that are.
    """
    text = " ".join(caption.lower().split()).rstrip(".")
    if match := _COUNTED.fullmatch(text):
        return Caption((Thing(match["colour"], match["shape"]),), count=_COUNT_WORDS[match["count"]])
    match = _SINGLE_OR_PAIR.fullmatch(text)
    if match is None:
        raise ValueError(
            f"caption {caption!r} is not in the playground's grammar; write 'a [size] COLOUR SHAPE', 'two|three COLOUR SHAPEs', "
            f"'a COLOUR SHAPE RELATION a COLOUR SHAPE' or 'a COLOUR SHAPE and a COLOUR SHAPE' with size {'|'.join(SIZES)}, "
            f"colour {'|'.join(COLOURS)}, shape {'|'.join(SHAPES)}, relation {'|'.join(RELATIONS)}"
        )
    first = Thing(match["colour0"], match["shape0"], match["size0"])
    if match["joint"] is None:
        return Caption((first,))
    second = Thing(match["colour1"], match["shape1"], match["size1"])
    if first.size or second.size or first == second:
        problem = "names a size beside another shape" if first.size or second.size else "names the same thing twice"
        raise ValueError(
            f"caption {caption!r} {problem}; the playground uses size words only for a single shape ('a small red circle') "
            "and counts for copies ('two red circles')"
        )
    return Caption((first, second), relation=None if match["joint"] == "and" else match["joint"])


def sample_scene(caption: Caption, rng: random.Random) -> Scene:
    """Draw the free attributes (positions, extents) of one picture that shows exactly what the caption says."""
    if len(caption.objects) == 1:
        thing = caption.things[0]
        extent = rng.uniform(*EXTENTS[thing.size])
        room = (IMAGE_SIZE - extent) / 2 - 1.5
        reach = min(room, 5.0)
        centre = IMAGE_SIZE / 2
        x, y = (centre + rng.uniform(-reach, reach) for _ in "xy")
        return Scene((Shape(thing.colour, thing.shape, x, y, extent),))
    places = _places(caption, rng)
    return Scene(
        tuple(
            Shape(thing.colour, thing.shape, x + rng.uniform(-0.7, 0.7), y + rng.uniform(-0.7, 0.7), rng.uniform(*_PAIR_EXTENT))
            for thing, (x, y) in zip(caption.objects, places, strict=True)
        )
    )


def _places(caption: Caption, rng: random.Random) -> list[tuple[float, float]]:
    """Centres for two or three shapes: quadrants, or two facing cells for a relation."""
    near, far = 8.3, 23.7
    if caption.relation is None:
        return rng.sample([(near, near), (far, near), (near, far), (far, far)], len(caption.objects))
    across = rng.uniform(10.0, 22.0)
    return {
        "above": [(across, near), (across, far)],
        "below": [(across, far), (across, near)],
        "left of": [(near, across), (far, across)],
        "right of": [(far, across), (near, across)],
    }[caption.relation]


def render(scenes: Sequence[Scene], size: int = IMAGE_SIZE) -> Tensor:
    """Images of the scenes, uint8, shape (B, 3, size, size).

    A pixel's coverage is clamp(1/2 - d, 0, 1) for its signed distance d (in pixels) to the outline; colours blend linearly.
    """
    scale = size / IMAGE_SIZE
    axis = torch.arange(size) + 0.5
    y_grid, x_grid = torch.meshgrid(axis, axis, indexing="ij")
    images = torch.tensor(BACKGROUND, dtype=torch.float32).view(1, 3, 1, 1).repeat(len(scenes), 1, size, size)
    for layer in range(max((len(scene.shapes) for scene in scenes), default=0)):
        rows = [index for index, scene in enumerate(scenes) if len(scene.shapes) > layer]
        shapes = [scenes[index].shapes[layer] for index in rows]
        geometry = torch.tensor([[shape.x, shape.y, shape.extent] for shape in shapes]) * scale
        kind = torch.tensor([SHAPES.index(shape.shape) for shape in shapes])
        colour = torch.tensor([PALETTE[shape.colour] for shape in shapes], dtype=torch.float32).view(-1, 3, 1, 1)
        centre_x, centre_y, extent = geometry.view(-1, 3, 1, 1).unbind(1)
        coverage = outline_coverage(kind, x_grid - centre_x, y_grid - centre_y, extent).unsqueeze(1)
        images[rows] = images[rows] * (1 - coverage) + colour * coverage
    return images.round().to(torch.uint8)


def outline_coverage(kind: Tensor, x: Tensor, y: Tensor, extent: Tensor) -> Tensor:
    """Share of each pixel inside an outline, clamp(1/2 - d, 0, 1), for the signed distance d to it in pixels.

    Args:
        kind: int64 (B,), index into ``SHAPES``.
        x, y: pixel centres relative to the outline's centre, broadcastable to (B, H, W).
        extent: diameter, side or base, broadcastable to (B, H, W).
    """
    radius = extent / 2
    circle = (x.square() + y.square()).sqrt() - radius
    square = torch.maximum(x.abs(), y.abs()) - radius
    # An isosceles triangle as wide and as high as its extent: base at y = radius, apex at y = -radius; side normal (2, -1)/sqrt 5.
    triangle = torch.maximum((2 * x.abs() - (y + radius)) / 5**0.5, y - radius)
    distances = torch.stack([circle, square, triangle])
    return (0.5 - distances.gather(0, kind.view(1, -1, 1, 1).expand(1, *circle.shape)).squeeze(0)).clamp(0, 1)


def all_captions() -> list[Caption]:
    """Every caption of the grammar, in a fixed order."""
    things = [Thing(colour, shape) for colour in COLOURS for shape in SHAPES]
    singles = [Caption((Thing(t.colour, t.shape, size),)) for t in things for size in (None, *SIZES)]
    counted = [Caption((thing,), count=count) for thing in things for count in _COUNT_WORDS.values()]
    pairs = [Caption(pair, relation=relation) for pair in itertools.permutations(things, 2) for relation in (None, *RELATIONS)]
    return [*singles, *counted, *pairs]


def is_held_out_combination(caption: Caption) -> bool:
    """Whether the caption names a colour-shape pair that no training prompt contains."""
    return any(thing.combination in HELD_OUT_COMBINATIONS for thing in caption.things)


def is_training_caption(caption: Caption) -> bool:
    """Whether the caption belongs to the training split: seen pairs only, and four in five of those by a hash of the text."""
    fold = hashlib.sha256(caption.text.encode()).digest()[0] % 5
    return not is_held_out_combination(caption) and fold != 0


def train_captions() -> list[Caption]:
    return [caption for caption in all_captions() if is_training_caption(caption)]


def heldout_captions() -> list[Caption]:
    return [caption for caption in all_captions() if not is_training_caption(caption)]


def family(caption: Caption) -> str:
    """The kind of caption: single, sized, counted, relation or conjunction."""
    if caption.count > 1:
        return "counted"
    if len(caption.things) == 2:
        return "relation" if caption.relation else "conjunction"
    return "sized" if caption.things[0].size else "single"


# How often each family is drawn: pairs outnumber the rest in the grammar and would crowd out single shapes.
FAMILY_WEIGHTS: dict[str, float] = {"single": 0.2, "sized": 0.2, "counted": 0.2, "relation": 0.25, "conjunction": 0.15}


def sample_captions(captions: Sequence[Caption], num: int, rng: random.Random) -> list[Caption]:
    """``num`` captions with replacement, families in the proportions of ``FAMILY_WEIGHTS``."""
    groups: dict[str, list[Caption]] = {}
    for caption in captions:
        groups.setdefault(family(caption), []).append(caption)
    names = list(groups)
    drawn = rng.choices(names, weights=[FAMILY_WEIGHTS[name] for name in names], k=num)
    return [rng.choice(groups[name]) for name in drawn]

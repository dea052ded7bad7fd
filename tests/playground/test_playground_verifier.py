"""The verifier: exact on clean renders, blind to nothing it should see, and each skill fails alone."""

import math
import random

import pytest
import torch

from visalign.playground import world
from visalign.playground.verifier import NO_SHAPE, SKILLS, find_components, verify
from visalign.playground.world import Scene, Shape


def clean(num: int, seed: int) -> tuple[list[world.Caption], torch.Tensor]:
    rng = random.Random(seed)
    captions = world.sample_captions(world.all_captions(), num, rng)
    return captions, world.render([world.sample_scene(caption, rng) for caption in captions])


def test_clean_renders_pass_and_shuffled_captions_do_not() -> None:
    captions, images = clean(512, seed=0)
    assert verify(images, captions).strict.mean() >= 0.995
    shuffled = verify(images, captions[1:] + captions[:1])
    assert shuffled.strict.mean() < 0.02
    assert shuffled.mean.mean() < 0.35


def test_mean_averages_the_skills_a_caption_names() -> None:
    captions, images = clean(64, seed=1)
    verdict = verify(images, captions[1:] + captions[:1])
    for row, caption in enumerate(captions[1:] + captions[:1]):
        named = [verdict.skills[skill][row].item() for skill in SKILLS if not math.isnan(verdict.skills[skill][row].item())]
        assert len(named) == len(caption.skills)
        assert verdict.mean[row].item() == pytest.approx(sum(named) / len(named))
        assert verdict.strict[row].item() == float(all(named))


RED = Shape("red", "circle", 8.3, 16, 12)
BLUE = Shape("blue", "square", 23.7, 16, 12)
PAIR = "a red circle left of a blue square"
SMALL = "a small red circle"


@pytest.mark.parametrize(
    ("caption", "shapes", "wrong"),
    [
        (PAIR, (RED, BLUE), set()),
        (PAIR, (Shape("green", "circle", 8.3, 16, 12), BLUE), {"colour"}),
        (PAIR, (Shape("red", "triangle", 8.3, 16, 12), BLUE), {"shape"}),
        (PAIR, (Shape("red", "square", 8.3, 16, 12), Shape("blue", "circle", 23.7, 16, 12)), {"shape"}),
        (PAIR, (Shape("red", "circle", 23.7, 16, 12), Shape("blue", "square", 8.3, 16, 12)), {"relation"}),
        (PAIR, (Shape("red", "circle", 16, 7, 11), Shape("blue", "square", 16, 24, 11)), {"relation"}),
        (PAIR, (RED, Shape("blue", "square", 23.7, 8, 11), Shape("blue", "square", 23.7, 24, 11)), {"count"}),
        ("two red circles", (RED,), {"count"}),
        ("two red circles", (RED, Shape("red", "square", 23.7, 16, 12)), {"shape"}),
        (SMALL, (Shape("red", "circle", 16, 16, 9.5),), set()),
        (SMALL, (Shape("red", "circle", 16, 16, 19),), {"size"}),
        (SMALL, (Shape("red", "circle", 16, 16, 14),), {"size"}),
        (SMALL, (Shape("blue", "circle", 16, 16, 9.5),), {"colour", "size"}),
        (PAIR, (), {"colour", "count", "shape", "relation"}),
    ],
)
def test_each_skill_fails_alone(caption: str, shapes: tuple[Shape, ...], wrong: set[str]) -> None:
    """Size is scored only with the right colour; an empty picture has nothing right."""
    verdict = verify(world.render([Scene(shapes)]), [caption])
    assert {skill for skill in SKILLS if verdict.skills[skill].item() == 0} == wrong
    assert verdict.strict.item() == float(not wrong)


def test_a_blob_between_circle_and_square_is_no_shape() -> None:
    axis = torch.arange(32) + 0.5 - 16
    superellipse = (axis.abs().view(1, -1) ** 4 + axis.abs().view(-1, 1) ** 4) ** 0.25
    background = torch.tensor(world.BACKGROUND).view(3, 1, 1).float()
    coverage = (7.5 - superellipse).clamp(0, 1)
    image = background + coverage * (torch.tensor(world.PALETTE["red"]).view(3, 1, 1) - background)
    found = find_components(image.round().to(torch.uint8).unsqueeze(0))
    assert found.num.item() == 1
    assert world.COLOURS[found.colour[0, 0]] == "red"
    assert found.shape[0, 0] == NO_SHAPE


def test_a_squeezed_circle_is_no_circle() -> None:
    x = torch.arange(32) + 0.5 - 16
    inside = (x.view(1, -1) / 5) ** 2 + (x.view(-1, 1) / 9) ** 2 <= 1
    palette = torch.tensor(world.PALETTE["red"]).view(3, 1, 1)
    image = torch.where(inside, palette, torch.tensor(world.BACKGROUND).view(3, 1, 1)).to(torch.uint8)
    assert find_components(image.unsqueeze(0)).shape[0, 0] == NO_SHAPE


def test_components_report_where_and_how_large_the_shapes_are() -> None:
    """Half a pixel of tolerance: that is what anti-aliasing and 8 bits leave."""
    shapes = (Shape("red", "circle", 8.3, 9.1, 12.4), Shape("white", "square", 23.2, 22.6, 11.3))
    found = find_components(world.render([Scene(shapes)]))
    assert found.num.item() == 2
    for shape in shapes:
        slot = found.colour[0].tolist().index(world.COLOURS.index(shape.colour))
        for name in ("x", "y", "extent"):
            assert getattr(found, name)[0, slot].item() == pytest.approx(getattr(shape, name), abs=0.5)


def test_touching_shapes_of_two_colours_stay_two_components() -> None:
    found = find_components(world.render([Scene((Shape("red", "square", 10, 16, 12), Shape("blue", "square", 22, 16, 12)))]))
    assert found.num.item() == 2


@pytest.mark.parametrize("size", [64, 96, 128])
def test_larger_pictures_are_judged_after_resampling(size: int) -> None:
    rng = random.Random(5)
    captions = world.sample_captions(world.all_captions(), 64, rng)
    images = world.render([world.sample_scene(caption, rng) for caption in captions], size=size)
    assert verify(images, captions).strict.mean() >= 0.98


@pytest.mark.parametrize(
    ("images", "captions", "lesson"),
    [
        (torch.zeros(1, 3, 32, 32), ["a red circle"], r"uint8 of shape \(B, 3, S, S\), got torch.float32"),
        (torch.zeros(1, 3, 32, 48, dtype=torch.uint8), ["a red circle"], r"\(1, 3, 32, 48\)"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), ["a red circle"], "2 images but 1 captions"),
    ],
)
def test_wrong_input_is_refused(images: torch.Tensor, captions: list[str], lesson: str) -> None:
    with pytest.raises(ValueError, match=lesson):
        verify(images, captions)

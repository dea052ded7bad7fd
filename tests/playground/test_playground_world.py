"""The world: every caption parses back, pictures repeat with the seed, the splits are disjoint, errors teach."""

import random
import re

import pytest
import torch

from visalign import playground
from visalign.playground import world


def test_every_caption_parses_back_to_itself() -> None:
    captions = world.all_captions()
    assert len({caption.text for caption in captions}) == len(captions) == 2205
    assert all(world.parse(caption.text) == caption for caption in captions)


def test_parse_ignores_case_spaces_and_the_final_stop() -> None:
    assert world.parse("  A  Red circle ABOVE a blue square. ") == world.parse("a red circle above a blue square")


@pytest.mark.parametrize(
    ("caption", "lesson"),
    [
        ("a pink circle", "not in the playground's grammar.*colour red|green"),
        ("four red circles", "'two|three COLOUR SHAPEs'"),
        ("", "not in the playground's grammar"),
        ("a small red circle above a blue square", "size words only for a single shape"),
        ("a red circle and a red circle", "names the same thing twice.*'two red circles'"),
    ],
)
def test_a_caption_outside_the_grammar_teaches_the_grammar(caption: str, lesson: str) -> None:
    with pytest.raises(ValueError, match=lesson.replace("|", re.escape("|"))):
        world.parse(caption)


def test_pictures_repeat_with_the_seed_and_differ_without() -> None:
    captions = world.sample_captions(world.all_captions(), 32, random.Random(0))

    def draw(seed: int) -> torch.Tensor:
        rng = random.Random(seed)
        return world.render([world.sample_scene(caption, rng) for caption in captions])

    first = draw(1)
    assert first.dtype == torch.uint8
    assert first.shape == (32, 3, 32, 32)
    assert torch.equal(first, draw(1))
    assert (first != draw(2)).flatten(1).any(1).all()


def test_a_picture_does_not_depend_on_its_neighbours_in_the_batch() -> None:
    rng = random.Random(3)
    scenes = [world.sample_scene(caption, rng) for caption in world.sample_captions(world.all_captions(), 16, rng)]
    assert torch.equal(world.render(scenes), torch.cat([world.render([scene]) for scene in scenes]))


@pytest.mark.parametrize(("shape", "share"), [("circle", 0.7854), ("square", 1.0), ("triangle", 0.5)])
def test_drawn_area_is_the_area_of_the_outline(shape: str, share: float) -> None:
    """Mean over 50 sub-pixel positions; tolerance 2 % for the distance that is only a bound at corners."""
    kind = torch.full((50,), world.SHAPES.index(shape))
    axis = torch.arange(32) + 0.5 - 16
    offset = torch.rand(2, 50, 1, 1, generator=torch.Generator().manual_seed(0))
    coverage = world.outline_coverage(kind, axis.view(1, 1, -1) + offset[0], axis.view(1, -1, 1) + offset[1], torch.tensor(14.0))
    assert coverage.sum((1, 2)).mean().item() == pytest.approx(share * 14**2, rel=0.02)


def test_splits_are_disjoint_and_held_out_pairs_stay_out_of_training() -> None:
    train, held_out = set(playground.train_prompts()), set(playground.heldout_prompts(2000))
    assert not train & held_out
    assert len(train) > 1000
    assert not any(playground.is_compositional(prompt) for prompt in train)
    assert len({caption.text for caption in world.heldout_captions()}) >= 512


def test_held_out_prompts_are_half_compositional_and_repeat_with_the_seed() -> None:
    prompts = playground.heldout_prompts(513, seed=4)
    assert len(prompts) == 513
    assert [playground.is_compositional(prompt) for prompt in prompts[:6]] == [False, True] * 3
    assert prompts == playground.heldout_prompts(513, seed=4) != playground.heldout_prompts(513, seed=5)


def test_a_draw_of_training_prompts_keeps_the_family_proportions() -> None:
    drawn = playground.train_prompts(4000)
    for name, share in world.FAMILY_WEIGHTS.items():
        observed = sum(world.family(world.parse(prompt)) == name for prompt in drawn) / 4000
        assert observed == pytest.approx(share, abs=0.03)

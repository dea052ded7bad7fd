"""Captions of the embedded world in GenEval's form: the exact scene fulfils its request, another one does not."""

import random

import pytest

from visalign import playground
from visalign.data import load_prompts
from visalign.playground.geneval import TAGS, geneval_row, geneval_rows
from visalign.playground.verifier import NO_COLOUR, find_components
from visalign.playground.world import COLOURS, SHAPES, family, parse, render, sample_scene
from visalign.rewards.detector import by_class, judge, parse_request
from visalign.rewards.detectors import Detection

ROWS = geneval_rows()


def seen(image):
    """What an exact detector would see: the verifier's components as boxes, and their colours."""
    found = find_components(image[None])
    boxes, colours = [], {}
    for colour, shape, x, y, extent in zip(*(part[0].tolist() for part in (found.colour, found.shape, found.x, found.y, found.extent)),
                                           strict=True):
        if colour != NO_COLOUR and shape >= 0:
            half = extent / 2
            boxes.append(Detection(SHAPES[shape], 0.9 - 0.01 * len(boxes), (x - half, y - half, x + half, y + half)))
            colours[boxes[-1]] = COLOURS[colour]
    return by_class(boxes), colours


def fulfils(image, row):
    terms = judge(parse_request(row), *seen(image), "exact")
    return min(term for of_kind in terms.values() for term in of_kind) == 1


def test_rows_are_requests_of_held_out_captions():
    heldout = {caption.text for caption in playground.heldout_captions()}
    for row in ROWS:
        parse_request(row)
        assert row["prompt"] in heldout
        assert TAGS[family(parse(row["prompt"]))] == row["tag"]
    assert {row["tag"] for row in ROWS} == {"colors", "counting", "color_attr", "position"}
    assert len({row["prompt"] for row in ROWS}) == len(ROWS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["prompt"])
def test_a_render_fulfils_its_own_request_and_no_other_of_its_tag(row):
    caption = parse(row["prompt"])
    (image,) = render([sample_scene(caption, random.Random(0))])
    assert fulfils(image, row)
    others = [other for other in ROWS if other["tag"] == row["tag"] and other["prompt"] != row["prompt"]]
    assert not any(fulfils(image, other) for other in others if set(parse(other["prompt"]).things) != set(caption.things))


def test_one_object_too_many_is_correct_but_for_the_exclusion():
    row = geneval_row(parse("two red circles"), "counting")
    (image,) = render([sample_scene(parse("three red circles"), random.Random(0))])
    found, colours = seen(image)
    lenient = judge(parse_request(row), found, colours, "at_least")
    assert lenient["count"] == [1.0]
    assert lenient["exclude"] == [0.0]


def test_a_position_reads_from_the_first_thing_of_the_caption_to_the_second():
    row = geneval_row(parse("a red circle above a blue square"), "position")
    assert row["include"] == [{"class": "square", "count": 1, "color": "blue"},
                              {"class": "circle", "count": 1, "color": "red", "position": ["above", 0]}]
    (other,) = render([sample_scene(parse("a red circle below a blue square"), random.Random(0))])
    assert not fulfils(other, row)


def test_they_are_a_prompt_source():
    prompts = load_prompts("playground:geneval")
    assert [prompt.text for prompt in prompts] == [row["prompt"] for row in ROWS]
    assert prompts[0].metadata["tag"] == ROWS[0]["tag"]
    with pytest.raises(ValueError, match="and geneval"):
        load_prompts("playground:geneval/1")

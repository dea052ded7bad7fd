"""Held-out captions of the embedded world in GenEval's form, tag by tag: ``playground:geneval``.

    {"tag": "position", "include": [{"class": "square", "count": 1, "color": "blue"},
                                    {"class": "circle", "count": 1, "color": "red", "position": ["above", 0]}], "prompt": ...}

The world names a colour for every shape, so that GenEval's ``single_object`` and ``two_object``, which name none, have no captions here;
sizes, the colour cyan, and two things of one class are not in GenEval's form. Source: GenEval, arXiv:2310.11513.
"""

import random
from typing import Any

from visalign.playground.world import Caption, family, heldout_captions

TAGS: dict[str, str] = {"single": "colors", "counted": "counting", "conjunction": "color_attr", "relation": "position"}
UNKNOWN_COLOURS = frozenset({"cyan"})


def geneval_rows(per_tag: int = 16) -> list[dict[str, Any]]:
    """Lines of a GenEval prompt file, at most ``per_tag`` of each tag, always the same."""
    rng, found = random.Random(0), []
    for kind, tag in TAGS.items():
        captions = [caption for caption in heldout_captions() if family(caption) == kind and _expressible(caption)]
        found += [geneval_row(caption, tag) for caption in rng.sample(captions, min(per_tag, len(captions)))]
    return found


def _expressible(caption: Caption) -> bool:
    shapes = {thing.shape for thing in caption.things}
    return len(shapes) == len(caption.things) and not any(thing.colour in UNKNOWN_COLOURS for thing in caption.things)


def geneval_row(caption: Caption, tag: str) -> dict[str, Any]:
    """One caption as GenEval asks for it; "the first above the second" is a position of the first, relative to the second."""
    include: list[dict[str, Any]] = [{"class": thing.shape, "count": caption.count, "color": thing.colour} for thing in caption.things]
    row: dict[str, Any] = {"tag": tag, "include": include, "prompt": caption.text}
    if caption.relation:
        include.reverse()  # an entry's position refers to one before it
        include[1]["position"] = [caption.relation, 0]
    if caption.count > 1:
        row["exclude"] = [{"class": caption.things[0].shape, "count": caption.count + 1}]
    return row

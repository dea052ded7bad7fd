"""PaCo's question about parts of a picture and about edits."""

import math
from itertools import combinations

import pytest
import torch
from PIL import Image

from tests.rewards.misbehaving_server import MisbehavingServer, completion, pictures
from visalign.rewards.judges.consistency import ConsistencyJudge
from visalign.types import Media, Prompt


def grid(*levels):
    a, b, c, d = (torch.full((3, 4, 4), level, dtype=torch.uint8) for level in levels)
    return Media("image", torch.cat([torch.cat([a, b], dim=2), torch.cat([c, d], dim=2)], dim=1))


def closeness(request):
    """P(yes) falls with the gap between the two grey levels; half of it where the question is about logic, 0.25 for following."""
    a, b = (int(picture[0, 0, 0]) for picture in pictures(request))
    words = request["messages"][0]["content"][-1]["text"]
    p = 0.25 if "follow the instruction" in words else math.exp(-abs(a - b) / 50) * 0.9 * (0.5 if "logic" in words else 1)
    return completion("Yes", finish="length", alternatives={"Yes": math.log(p), "No": math.log(1 - p)})


def judge(server, *arguments, **options):
    return ConsistencyJudge({"base_urls": server.url, "model": "m"}, *arguments, **options)


def test_a_grid_is_the_mean_over_pairs_criteria_and_dimensions():
    criteria = {"style": {"palette": "colours", "brush": "strokes"}, "sense": {"story": "logic"}}
    with MisbehavingServer([closeness]) as server:
        scores = judge(server, criteria=criteria).score([grid(0, 50, 100, 101)], [Prompt("a story")], [0])
    style = sum(0.9 * math.exp(-abs(a - b) / 50) for a, b in combinations((0, 50, 100, 101), 2)) / 6
    assert scores.details["style"].item() == pytest.approx(style, abs=1e-6)
    assert scores.details["sense"].item() == pytest.approx(style / 2, abs=1e-6)
    assert scores.raw.item() == pytest.approx(0.75 * style, abs=1e-6)
    assert scores.details["copies"].item() == pytest.approx(1 / 6)
    assert len(server.requests) == 18


def test_another_theme_is_another_question(tmp_path):
    with MisbehavingServer([closeness]) as server:
        options = {"base_urls": server.url, "model": "m", "cache_dir": str(tmp_path)}
        for theme, asked in (("a", 6), ("b", 12), ("a", 12)):
            ConsistencyJudge(options).score([grid(0, 1, 2, 3)], [Prompt(theme)], [0])
            assert len(server.requests) == asked


def test_equal_parts_are_seen_as_copies():
    with MisbehavingServer([closeness]) as server:
        scores = judge(server).score([grid(9, 9, 9, 9)], [Prompt("a")], [0])
        assert len(server.requests) == 1
    assert scores.details["copies"].tolist() == [1]


def test_an_edit_is_the_geometric_mean_of_keeping_and_following(tmp_path):
    source = tmp_path / "source.png"
    Image.new("RGB", (8, 8), (50, 50, 50)).save(source)
    prompt = Prompt("add a hat", images=(str(source),))
    with MisbehavingServer([closeness]) as server:
        scores = judge(server, "edit", criteria={"kept": {"identity": "identity"}}).score([grid(0, 0, 0, 0)], [prompt], [0])
    assert scores.raw.item() == pytest.approx(math.sqrt(0.25 * 0.9 * math.exp(-1)), abs=1e-6)
    assert scores.details["followed"].item() == pytest.approx(0.25)


def test_one_pair_without_an_answer_makes_the_sample_invalid():
    calls = []

    def once(request):
        calls.append(request)
        return 422 if len(calls) == 4 else closeness(request)

    with MisbehavingServer([once]) as server:
        scores = ConsistencyJudge({"base_urls": server.url, "model": "m", "concurrency": 1}).score(
            [grid(1, 20, 40, 60), grid(2, 21, 41, 61)], [Prompt("a")] * 2, [0, 0])
    assert scores.reasons == ("http 422", None)


@pytest.mark.parametrize(("options", "match"), [({"grid": (1, 1)}, "two parts"), ({"mode": "set"}, "mode 'set'"),
                                                ({"criteria": {"style": {}}}, "dimension"),
                                                ({"wording": "{prompt}?"}, "lacks {criterion}")])
def test_bad_parameters(options, match):
    with pytest.raises(ValueError, match=match):
        ConsistencyJudge({"base_urls": "http://localhost:1/v1", "model": "m"}, **options)


def test_bad_samples_and_prompts():
    backend = {"base_urls": "http://localhost:1/v1", "model": "m"}
    with pytest.raises(ValueError, match="3 x 2 does not divide an image of 8 x 8"):
        ConsistencyJudge(backend, grid=(3, 2)).score([grid(1, 2, 3, 4)], [Prompt("a")], [0])
    with pytest.raises(ValueError, match=r"prompt 0: .* source"):
        ConsistencyJudge(backend, "edit").check_prompts([Prompt("a")])
    with pytest.raises(ValueError, match="prompt 0: criteria"):
        ConsistencyJudge(backend, criteria="prompt").check_prompts([Prompt("a", metadata={"criteria": []})])

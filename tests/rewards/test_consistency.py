"""Consistency of image sets on the embedded CLIP: panels, pairs, sources, the ceiling on copies; random images, seed 0."""

import pytest
import torch

from visalign import playground
from visalign.media import save_media
from visalign.protocols import Reward
from visalign.rewards.consistency import SetConsistency, pair_similarities, panels
from visalign.scoring import admit, check_inputs
from visalign.types import Media, Prompt

MODEL = str(playground.clip_path())


def pictures(num, seed=0):
    coarse = torch.rand(num, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    return (torch.nn.functional.interpolate(coarse, size=(32, 32), mode="bicubic").clamp(0, 1) * 255).round().to(torch.uint8)


def sheet(cells, rows, columns):
    """Pictures (rows * columns, 3, h, w) as one image, in reading order."""
    return Media("image", torch.cat([torch.cat(list(cells[row * columns:(row + 1) * columns]), dim=2) for row in range(rows)], dim=1))


def say(reward, media, prompt=Prompt("a")):  # noqa: B008
    return reward.score([media], [prompt], [0])


@pytest.mark.parametrize(("rows", "columns"), [(1, 2), (2, 2), (3, 1)])
def test_panels_are_cut_in_reading_order(rows, columns):
    cells = pictures(rows * columns)
    cut = panels(sheet(cells, rows, columns).data, rows, columns)
    assert torch.equal(torch.stack(cut), cells)


def test_what_the_grid_does_not_divide_is_left_over():
    image = torch.arange(3 * 5 * 7, dtype=torch.uint8).view(3, 5, 7)
    cut = panels(image, 2, 2)
    assert [tuple(one.shape) for one in cut] == [(3, 2, 3)] * 4
    assert torch.equal(cut[3], image[:, 2:4, 3:6])
    with pytest.raises(ValueError, match="no grid of 6 x 1"):
        panels(image, 6, 1)


def test_pairs_are_all_panels_with_each_other_and_with_every_source():
    e = torch.nn.functional.normalize(torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), dim=1)
    own, sources = e[:3], e[3:]
    expected = [own[0] @ own[1], own[0] @ own[2], own[1] @ own[2], *(a @ b for a in own for b in sources)]
    torch.testing.assert_close(pair_similarities(own, sources), torch.stack(expected))


def test_the_score_is_the_mean_over_pairs_and_copies_score_one():
    reward, cells = SetConsistency(MODEL, grid=[2, 2]), pictures(4)
    assert isinstance(reward, Reward)
    e = reward.encoder.images(list(cells))
    pairs = torch.stack([e[i] @ e[j] for i in range(4) for j in range(i)])
    scores = say(reward, sheet(cells, 2, 2))
    torch.testing.assert_close(scores.raw[0], pairs.mean(), atol=1e-6, rtol=0)
    torch.testing.assert_close(scores.details["closest_pair"][0], pairs.max(), atol=1e-6, rtol=0)
    torch.testing.assert_close(scores.details["farthest_pair"][0], pairs.min(), atol=1e-6, rtol=0)
    torch.testing.assert_close(say(reward, sheet(cells[:1].expand(4, -1, -1, -1), 2, 2)).raw, torch.ones(1), atol=1e-5, rtol=0)
    torch.testing.assert_close(say(reward, sheet(cells.flip(0), 2, 2)).raw, scores.raw, atol=1e-6, rtol=0)


def test_nothing_is_earned_beyond_the_ceiling():
    cells = pictures(2)
    free = say(SetConsistency(MODEL, grid=[1, 2]), sheet(cells, 1, 2)).raw.item()
    capped = SetConsistency(MODEL, grid=[1, 2], ceiling=(1 + free) / 2)
    assert say(capped, sheet(cells, 1, 2)).raw.item() == pytest.approx(free)
    copies = say(capped, sheet(cells[:1].expand(2, -1, -1, -1), 1, 2))
    assert copies.raw.item() == pytest.approx((1 + free) / 2)
    assert copies.details["closest_pair"].item() == pytest.approx(1, abs=1e-5)


def test_an_edit_is_compared_with_its_source_images(tmp_path):
    cells = pictures(3)
    paths = [str(save_media(Media("image", one), tmp_path / str(row))) for row, one in enumerate(cells[:2])]
    reward = SetConsistency(MODEL, grid=[1, 1], sources=True)
    e = reward.encoder.images(list(cells))
    scores = reward.score([Media("image", cells[2]), Media("image", cells[0])],
                          [Prompt("a", images=tuple(paths)), Prompt("b", images=(paths[0],))], [0, 1])
    torch.testing.assert_close(scores.raw, torch.stack([(e[2] @ e[0] + e[2] @ e[1]) / 2, torch.tensor(1.0)]), atol=1e-5, rtol=0)


def test_the_grid_may_differ_by_prompt():
    reward, cells = SetConsistency(MODEL), pictures(6)
    media = [sheet(cells[:2], 1, 2), sheet(cells, 2, 3)]
    prompts = [Prompt("a", metadata={"grid": [1, 2]}), Prompt("b", metadata={"grid": [2, 3]})]
    both = reward.score(media, prompts, [0, 1]).raw
    torch.testing.assert_close(both, torch.cat([say(reward, one, prompt).raw for one, prompt in zip(media, prompts, strict=True)]),
                               atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="metadata lacks 'grid'"):
        check_inputs(reward.spec, media, [prompts[0], Prompt("b")])


@pytest.mark.parametrize(("params", "prompt", "problem"), [
    ({}, Prompt("a", metadata={"grid": "2x2"}), r"prompt 0: grid '2x2' must be the numbers"),
    ({}, Prompt("a", metadata={"grid": [2, 0]}), r"grid \[2, 0\] must be"),
    ({}, Prompt("a", metadata={"grid": [1, 1]}), "one panel: nothing to compare"),
    ({"grid": [1, 1], "sources": True}, Prompt("a"), "no condition images to be consistent with")])
def test_prompts_that_cannot_be_judged_are_refused_before_anything_runs(params, prompt, problem):
    with pytest.raises(ValueError, match=problem):
        admit({"r": SetConsistency(MODEL, **params)}, [prompt])


@pytest.mark.parametrize(("params", "problem"), [
    ({"ceiling": 0.0}, r"must be in \(0, 1\]"), ({"grid": [1, 1]}, "set sources: true"), ({"grid": [2]}, r"for example \[2, 2\]")])
def test_bad_settings(params, problem):
    with pytest.raises(ValueError, match=problem):
        SetConsistency(MODEL, **params)

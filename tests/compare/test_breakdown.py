"""Tables by tag and by dimension against sums done by hand; both overall definitions; what could not be judged."""

import pytest
import torch

from visalign.compare.breakdown import by_dimension, by_key, primary_dimension
from visalign.types import Prompt, Scores

NAN = float("nan")


def tagged(*tags):
    return [Prompt(f"prompt {k}", metadata={} if tag is None else {"tag": tag}) for k, tag in enumerate(tags)]


def table(tags, base, model, clusters=None):
    clusters = torch.arange(len(tags)) if clusters is None else torch.tensor(clusters)
    return by_key("tag", tagged(*tags), torch.tensor(base), torch.tensor(model), clusters)


def test_micro_pools_samples_and_macro_averages_rows():
    found = table(["a", "a", "a", "b"], [0.0, 0.0, 1.0, 1.0], [1.0, 0.0, 1.0, 0.0])
    assert list(found.rows) == ["a", "b"]
    assert found.rows["a"].base.mean == pytest.approx(1 / 3)
    assert found.rows["a"].model.mean == pytest.approx(2 / 3)
    assert found.micro.base.mean == pytest.approx(2 / 4)
    assert found.macro.base.mean == pytest.approx((1 / 3 + 1) / 2)
    assert found.macro.gain.mean == pytest.approx((1 / 3 - 1) / 2)
    assert (found.rows["a"].base.samples, found.rows["a"].base.prompts, found.micro.base.samples) == (3, 3, 4)


def test_a_row_of_one_prompt_has_no_interval():
    found = table(["a", "a", "b", "b"], [0.0, 1.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0], clusters=[0, 1, 2, 2])
    assert found.rows["a"].gain.low is not None
    assert found.rows["b"].gain.low is None
    assert (found.rows["b"].base.samples, found.rows["b"].base.prompts) == (2, 1)


def test_sides_that_are_equal_gain_exactly_nothing():
    values = torch.rand(40, generator=torch.Generator().manual_seed(0)).tolist()
    found = table(["a", "b"] * 20, values, values)
    for one in (*found.rows.values(), found.micro, found.macro):
        assert (one.gain.mean, one.gain.low, one.gain.high) == (0.0, 0.0, 0.0)


def test_the_interval_of_a_row_that_holds_everything_is_that_of_the_mean():
    from visalign.compare.comparison import contrast

    base, model = torch.rand(2, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    clusters = torch.arange(10).repeat_interleave(3)
    found = by_key("tag", tagged(*["a"] * 30), base, model, clusters)
    wanted = contrast(base, model, clusters)
    for one in (found.rows["a"], found.micro, found.macro):
        for side in ("base", "model", "gain"):
            got, expected = getattr(one, side), getattr(wanted, side)
            assert (got.mean, got.low, got.high) == pytest.approx((expected.mean, expected.low, expected.high))
            assert (got.samples, got.prompts) == (expected.samples, expected.prompts)


def test_pairs_invalid_on_one_side_are_left_out_and_counted():
    found = table(["a", "a", "b"], [0.0, NAN, 1.0], [1.0, 1.0, NAN])
    assert list(found.rows) == ["a"]
    assert found.rows["a"].base.samples == 1
    assert (found.invalid_base, found.invalid_model) == (1, 1)
    assert table(["a"], [NAN], [1.0]) is None


def test_prompts_without_the_key_share_a_row_and_a_key_nobody_has_is_refused():
    assert list(table(["a", None], [0.0, 1.0], [0.0, 1.0]).rows) == ["a", "none"]
    with pytest.raises(ValueError, match="no prompt has 'colour' in its metadata \\(there is: tag\\)"):
        by_key("colour", tagged("a"), torch.zeros(1), torch.zeros(1), torch.zeros(1, dtype=torch.int64))
    with pytest.raises(ValueError, match="needs a word or a number"):
        by_key("tag", [Prompt("x", metadata={"tag": ["a"]})], torch.zeros(1), torch.zeros(1), torch.zeros(1, dtype=torch.int64))


class Points:
    def points(self, prompt):
        return prompt.metadata["counts"]


COLOUR, SIZE, STYLE = "Attribute - Color", "Attribute - Size", "Style"
PROMPTS = [Prompt("p", metadata={"counts": {COLOUR: 2, STYLE: 1}}), Prompt("q", metadata={"counts": {SIZE: 1}})]


def shares(**columns):
    return Scores.from_values([0.5, 0.5], details={name: torch.tensor(values) for name, values in columns.items()})


def test_points_are_pooled_by_their_number():
    """Base: colour 1 of 2, style 1 of 1, size 0 of 1. Primary: attribute 1/3, style 1/1; micro 2/4, macro (1/3 + 1)/2."""
    base = shares(**{COLOUR: [0.5, NAN], STYLE: [1.0, NAN], SIZE: [NAN, 0.0]})
    model = shares(**{COLOUR: [1.0, NAN], STYLE: [0.0, NAN], SIZE: [NAN, 1.0]})
    primary, detailed = (by_dimension(Points(), PROMPTS, base, model, torch.arange(2), level) for level in (True, False))
    assert {name: row.base.mean for name, row in primary.rows.items()} == pytest.approx({"Attribute": 1 / 3, "Style": 1.0})
    assert {name: row.model.mean for name, row in detailed.rows.items()} == {COLOUR: 1.0, STYLE: 0.0, SIZE: 1.0}
    assert primary.rows["Attribute"].base.samples == 3
    assert primary.micro.base.mean == detailed.micro.base.mean == 0.5
    assert primary.macro.base.mean == pytest.approx(2 / 3)
    assert primary.macro.model.mean == pytest.approx(0.5)
    assert primary.micro.model.mean == pytest.approx(3 / 4)


def test_points_of_an_unreadable_answer_count_nowhere():
    base = shares(**{COLOUR: [0.5, NAN], STYLE: [1.0, NAN]})    # the second sample's answer gave nothing, not even a column for its point
    model = shares(**{COLOUR: [1.0, NAN], STYLE: [1.0, NAN], SIZE: [NAN, 1.0]})
    found = by_dimension(Points(), PROMPTS, base, model, torch.arange(2), False)
    assert list(found.rows) == [COLOUR, STYLE]
    assert (found.invalid_base, found.invalid_model) == (1, 0)
    assert found.micro.base.mean == pytest.approx(2 / 3)


@pytest.mark.parametrize(("name", "primary"), [
    ("Attribute - Color", "Attribute"), ("Entity Layout - Two-Dimensional Space", "Entity Layout"), ("World Knowledge", "World Knowledge"),
    ("Action - Full-body (Character/Anthropomorphic)", "Action"), ("Action - Non-contact Interaction", "Action"), ("Style", "Style"),
    ("Text Generation (Case-insensitive)", "Text Generation"), ("属性-数量", "属性"), ("动作-人物/拟人手部动作", "动作"), ("风格", "风格")])
def test_primary_dimensions(name, primary):
    assert primary_dimension(name) == primary

"""Win rates from judges and judges from scores; judges here are plain code with known answers."""

from itertools import pairwise

import pytest
import torch

from visalign.credit import RewardTerm, assign_credit
from visalign.plugins import load_reward
from visalign.protocols import PairwiseReward, Reward, RewardSpec
from visalign.rewards.function import FunctionReward
from visalign.rewards.jpeg import JpegCompressibility
from visalign.rewards.pairwise import BradleyTerry, WinRate
from visalign.scoring import score
from visalign.types import Comparisons, Media, Prompt


def image(level):
    return Media("image", torch.full((3, 2, 2), level, dtype=torch.uint8))


def level_of(media):
    return int(media.data[0, 0, 0])


class Judge:
    """Asks ``rule(level of first, level of second)`` for a probability, or a string: why there is none."""

    spec = RewardSpec(name="judge", arity="pairwise")

    def __init__(self, rule):
        self.rule = rule
        self.asked = []

    def compare(self, first, second, prompts):
        pairs = [(level_of(a), level_of(b)) for a, b in zip(first, second, strict=True)]
        self.asked += pairs
        answers = [self.rule(*pair) for pair in pairs]
        ok = [not isinstance(answer, str) for answer in answers]
        return Comparisons(torch.tensor([answer if valid else torch.nan for answer, valid in zip(answers, ok, strict=True)]),
                           torch.tensor(ok), tuple(None if valid else answer for answer, valid in zip(answers, ok, strict=True)))


def prefers_larger(a, b):
    return 1.0 if a > b else 0.0 if a < b else 0.5


def rates(rule, levels, group_id=None, **options):
    prompts = [Prompt("same text")] * len(levels)
    return WinRate(Judge(rule), **options).score([image(level) for level in levels], prompts, group_id or [0] * len(levels))


def close(tensor, expected):
    torch.testing.assert_close(tensor, torch.tensor(expected), rtol=0, atol=1e-6, check_dtype=False)


def test_a_judge_that_always_answers_image_1():
    close(rates(lambda a, b: 1.0, range(4), swap=False).raw, [1, 2 / 3, 1 / 3, 0])  # position bias, rewarded
    swapped = rates(lambda a, b: 1.0, range(4), swap=True)
    close(swapped.raw, [0.5] * 4)
    close(swapped.details["swap_inconsistency"], [1.0] * 4)
    close(swapped.details["tie_rate"], [1.0] * 4)


def test_published_example_and_its_advantages():
    wins = {(0, 1): 1.0, (0, 2): 1.0, (0, 3): 0.5, (1, 2): 1.0, (1, 3): 0.0, (2, 3): 0.0}
    result = rates(lambda a, b: wins[a, b] if a < b else 1 - wins[b, a], range(4))
    close(result.raw, [5 / 6, 1 / 3, 0, 5 / 6])
    close(result.details["swap_inconsistency"], [0.0] * 4)
    close(result.details["tie_rate"], [1 / 3, 0, 0, 1 / 3])
    credit = assign_credit([RewardTerm("w", WinRate(Judge(prefers_larger)))], {"w": result}, torch.zeros(4, dtype=torch.int64))
    torch.testing.assert_close(credit.advantage, torch.tensor([0.8165, -0.4082, -1.2247, 0.8165]), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("schedule", "swap", "num_asked"), [("all_pairs", False, 15), ("all_pairs", True, 30), ("ring", True, 12),
                                                             (3, True, 18), (4, False, 12)])
def test_schedules_ask_as_many_questions_as_they_say(schedule, swap, num_asked):
    reward = WinRate(Judge(prefers_larger), schedule=schedule, swap=swap)
    scores = reward.score([image(level) for level in range(6)], [Prompt("a")] * 6, [0] * 6)
    assert len(reward.judge.asked) == num_asked
    assert scores.details["comparisons"].sum() == (num_asked if swap else 2 * num_asked)
    assert scores.raw[5] == 1
    assert scores.raw[0] == 0


def test_groups_are_told_apart_by_id_and_not_by_text():
    levels, group_id = [3, 9, 1, 8, 2, 7], [5, 7, 5, 7, 5, 7]  # interleaved, one prompt text
    close(rates(prefers_larger, levels, group_id).raw, [1, 1, 0, 0.5, 0.5, 0])


def test_invalid_comparisons_are_masked_and_not_ties():
    def fails_on_2(a, b):
        return "parse" if 2 in (a, b) else prefers_larger(a, b)

    scores = rates(fails_on_2, [0, 1, 2, 3])
    close(scores.raw[[0, 1, 3]], [0, 0.5, 1])
    assert scores.valid.tolist() == [True, True, False, True]
    assert scores.reasons == (None, None, "parse", None)
    assert scores.details["comparisons"].tolist() == [2, 2, 0, 2]


def test_half_a_swap_does_not_count():
    scores = rates(lambda a, b: "refused" if (a, b) == (1, 0) else 1.0, [0, 1, 2])
    close(scores.raw, [0.5, 0.5, 0.5])  # had (0, 1) counted in one order, 0 would have won it
    assert scores.details["comparisons"].tolist() == [1, 1, 2]


def test_a_lone_sample_has_no_win_rate():
    scores = rates(prefers_larger, [4, 1, 2], [0, 1, 1])
    assert scores.reasons == ("no comparison", None, None)
    close(scores.raw[1:], [0, 1])


def test_schedule_that_does_not_fit_the_group():
    with pytest.raises(ValueError, match="5 samples cannot each have 3 comparisons"):
        rates(prefers_larger, range(5), schedule=3)


@pytest.mark.parametrize("schedule", ["al_pairs", True, None])
def test_unknown_schedule(schedule):
    with pytest.raises(ValueError, match="is neither 'all_pairs', 'ring' nor a number"):
        WinRate(Judge(prefers_larger), schedule=schedule)


def test_a_judge_that_loses_an_answer_is_named():
    class Short(Judge):
        def compare(self, first, second, prompts):
            return super().compare(first[1:], second[1:], prompts[1:])

    with pytest.raises(ValueError, match="judge 'judge' answered 5 of 6 comparisons"):
        WinRate(Short(prefers_larger)).score([image(i) for i in range(3)], [Prompt("a")] * 3, [0] * 3)


def levels_reward(**options):
    return FunctionReward(lambda media, prompts: [None if level_of(m) == 99 else float(level_of(m)) for m in media], **options)


def test_bradley_terry_closed_form_antisymmetry_and_direction():
    judge = BradleyTerry(levels_reward(), scale=0.5)
    assert isinstance(judge, PairwiseReward)
    first, second, prompts = [image(3), image(1)], [image(1), image(1)], [Prompt("a")] * 2
    close(judge.compare(first, second, prompts).prob_first, [1 / (1 + torch.e ** -1), 0.5])
    close(judge.compare(second, first, prompts).prob_first, [1 / (1 + torch.e), 0.5])
    smaller = BradleyTerry(levels_reward(direction=-1), scale=0.5)
    close(smaller.compare(first, second, prompts).prob_first, [1 / (1 + torch.e), 0.5])


def test_a_preference_is_better_when_larger_whatever_it_was_made_of():
    lifted = BradleyTerry(levels_reward(direction=-1))
    assert (lifted.spec.direction, lifted.spec.arity, lifted.spec.raw_range) == (1, "pairwise", (0.0, 1.0))
    assert WinRate(lifted).spec.direction == 1
    assert not lifted.spec.differentiable


def test_bradley_terry_passes_invalidity_on():
    answer = BradleyTerry(levels_reward()).compare([image(99), image(1)], [image(1), image(2)], [Prompt("a")] * 2)
    assert answer.valid.tolist() == [False, True]
    assert answer.reasons == ("no score", None)


def test_win_rates_of_a_lifted_reward_keep_its_order_and_score_each_sample_once():
    calls = []
    pointwise = FunctionReward(lambda media, prompts: (calls.append(len(media)), [float(level_of(m)) for m in media])[1])
    levels, group_id = [3, 9, 1, 8, 2, 7], [0, 1, 0, 1, 0, 1]
    prompts = [Prompt("a") for _ in levels]  # six objects, two groups
    scores = WinRate(BradleyTerry(pointwise)).score([image(level) for level in levels], prompts, group_id)
    assert calls == [6]
    for group in (0, 1):
        ranked = sorted((level, float(scores.raw[i])) for i, level in enumerate(levels) if group_id[i] == group)
        assert all(low[1] < high[1] for low, high in pairwise(ranked))
    close(scores.raw[0::2].sum(), 1.5)  # G / 2


def test_configured_by_name_and_dispatched():
    reward = load_reward("win_rate", schedule="ring", judge={"reward": "bradley_terry", "scale": 10.0,
                                                            "pointwise": {"reward": "jpeg_compressibility"}})
    assert isinstance(reward, Reward)
    assert reward.spec.name == "jpeg_compressibility_win_rate"
    noise = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    media = [Media("image", noise), Media("image", torch.zeros_like(noise))]
    close(score({"w": reward}, media, [Prompt("a")] * 2, [0, 0])["w"].raw, [0, 1])


def test_wrong_kinds_are_explained():
    with pytest.raises(ValueError, match="JpegCompressibility compares nothing; lift a pointwise reward"):
        WinRate(JpegCompressibility())
    with pytest.raises(ValueError, match=r"judge 'pairwise_judge' is only a name; write judge: {reward: pairwise_judge, \.\.\.}"):
        WinRate("pairwise_judge")
    with pytest.raises(ValueError, match="WinRate gives no score per sample"):
        BradleyTerry(WinRate(Judge(prefers_larger)))
    with pytest.raises(ValueError, match="scale -1 must be above 0"):
        BradleyTerry(JpegCompressibility(), scale=-1)

"""Win rates by judges and scores: order swap, ties, invalid answers, antisymmetry; gains over pairs that are valid on both sides."""

import pytest
import torch

from visalign.compare.comparison import ask_both_orders, contrast, estimate, joined, outcomes, wins_of_judge, wins_of_scores
from visalign.protocols import RewardSpec
from visalign.rewards.function import FunctionReward
from visalign.rewards.pairwise import BradleyTerry
from visalign.types import Comparisons, Media, Prompt, Scores

NAN = float("nan")


def image(level):
    return Media("image", torch.full((3, 4, 4), level, dtype=torch.uint8))


def brightness(media, prompts):
    return [float(one.data.float().mean()) / 10 for one in media]


class Rule:
    """A judge by a function of two grey levels; ``None`` is no answer."""

    spec = RewardSpec(name="rule", arity="pairwise")

    def __init__(self, rule):
        self.rule, self.calls = rule, 0

    def compare(self, first, second, prompts):
        self.calls += 1
        said = [self.rule(int(a.data[0, 0, 0]), int(b.data[0, 0, 0])) for a, b in zip(first, second, strict=True)]
        return Comparisons(torch.tensor([NAN if p is None else p for p in said]), torch.tensor([p is not None for p in said]),
                           tuple("refused" if p is None else None for p in said))


def asked(rule, pairs):
    judge = Rule(rule)
    found = ask_both_orders(judge, [image(a) for a, _ in pairs], [image(b) for _, b in pairs], [Prompt("x")] * len(pairs))
    assert judge.calls == 1
    return found


def brighter(a, b):
    return 0.5 if a == b else float(a > b)


def test_a_consistent_judge_says_the_same_in_both_orders():
    found = asked(brighter, [(9, 3), (3, 9), (5, 5)])
    assert found.prob.tolist() == found.outcome.tolist() == [1.0, 0.0, 0.5]
    assert found.inconsistency.tolist() == [0.0, 0.0, 0.0]
    assert found.agreement.all()


def test_a_judge_that_prefers_a_position_only_gives_ties():
    found = asked(lambda a, b: 1.0, [(9, 3), (3, 9)])
    assert found.prob.tolist() == found.outcome.tolist() == [0.5, 0.5]
    wins = wins_of_judge(found, torch.arange(2))
    assert (wins.rate.mean, wins.rate.low, wins.rate.high) == (0.5, 0.5, 0.5)
    assert (wins.swap_inconsistency, wins.order_agreement) == (1.0, 0.0)


@pytest.mark.parametrize(("forth", "back", "outcome"), [
    (1.0, 0.0, 1.0), (0.0, 1.0, 0.0), (1.0, 1.0, 0.5), (0.0, 0.0, 0.5), (0.5, 0.5, 0.5),
    (1.0, 0.5, 0.5), (0.5, 0.0, 0.5),          # one order ties: no agreement, although the mean probability is 0.75
    (0.9, 0.3, 1.0), (0.6, 0.8, 0.5)])
def test_only_a_verdict_that_both_orders_share_counts(forth, back, outcome):
    found = asked(lambda a, b: forth if a > b else back, [(9, 3)])
    assert found.outcome.tolist() == [outcome]
    assert found.prob.item() == pytest.approx((forth + 1 - back) / 2)
    assert found.inconsistency.item() == pytest.approx(abs(forth + back - 1))


def test_swapping_the_sides_turns_the_rate_around():
    generator = torch.Generator().manual_seed(0)
    pairs = [(int(a), int(b)) for a, b in torch.randint(0, 9, (50, 2), generator=generator)]
    noisy = {(a, b): p for a in range(9) for b, p in enumerate(torch.rand(9, generator=generator).tolist())}
    ab, ba = asked(lambda a, b: noisy[a, b], pairs), asked(lambda a, b: noisy[a, b], [(b, a) for a, b in pairs])
    assert torch.equal(ab.outcome, 1 - ba.outcome)
    assert torch.allclose(ab.prob, 1 - ba.prob)


def test_a_pair_that_fails_in_one_order_is_left_out_and_counted():
    found = asked(lambda a, b: None if (a, b) == (3, 9) else brighter(a, b), [(9, 3), (8, 2), (1, 1)])
    assert found.valid.tolist() == [False, True, True]
    assert found.reasons == ("refused", None, None)
    wins = wins_of_judge(found, torch.arange(3))
    assert (wins.wins, wins.ties, wins.losses, dict(wins.invalid)) == (1, 1, 0, {"refused": 1})
    assert wins.rate.mean == 0.75
    assert (wins.rate.samples, wins.rate.prompts) == (2, 2)


def test_without_any_answer_there_is_no_rate():
    wins = wins_of_judge(asked(lambda a, b: None, [(1, 2), (3, 4)]), torch.arange(2))
    assert wins.rate is None
    assert wins.swap_inconsistency is None
    assert wins.invalid == {"refused": 2}


def test_parts_join_to_the_whole():
    pairs = [(9, 3), (3, 9), (5, 5), (7, 1)]
    rule = lambda a, b: None if a == 7 else brighter(a, b)  # noqa: E731
    whole, both = asked(rule, pairs), joined([asked(rule, pairs[:1]), asked(rule, pairs[1:])])
    assert both.reasons == whole.reasons
    for name in ("prob", "outcome", "valid", "inconsistency", "agreement"):
        assert torch.equal(getattr(both, name).nan_to_num(9), getattr(whole, name).nan_to_num(9))


def test_a_lifted_score_judges_as_the_score_does():
    reward = FunctionReward(brightness, name="brightness")
    base, model = [image(level) for level in (10, 20, 30)], [image(level) for level in (15, 20, 25)]
    prompts = [Prompt("x")] * 3
    by_judge = wins_of_judge(ask_both_orders(BradleyTerry(reward), model, base, prompts), torch.arange(3))
    by_score = wins_of_scores(reward.score(base, prompts, [0, 1, 2]), reward.score(model, prompts, [0, 1, 2]), torch.arange(3))
    assert (by_judge.wins, by_judge.ties, by_judge.losses) == (by_score.wins, by_score.ties, by_score.losses) == (1, 1, 1)
    assert by_judge.rate == by_score.rate


def test_a_smaller_raw_score_wins_where_smaller_is_better():
    base, model = Scores.from_values([2.0, 1.0], direction=-1), Scores.from_values([1.0, 1.0], direction=-1)
    wins = wins_of_scores(base, model, torch.arange(2))
    assert (wins.wins, wins.ties, wins.losses) == (1, 1, 0)


def test_a_score_that_is_missing_on_either_side_counts_nowhere():
    base, model = Scores.from_values([0.0, None, 0.0]), Scores.from_values([1.0, 1.0, None], reason="timeout")
    wins = wins_of_scores(base, model, torch.tensor([0, 1, 2]))
    assert (wins.wins, wins.ties, wins.losses) == (1, 0, 0)
    assert wins.invalid == {"no score": 1, "timeout": 1}
    assert outcomes(base.value, model.value).isnan().tolist() == [False, True, True]


def test_the_gain_is_the_difference_of_the_means_over_shared_pairs():
    base, model = torch.tensor([0.1, 0.2, NAN, 0.4]), torch.tensor([0.3, NAN, 0.9, 0.3])
    found = contrast(base, model, torch.tensor([0, 1, 2, 3]))
    assert found.base.mean == pytest.approx(0.25)
    assert found.model.mean == pytest.approx(0.3)
    assert found.gain.mean == pytest.approx(0.05)
    assert (found.gain.samples, found.gain.prompts) == (2, 2)
    assert contrast(torch.tensor([NAN]), torch.tensor([1.0]), torch.tensor([0])) is None


def test_one_prompt_tells_nothing_about_others_however_many_seeds():
    found = estimate(torch.ones(8), torch.zeros(8, dtype=torch.int64))
    assert (found.mean, found.low, found.high, found.samples, found.prompts) == (1.0, None, None, 8, 1)
    assert not found.excludes(0.5)
    assert estimate(torch.ones(2), torch.arange(2)).excludes(0.5)


def test_a_judge_must_answer_every_question():
    class Short:
        spec = RewardSpec(name="short", arity="pairwise")

        def compare(self, first, second, prompts):
            return Comparisons(torch.ones(1), torch.ones(1, dtype=torch.bool), (None,))

    with pytest.raises(ValueError, match="'short' answered 1 of 4 comparisons"):
        ask_both_orders(Short(), [image(1)] * 2, [image(2)] * 2, [Prompt("x")] * 2)

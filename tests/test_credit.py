"""From scores to advantages: invariances, closed forms and the ways several rewards combine. float64 statistics, seed 0."""

import json
from types import SimpleNamespace

import pytest
import torch

from visalign.credit import CircuitBreaker, RewardFailureError, RewardTerm, assign_credit
from visalign.maths.advantages import AdvantageRule, group_advantages
from visalign.protocols import RewardSpec
from visalign.types import Scores

RULES = [AdvantageRule(centre=centre, scale=scale, level=level, whiten=whiten)
         for centre in ("group", "leave_one_out", "rank") for scale in ("group", "global", "none")
         for level, whiten in (("reward", False), ("advantage", False), ("advantage", True))]


def term(name="r", **options):
    return RewardTerm(name, SimpleNamespace(spec=RewardSpec(name=name), score=None), **options)


def scored(values, direction=1, **details):
    return Scores.from_values(values, direction=direction, details={key: torch.tensor(v) for key, v in details.items()})


def groups(num_groups, size):
    return torch.arange(num_groups).repeat_interleave(size)


def random_values(num, seed=0):
    return torch.randn(num, generator=torch.Generator().manual_seed(seed)).tolist()


def credit(values, group_id, rule=None, **options):
    return assign_credit([term(**options)], {"r": scored(values)}, group_id, rule)


def test_closed_form_of_one_group():
    # (1, 2, 3, 6): mean 3, unbiased variance 14 / 3
    result = credit([1.0, 2.0, 3.0, 6.0], groups(1, 4))
    expected = torch.tensor([-2.0, -1.0, 0.0, 3.0]) / (14 / 3) ** 0.5
    torch.testing.assert_close(result.advantage, expected)
    assert result.valid.all()
    assert result.reward.tolist() == [1, 2, 3, 6]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_an_invalid_sample_changes_nobodys_advantage(rule):
    values, other = random_values(12), random_values(12, seed=1)
    terms = [term("a", weight=0.7), term("b", weight=0.3)]
    without = assign_credit(terms, {"a": scored(values), "b": scored(other)}, groups(3, 4), rule)
    for bad in (None, float("nan"), float("inf")):
        with_bad = assign_credit(terms, {"a": scored([*values, bad]), "b": scored([*other, 1e6])},
                                 torch.cat([groups(3, 4), torch.tensor([1])]), rule)
        assert torch.equal(with_bad.advantage[:12], without.advantage)
        assert with_bad.advantage[12] == 0
        assert not with_bad.valid[12]
        assert with_bad.reward[12].isnan()
    assert without.advantage.abs().sum() > 1


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.7, 0.3), (1.0, -0.5)])
def test_complete_scores_agree_with_the_plain_formula(rule, weights):
    values = torch.tensor([random_values(12), random_values(12, seed=1)])
    scores = {"a": scored(values[0].tolist()), "b": scored(values[1].tolist())}
    result = assign_credit([term("a", weight=weights[0]), term("b", weight=weights[1])], scores, groups(3, 4), rule)
    plain = group_advantages(values.T.double(), torch.ones(12, 2, dtype=torch.bool), groups(3, 4), rule, weights)
    torch.testing.assert_close(result.advantage, plain.advantage.float(), rtol=1e-6, atol=1e-6)


def test_permuting_samples_permutes_advantages():
    values, group_id = random_values(12), groups(3, 4)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    straight = credit(values, group_id).advantage
    shuffled = credit([values[i] for i in order], group_id[order]).advantage
    torch.testing.assert_close(shuffled, straight[order])


def test_group_ids_need_not_be_small_or_consecutive():
    values = random_values(8)
    far = torch.tensor([2**40, 2**40 + 1]).repeat_interleave(4)
    assert torch.equal(credit(values, far).advantage, credit(values, groups(2, 4)).advantage)
    with pytest.raises(ValueError, match=r"group_id is torch\.float32; keep it int64"):
        credit(values, groups(2, 4).float())


def test_direction_comes_before_everything():
    values = random_values(8)
    less = assign_credit([term()], {"r": scored(values, direction=-1)}, groups(2, 4))
    torch.testing.assert_close(less.advantage, -credit(values, groups(2, 4)).advantage)
    torch.testing.assert_close(torch.tensor(less.metrics["reward/r/mean"]), torch.tensor(values).mean().double().float())
    assert less.metrics["credit/reward_mean"] == pytest.approx(-less.metrics["reward/r/mean"])


def test_standardisation_then_weights():
    scores = {"a": scored([22.0, 24.8]), "b": scored([0.5, 0.25])}
    terms = [term("a", weight=2.0, shift=22.0, scale=1.4), term("b", weight=-1.0)]
    result = assign_credit(terms, scores, groups(1, 2), AdvantageRule(scale="none"))
    torch.testing.assert_close(result.reward, torch.tensor([-0.5, 3.75]))
    torch.testing.assert_close(result.advantage, torch.tensor([-2.125, 2.125]))


def test_the_two_levels_disagree_as_predicted():
    # a and b rank two samples oppositely, a with a spread 10 times larger.
    scores = {"a": scored([0.0, 10.0]), "b": scored([1.0, 0.0])}
    half = 0.5 ** 0.5  # |advantage| of a pair with the unbiased std
    terms = [term("a"), term("b", weight=2.0)]
    reward = assign_credit(terms, scores, groups(1, 2), AdvantageRule(level="reward"))
    advantage = assign_credit(terms, scores, groups(1, 2), AdvantageRule(level="advantage", whiten=False))
    torch.testing.assert_close(reward.advantage, torch.tensor([-half, half]))        # 10 - 2 > 0: a decides
    torch.testing.assert_close(advantage.advantage, torch.tensor([half, -half]))     # (1 - 2) of a unit: b decides


def test_whitening_gives_unit_spread_whatever_the_weights():
    scores = {"a": scored(random_values(32)), "b": scored(random_values(32, seed=1))}
    for weights in ((1, 1), (30, 10)):
        terms = [term("a", weight=weights[0]), term("b", weight=weights[1])]
        result = assign_credit(terms, scores, groups(4, 8), AdvantageRule(level="advantage", whiten=True, clip=None))
        assert result.advantage.double().std() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("level", ["reward", "advantage"])
def test_groups_without_spread_are_exactly_zero(level):
    values = [0.1] * 4 + random_values(4)
    scores = {"a": scored(values), "b": scored([0.7] * 8)}
    result = assign_credit([term("a", weight=1 / 3), term("b", weight=0.1)], scores, groups(2, 4), AdvantageRule(level=level))
    assert (result.advantage[:4] == 0).all()
    assert result.valid.all()
    assert result.metrics["credit/zero_spread_fraction"] == 0.5
    torch.testing.assert_close(result.advantage[4:].sum(), torch.tensor(0.0), atol=1e-6, rtol=0)


def test_clip():
    values = [100.0] + [0.0] * 63
    assert credit(values, groups(1, 64), AdvantageRule(clip=2.0)).advantage[0] == 2
    result = credit(values, groups(1, 64), AdvantageRule(clip=None))
    assert result.advantage[0] == pytest.approx(63 / 8)  # (1 - 1/64) / sqrt(1/64)
    assert credit(values, groups(1, 64), AdvantageRule(clip=2.0)).metrics["credit/clipped_fraction"] == pytest.approx(1 / 64)


class TestMissingScores:
    def test_required_scores_propagate_invalidity(self):
        a, b = [1.0, 2.0, 4.0, 8.0, 3.0], [1.0, 0.0, None, 2.0, 5.0]
        both = assign_credit([term("a"), term("b")], {"a": scored(a), "b": scored(b)}, groups(1, 5))
        keep = torch.tensor([0, 1, 3, 4])
        alone = assign_credit([term("a"), term("b")], {"a": scored([a[i] for i in keep]), "b": scored([b[i] for i in keep])},
                              groups(1, 4))
        torch.testing.assert_close(both.advantage[keep], alone.advantage)
        assert both.valid.tolist() == [True, True, False, True, True]
        assert both.metrics["reward/a/valid_rate"] == 1.0
        assert both.metrics["reward/b/valid_rate"] == 0.8

    @pytest.mark.parametrize("rule", RULES, ids=str)
    def test_an_optional_reward_is_dropped_for_the_whole_group_and_only_there(self, rule):
        a, b = random_values(8), random_values(8, seed=1)
        terms = [term("a", weight=0.6), term("b", weight=-0.2, required=False)]
        result = assign_credit(terms, {"a": scored(a), "b": scored([None, *b[1:]])}, groups(2, 4), rule)
        assert result.valid.all()
        # In group 0 the whole weight 0.8 is a's; in group 1 nothing changes.
        torch.testing.assert_close(result.reward[:4], 0.8 * torch.tensor(a[:4]))
        torch.testing.assert_close(result.reward[4:], 0.6 * torch.tensor(a[4:]) - 0.2 * torch.tensor(b[4:]))
        assert result.metrics["reward/b/groups_without"] == 0.5
        assert torch.isfinite(result.advantage).all()

    def test_no_sibling_is_judged_on_another_sum(self):
        # b would add 5 to everyone; were it left out for one sample alone, that sample would come out worst.
        terms = [term("a"), term("b", required=False)]
        scores = {"a": scored([3.0, 2.0, 1.0]), "b": scored([None, 5.0, 5.0])}
        assert assign_credit(terms, scores, groups(1, 3)).advantage.argsort(descending=True).tolist() == [0, 1, 2]

    def test_an_optional_score_missing_only_where_the_sample_is_invalid_anyway_costs_nothing(self):
        terms = [term("a"), term("b", required=False)]
        scores = {"a": scored([None, 2.0, 1.0, 4.0]), "b": scored([None, 5.0, 3.0, 0.0])}
        torch.testing.assert_close(assign_credit(terms, scores, groups(1, 4)).reward[1:], torch.tensor([7.0, 4.0, 4.0]))

    @pytest.mark.parametrize(("values", "kept"), [
        ([1.0, None, None, None], False), ([1.0, 2.0, None, None], False), ([1.0, 2.0, 3.0, None], True)])
    @pytest.mark.parametrize("level", ["reward", "advantage"])
    def test_a_group_with_half_its_samples_or_less_is_left_out(self, values, kept, level):
        result = assign_credit([term()], {"r": scored([*values, 0.0, 1.0, 2.0, 3.0])}, groups(2, 4), AdvantageRule(level=level))
        assert bool(result.valid[:4].any()) is kept
        assert bool(result.advantage[:4].any()) is kept
        assert result.metrics["credit/dropped_group_fraction"] == (0 if kept else 0.5)
        plain = group_advantages(torch.tensor([float("nan") if v is None else v for v in [*values, 0.0, 1.0, 2.0, 3.0]]),
                                 scored([*values, 0.0, 1.0, 2.0, 3.0]).valid, groups(2, 4))
        assert plain.dropped_groups == (0 if kept else 1)  # the same rule as the formula's own

    @pytest.mark.parametrize("level", ["reward", "advantage"])
    def test_a_group_of_one_compares_nothing(self, level):
        result = assign_credit([term()], {"r": scored([5.0, 0.0, 1.0])}, torch.tensor([0, 1, 1]), AdvantageRule(level=level))
        assert result.valid.tolist() == [False, True, True]
        assert result.advantage[0] == 0

    def test_nothing_valid_gives_zeros_and_no_nan_metric(self):
        result = credit([None] * 4, groups(1, 4))
        assert (result.advantage == 0).all()
        assert not result.valid.any()
        assert not any(value != value for value in result.metrics.values())


def test_metrics_of_one_reward():
    # groups (0, 2) and (10, 14): within-group population stds 1 and 2
    result = assign_credit([term()], {"r": scored([0.0, 2.0, 10.0, 14.0], colour=[1.0, 0.0, float("nan"), 0.5])}, groups(2, 2))
    expected = {"mean": 6.5, "std": 5.7227615, "group_std": 1.5, "valid_rate": 1.0, "colour": 0.5}
    assert {key: result.metrics[f"reward/r/{key}"] for key in expected} == pytest.approx(expected)
    assert all("/" in key and isinstance(value, float) for key, value in result.metrics.items())


@pytest.mark.parametrize(("terms", "message"), [
    ([term("a"), term("a")], "two rewards share a name: a, a"),
    ([term("a", required=False)], "no reward among a is required"),
    ([term("c")], "no scores for the reward 'c'; scored were: a, short"),
    ([term("short")], "reward 'short' scored 1 samples, there are 2 group ids"),
])
def test_inputs_that_do_not_fit(terms, message):
    with pytest.raises(ValueError, match=message):
        assign_credit(terms, {"a": scored([1.0, 2.0]), "short": scored([1.0])}, groups(1, 2))


@pytest.mark.parametrize(("options", "message"), [
    ({"weight": 0.0}, "does nothing"), ({"weight": float("nan")}, "does nothing"),
    ({"scale": 0.0}, "a scale above 0"), ({"scale": -1.0}, "direction=-1"), ({"shift": float("inf")}, "finite shift"),
])
def test_terms_that_mean_nothing(options, message):
    with pytest.raises(ValueError, match=message):
        term(**options)


def failing(num_failures, num=20, reason="timeout"):
    return {"judge": Scores.from_values([None] * num_failures + [1.0] * (num - num_failures), reason=reason)}


class TestCircuitBreaker:
    def test_trips_above_the_tolerated_number_and_says_why(self):
        breaker = CircuitBreaker(threshold=0.05, window=100)
        for _ in range(2):
            breaker.update(failing(2))
        breaker.update(failing(1, reason="parse"))  # 5 of 60
        with pytest.raises(RewardFailureError, match=r"'judge' failed for 6 of the last 80 samples \(tolerated: 5% of 100\): "
                                               r"4 x timeout, 2 x parse\..*resume"):
            breaker.update(failing(1, reason="parse"))

    def test_old_failures_are_forgotten(self):
        breaker = CircuitBreaker(threshold=0.05, window=100)
        for _ in range(10):
            for failures in (5, 0, 0, 0, 0):  # exactly 5 in any 100 samples
                breaker.update(failing(failures))

    def test_a_reward_that_gives_nothing_stops_the_run_at_once(self):
        with pytest.raises(RewardFailureError, match="gave no score for any of 4 samples: 4 x refused"):
            CircuitBreaker().update(failing(4, num=4, reason="refused"))

    def test_it_names_the_failures_of_that_update_alone(self):
        breaker = CircuitBreaker()
        breaker.update(failing(3, reason="parse"))
        with pytest.raises(RewardFailureError, match=r"any of 4 samples: 4 x refused\. "):
            breaker.update(failing(4, num=4, reason="refused"))

    def test_rewards_are_counted_apart(self):
        breaker = CircuitBreaker(threshold=0.05, window=100)
        for name in ("a", "b", "c"):
            breaker.update({name: failing(4)["judge"]})

    def test_a_resumed_run_trips_at_the_same_update(self):
        breaker = CircuitBreaker(threshold=0.05, window=100)
        breaker.update(failing(5))
        resumed = CircuitBreaker(threshold=0.05, window=100)
        resumed.load_state_dict(json.loads(json.dumps(breaker.state_dict())))
        for each in (breaker, resumed):
            with pytest.raises(RewardFailureError, match=r"6 of the last 40 samples"):
                each.update(failing(1))

    @pytest.mark.parametrize(("threshold", "window"), [(0, 10), (1.5, 10), (0.05, 0)])
    def test_bad_settings(self, threshold, window):
        with pytest.raises(ValueError, match="must lie in"):
            CircuitBreaker(threshold, window)

"""The rule on numbers whose verdict can be told by hand, its error rates on simulated evaluations, and what it refuses."""

import math

import pytest
import torch

from visalign.guards.rule import Look, judge, shifts

SPREAD = torch.tensor([-1.0, 1.0], dtype=torch.float64).repeat(32)  # 64 prompts, mean 0, standard deviation 1
JITTER = 0.05 * torch.randn(64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def look(iteration, reward, **guards):
    """Everybody moves by about the same amount, so that changes are sure; ``None`` for nobody knows."""
    def values(level):
        return torch.full((64,), math.nan, dtype=torch.float64) if level is None else SPREAD + level + iteration * (JITTER - JITTER.mean())

    return Look(iteration, values(reward), {name: values(level) for name, level in guards.items()})


def verdict(*looks, fall=0.1, confidence=0.95):
    return judge(looks, fall=fall, confidence=confidence)


def test_a_guard_that_falls_while_the_reward_rises_is_hacking():
    found = verdict(look(0, 0.0, clip=0.0), look(1, 0.5, clip=0.4), look(2, 1.0, clip=0.1))
    (fall,) = found.alarms
    assert (fall.guard, fall.peak, fall.kind) == ("clip", 1, "hacking")
    assert fall.drop == pytest.approx(0.3)
    assert fall.reward_change == pytest.approx(0.5)
    assert found.best == 1
    assert found.standing == pytest.approx(0.1)


def test_if_everything_falls_it_is_collapse():
    (fall,) = verdict(look(0, 0.0, clip=0.0), look(1, 0.5, clip=0.4), look(2, 0.1, clip=0.1)).alarms
    assert fall.kind == "collapse"


def test_with_a_reward_that_evaluations_do_not_hold_a_fall_counts():
    (fall,) = verdict(look(0, None, clip=0.0), look(1, None, clip=-0.3)).alarms
    assert fall.kind == "hacking"
    assert math.isnan(fall.reward_change)


@pytest.mark.parametrize("level", [0.35, 0.4, 0.6])
def test_small_falls_and_rises_are_left_alone(level):
    assert not verdict(look(0, 0.0, clip=0.0), look(1, 0.5, clip=0.4), look(2, 1.0, clip=level)).alarms


def test_a_fall_that_could_be_chance_is_none():
    """The same drop of 0.3, but prompts disagree by ten times as much."""
    noise = 10 * torch.randn(64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    before = look(0, 0.0, clip=0.0)
    after = Look(1, before.reward + 1, {"clip": SPREAD - 0.3 + noise - noise.mean()})
    (fall,) = verdict(before, after).falls
    assert fall.drop == pytest.approx(0.3)
    assert not fall.sure
    assert not verdict(before, after).alarms


def test_any_guard_may_alarm_each_from_its_own_peak():
    looks = [look(0, 0.0, a=0.0, b=0.0), look(1, 0.1, a=0.5, b=0.1), look(2, 0.2, a=0.3, b=0.6), look(3, 0.3, a=0.5, b=0.2)]
    found = verdict(*looks)
    assert [(fall.guard, fall.peak) for fall in found.falls] == [("a", 1), ("b", 2)]
    assert [fall.guard for fall in found.alarms] == ["b"]
    assert found.best == 2  # (0.3 + 0.6) / 2 is the highest average


def test_without_guards_the_training_reward_chooses_the_best_and_nothing_alarms():
    found = verdict(look(0, 0.0), look(1, 0.5), look(2, 0.3))
    assert (found.falls, found.alarms, found.best) == ((), (), 1)


def test_units_do_not_matter():
    looks = [look(0, 0.0, clip=0.0), look(1, 0.5, clip=0.4), look(2, 1.0, clip=0.1)]
    scaled = [Look(one.iteration, 1000 * one.reward - 7, {"clip": 1e-3 * one.guards["clip"] + 22}) for one in looks]
    assert verdict(*scaled).alarms[0].drop == pytest.approx(verdict(*looks).alarms[0].drop)
    assert verdict(*scaled).standing == pytest.approx(verdict(*looks).standing)


def test_prompts_without_a_score_are_left_out_of_the_comparison():
    looks = [look(0, 0.0, clip=0.0), look(1, 0.5, clip=0.4), look(2, 1.0, clip=0.1)]
    holes = [Look(one.iteration, one.reward.clone(), {"clip": one.guards["clip"].clone()}) for one in looks]
    for one, rows in zip(holes, ([0, 1], [2, 3], [4, 5]), strict=True):
        one.guards["clip"][rows] = math.nan
    assert verdict(*holes).alarms[0].drop == pytest.approx(0.3, abs=0.02)
    nobody = Look(2, looks[2].reward, {"clip": torch.full((64,), math.nan, dtype=torch.float64)})
    assert not verdict(looks[0], looks[1], nobody).falls


def test_a_judge_of_pairs_has_no_spread_at_the_start_and_is_measured_by_its_first():
    half = torch.full((64,), 0.5, dtype=torch.float64)
    looks = [Look(0, SPREAD, {"judge": half}), Look(1, SPREAD + 1, {"judge": half + 0.2 + 0.1 * SPREAD}),
             Look(2, SPREAD + 2, {"judge": half + 0.1 * SPREAD + 0.01 * JITTER})]
    (fall,) = verdict(*looks).alarms
    assert fall.drop == pytest.approx(2, abs=0.01)
    assert verdict(*looks[:2]).standing == pytest.approx(2)


def test_a_guard_that_says_the_same_of_every_prompt_is_not_judged():
    flat = [Look(k, SPREAD + k, {"clip": torch.full((64,), 1.0 - k, dtype=torch.float64)}) for k in range(2)]
    assert not verdict(*flat).falls


@pytest.mark.parametrize(("drift", "low", "high"), [(0.0, 0.0, 0.09), (-0.3, 0.95, 1.0)])
def test_error_rates_over_simulated_runs(drift, low, high):
    """200 runs of 8 evaluations on 128 prompts; between evaluations a prompt's score moves by half of what prompts differ by.

    At 0.95 five runs of a hundred may be stopped for nothing (200 runs: up to 18 by chance), and a fall of 0.3 is hardly ever missed."""
    generator, alarmed = torch.Generator().manual_seed(0), 0
    for _ in range(200):
        base = torch.randn(128, dtype=torch.float64, generator=generator)
        noise = 0.5 * torch.randn(8, 128, dtype=torch.float64, generator=generator)
        level = [drift * max(0, k - 3) / 4 for k in range(8)]
        looks = [Look(k, base + 0.1 * k, {"clip": base + noise[k] + level[k]}) for k in range(8)]
        alarmed += any(judge(looks[:end], fall=0.1, confidence=0.95).alarms for end in range(2, 9))
    assert low <= alarmed / 200 <= high


def test_wrong_input_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        judge([], fall=0.1, confidence=0.95)
    with pytest.raises(ValueError, match="same prompts"):
        verdict(look(0, 0.0, clip=0.0), Look(1, torch.zeros(3), {"clip": torch.zeros(3)}))


def test_media_that_change_by_a_standard_deviation_or_lose_half_their_diversity_are_named():
    before = {"edges": SPREAD, "colours": SPREAD, "flat": torch.ones(64, dtype=torch.float64)}
    now = {"edges": SPREAD - 1.2, "colours": SPREAD + 0.9, "flat": torch.zeros(64, dtype=torch.float64)}
    assert [(one.name, round(one.change, 6)) for one in shifts(before, now, 1.0, (9.0, 5.1))] == [("edges", -1.2)]
    (lost,) = shifts({}, {}, 1.0, (9.0, 4.0))
    assert (lost.name, lost.change) == ("diversity", pytest.approx(3 / 8))
    assert "38%" in lost.describe()
    assert shifts({}, {}, 1.0, None) == shifts({}, {}, 1.0, (1.0, 1.0)) == []

"""Group statistics against closed forms; what is masked must be exactly zero and change nobody else."""

import math

import pytest
import torch

from visalign.maths.advantages import AdvantageRule, group_advantages

FLOW_GRPO = {"ddof": 0, "eps": 1e-4}


def advantages(rewards, groups=None, valid=None, weights=None, dtype=torch.float64, **rule):
    rewards = torch.tensor(rewards, dtype=dtype)
    groups = torch.zeros(len(rewards), dtype=torch.int64) if groups is None else torch.tensor(groups)
    valid = torch.ones_like(rewards, dtype=torch.bool) if valid is None else torch.tensor(valid)
    return group_advantages(rewards, valid, groups, AdvantageRule(**rule), weights)


def rounded(result, digits=4):
    return [round(value, digits) for value in result.advantage.tolist()]


def test_global_std_shrinks_advantages_when_prompts_differ():
    """Groups {1, 2} and {11, 12}: +-0.0995 with the global std, +-0.9998 with the group's."""
    rewards, groups = [1.0, 2.0, 11.0, 12.0], [0, 0, 1, 1]
    assert rounded(advantages(rewards, groups, scale="global", **FLOW_GRPO)) == [-0.0995, 0.0995, -0.0995, 0.0995]
    assert rounded(advantages(rewards, groups, scale="group", **FLOW_GRPO)) == [-0.9998, 0.9998, -0.9998, 0.9998]
    assert rounded(advantages(rewards, groups, scale="none")) == [-0.5, 0.5, -0.5, 0.5]


@pytest.mark.parametrize("scale", ["group", "global", "none"])
@pytest.mark.parametrize("centre", ["group", "leave_one_out", "rank"])
@pytest.mark.parametrize("value", [0.1, 0.7, 26.37, -1234.567, 0.0])
def test_constant_float32_groups_are_exactly_zero(value, centre, scale):
    """In float32 the mean of equal rewards can be one ulp off and advantages reach 0.97."""
    result = advantages([value] * 12 + [1.0, 2.0], [0] * 12 + [1] * 2, dtype=torch.float32, centre=centre, scale=scale)
    assert result.advantage[:12].eq(0).all()
    assert result.advantage[12:].ne(0).all()
    assert result.zero_spread == 0.5


def test_rounding_noise_is_no_information():
    one_ulp = torch.nextafter(torch.tensor(26.37), torch.tensor(27.0)).item()
    for centre in ("group", "rank"):
        assert advantages([26.37, one_ulp, 26.37, one_ulp], dtype=torch.float32, centre=centre).advantage.eq(0).all()


def test_a_group_of_one_is_zero():
    result = advantages([3.0, 1.0, 2.0], [0, 1, 1])
    assert result.advantage[0] == 0
    assert (result.num_groups, result.dropped_groups) == (2, 1)


@pytest.mark.parametrize(("ddof", "eps"), [(0, 1e-6), (1, 1e-8)])
def test_group_z_score(ddof, eps):
    rewards = [0.2, 0.9, 0.4, 0.1]
    mean = sum(rewards) / 4
    std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / (4 - ddof))
    expected = [(r - mean) / (std + eps) for r in rewards]
    assert advantages(rewards, ddof=ddof, eps=eps).advantage.tolist() == pytest.approx(expected, rel=1e-14)


def test_leave_one_out_subtracts_the_others():
    rewards = [1.0, 2.0, 6.0]
    expected = [1 - 4, 2 - 3.5, 6 - 1.5]
    assert advantages(rewards, centre="leave_one_out", scale="none").advantage.tolist() == pytest.approx(expected)


def test_ranks_ignore_magnitudes_and_average_ties():
    result = advantages([0.1, 100.0, 0.2, 0.2], centre="rank", scale="none")
    assert result.advantage.tolist() == pytest.approx([-0.5, 0.5, 0.0, 0.0])


@pytest.mark.parametrize("centre", ["group", "leave_one_out", "rank"])
@pytest.mark.parametrize("scale", ["group", "global", "none"])
@pytest.mark.parametrize("level", ["reward", "advantage"])
def test_every_group_sums_to_zero_and_order_does_not_matter(centre, scale, level):
    generator = torch.Generator().manual_seed(0)
    rewards, groups = torch.randn(24, 2, generator=generator, dtype=torch.float64), torch.arange(24) % 4 * 1_000_000_007
    valid = torch.ones(24, 2, dtype=torch.bool)
    rule = AdvantageRule(centre=centre, scale=scale, level=level, clip=None)
    result = group_advantages(rewards, valid, groups, rule, [1.0, 0.5]).advantage
    for g in range(4):
        assert abs(float(result[g::4].sum())) < 1e-12
    order = torch.randperm(24, generator=generator)
    shuffled = group_advantages(rewards[order], valid, groups[order], rule, [1.0, 0.5]).advantage
    torch.testing.assert_close(shuffled, result[order], atol=1e-13, rtol=0)


@pytest.mark.parametrize("scale", ["group", "global"])
def test_normalised_advantages_ignore_shift_and_scale_of_the_reward(scale):
    rewards, groups = [0.3, 0.9, 0.5, 0.6, 0.2, 0.8], [0, 0, 0, 1, 1, 1]
    plain = advantages(rewards, groups, scale=scale, eps=0.0).advantage
    moved = advantages([100 * r - 7 for r in rewards], groups, scale=scale, eps=0.0).advantage
    torch.testing.assert_close(plain, moved, atol=1e-11, rtol=0)


@pytest.mark.parametrize("rule", [
    {}, {"scale": "global"}, {"scale": "none", "centre": "leave_one_out"}, {"centre": "rank"}, {"level": "advantage"},
])
@pytest.mark.parametrize("garbage", [math.nan, math.inf, 1e30, 0.0])
def test_an_invalid_sample_is_zero_and_changes_nobody(rule, garbage):
    rewards, groups = [0.3, 0.9, 0.5, 0.6, 0.2, 0.8], [0, 0, 0, 1, 1, 1]
    without = advantages(rewards, groups, **rule)
    dirty = advantages([*rewards, garbage], [*groups, 0], [True] * 6 + [False], **rule)
    assert dirty.advantage[6] == 0
    assert torch.equal(dirty.advantage[:6], without.advantage)
    assert dirty.group_std == without.group_std


def test_groups_with_too_few_valid_samples_are_dropped_whole():
    """2 of 4 is not more than half, 3 of 4 is; 1 of 1 is fewer than 2."""
    rewards = [1.0, 2.0, 3.0, 4.0] * 2 + [5.0]
    valid = [True, True, False, False, True, True, True, False, True]
    result = advantages(rewards, [0] * 4 + [1] * 4 + [2], valid)
    assert result.advantage[:4].eq(0).all()
    assert result.advantage[4:7].tolist() == pytest.approx([-1, 0, 1], abs=1e-7)
    assert result.advantage[7:].eq(0).all()
    assert (result.num_groups, result.dropped_groups) == (3, 2)


def test_a_batch_without_one_usable_group_is_all_zero():
    result = advantages([1.0, math.nan], [0, 0], [True, False])
    assert result.advantage.eq(0).all()
    assert (result.dropped_groups, result.zero_spread) == (1, 0.0)
    assert math.isnan(result.group_std)
    whitened = advantages([1.0, math.nan], [0, 0], [True, False], level="advantage")
    assert whitened.advantage.eq(0).all()


def test_clip():
    rewards = [0.0] * 99 + [1.0]
    assert float(advantages(rewards).advantage.max()) == 5.0
    assert float(advantages(rewards, clip=None).advantage.max()) == pytest.approx(9.9, abs=1e-5)
    assert float(advantages(rewards, clip=2.0).advantage.max()) == 2.0


def test_summing_rewards_first_lets_the_large_scale_win():
    """Two opposed rewards, one on a scale of 100: "reward" follows the large one, "advantage" weighs both alike."""
    rewards = [[0.0, 300.0], [1.0, 200.0], [2.0, 100.0], [3.0, 0.0]]
    first = advantages(rewards, level="reward").advantage
    assert first.tolist() == pytest.approx([1.1619, 0.3873, -0.3873, -1.1619], abs=1e-4)
    # The z-scores cancel up to rounding, which whitening must not blow up.
    assert advantages(rewards, level="advantage").advantage.eq(0).all()


def test_gdpo_by_hand():
    """Per-reward group z-scores, weights 2 and 1, then the batch's std; a batch of two groups."""
    table = torch.tensor([[0.1, 5.0], [0.4, 3.0], [0.9, 4.0], [0.2, 9.0], [0.3, 7.0], [0.8, 1.0]], dtype=torch.float64)
    expected = torch.zeros(6, dtype=torch.float64)
    for rows in (slice(0, 3), slice(3, 6)):
        z = (table[rows] - table[rows].mean(0)) / (table[rows].std(0) + 1e-8)
        expected[rows] = 2 * z[:, 0] + z[:, 1]
    unwhitened = advantages(table.tolist(), [0] * 3 + [1] * 3, weights=[2.0, 1.0], level="advantage", whiten=False)
    torch.testing.assert_close(unwhitened.advantage, expected)
    whitened = advantages(table.tolist(), [0] * 3 + [1] * 3, weights=[2.0, 1.0], level="advantage")
    torch.testing.assert_close(whitened.advantage, expected / (expected.std() + 1e-8))
    assert float(whitened.advantage.std()) == pytest.approx(1, abs=1e-7)


def test_a_reward_of_weight_zero_is_only_logged():
    rewards = [[0.1, math.nan], [0.4, 3.0], [0.9, 4.0]]
    result = advantages(rewards, valid=[[True, False], [True, True], [True, True]], weights=[1.0, 0.0])
    assert torch.equal(result.advantage, advantages([0.1, 0.4, 0.9]).advantage)


def test_a_sample_with_one_failed_reward_is_invalid():
    rewards = [[0.1, math.nan], [0.4, 3.0], [0.9, 4.0], [0.5, 6.0]]
    valid = [[True, False], [True, True], [True, True], [True, True]]
    assert advantages(rewards, valid=valid).advantage[0] == 0
    assert torch.equal(advantages(rewards, valid=valid).advantage[1:], advantages(rewards[1:]).advantage)


def test_dtype_follows_the_rewards_and_statistics_are_float64():
    # In float32 the spread of 2e-1 around 1e6 has one significant digit left.
    result = advantages([1e6, 1e6 + 2.0, 1e6 + 4.0], dtype=torch.float32)
    assert result.advantage.dtype == torch.float32
    assert result.advantage.tolist() == pytest.approx([-1.0, 0.0, 1.0], abs=1e-6)
    integers = group_advantages(torch.tensor([1, 2]), torch.tensor([True, True]), torch.tensor([0, 0]))
    assert integers.advantage.dtype == torch.float32


def test_group_std_is_reported_over_kept_groups():
    result = advantages([1.0, 3.0, 10.0, 14.0, 7.0], [0, 0, 1, 1, 2], ddof=0)
    assert result.group_std == pytest.approx(1.5)


def test_large_group_ids_do_not_merge():
    """2^40 and 2^40 + 1 are one number in float32."""
    groups = [1 << 40, 1 << 40, (1 << 40) + 1, (1 << 40) + 1]
    assert advantages([1.0, 2.0, 11.0, 12.0], groups).num_groups == 2


@pytest.mark.parametrize(("call", "message"), [
    (lambda: AdvantageRule(centre="median"), "AdvantageRule.centre must be one of group, leave_one_out, rank, got 'median'"),
    (lambda: AdvantageRule(scale="batch"), "AdvantageRule.scale"),
    (lambda: AdvantageRule(level="both"), "AdvantageRule.level"),
    (lambda: AdvantageRule(ddof=2), "AdvantageRule.ddof"),
    (lambda: AdvantageRule(eps=-1.0), "AdvantageRule.eps"),
    (lambda: AdvantageRule(clip=0.0), "AdvantageRule.clip must be > 0"),
    (lambda: advantages([1.0, math.nan]), "mark that sample invalid"),
    (lambda: advantages([[1.0, 2.0]], weights=[1.0]), "2 rewards need 2 weights, got 1"),
    (lambda: advantages([1.0, 2.0], weights=[0.0]), "at least one must differ from 0"),
    (lambda: advantages([1.0, 2.0], weights=[math.inf]), "weights must be finite"),
    (lambda: advantages([1.0, 2.0], groups=[0]), "need one shape"),
    (lambda: advantages([1.0, 2.0], valid=[1.0, 1.0]), "valid must be bool"),
    (lambda: advantages([1.0, 2.0], groups=[0.0, 0.0]), "group_id int64"),
])
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()

"""Margins, labels, lists, weights, exploration: numbers, identities with the pair losses, and exact gradients of every loss."""

import itertools
import math

import pytest
import torch

from visalign.maths.preference import LOSSES, LossInput, bind_loss
from visalign.maths.preference_margins import PICKSCORE_RANGE, histogram_probability, rarity_weights
from visalign.maths.preference_models import bradley_terry_ties, skew_scores
from visalign.maths.preference_safeguard import safeguard, scale_loser
from visalign.maths.preference_weights import curated_distribution, curation_weights

REQUIRED = {"smpo": {"low": 0.0, "high": 1.0}}


def rows(*values):
    return torch.tensor(values, dtype=torch.float64)


def inputs(*u, kappa=1.0, **extra):
    """One group with the implicit rewards ``u``."""
    policy = -rows(u) / kappa
    return LossInput(policy=policy.requires_grad_(), reference=torch.zeros_like(policy), kappa=kappa, **extra)


def value(name, given, **parameters):
    return float(bind_loss(name, **parameters)(given).detach())


def gradient(name, given, **parameters):
    (slope,) = torch.autograd.grad(bind_loss(name, **parameters)(given).sum(), given.policy)
    return slope


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_gradients_are_exact(name):
    needs = LOSSES[name].needs
    generator = torch.Generator().manual_seed(0)
    size = {"pair": 2, "label": 1, "list": 4, "weight": 3}[needs.group]
    policy, reference, old = (0.5 + 0.2 * torch.rand(3, size, generator=generator, dtype=torch.float64) for _ in range(3))
    reward = torch.rand(3, size, generator=generator, dtype=torch.float64).sort(dim=1, descending=True).values
    marked = torch.ones(3, size, dtype=torch.bool)
    # Smaller than the clamp of 'spo', larger than the step of the finite difference.
    reference = policy + 0.08 * (reference - 0.6)
    loss = bind_loss(name, **{**REQUIRED.get(name, {}), **({"scale": 2.0} if name == "mapo" else {})})

    def total(errors):
        return loss(LossInput(
            policy=errors, reference=reference, old=old, kappa=5.0, reward=reward, label=torch.full_like(policy, 0.3),
            from_reference=marked, statistics={"kl": 0.004, "mean_weight": 1.7}, weight=rows(0.5, 1.0, 2.0)))

    assert torch.autograd.gradcheck(total, (policy.requires_grad_(),))


# --- margins and weights of pairs ---------------------------------------------------------------------------------------------


def test_smpo_numbers():
    low, high = PICKSCORE_RANGE
    for reward, s, p in [((0.22, 0.21), 0.300065, 0.5150033), ((high, low), 4.62117, 0.7310586), ((0.2, 0.2), 0.0, 0.5)]:
        given = inputs(1.3, 0.0, reward=rows(reward))
        assert value("smpo", given, low=low, high=high) == pytest.approx(math.log1p(math.exp(-s * 1.3)), abs=1e-6)
        assert s == pytest.approx(10 * (2 * p - 1), abs=1e-5)
    assert gradient("smpo", inputs(1.3, 0.0, reward=rows((0.2, 0.2))), low=low, high=high).abs().max() == 0


def test_smpo_follows_the_reward_where_the_order_contradicts_it():
    right, wrong = inputs(0.4, 0.1, reward=rows((0.9, 0.2))), inputs(0.1, 0.4, reward=rows((0.2, 0.9)))
    assert value("smpo", right, low=0.0, high=1.0) == pytest.approx(value("smpo", wrong, low=0.0, high=1.0))


def test_odpo_asks_for_a_margin():
    assert value("odpo", inputs(0.7, 0.0, reward=rows((0.9, 0.2))), alpha=1.0) == pytest.approx(math.log(2))
    assert value("odpo", inputs(0.7, 0.0, reward=rows((0.5, 0.5)))) == pytest.approx(value("dpo", inputs(0.7, 0.0)))


def test_modpo_learns_the_weighted_sum_of_all_rewards():
    """Labels follow Bradley-Terry of the own reward; the expected loss is flat at u = w gap_own + gap_others."""
    own, others, w = 0.8, -0.5, 0.3
    prefers = 1 / (1 + math.exp(-own))
    u = w * own + others
    first, second = (gradient("modpo", given, own_weight=w) for given in (
        inputs(u, 0.0, reward=rows((others, 0.0))), inputs(0.0, u, reward=rows((0.0, others)))))
    assert prefers * float(first[0, 0]) + (1 - prefers) * float(second[0, 1]) == pytest.approx(0, abs=1e-12)


def test_a_weight_multiplies_the_loss_of_its_group():
    policy, reference = rows((0.1, 0.2), (0.3, 0.1)), rows((0.2, 0.1), (0.1, 0.2))
    plain = LOSSES["dpo"](LossInput(policy=policy, reference=reference, kappa=3.0))
    weighted = LOSSES["dpo"](LossInput(policy=policy, reference=reference, kappa=3.0, weight=rows(2.0, 0.0)))
    assert torch.equal(weighted, plain * rows(2.0, 0.0))


def test_rarity_weights_even_out_the_histogram():
    score = rows(0.0, 0.1, 0.05, 1.0)
    probability = histogram_probability(score, num_bins=2)
    assert probability.tolist() == [0.75, 0.75, 0.75, 0.25]
    assert rarity_weights(probability).tolist() == pytest.approx([0.96, 0.96, 0.96, 2.88])
    assert rarity_weights(probability, power=0.0).tolist() == [1, 1, 1, 1]
    assert histogram_probability(rows(2.0, 2.0)).tolist() == [1, 1]
    with pytest.raises(ValueError, match=r"in \(0, 1\]"):
        rarity_weights(rows(0.0, 0.5))
    with pytest.raises(ValueError, match="finite scores"):
        histogram_probability(rows(0.0, math.nan))


# --- exploration --------------------------------------------------------------------------------------------------------------


def test_xpo_pushes_away_from_the_reference_samples_alone():
    given = inputs(0.4, -0.2, from_reference=torch.tensor([[False, True]]))
    extra = gradient("xpo", given, alpha=0.1) - gradient("dpo", given)
    assert extra[0].tolist() == pytest.approx([0.0, -0.1])               # the error of the reference's sample is to rise
    assert value("xpo", given, alpha=0.1) == pytest.approx(value("dpo", given) - 0.02)
    both = inputs(0.4, -0.2, from_reference=torch.tensor([[True, True]]))
    assert value("xpo", both, alpha=0.1) == pytest.approx(value("vpo", both, alpha=0.1, attitude="optimistic", calibration="both"))


def test_xpo_without_a_reference_sample_teaches():
    with pytest.raises(ValueError, match="1 of 1 pairs have none"):
        LOSSES["xpo"](inputs(0.4, -0.2, from_reference=torch.tensor([[False, False]])))


def test_vpo_with_pessimism_on_the_chosen_samples_is_rpo():
    given = inputs(0.4, -0.2, kappa=250.0)
    expected = gradient("rpo", given, sft_weight=0.02 * 250.0)
    assert torch.allclose(gradient("vpo", given, alpha=0.02), expected)
    optimistic = gradient("vpo", given, alpha=0.02, attitude="optimistic")
    assert torch.allclose((optimistic + expected) / 2, gradient("dpo", given))


def test_the_value_that_vpo_favours_is_minus_the_calibrated_implicit_reward():
    """Three outcomes: with E_c[r] = 0, beta log Z of the tilted policy equals -E_c[beta log(pi / reference)]."""
    beta, reference, calibration = 0.7, rows(0.2, 0.5, 0.3), rows(0.1, 0.3, 0.6)
    reward = rows(1.0, -0.4, 0.8)
    reward = reward - (calibration * reward).sum()
    policy = reference * (reward / beta).exp()
    log_z = policy.sum().log()
    policy = policy / policy.sum()
    best = (policy * reward).sum() - beta * (policy * (policy / reference).log()).sum()
    assert float(best) == pytest.approx(float(beta * log_z))
    assert float(-(calibration * beta * (policy / reference).log()).sum()) == pytest.approx(float(best))


# --- labels -------------------------------------------------------------------------------------------------------------------


def test_kto_numbers():
    delta = rows((0.001,), (-0.0005,))
    given = LossInput(policy=-delta, reference=torch.zeros_like(delta), kappa=1000.0, label=rows((1.0,), (-1.0,)),
                      statistics={"kl": float(delta.mean())})
    assert given.statistics["kl"] == pytest.approx(0.00025)
    loss = bind_loss("kto")
    assert loss(given).tolist() == pytest.approx([0.320821, 0.320821], abs=1e-6)
    assert (1 - loss(given)).tolist() == pytest.approx([0.679179, 0.679179], abs=1e-6)
    assert float(loss.statistic("kl", given).mean()) == pytest.approx(0.00025)


@pytest.mark.parametrize("u", [-0.7, 0.2, 3.0])
def test_kto_of_a_negative_baseline_uses_zero_and_labels_mirror(u):
    def loss(u, label, kl):
        return value("kto", inputs(u, label=rows((label,)), statistics={"kl": kl}))
    assert loss(u, 1.0, -0.4) == pytest.approx(loss(u, 1.0, 0.0))
    assert loss(u, 1.0, 0.0) == pytest.approx(loss(-u, -1.0, 0.0))
    assert loss(u, 0.5, 0.1) == pytest.approx(0.75 * loss(u, 1.0, 0.1) + 0.25 * loss(u, -1.0, 0.1))


def test_kto_baseline_of_one_sample_pins_the_loss():
    for u in (0.5, 5.0):
        given = inputs(u, label=rows((1.0,)), statistics={"kl": u})
        assert value("kto", given) == pytest.approx(0.5)
        assert float(gradient("kto", given)) == pytest.approx(0.25)


def test_kto_class_weights():
    good, bad = (inputs(0.3, label=rows((label,)), statistics={"kl": 0.0}) for label in (1.0, -1.0))
    assert value("kto", good, weight_good=3.0) == pytest.approx(3 * value("kto", good))
    assert value("kto", bad, weight_bad=0.0) == 0


def test_dro_numbers():
    policy = rows((0.10,), (0.13,)).requires_grad_()
    given = LossInput(policy=policy, kappa=1.0, label=rows((1.0,), (-1.0,)))
    loss = LOSSES["dro"](given)
    assert float(loss.sum().detach()) == pytest.approx(-0.03)
    assert float(loss.mean().detach()) == pytest.approx(-0.015)
    assert gradient("dro", given).flatten().tolist() == [1, -1]


# --- lists --------------------------------------------------------------------------------------------------------------------


def test_plackett_luce_number_and_pair_form():
    assert value("plackett_luce", inputs(0.8, 0.3, -0.5)) == pytest.approx(1.001874, abs=1e-6)
    for u in [(0.3, -0.2), (-2.0, 5.0)]:
        assert value("plackett_luce", inputs(*u)) == pytest.approx(value("dpo", inputs(*u)))


def test_plackett_luce_probabilities_of_all_rankings_sum_to_one():
    u = (0.8, 0.3, -0.5, 1.1)
    assert sum(math.exp(-value("plackett_luce", inputs(*order))) for order in itertools.permutations(u)) == pytest.approx(1)


def test_rankdpo_number_and_pair_form():
    reward = rows((1.0, 0.5, 0.0))
    assert value("rankdpo", inputs(0.8, 0.3, -0.5, reward=reward)) == pytest.approx(0.243124, abs=1e-6)
    weight = (2**0.9 - 2**0.2) * (1 - 1 / math.log2(3))
    pair = inputs(0.3, -0.2, reward=rows((0.9, 0.2)))
    assert value("rankdpo", pair) == pytest.approx(weight * value("dpo", pair))


def test_rankdpo_weights():
    """At u = 0 every pair adds log(2) w to the value and -w / 2, +w / 2 to the slopes in its better and worse member."""
    given = inputs(0.0, 0.0, 0.0, reward=rows((1.0, 0.5, 0.0)))
    total = value("rankdpo", given) / math.log(2)
    first, _, third = (2 * gradient("rankdpo", given)[0]).tolist()
    w_23, w_12 = total - first, total + third
    assert (w_12, total - w_12 - w_23, w_23) == pytest.approx((0.216196, 0.5, 0.0542329), abs=1e-6)


def test_rankdpo_ignores_the_order_of_equal_rewards():
    spread = gradient("rankdpo", inputs(0.4, 0.3, -0.5, reward=rows((1.0, 1.0, 1.0))))
    assert spread.abs().max() == 0


def test_rankdpo_by_the_policys_rank_swaps_the_discounts():
    reward = rows((1.0, 0.5, 0.0))
    agreeing, reversed_ = inputs(0.8, 0.3, -0.5, reward=reward), inputs(-0.5, 0.3, 0.8, reward=reward)
    assert value("rankdpo", agreeing, rank="policy") == pytest.approx(value("rankdpo", agreeing))
    assert value("rankdpo", reversed_, rank="policy") != pytest.approx(value("rankdpo", reversed_))
    with pytest.raises(ValueError, match="best first"):
        LOSSES["rankdpo"](inputs(0.1, 0.2, reward=rows((0.0, 1.0))))


def test_gpo_pair_form_is_sppo_and_its_optimum_the_mean_score():
    pair = inputs(0.2, -0.1, reward=rows((1.0, 0.0)))
    assert value("gpo", pair) == pytest.approx(value("sppo", pair)) == pytest.approx(0.25)
    score = skew_scores(rows((1.0, 0.0), (0.3, 0.7), (-0.2, 0.5))).mean(dim=1)
    assert value("gpo", inputs(*(2 * score).tolist(), reward=score[None]), eta=2.0) == pytest.approx(0)


def test_skew_scores_of_three_unit_vectors_cycle():
    angle = torch.arange(3) * (2 * math.pi / 3)
    scores = skew_scores(torch.stack([angle.cos(), angle.sin()], dim=1).double())
    assert torch.equal(scores, -scores.T) or torch.allclose(scores, -scores.T, atol=1e-7)
    assert [float(scores[i, (i + 1) % 3]) for i in range(3)] == pytest.approx([math.sqrt(3) / 2] * 3, abs=1e-6)
    assert scores.mean(dim=1).abs().max() < 1e-6                          # rock, paper, scissors: nobody is better on average
    with pytest.raises(ValueError, match="even number"):
        skew_scores(torch.zeros(3, 5))


# --- weights ------------------------------------------------------------------------------------------------------------------


def test_rwr_numbers():
    policy, reward = rows((0.2,), (0.1,)), rows((0.0,), (math.log(3),))
    loss = bind_loss("rwr")
    bare = LossInput(policy=policy, kappa=1.0, reward=reward, statistics={"mean_weight": 1.0})
    assert float(loss(bare).mean()) == pytest.approx(0.25)
    mean_weight = float(loss.statistic("mean_weight", bare).mean())
    assert mean_weight == pytest.approx(2.0)
    given = LossInput(policy=policy, kappa=1.0, reward=reward, statistics={"mean_weight": mean_weight})
    assert float(loss(given).mean()) == pytest.approx(0.125)


def test_rwr_temperature_goes_from_best_to_uniform():
    policy, reward = rows((0.2,), (0.1,)), rows((0.0,), (1.0,))
    for temperature, expected in [(1e6, 0.15), (0.01, 0.1)]:
        loss = bind_loss("rwr", temperature=temperature)
        given = LossInput(policy=policy, kappa=1.0, reward=reward, statistics={"mean_weight": 1.0})
        mean_weight = float(loss.statistic("mean_weight", given).mean())
        scaled = LossInput(policy=policy, kappa=1.0, reward=reward, statistics={"mean_weight": mean_weight})
        assert float(loss(scaled).mean()) == pytest.approx(expected, abs=1e-6)
    with pytest.raises(ValueError, match=r"overflows at temperature 0\.001"):
        bind_loss("rwr", temperature=0.001).statistic("mean_weight", given)


def test_sft_and_best_of_group():
    given = LossInput(policy=rows((0.1, 0.2, 0.6)), kappa=1.0)
    assert value("sft", given) == pytest.approx(0.3)
    assert value("best_of_group", given) == pytest.approx(0.1)


def test_curation_numbers_and_bound():
    p, reward = rows(0.5, 0.5), rows(0.0, math.log(3))
    curated = curated_distribution(p, reward, 2)
    assert curated.tolist() == pytest.approx([0.375, 0.625])
    before, after = ((q * reward.exp()).sum() for q in (p, curated))
    variance = (p * (reward.exp() - before).square()).sum()
    assert (float(before), float(after)) == pytest.approx((2.0, 2.25))
    bound = float(before + 0.5 * variance / 3)
    assert bound == pytest.approx(2.1667, abs=1e-4)
    assert float(after) >= bound


def test_curation_weights_average_to_the_curated_distribution():
    p, reward, k = rows(0.2, 0.5, 0.3), rows(0.4, -1.0, 0.9), 3
    density = torch.zeros(3, dtype=torch.float64)
    for group in itertools.product(range(3), repeat=k):
        members = list(group)
        density.index_add_(0, torch.tensor(members), p[members].prod() * curation_weights(reward[members]) / k)
    assert torch.allclose(density, curated_distribution(p, reward, k))
    assert torch.allclose(curated_distribution(p, reward, 1), p)
    tilted = p * reward.exp()
    far, near = (float((curated_distribution(p, reward, k) - tilted / tilted.sum()).abs().max()) for k in (2, 9))
    assert near < far / 3                                                  # K to infinity: p e^r / Z
    with pytest.raises(ValueError, match="cannot be enumerated"):
        curated_distribution(p, reward, 40)


# --- models of preference, safeguard ------------------------------------------------------------------------------------------


def test_ties_numbers():
    even, apart = bradley_terry_ties(rows(0.0)), bradley_terry_ties(rows(2.0))
    assert [float(t.exp()) for t in (even.first, even.tie, even.second)] == pytest.approx([1 / 6, 4 / 6, 1 / 6])
    assert (float(-even.first), float(-even.tie)) == pytest.approx((1.791759, 0.405465), abs=1e-6)
    assert [float(t.exp()) for t in (apart.first, apart.tie, apart.second)] == pytest.approx([0.596418, 0.377228, 0.026354], abs=1e-6)
    assert float(apart.first.exp() + apart.tie.exp() + apart.second.exp()) == pytest.approx(1)
    with pytest.raises(ValueError, match="k > 1"):
        bradley_terry_ties(rows(0.0), k=1.0)


def test_safeguard_numbers():
    g_w, g_l = rows((1.0, 0.0)), rows((2.0, 1.0))
    scale = safeguard(g_w, g_l, 0.9)
    assert scale.tolist() == pytest.approx([0.05])
    assert float(((-g_w + scale[:, None] * g_l) * g_w).sum()) == pytest.approx(-0.9)
    assert safeguard(g_w, -g_l, 0.9).tolist() == [1.0]
    assert safeguard(0 * g_w, g_l, 0.9).tolist() == [1.0]


@pytest.mark.parametrize("mu", [0.0, 0.6, 1.0])
def test_safeguard_keeps_the_chosen_descent(mu):
    generator = torch.Generator().manual_seed(1)
    g_w, g_l = (torch.randn(200, 3, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    scale = safeguard(g_w, g_l, mu)
    assert ((scale >= 0) & (scale <= 1)).all()
    size, along = g_w.square().sum((1, 2)), (g_w * g_l).sum((1, 2))
    assert (scale[along <= 0] == 1).all()
    assert (-size + scale * along <= -mu * size + 1e-12).all()


def test_a_scaled_loser_keeps_the_value_and_scales_the_slope():
    given = inputs(0.4, -0.2)
    scaled = scale_loser(given, rows(0.25))
    assert value("dpo", scaled) == pytest.approx(value("dpo", given))
    expected = gradient("dpo", given) * rows(1.0, 0.25)
    (slope,) = torch.autograd.grad(LOSSES["dpo"](scaled).sum(), given.policy)
    assert torch.allclose(slope, expected)


def test_safeguard_teaches():
    with pytest.raises(ValueError, match="one shape"):
        safeguard(torch.zeros(2, 3), torch.zeros(2, 4), 0.5)
    with pytest.raises(ValueError, match="mu in"):
        safeguard(torch.zeros(2, 3), torch.zeros(2, 3), 1.5)
    with pytest.raises(ValueError, match="one scale per pair"):
        scale_loser(inputs(0.1, 0.2), rows(0.5, 0.5))

"""Pair losses: published numbers, slopes at the reference, symmetry under swapping the pair, optima."""

import math

import pytest
import torch

from visalign.maths.preference import LOSSES, LossInput, bind_loss

MARGIN_ONLY = ["dpo", "conservative_dpo", "robust_dpo", "npo", "ipo", "hinge", "brier", "exo"]


def inputs(*u, kappa=1.0, **extra):
    """One group with the implicit rewards ``u``."""
    policy = -torch.tensor([u], dtype=torch.float64) / kappa
    return LossInput(policy=policy.requires_grad_(), reference=torch.zeros_like(policy), kappa=kappa, **extra)


def rows(*values):
    return torch.tensor([values], dtype=torch.float64)


def example(name, **errors):
    """Inputs at the reference (u = 0) that hold whatever the pair loss ``name`` needs."""
    needs = LOSSES[name].needs
    return inputs(
        0.0, 0.0, kappa=2500.0,
        old=rows(0.0, 0.0) if needs.old else None,
        reward=rows(0.7, 0.6) if needs.reward else None,
        from_reference=torch.tensor([[False, True]]) if needs.from_reference else None,
    )


def value(name, given, **parameters):
    return float(bind_loss(name, **parameters)(given).detach())


def slopes(name, given, **parameters):
    """dL/du_w and dL/du_l."""
    (gradient,) = torch.autograd.grad(bind_loss(name, **parameters)(given).sum(), given.policy)
    return (-gradient[0] / given.kappa).tolist()


def published_pair(kappa):
    policy = torch.tensor([[0.100, 0.130]], dtype=torch.float64, requires_grad=True)
    return LossInput(policy=policy, reference=rows(0.1002, 0.1299), kappa=kappa)


def test_diffusion_dpo_numbers():
    given = published_pair(2500.0)
    assert float(given.margin.detach()) == pytest.approx(0.75)
    assert value("dpo", given) == pytest.approx(0.386871, abs=1e-6)
    (gradient,) = torch.autograd.grad(LOSSES["dpo"](given).sum(), given.policy)
    assert gradient[0].tolist() == pytest.approx([802.05, -802.05], abs=0.01)


def test_diffusion_dpo_mistakes_are_other_numbers():
    assert value("dpo", published_pair(5000.0)) == pytest.approx(0.201413, abs=1e-6)           # the half forgotten
    assert value("npo", published_pair(2500.0)) == pytest.approx(1.136871, abs=1e-6)           # the sign flipped
    assert float(published_pair(2500.0 * 16384).margin.detach()) == pytest.approx(12288)       # a sum for the mean


@pytest.mark.parametrize(("u", "expected"), [(1.0, 0.313262), (0.04, 0.673347)])
def test_flow_dpo_numbers(u, expected):
    assert value("dpo", inputs(u, 0.0)) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("name", "parameters", "expected"), [
    ("ipo", {}, 0.5625), ("hinge", {}, 0.0), ("brier", {}, 0.0495954), ("conservative_dpo", {"label_smoothing": 0.1}, 0.376929),
    ("robust_dpo", {"flip_rate": 0.1}, 0.0956791), ("exo", {"label_smoothing": 0.01}, 0.503080), ("dmpo", {}, 0.503080),
])
def test_table_of_values(name, parameters, expected):
    assert value(name, inputs(1.0, -0.25), **parameters) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", ["dpo", "conservative_dpo", "robust_dpo", "npo", "spo"])
def test_logistic_losses_are_log_2_at_the_reference(name):
    policy = torch.rand(5, 2)
    loss = LOSSES[name](LossInput(policy=policy, reference=policy.clone(), kappa=2500.0))
    assert torch.equal(loss, torch.full((5,), math.log(2)))


@pytest.mark.parametrize(("name", "down", "up"), [
    ("dpo", -0.5, 0.5), ("conservative_dpo", -0.4, 0.4), ("robust_dpo", -0.625, 0.625), ("ipo", -1, 1), ("hinge", -1, 1),
    ("brier", -0.25, 0.25), ("exo", -0.25 * math.log(99), 0.25 * math.log(99)), ("bco", -0.5, 0.5), ("nca", -0.25, 0.25),
    ("apo", -0.25, 0.25), ("sppo", -1, 1), ("inpo", -1, 1), ("spo", -0.5, 0.5), ("npo", 0.5, -0.5),
])
def test_slopes_at_the_reference(name, down, up):
    assert slopes(name, example(name)) == pytest.approx([down, up])


@pytest.mark.parametrize("name", sorted(name for name, loss in LOSSES.items() if loss.needs.group == "pair" and name != "npo"))
def test_every_pair_loss_lowers_the_chosen_error_and_raises_the_rejected(name):
    parameters = {"low": 0.0, "high": 1.0} if name == "smpo" else {}
    winner, loser = slopes(name, example(name), **parameters)
    assert winner < 0 < loser


@pytest.mark.parametrize("name", MARGIN_ONLY)
@pytest.mark.parametrize(("u_w", "u_l"), [(0.8, -0.3), (-1.2, 0.4), (3.0, 2.9)])
def test_swapping_the_pair_negates_the_margin(name, u_w, u_l):
    u = u_w - u_l
    assert value(name, inputs(u_w, u_l)) == pytest.approx(value(name, inputs(u, 0.0)))
    assert value(name, inputs(u_l, u_w)) == pytest.approx(value(name, inputs(-u, 0.0)))


@pytest.mark.parametrize("u", [-2.0, 0.0, 1.3])
def test_npo_is_dpo_of_swapped_labels(u):
    assert value("npo", inputs(u, 0.0)) == pytest.approx(value("dpo", inputs(0.0, u)))


@pytest.mark.parametrize("u", [-2.0, 0.3, 4.0])
@pytest.mark.parametrize("flip_rate", [0.05, 0.4])
def test_robust_dpo_is_unbiased_under_flips(u, flip_rate):
    right, flipped = (value("robust_dpo", inputs(sign * u, 0.0), flip_rate=flip_rate) for sign in (1, -1))
    assert (1 - flip_rate) * right + flip_rate * flipped == pytest.approx(value("dpo", inputs(u, 0.0)))


@pytest.mark.parametrize(("name", "parameters", "optimum"), [
    ("conservative_dpo", {"label_smoothing": 0.2}, math.log(4)), ("exo", {"label_smoothing": 0.2}, math.log(4)), ("ipo", {}, 0.5),
])
def test_bounded_optima(name, parameters, optimum):
    assert slopes(name, inputs(optimum, 0.0), **parameters) == pytest.approx([0, 0], abs=1e-12)
    assert value(name, inputs(optimum + 0.1, 0.0), **parameters) > value(name, inputs(optimum, 0.0), **parameters)


def test_exo_vanishes_where_the_policy_matches_the_smoothed_label():
    assert value("exo", inputs(math.log(99), 0.0), label_smoothing=0.01) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(("name", "expected"), [("bco", 0.925456), ("nca", 1.233829), ("apo", 0.735583)])
def test_values_of_losses_without_margin(name, expected):
    """With P_w = sigmoid(0.8) = 0.689974 and P_l = sigmoid(-0.3) = 0.425557."""
    assert value(name, inputs(0.8, -0.3)) == pytest.approx(expected, abs=1e-6)


def test_nca_holds_the_chosen_sample():
    """Its slope in u_w vanishes at u_w = log 2, where dpo and bco still push."""
    assert slopes("nca", inputs(math.log(2), 0.0))[0] == pytest.approx(0, abs=1e-12)
    assert slopes("nca", inputs(1.0, 0.0))[0] > 0
    assert slopes("bco", inputs(1.0, 0.0))[0] < 0


@pytest.mark.parametrize("sft_weight", [0.0, 0.3, 1250.0])
def test_rpo_adds_the_chosen_error(sft_weight):
    given = published_pair(2500.0)
    assert value("rpo", given, sft_weight=sft_weight) == pytest.approx(value("dpo", given) + sft_weight * 0.1)


def test_rpo_weight_of_half_kappa_doubles_the_slope_at_the_reference():
    given = example("rpo")
    assert slopes("rpo", given, sft_weight=1250.0)[0] == pytest.approx(2 * slopes("dpo", given)[0])


@pytest.mark.parametrize(("errors", "expected"), [((0.1, 0.2), 0.1000000), ((0.1, 0.1002), 0.166887)])
def test_mapo_numbers(errors, expected):
    given = LossInput(policy=rows(*errors), kappa=1.0)
    assert value("mapo", given) == pytest.approx(expected, abs=1e-6)


def test_mapo_odds_are_smooth_where_the_series_takes_over():
    loss = bind_loss("mapo", weight=1.0, eta=1.0, scale=1.0)
    for errors in [(0.0, 0.0), (0.99e-4, 1.01e-4)]:
        policy = rows(*errors).requires_grad_()
        (gradient,) = torch.autograd.grad(loss(LossInput(policy=policy, kappa=1.0)).sum(), policy)
        assert gradient[0].tolist() == pytest.approx([1.25, -0.25], abs=1e-4)      # 1 + sigmoid(0) / 2 and -sigmoid(0) / 2


def test_sppo_numbers_and_its_soft_form():
    assert value("sppo", inputs(0.2, -0.1)) == pytest.approx(0.25)
    assert value("sppo_soft", inputs(0.2, -0.1, reward=rows(1e3, 0.0))) == pytest.approx(0.25)
    assert value("sppo_soft", inputs(0.2, -0.1, reward=rows(1.0, 1.0))) == pytest.approx(0.05)


def test_inpo_is_ipo_towards_a_mixture_of_reference_and_old():
    policy, reference, old = rows(0.10, 0.13), rows(0.11, 0.12), rows(0.09, 0.14)
    given = LossInput(policy=policy, reference=reference, old=old, kappa=20.0)
    for anchor in (0.0, 0.25, 1.0):
        mixed = LossInput(policy=policy, reference=anchor * reference + (1 - anchor) * old, kappa=20.0)
        assert value("inpo", given, anchor=anchor) == pytest.approx(value("ipo", mixed))


def test_spo_clamps_the_log_ratio():
    given = LossInput(policy=rows(-0.25, 0.03).requires_grad_(), reference=rows(0.0, 0.0), kappa=10.0)
    assert value("spo", given) == pytest.approx(0.251239, abs=1e-6)
    assert slopes("spo", given)[0] == 0.0


def test_dpo_does_not_overflow():
    assert value("dpo", inputs(1e6, 0.0)) == 0.0
    assert value("dpo", inputs(-1e6, 0.0)) == pytest.approx(1e6)
    assert value("exo", inputs(-1e6, 0.0)) == pytest.approx(-math.log(0.99) + math.log(0.99) - math.log(0.01))

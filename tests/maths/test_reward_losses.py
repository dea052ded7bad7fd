"""Losses of reward models: closed forms, gradients, what noise does to them, and what treatments undo. float64, seed 0."""

import itertools
import math

import pytest
import torch
from torch.nn.functional import logsigmoid

from visalign.maths.preference_models import skew_scores
from visalign.maths.reward_losses import (
    bradley_terry_loss,
    centring_penalty,
    flip_corrected_loss,
    gated_reward,
    general_preference,
    plackett_luce_loss,
    rating_loss,
    ties_loss,
    without_nuisance,
)
from visalign.maths.reward_noise import (
    Strength,
    co_filter,
    keep_fraction,
    label_posterior,
    preference_strength,
    treat_labels,
    vote_probability,
)

NAN = float("nan")


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class TestBradleyTerry:
    def test_a_plain_label_is_minus_log_sigmoid(self):
        difference = random(20)
        torch.testing.assert_close(bradley_terry_loss(difference), -logsigmoid(difference))
        assert float(bradley_terry_loss(tensor(0.0))) == pytest.approx(math.log(2))

    def test_swapping_the_pair_and_its_label_changes_nothing(self):
        difference, label = random(20), torch.rand(20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        torch.testing.assert_close(bradley_terry_loss(difference, label, 0.3), bradley_terry_loss(-difference, 1 - label, 0.3))

    @pytest.mark.parametrize("label", [0.5, 0.7, 0.9])
    def test_the_optimum_is_the_labels_log_odds(self, label):
        difference = tensor(math.log(label / (1 - label))).requires_grad_()
        bradley_terry_loss(difference, label).sum().backward()
        assert float(difference.grad) == pytest.approx(0, abs=1e-12)

    def test_margins_shift_the_winner_and_raise_the_loss(self):
        difference, margin = random(20), tensor(*[0.5] * 20)
        torch.testing.assert_close(bradley_terry_loss(difference, 1.0, margin), -logsigmoid(difference - margin))
        torch.testing.assert_close(bradley_terry_loss(difference, 0.0, margin), -logsigmoid(-difference - margin))

    def test_the_corrected_loss_has_the_clean_expectation(self):
        difference, q = random(20), 0.25
        expected = (1 - q) * flip_corrected_loss(difference, q) + q * flip_corrected_loss(-difference, q)
        torch.testing.assert_close(expected, bradley_terry_loss(difference))
        torch.testing.assert_close(flip_corrected_loss(difference, 0.0), bradley_terry_loss(difference))

    def test_the_centring_penalty_sees_the_level_and_not_the_difference(self):
        assert centring_penalty(tensor(1.0, 3.0), tensor(-1.0, 2.0)).tolist() == [0.0, 25.0]

    @pytest.mark.parametrize(("call", "message"), [
        (lambda: bradley_terry_loss(tensor(0.0), -1.0), r"labels of \+1 and -1 become \(1 \+ label\) / 2"),
        (lambda: bradley_terry_loss(tensor(0.0), tensor(NAN)), r"prob_first must lie in \[0, 1\]"),
        (lambda: flip_corrected_loss(tensor(0.0), 0.5), "at 0.5 labels say nothing"),
        (lambda: ties_loss(tensor(0.0), torch.tensor([2])), "1, 0 or -1 per comparison"),
        (lambda: ties_loss(tensor(0.0), torch.tensor([1, 0])), r"shape \(1,\)"),
        (lambda: ties_loss(tensor(0.0), torch.tensor([1]), k=1.0), "ties need k > 1"),
    ])
    def test_bad_input(self, call, message):
        with pytest.raises(ValueError, match=message):
            call()


class TestTies:
    def test_probabilities_of_the_three_outcomes_sum_to_one(self):
        difference = random(10)
        total = sum((-ties_loss(difference, torch.full((10,), outcome), k=3.0)).exp() for outcome in (1, 0, -1))
        torch.testing.assert_close(total, torch.ones(10, dtype=torch.float64))

    def test_at_no_difference(self):
        # k = 5: win 1/6 each, tie 4/6
        loss = ties_loss(torch.zeros(3, dtype=torch.float64), torch.tensor([1, 0, -1]))
        assert (-loss).exp().tolist() == pytest.approx([1 / 6, 2 / 3, 1 / 6])

    def test_a_tie_pulls_the_rewards_together(self):
        difference = tensor(-2.0, 0.0, 2.0).requires_grad_()
        ties_loss(difference, torch.zeros(3, dtype=torch.int64)).sum().backward()
        assert difference.grad[0] < 0 < difference.grad[2]
        assert float(difference.grad[1]) == pytest.approx(0)


class TestLists:
    def test_likelihoods_of_all_rankings_sum_to_one(self):
        reward = random(4)
        total = sum(float((-plackett_luce_loss(reward[list(order)][None])).exp()) for order in itertools.permutations(range(4)))
        assert total == pytest.approx(1)

    def test_two_candidates_are_a_pair(self):
        reward = random(10, 2)
        torch.testing.assert_close(plackett_luce_loss(reward), bradley_terry_loss(reward[:, 0] - reward[:, 1]))

    def test_only_differences_count(self):
        reward = random(5, 4)
        torch.testing.assert_close(plackett_luce_loss(reward), plackett_luce_loss(reward + random(5, 1)))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_shorter_lists_are_as_if_alone(self, dtype):
        reward = random(2, 4).to(dtype)
        reward[1, 2:] = NAN
        present = torch.tensor([[True] * 4, [True, True, False, False]])
        reward.requires_grad_()
        loss = plackett_luce_loss(reward, present)
        torch.testing.assert_close(loss[1:], plackett_luce_loss(reward[1:, :2]))
        torch.testing.assert_close(loss[:1], plackett_luce_loss(reward[:1]))
        loss.sum().backward()
        assert torch.isfinite(reward.grad).all()
        assert (reward.grad[1, 2:] == 0).all()

    def test_a_list_with_a_gap(self):
        with pytest.raises(ValueError, match="filled from the front"):
            plackett_luce_loss(torch.zeros(1, 3), torch.tensor([[True, False, True]]))


class TestGeneralPreference:
    def test_rock_paper_scissors(self):
        # Embeddings at 0, 120 and 240 degrees: each is beaten by one and beats the other, by the same odds.
        angle = torch.arange(3, dtype=torch.float64) * 2 * math.pi / 3
        points = torch.stack([angle.cos(), angle.sin()], dim=1)
        score = general_preference(points, points.roll(-1, dims=0))
        torch.testing.assert_close(score, torch.full((3,), 3**0.5 / 2, dtype=torch.float64))

    def test_it_learns_a_cycle_that_no_reward_can(self):
        first, second = torch.tensor([0, 1, 2]), torch.tensor([1, 2, 0])  # rock > scissors > paper > rock
        embedding, reward = random(3, 2).requires_grad_(), random(3).requires_grad_()
        optimizer = torch.optim.Adam([embedding, reward], lr=0.1)
        for _ in range(150):
            optimizer.zero_grad()
            unit = torch.nn.functional.normalize(embedding, dim=1)
            general = bradley_terry_loss(4 * general_preference(unit[first], unit[second]))
            scalar = bradley_terry_loss(reward[first] - reward[second])
            (general.mean() + scalar.mean()).backward()
            optimizer.step()
        assert float(general.detach().mean()) < 0.05
        assert float(scalar.detach().mean()) == pytest.approx(math.log(2), abs=1e-3)  # the best a reward can do is to say nothing

    def test_antisymmetry_and_agreement_with_the_scores_of_a_group(self):
        first, second = random(6, 4), random(6, 4, seed=1)
        torch.testing.assert_close(general_preference(first, second), -general_preference(second, first))
        torch.testing.assert_close(general_preference(first, first), torch.zeros(6, dtype=torch.float64))
        torch.testing.assert_close(general_preference(first, second), skew_scores(torch.stack([first, second], dim=1))[:, 0, 1])

    def test_planes_are_weighed(self):
        first, second = random(6, 4), random(6, 4, seed=1)
        one = general_preference(first[:, :2], second[:, :2])
        other = general_preference(first[:, 2:], second[:, 2:])
        torch.testing.assert_close(general_preference(first, second, tensor(2.0, 0.5)), 2 * one + 0.5 * other)

    def test_a_reward_is_a_special_case(self):
        # v = (r, 1): the score is r_first - r_second
        first, second = (torch.stack([r, torch.ones(6, dtype=torch.float64)], dim=1) for r in (random(6), random(6, seed=1)))
        torch.testing.assert_close(general_preference(first, second), first[:, 0] - second[:, 0])

    def test_an_odd_number_of_coordinates(self):
        with pytest.raises(ValueError, match=r"one shape \(n, even\)"):
            general_preference(torch.zeros(2, 3), torch.zeros(2, 3))


class TestRatings:
    def test_only_what_was_rated_counts(self):
        predicted = tensor(*[[0.5, 0.2], [0.1, 0.9], [0.3, 0.3]]).requires_grad_()
        loss = rating_loss(predicted, tensor([1.0, 0.0], [NAN, 0.4], [NAN, NAN]))
        assert loss.tolist() == pytest.approx([(0.25 + 0.04) / 2, 0.25, 0.0])
        loss.sum().backward()
        assert torch.isfinite(predicted.grad).all()
        assert predicted.grad[1, 0] == 0

    def test_the_gate_mixes_with_weights_of_sum_one(self):
        ratings, logits = random(5, 3), random(5, 3, seed=1)
        torch.testing.assert_close(gated_reward(torch.full((5, 3), 0.7, dtype=torch.float64), logits), tensor(*[0.7] * 5))
        torch.testing.assert_close(gated_reward(ratings, torch.zeros(5, 3)), ratings.mean(dim=1))
        torch.testing.assert_close(gated_reward(ratings, logits, temperature=1e-3), ratings.gather(1, logits.argmax(1)[:, None]).squeeze(1))

    def test_the_gate_learns_which_aspect_a_prompt_is_about(self):
        # Prompt kind 0 is judged by aspect 0, kind 1 by aspect 1.
        kind = torch.arange(200) % 2
        first, second = random(200, 2), random(200, 2, seed=1)
        better = (first - second).gather(1, kind[:, None]).squeeze(1) > 0
        gate = torch.zeros(2, 2, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.Adam([gate], lr=0.2)
        for _ in range(60):
            optimizer.zero_grad()
            difference = gated_reward(first, gate[kind]) - gated_reward(second, gate[kind])
            bradley_terry_loss(difference, better.double()).mean().backward()
            optimizer.step()
        assert (torch.softmax(gate, dim=1).diagonal() > 0.95).all()

    def test_without_the_nuisance_nothing_correlates_with_it(self):
        nuisance = random(300)
        ratings = random(300, 2, seed=1) + nuisance[:, None] * tensor(2.0, -0.5)
        clean, coefficient = without_nuisance(ratings, nuisance)
        assert torch.corrcoef(torch.cat([clean, nuisance[:, None]], dim=1).T)[2, :2].tolist() == pytest.approx([0, 0], abs=1e-12)
        assert coefficient.tolist() == pytest.approx([2.0, -0.5], abs=0.15)

    @pytest.mark.parametrize(("call", "message"), [
        (lambda: rating_loss(torch.zeros(2, 3), torch.zeros(2, 2)), r"one shape \(n, K\)"),
        (lambda: gated_reward(torch.zeros(2, 3), torch.zeros(2, 2)), r"one shape \(n, K\)"),
        (lambda: gated_reward(torch.zeros(2, 3), torch.zeros(2, 3), 0.0), "temperature > 0"),
        (lambda: without_nuisance(torch.zeros(2, 3), torch.ones(2)), "the nuisance is constant"),
    ])
    def test_bad_input(self, call, message):
        with pytest.raises(ValueError, match=message):
            call()


def noisy_pairs(num=400, rate=0.25):
    """Features of chosen minus rejected under a known linear reward, and which labels are wrong."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(num, 8, generator=generator, dtype=torch.float64)
    truth = torch.linspace(-2, 2, 8, dtype=torch.float64)
    features = features * torch.sign(features @ truth)[:, None]
    wrong = torch.rand(num, generator=generator) < rate
    return torch.where(wrong[:, None], -features, features), wrong


def fit(features, loss, steps=150):
    weights = torch.zeros(features.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([weights], lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(features @ weights).mean().backward()
        optimizer.step()
    return weights.detach()


class TestNoise:
    def test_voting_finds_the_wrong_labels(self):
        features, wrong = noisy_pairs()
        halves = [fit(features[start::2], bradley_terry_loss) for start in (0, 1)]
        strength = preference_strength(torch.stack([features @ weights for weights in halves]))
        treated = treat_labels(strength, flip_fraction=0.25, smooth_fraction=0.1)
        # Fewer than half as many wrong labels as before.
        assert float((treated.flipped != wrong).double().mean()) < 0.5 * float(wrong.double().mean())

    def test_flips_shrink_what_is_learnt_and_the_corrected_loss_undoes_it(self):
        # Labels drawn from known log-odds and flipped with rate 0.25; the direction survives, the scale does not.
        generator = torch.Generator().manual_seed(0)
        truth = tensor(1.0, -2.0, 0.5)
        features = torch.randn(8000, 3, generator=generator, dtype=torch.float64)
        first_wins = torch.rand(8000, generator=generator, dtype=torch.float64) < torch.sigmoid(features @ truth)
        flipped = torch.rand(8000, generator=generator) < 0.25
        chosen = torch.where((first_wins != flipped)[:, None], features, -features)
        plain = fit(chosen, bradley_terry_loss)
        assert float(plain.norm()) < 0.6 * float(truth.norm())
        assert float(torch.nn.functional.cosine_similarity(plain, truth, dim=0)) > 0.99
        corrected = fit(chosen, lambda difference: flip_corrected_loss(difference, 0.25))
        torch.testing.assert_close(corrected, truth, rtol=0, atol=0.2)

    def test_strength_is_mean_and_spread_over_models(self):
        found = preference_strength(tensor([1.0, -1.0], [3.0, -1.0]))
        assert (found.mean.tolist(), found.std.tolist()) == ([2.0, -1.0], [1.0, 0.0])
        with pytest.raises(ValueError, match="at least two models"):
            preference_strength(random(1, 5))

    def test_treatments_by_place(self):
        strength = Strength(tensor(3.0, -2.0, 0.1, -0.1, 1.0), torch.zeros(5, dtype=torch.float64))
        treated = treat_labels(strength, flip_fraction=0.2, smooth_fraction=0.4, smoothing=0.3, margin_scale=0.5)
        assert treated.flipped.tolist() == [False, True, False, False, False]
        assert treated.prob_chosen.tolist() == pytest.approx([1.0, 0.0, 0.7, 0.7, 1.0])
        assert treated.margin.tolist() == pytest.approx([1.5, 0.0, 0.0, 0.0, 0.5])

    def test_no_label_is_flipped_that_the_models_agree_with(self):
        treated = treat_labels(Strength(tensor(3.0, 2.0, 1.0, 0.5), torch.zeros(4)), flip_fraction=0.5, smooth_fraction=0.0)
        assert not treated.flipped.any()
        assert treated.prob_chosen.tolist() == pytest.approx([1.0, 1.0, 0.7, 0.7])

    def test_votes(self):
        assert vote_probability(tensor(3.0, 0.0, 0.0), tensor(1.0, 0.0, 2.0)).tolist() == pytest.approx([4 / 6, 0.5, 0.25])
        assert vote_probability(tensor(3.0), tensor(0.0), prior=0.0).tolist() == [1.0]
        with pytest.raises(ValueError, match="needs prior > 0"):
            vote_probability(tensor(0.0), tensor(0.0), prior=0.0)

    def test_the_posterior_is_bayes_rule_and_its_mean_finds_the_flip_rate(self):
        p = torch.sigmoid(tensor(-1.0, 0.0, 2.0))
        torch.testing.assert_close(label_posterior(tensor(-1.0, 0.0, 2.0), 0.2), 0.8 * p / (0.8 * p + 0.2 * (1 - p)))
        # Under the true model with log-odds d, of every label the clean winner is drawn, then flipped with rate 0.25.
        generator = torch.Generator().manual_seed(0)
        odds = 3 * torch.randn(20_000, generator=generator, dtype=torch.float64)
        first_wins = torch.rand(20_000, generator=generator, dtype=torch.float64) < torch.sigmoid(odds)
        labelled = torch.where(torch.rand(20_000, generator=generator) < 0.25, ~first_wins, first_wins)
        difference, rate = torch.where(labelled, odds, -odds), 0.05
        for _ in range(60):
            rate = 1 - float(label_posterior(difference, rate).mean())
        assert rate == pytest.approx(0.25, abs=0.015)
        with pytest.raises(ValueError, match=r"\(0, 0.5\)"):
            label_posterior(difference, 0.5)

    def test_each_model_is_given_what_the_other_finds_easy(self):
        for_a, for_b = co_filter(tensor(0.1, 0.9, 0.2, 0.8), tensor(0.5, 0.1, 0.2, 0.9), keep=0.5)
        assert for_a.tolist() == [False, True, True, False]
        assert for_b.tolist() == [True, False, True, False]
        assert co_filter(tensor(1.0, 2.0), tensor(1.0, 2.0), keep=0.01)[0].sum() == 1
        assert co_filter(tensor(1.0, 1.0, 1.0), tensor(1.0, 1.0, 1.0), keep=1.0)[0].all()

    def test_co_filtering_leaves_mostly_right_labels(self):
        features, wrong = noisy_pairs()
        models = [fit(features[start::2], bradley_terry_loss) for start in (0, 1)]
        for kept in co_filter(*(bradley_terry_loss(features @ weights) for weights in models), keep=0.75):
            assert float(wrong[kept].double().mean()) < 0.5 * float(wrong.double().mean())

    def test_filtering_begins_with_everything(self):
        assert [keep_fraction(progress, 0.25, warmup=0.5) for progress in (0.0, 0.25, 0.5, 1.0)] == [1.0, 0.875, 0.75, 0.75]

    @pytest.mark.parametrize(("call", "message"), [
        (lambda: keep_fraction(2.0, 0.25), r"progress in \[0, 1\]"),
        (lambda: co_filter(tensor(1.0), tensor(1.0), 0.0), r"keep in \(0, 1\]"),
        (lambda: co_filter(tensor(1.0), tensor(1.0, 2.0), 0.5), r"shape \(n,\)"),
        (lambda: treat_labels(Strength(tensor(1.0), tensor(0.0)), flip_fraction=0.8, smooth_fraction=0.3), "sum to at most 1"),
        (lambda: treat_labels(Strength(tensor(1.0), tensor(0.0)), smoothing=0.6), r"\[0, 0.5\]"),
    ])
    def test_bad_input(self, call, message):
        with pytest.raises(ValueError, match=message):
            call()

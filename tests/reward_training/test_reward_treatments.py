"""Noise treatments: what they make of labels, and what that is worth on a problem whose wrong labels are known. CPU, three seeds."""

import pytest
import torch

from tests.reward_training.worlds import examples, fitting, utilities
from visalign.maths.calibration import ranking_accuracy
from visalign.maths.reward_losses import flip_corrected_loss
from visalign.maths.seeds import derive_seed
from visalign.reward_models.heads import ScalarHead, Shape
from visalign.reward_training.objectives import Batch, Targets, pair_loss
from visalign.reward_training.treatments import CoFilter, FlipCorrected, NoTreatment, Posterior, Smoothing, Voting

SEEDS = (0, 1, 2)
# Enough to learn wrong labels by heart.
FREE = {"width": 64, "depth": 2, "epochs": 30, "batch": 64, "learning_rate": 2e-3, "weight_decay": 0.0}


def world(seed, num=600, dim=16, flipped=0.3):
    """Embeddings, training pairs with flipped labels (gold beside them), and clean test pairs."""
    media, direction = utilities(2 * num + 2000, dim, seed)
    utility = 4 * (media @ direction)
    rows = torch.arange(len(media)).reshape(-1, 2)
    train, test = rows[:num], rows[num:]
    wrong = torch.rand(num, generator=torch.Generator().manual_seed(seed + 100)) < flipped
    noisy = torch.where(wrong[:, None], utility[train].flip(1), utility[train])
    return media, examples(noisy, train, gold=utility[train]), examples(utility[test], test)


def crossfit_of(fit, train, seed):
    def crossfit(folds, repetition):
        odds = torch.empty(len(train), dtype=torch.float64)
        fold = torch.randperm(len(train), generator=torch.Generator().manual_seed(repetition)) % folds
        for k in range(folds):
            member, _ = fit.fit(train.select(fold != k), Targets.of(train.label[fold != k]), derive_seed(seed, repetition, k))
            odds[fold == k] = fit.log_odds(member, train.select(fold == k))
        return odds

    return crossfit


def accuracy(treatment, seed):
    """On clean test pairs, with the treatment."""
    media, train, test = world(seed)
    fit = fitting(media, **FREE)
    treated = treatment.treat(train, crossfit_of(fit, train, seed))
    member, _ = fit.fit(train, treated.targets, seed, treated.co_filter)
    return ranking_accuracy(fit.log_odds(member, test), test.label)


def refused(folds, repetition):
    raise AssertionError("no model of other prompts was needed")


@pytest.fixture(scope="module")
def untreated():
    return sum(accuracy(NoTreatment(), seed) for seed in SEEDS) / len(SEEDS)


@pytest.mark.parametrize("treatment", [FlipCorrected(rate=0.3), Posterior(folds=3), Voting(models=2, folds=3), CoFilter(rate=0.3)],
                         ids=lambda treatment: type(treatment).__name__)
def test_treatments_improve_a_model_that_could_learn_wrong_labels_by_heart(treatment, untreated):
    assert sum(accuracy(treatment, seed) for seed in SEEDS) / len(SEEDS) > untreated + 0.02


class TestLabels:
    """What the treatments make of labels, with the log-odds of a model that is right about three labels in four wrong ones."""

    num = 12_000

    def judged(self, seed=0):
        generator = torch.Generator().manual_seed(seed)
        odds = 2 * torch.randn(self.num, generator=generator, dtype=torch.float64)
        truth = torch.where(torch.rand(self.num, generator=generator) < torch.sigmoid(odds), 1.0, -1.0)
        wrong = torch.rand(self.num, generator=generator) < 0.25
        label = torch.where(wrong, -truth, truth)
        label[:200] = 0
        scores = torch.stack([label, -label], dim=1)
        return odds, wrong, examples(scores, torch.zeros(self.num, 2, dtype=torch.int64))

    def test_none_and_smoothing_ask_no_model(self):
        _, _, data = self.judged()
        plain = NoTreatment().treat(data, refused)
        assert torch.equal(plain.targets.prob, (1 + data.label) / 2)
        assert plain.flip_rate == 0
        smooth = Smoothing(0.1).treat(data, refused).targets.prob
        assert sorted({round(value, 4) for value in smooth.tolist()}) == [0.1, 0.5, 0.9]
        assert FlipCorrected(rate=0.2).treat(data, refused).targets.flip_rate == 0.2
        assert CoFilter(rate=0.2).treat(data, refused).co_filter.rate == 0.2

    @pytest.mark.parametrize("treatment", [FlipCorrected(), CoFilter(), Posterior(), Voting()], ids=lambda one: type(one).__name__)
    def test_rates_are_estimated_from_models_of_other_prompts(self, treatment):
        odds, _, data = self.judged()
        treated = treatment.treat(data, lambda folds, repetition: odds)
        assert treated.flip_rate == pytest.approx(0.25, abs=0.04)
        assert treated.metrics["noise/flip_rate"] == treated.flip_rate

    @pytest.mark.parametrize("treatment", [Posterior(), Voting(smooth=0.0)], ids=lambda one: type(one).__name__)
    def test_more_labels_are_right_afterwards_and_ties_stay(self, treatment):
        odds, wrong, data = self.judged()
        prob = treatment.treat(data, lambda folds, repetition: odds).targets.prob
        assert (prob[:200] == 0.5).all()
        truth = torch.where(wrong, -data.label, data.label)[200:]
        right = (torch.sign(prob[200:] - 0.5) == truth).double().mean()
        assert float(right) > 0.75 + 0.04

    def test_voting_asks_several_models_and_sets_margins_for_clear_labels(self):
        odds, _, data = self.judged()
        asked = []

        def crossfit(folds, repetition):
            asked.append((folds, repetition))
            return odds

        treated = Voting(models=3, folds=4, flip=0.1, smooth=0.2, margin=0.5).treat(data, crossfit)
        assert asked == [(4, 0), (4, 1), (4, 2)]
        assert treated.metrics["noise/flipped"] == pytest.approx(0.1, abs=1e-3)
        clear = treated.targets.margin > 0
        agree = odds * data.label
        torch.testing.assert_close(treated.targets.margin[clear].double(), 0.5 * agree[clear])
        assert not clear[:200].any()

    def test_models_that_say_nothing_are_reported(self):
        _, _, data = self.judged()
        noise = torch.randn(self.num, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        with pytest.raises(ValueError, match="noise: models of other prompts do not tell right from wrong"):
            FlipCorrected().treat(data, lambda folds, repetition: -data.label * noise.abs())

    @pytest.mark.parametrize(("make", "message"), [
        (lambda: Smoothing(0.6), "amount"), (lambda: FlipCorrected(rate=0.5), "rate must lie"),
        (lambda: Posterior(rate="guess"), "estimate"), (lambda: Posterior(folds=1), "folds"), (lambda: Voting(models=1), "at least 2"),
        (lambda: Voting(flip=0.8, smooth=0.3), "shares"), (lambda: CoFilter(warmup=0.0), "warmup")])
    def test_bad_parameters(self, make, message):
        with pytest.raises(ValueError, match=message):
            make()


def test_the_flip_corrected_loss_is_used_for_winners_and_cross_entropy_for_ties():
    media = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    head = ScalarHead(Shape(4, 0, ("media",)))
    data = examples(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]), torch.arange(6).reshape(3, 2))
    targets = Targets(Targets.of(data.label).prob, torch.zeros(3), flip_rate=0.2)
    loss = pair_loss(head, Batch(data, targets, media[data.media], None))
    first, second = head(media[data.media], None).unbind(1)
    odds = head.log_odds(first, second)
    torch.testing.assert_close(loss[0], flip_corrected_loss(odds[0], 0.2))
    torch.testing.assert_close(loss[1], flip_corrected_loss(-odds[1], 0.2))
    torch.testing.assert_close(loss[2], pair_loss(head, Batch(data, Targets.of(data.label), media[data.media], None))[2])


def test_co_filtering_leaves_out_what_the_other_model_doubts_once_it_is_warm():
    """With the rate at 0 a second model changes nothing: the first one is trained as alone."""
    media, train, _ = world(0)
    fit = fitting(media, **{**FREE, "epochs": 3})
    with_none, _ = fit.fit(train, Targets.of(train.label), 0, CoFilter(rate=0.0))
    with_some, _ = fit.fit(train, Targets.of(train.label), 0, CoFilter(rate=0.4, warmup=0.1))
    assert not torch.equal(with_none.head.state_dict()["body.0.weight"], with_some.head.state_dict()["body.0.weight"])
    alone, _ = fit.fit(train, Targets.of(train.label), 0)
    torch.testing.assert_close(with_none.head.state_dict()["body.0.weight"], alone.head.state_dict()["body.0.weight"])


def test_each_model_learns_from_the_pairs_that_the_other_one_finds_right():
    """Two linear heads that disagree about which half of a batch looks right: the gradient of each comes from the other's half."""
    media = torch.eye(4)
    data = examples(torch.tensor([[1.0, 0.0]]).repeat(2, 1), torch.tensor([[0, 1], [2, 3]]))
    fit = fitting(media, max_grad_norm=1e9)
    heads = [ScalarHead(Shape(4, 0, ("media",))) for _ in range(2)]
    with torch.no_grad():
        for head, weight in zip(heads, ([2.0, 0.0, 0.0, 2.0], [0.0, 2.0, 2.0, 0.0]), strict=True):  # sure of the first, of the second pair
            head.body[0].weight.copy_(torch.tensor([weight]))
    (stage,) = fit.objective.stages()
    learners = [fit._learner(stage, head, num_steps=1, adapts=False) for head in heads]
    fit._step(heads, stage, learners, data, Targets.of(data.label), CoFilter(rate=0.49, warmup=0.1), progress=1.0)
    touched = [(head.body[0].weight.grad[0].abs() > 1e-6).tolist() for head in heads]
    assert touched == [[False, False, True, True], [True, True, False, False]]

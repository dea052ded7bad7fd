"""What heads learn from judgements of known utilities: directions, ties, lists, circles, ratings and gates. CPU, seeds as stated."""

import math

import pytest
import torch
from torch.nn.functional import cosine_similarity

from tests.reward_training.worlds import examples, fitting, utilities
from visalign.maths.calibration import ranking_accuracy
from visalign.reward_models.heads import ScalarHead, Shape
from visalign.reward_training.objectives import Batch, BradleyTerry, GeneralPreference, PlackettLuce, Ratings, Targets, Ties

LINEAR = {"epochs": 30, "batch": 128, "learning_rate": 0.05, "weight_decay": 0.0, "schedule": "cosine"}


def pairs(num, dim=6, strength=2.0, seed=0):
    """Bradley-Terry judgements of the utility ``strength w . x``, and w."""
    media, direction = utilities(2 * num, dim, seed)
    reward = strength * (media @ direction)
    rows = torch.arange(2 * num).reshape(num, 2)
    first = torch.rand(num, generator=torch.Generator().manual_seed(seed + 1)) < torch.sigmoid(reward[::2] - reward[1::2])
    scores = torch.stack([first.float(), (~first).float()], dim=1)
    return media, direction, examples(scores, rows)


def learnt(head):
    """Direction and length of a linear head in units of the raw features."""
    weight = head.body[-1].weight[0] / head.std
    return weight, float(weight.norm())


class TestBradleyTerry:
    def test_a_linear_head_recovers_direction_and_strength(self):
        media, direction, data = pairs(4000)
        member, rows = fitting(media, **LINEAR).fit(data, Targets.of(data.label), 0)
        weight, length = learnt(member.head)
        assert float(cosine_similarity(weight, direction, dim=0)) > 0.995
        assert length == pytest.approx(2.0, rel=0.08)
        assert [row["epoch"] for row in rows] == list(range(1, 31))
        assert rows[-1]["loss"] < rows[0]["loss"] < math.log(2)

    def test_the_same_seed_gives_the_same_weights_and_another_one_others(self):
        media, _, data = pairs(200)
        fit = fitting(media, depth=1, epochs=2, batch=32)
        states = [fit.fit(data, Targets.of(data.label), seed)[0].head.state_dict() for seed in (3, 3, 4)]
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
        assert not torch.equal(states[0]["body.0.weight"], states[2]["body.0.weight"])

    def test_weights_count_as_repetitions(self):
        media, _, data = pairs(64)
        weighted = examples(data.scores, data.media)
        weighted.weight[:32] = 2
        doubled = data.select(torch.cat([torch.arange(64), torch.arange(32)]))
        settings = {"epochs": 200, "batch": 96, "learning_rate": 0.02, "weight_decay": 0.1}
        heads = [fitting(media, **settings).fit(one, Targets.of(one.label), 0)[0].head for one in (weighted, doubled)]
        torch.testing.assert_close(learnt(heads[0])[0], learnt(heads[1])[0], atol=0.02, rtol=0.02)

    def test_centring_adds_the_squared_sum_of_both_rewards(self):
        media, _, data = pairs(10)
        head = ScalarHead(Shape(6, 0, ("media",)))
        batch = Batch(data, Targets.of(data.label), media[data.media], None)
        first, second = head(media[data.media], None).squeeze(-1).unbind(1)
        added = BradleyTerry(centring=0.3).loss(head, batch) - BradleyTerry().loss(head, batch)
        torch.testing.assert_close(added, 0.3 * (first + second).square())

    def test_the_best_epoch_is_kept_by_the_calibration_judgements(self):
        media, _, data = pairs(300, dim=20)
        train, calibration = data.select(torch.arange(100)), data.select(torch.arange(100, 300))
        settings = {"width": 64, "depth": 2, "epochs": 20, "batch": 20, "learning_rate": 5e-3, "weight_decay": 0.0, "schedule": "constant"}
        losses = {}
        for keep in ("last", "best"):
            fit = fitting(media, calibration=calibration, keep=keep, **settings)
            member, rows = fit.fit(train, Targets.of(train.label), 0)
            odds = fit.log_odds(member, calibration)
            losses[keep] = float(torch.nn.functional.softplus(-odds * calibration.label).mean())
        watched = [row["calibration/loss"] for row in rows]
        assert losses["best"] == pytest.approx(min(watched), rel=1e-5)
        assert losses["last"] == pytest.approx(watched[-1], rel=1e-5)
        assert losses["best"] < 0.8 * losses["last"]

    def test_a_diverging_loss_is_an_error(self):
        media, _, data = pairs(50)
        media[3] = float("inf")
        with pytest.raises(ValueError, match=r"lower optimization\.learning_rate"):
            fitting(media, epochs=1).fit(data, Targets.of(data.label), 0)


class TestTies:
    def test_ties_are_an_outcome_of_their_own(self):
        """Ties where utilities are near teach the same direction, and a head taught by them says ties are likely there."""
        media, direction = utilities(6000, 4)
        difference = 3 * (media @ direction).reshape(-1, 2)
        outcome = torch.where((difference[:, 0] - difference[:, 1]).abs() < 1.5, 0.0, torch.sign(difference[:, 0] - difference[:, 1]))
        data = examples(torch.stack([outcome, -outcome], dim=1), torch.arange(6000).reshape(-1, 2))
        fit = fitting(media, objective=Ties(k=5.0), **LINEAR)
        member, _ = fit.fit(data, Targets.of(data.label), 0)
        assert float(cosine_similarity(learnt(member.head)[0], direction, dim=0)) > 0.99
        odds = fit.log_odds(member, data)
        from visalign.maths.preference_models import bradley_terry_ties

        log_probs = bradley_terry_ties(odds, 5.0)
        said = torch.stack([log_probs.second, log_probs.tie, log_probs.first]).argmax(dim=0) - 1
        assert float((said == data.label).double().mean()) > 0.9

    @pytest.mark.parametrize("make", [lambda: Ties(k=1.0), lambda: BradleyTerry(centring=-1), lambda: GeneralPreference(planes=0),
                                      lambda: Ratings(()), lambda: Ratings(("a", "a")), lambda: Ratings(("a",), nuisance="b"),
                                      lambda: Ratings(("a",), nuisance="a")])
    def test_bad_parameters_are_refused(self, make):
        with pytest.raises(ValueError, match=r"must be|at least|name at least|not rated"):
            make()


class TestLists:
    def test_plackett_luce_learns_from_whole_lists(self):
        media, direction = utilities(4000, 5)
        gumbel = -torch.log(-torch.log(torch.rand(4000, generator=torch.Generator().manual_seed(3))))
        scores = (2 * (media @ direction) + gumbel).reshape(-1, 4)  # orders drawn from Plackett-Luce
        data = examples(scores, torch.arange(4000).reshape(-1, 4))
        member, _ = fitting(media, objective=PlackettLuce(), **LINEAR).fit(data, Targets.of(torch.zeros(1000)), 0)
        weight, length = learnt(member.head)
        assert float(cosine_similarity(weight, direction, dim=0)) > 0.99
        assert length == pytest.approx(2.0, rel=0.1)

    def test_candidates_of_one_score_are_not_ordered(self):
        """Two candidates that always share the first place, in the same positions, end with the same reward."""
        media = torch.eye(3)
        data = examples(torch.tensor([[1.0, 1.0, 0.0]]).repeat(200, 1), torch.tensor([[0, 1, 2]]).repeat(200, 1))
        member, _ = fitting(media, objective=PlackettLuce(), **{**LINEAR, "weight_decay": 0.1}).fit(data, Targets.of(torch.zeros(200)), 0)
        reward = member.head(media, None).squeeze(-1)
        assert abs(float(reward[0] - reward[1])) < 0.15
        assert float(reward[0] - reward[2]) > 2


class TestCircles:
    def circle(self):
        """Rock, paper, scissors with jitter: 0 beats 1 beats 2 beats 0."""
        generator = torch.Generator().manual_seed(0)
        kind = torch.arange(600) % 3
        media = torch.eye(3)[torch.stack([kind, (kind + 1) % 3], dim=1).flatten()] + 0.05 * torch.randn(1200, 3, generator=generator)
        return media, examples(torch.tensor([[1.0, 0.0]]).repeat(600, 1), torch.arange(1200).reshape(-1, 2))

    @pytest.mark.parametrize("seed", [0, 1])
    def test_a_general_preference_knows_rock_paper_scissors_where_no_reward_can(self, seed):
        media, data = self.circle()
        settings = {"width": 32, "depth": 2, "epochs": 30, "batch": 64, "learning_rate": 3e-3, "weight_decay": 0.0}
        accuracy = {}
        for objective in (GeneralPreference(planes=1), BradleyTerry()):
            fit = fitting(media, objective=objective, **settings)
            member, _ = fit.fit(data.select(torch.arange(450)), Targets.of(data.label[:450]), seed)
            test = data.select(torch.arange(450, 600))
            accuracy[type(objective)] = ranking_accuracy(fit.log_odds(member, test), test.label)
        assert accuracy[GeneralPreference] > 0.99
        assert accuracy[BradleyTerry] <= 2 / 3 + 0.05

    def test_it_learns_rewards_as_well(self):
        media, _, data = pairs(2000)
        fit = fitting(media, objective=GeneralPreference(planes=2), depth=1, epochs=20, batch=64, learning_rate=5e-3, weight_decay=0.0)
        plain = fitting(media, **LINEAR)
        train, test = data.select(torch.arange(1500)), data.select(torch.arange(1500, 2000))
        found = [ranking_accuracy(one.log_odds(one.fit(train, Targets.of(train.label), 0)[0], test), test.label) for one in (fit, plain)]
        assert found[0] > found[1] - 0.03


class TestRatings:
    def world(self, n=1500, seed=0):
        """Two aspects are coordinates of the embedding; one kind of prompt wants the first, the other the second."""
        media, _ = utilities(2 * n, 4, seed)
        kind = torch.arange(n) % 2
        rows = torch.arange(2 * n).reshape(n, 2)
        ratings = media[:, :2][rows] * torch.tensor([1.0, 0.2]) + torch.tensor([0.0, 5.0])  # each on a scale of its own
        wanted = media[rows].gather(2, kind[:, None, None].expand(-1, 2, 1)).squeeze(-1)
        return media, torch.eye(2), examples(wanted, rows, ratings=ratings, text=kind)

    def test_heads_learn_the_ratings_and_the_gate_shifts_with_the_prompt(self):
        media, text, data = self.world()
        fit = fitting(media, text, Ratings(("first", "second")), blocks=("media", "text"), **{**LINEAR, "learning_rate": 0.02})
        member, rows = fit.fit(data, Targets.of(data.label), 0)
        assert len(rows) == 60  # ratings, then the gate
        weights = member.head.gate_weights(text)
        assert float(weights[0, 0]) > 0.95
        assert float(weights[1, 1]) > 0.95
        rated = member.head.ratings(media[:100], text[data.text[:1]].expand(100, -1))
        torch.testing.assert_close(rated, media[:100, :2] * torch.tensor([1.0, 0.2]) + torch.tensor([0.0, 5.0]), atol=0.15, rtol=0)
        assert ranking_accuracy(fit.log_odds(member, data), data.label) > 0.97

    def test_missing_ratings_leave_what_is_learnt_as_it_is(self):
        media, text, data = self.world()
        data.ratings[torch.rand(data.ratings.shape, generator=torch.Generator().manual_seed(1)) < 0.5] = math.nan
        fit = fitting(media, text, Ratings(("first", "second")), blocks=("media", "text"), **{**LINEAR, "learning_rate": 0.02})
        member, _ = fit.fit(data, Targets.of(data.label), 0)
        assert ranking_accuracy(fit.log_odds(member, data), data.label) > 0.97

    def test_a_nuisance_that_the_ratings_follow_does_not_count(self):
        """Ratings are quality plus length; judgements follow the quality alone, which is independent of the length."""
        media, _ = utilities(4000, 3, 5)
        rows = torch.arange(4000).reshape(-1, 2)
        ratings = torch.stack([media[:, 0] + 2 * media[:, 1], media[:, 1]], dim=1)[rows]
        data = examples(media[:, 0][rows], rows, ratings=ratings)
        found = {}
        for nuisance in ("length", None):
            objective = Ratings(("quality", "length") if nuisance else ("quality",), nuisance)
            mine = examples(data.scores, data.media, ratings=ratings if nuisance else ratings[..., :1])
            fit = fitting(media, objective=objective, **LINEAR)
            found[nuisance] = ranking_accuracy(fit.log_odds(fit.fit(mine, Targets.of(mine.label), 0)[0], mine), mine.label)
        assert found["length"] > 0.97
        assert found[None] < 0.75

    @pytest.mark.parametrize("values", [math.nan, 0.5])
    def test_ratings_that_are_missing_or_all_the_same_are_refused(self, values):
        media, text, data = self.world(n=50)
        data.ratings[..., 1] = values
        fit = fitting(media, text, Ratings(("first", "second")), blocks=("media", "text"), epochs=1)
        with pytest.raises(ValueError, match=r"ratings of 'second'.*leave the aspect out"):
            fit.fit(data, Targets.of(data.label), 0)

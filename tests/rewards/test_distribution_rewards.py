"""Fréchet distances and Vendi scores of whole sets, on pixel means as features; seeds stated."""

import logging

import pytest
import torch
from colour_features import Plane, audio, colour, images, prompts, save_reference, save_standard

from tests import gaussian_run
from visalign.credit import RewardTerm
from visalign.maths.diversity import cosine_vendi
from visalign.maths.frechet import Moments, frechet_distance
from visalign.protocols import Measures, Reward
from visalign.rewards.distribution import FrechetDistance, VendiScore
from visalign.rewards.encoders import as_encoder
from visalign.rewards.exemplars import reference_statistics, save_exemplars
from visalign.rewards.kernel_distance import KAD
from visalign.tracking import read_metrics
from visalign.types import Media


@pytest.fixture
def reference(tmp_path):
    return save_reference(tmp_path)


@pytest.fixture
def standard(tmp_path):
    return save_standard(tmp_path)


def tones(media):
    """Three numbers per sound of (2, 3), (n, 3)."""
    return torch.stack([sample.data.double().sum(dim=0) for sample in media])


def test_membership_of_the_worked_example(standard):
    # D1 = 2, -.2, .1, .3 and D2 = 1.2, -1, 0, -.6: D+ = 1.2, -1, .1, -.6, although 0 is closer to the reference mean than .1.
    reward = FrechetDistance(Plane(), standard)
    features = torch.tensor([2, -0.2, 0.1, 0.3, 1.2, -1, 0, -0.6], dtype=torch.float64)[:, None]
    credit = reward.credit(features, torch.tensor([5, 6, 7, 8, 5, 6, 7, 8]))
    assert credit.dtype == torch.float32
    assert credit.tolist() == [0, 0, 1, 0, 1, 1, 0, 1]
    assert reward.value(features[credit == 1]) == pytest.approx(-0.0069258, abs=1e-7)
    interleaved = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])
    again = reward.credit(features[interleaved], torch.tensor([0, 0, 1, 1, 2, 2, 3, 3]))
    assert again.tolist() == credit[interleaved].tolist()


def test_features_of_media_lead_to_the_set_closer_to_the_exemplars(reference):
    reward = FrechetDistance(colour, reference)
    media = images(40, seed=2)
    features = reward.features(media, prompts(40))
    assert features.dtype == torch.float64
    torch.testing.assert_close(features, colour(media))
    credit = reward.credit(features, torch.arange(20).repeat_interleave(2))
    assert credit.view(20, 2).sum(dim=1).tolist() == [1.0] * 20
    positive, negative = reward.value(features[credit == 1]), reward.value(features[credit == 0])
    assert positive > max(reward.value(features[::2]), reward.value(features[1::2])) >= negative
    assert reward.spec.arity == "set"
    assert reward.spec.direction == 1
    assert not isinstance(reward, Reward)


def test_vendi_membership_raises_diversity():
    reward = VendiScore(colour)
    media = images(30, seed=3)
    features = reward.features(media, prompts(30))
    torch.testing.assert_close(features.norm(dim=1), torch.ones(30, dtype=torch.float64))
    assert reward.value(features) == pytest.approx(cosine_vendi(colour(media)), rel=1e-9)
    credit = reward.credit(features, torch.arange(15).repeat_interleave(2))
    assert reward.value(features[credit == 1]) > max(reward.value(features[::2]), reward.value(features[1::2]))


def test_leave_one_out_takes_any_group_size_and_finds_the_outlier(reference):
    reward = FrechetDistance(colour, reference, credit="leave_one_out")
    features = torch.cat([reward.features(images(8, seed=4), prompts(8)), torch.full((1, 3), 5.0, dtype=torch.float64)])
    credit = reward.credit(features, torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2]))
    assert int(credit.argmin()) == 8
    assert credit[8] < 0


def test_group_sizes_other_than_two_are_explained(reference):
    with pytest.raises(ValueError, match=r"group 3 has 4 samples; one goes to D\+ and one to D-, so set train\.group_size: 2"):
        FrechetDistance(colour, reference).credit(torch.rand(4, 3), torch.tensor([3, 3, 3, 3]))


def test_a_sample_that_cannot_be_judged_takes_its_pair_along(reference):
    features = torch.rand(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    group_id = torch.arange(4).repeat_interleave(2)
    alone = FrechetDistance(colour, reference).credit(features[2:], group_id[2:])
    broken = features.clone()
    broken[1, 0] = torch.inf
    credit = FrechetDistance(colour, reference).credit(broken, group_id)
    assert credit[:2].isnan().all()
    assert credit[2:].tolist() == alone.tolist()
    assert FrechetDistance(colour, reference).credit(features * torch.nan, group_id).isnan().all()
    black = VendiScore(colour).features([Media("image", torch.zeros(3, 4, 4, dtype=torch.uint8))], prompts(1))
    assert black.isnan().all()


def test_memory_counts_into_every_credit_but_into_no_evaluation_and_survives_a_checkpoint(reference):
    features = torch.rand(3, 8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    group_id = torch.arange(4).repeat_interleave(2)
    reward = FrechetDistance(colour, reference, credit="leave_one_out", memory=10)
    before = reward.value(features[2]), reward.measure(features[2])
    for step in range(2):
        reward.credit(features[step], group_id)
    earlier = features[:2].flatten(0, 1)[-10:]
    assert torch.equal(reward.memory.features, earlier)
    assert (reward.value(features[2]), reward.measure(features[2])) == before
    resumed = FrechetDistance(colour, reference, credit="leave_one_out", memory=10)
    resumed.load_state_dict(reward.state_dict())

    def distance(rows):
        return frechet_distance(Moments.of(torch.cat([rows, earlier])).gaussian(), reward.exemplars.gaussian)

    # The samples are judged beside the earlier ones, before they join them.
    expected = [distance(torch.cat([features[2, :i], features[2, i + 1:]])) - distance(features[2]) for i in range(8)]
    credit = reward.credit(features[2], group_id)
    assert credit.tolist() == pytest.approx(expected, abs=1e-7)
    assert torch.equal(resumed.credit(features[2], group_id), credit)
    assert torch.equal(resumed.memory.features, reward.memory.features)
    assert FrechetDistance(colour, reference).state_dict() == {}


def test_small_sets_are_warned_about_once(reference, caplog):
    reward = FrechetDistance(colour, reference, shrinkage=1e-3)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            reward.credit(torch.rand(4, 3, generator=torch.Generator().manual_seed(7)), torch.tensor([0, 0, 1, 1]))
    assert sum("2 samples cannot fill 3 dimensions" in record.message for record in caplog.records) == 1


@pytest.mark.parametrize("memory", [0, 40])
def test_influence_is_nearly_leaving_out_on_the_same_scale(reference, memory):
    features = torch.rand(200, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(20)) ** 2
    group_id = torch.arange(25).repeat_interleave(8)
    exact, first_order = (FrechetDistance(colour, reference, credit=credit, memory=memory) for credit in ("leave_one_out", "influence"))
    for _ in range(2):
        credits = [reward.credit(features, group_id).double() for reward in (exact, first_order)]
        features = features.roll(7, dims=1)
    assert float(torch.corrcoef(torch.stack(credits))[0, 1]) > 0.999
    assert float((credits[0] - credits[1]).abs().max()) < 0.1 * float(credits[0].abs().max())


def test_while_every_sample_holds_a_dimension_influence_is_leaving_out(reference):
    features = torch.rand(12, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(21))
    exact, first_order = (FrechetDistance(colour, reference, credit=credit, memory=50) for credit in ("leave_one_out", "influence"))
    few = [reward.credit(features[:4], torch.zeros(4, dtype=torch.int64)) for reward in (exact, first_order)]
    assert torch.equal(*few)
    more = [reward.credit(features[4:], torch.zeros(8, dtype=torch.int64)) for reward in (exact, first_order)]
    assert not torch.equal(*more)


def test_value_is_minus_what_is_measured(reference):
    reward = FrechetDistance(colour, reference, shrinkage=0.0, memory=5)
    features = reward.features(images(40, seed=22), prompts(40))
    distance, at_infinity = reward.measure(features)
    assert (distance.name, distance.direction, distance.count, distance.std, distance.r_squared) == ("FD", -1, 40, None, None)
    assert distance.value == pytest.approx(frechet_distance(Moments.of(features).gaussian(), reward.exemplars.gaussian), rel=1e-12)
    assert reward.value(features) == pytest.approx(-distance.value, rel=1e-12)
    assert at_infinity.name == "FD-inf"
    assert at_infinity.value < distance.value
    assert 0 < at_infinity.r_squared <= 1
    assert reward.measure(features)[1] == at_infinity  # the subsets are the same every time
    assert len(reward.measure(features[:11])) == 1  # below four samples per dimension
    assert FrechetDistance(colour, reference, shrinkage=0.5).measure(features)[0] == distance
    assert isinstance(reward, Measures)
    with pytest.raises(ValueError, match="not finite"):
        reward.value(features * torch.nan)


def test_sound_is_measured_as_fad(standard):
    reward = FrechetDistance(Plane(), standard)
    features = reward.features(audio([[0.1], [-0.2], [0.5], [0.3], [-0.4]]), prompts(5))
    assert [found.name for found in reward.measure(features)] == ["FAD", "FAD-inf"]


@pytest.mark.parametrize("q", [1.0, 2.0])
def test_vendi_measures_its_order(q):
    reward = VendiScore(colour, q=q, memory=4)
    features = reward.features(images(12, seed=23), prompts(12))
    found, = reward.measure(features)
    assert (found.name, found.direction) == ("Vendi" if q == 1 else "Vendi, q = 2", 1)
    assert found.value == pytest.approx(cosine_vendi(features, q), rel=1e-12)
    assert reward.value(features) == pytest.approx(found.value, rel=1e-9)


@pytest.mark.parametrize("make", [
    lambda path: FrechetDistance(tones, path, credit="influence", memory=12, keep="reservoir", modality=["audio"]),
    lambda path: KAD(tones, path, credit="leave_one_out", memory=12, modality=["audio"]),
    lambda path: VendiScore(tones, credit="leave_one_out", memory=12, keep="reservoir", modality=["audio"]),
])
def test_a_resumed_run_gives_the_credits_of_an_unbroken_one(tmp_path, make):
    """Metrics and weights of six iterations, and of three and three: the reward's memory is in the checkpoint."""
    exemplars = [Media("audio", torch.rand(2, 3, generator=torch.Generator().manual_seed(seed)), rate=8.0) for seed in range(40)]
    save_exemplars(reference_statistics(exemplars, as_encoder(tones, ["audio"])), tmp_path / "tones.safetensors")
    whole, half = gaussian_run.config("train.schedule=constant"), gaussian_run.config("train.schedule=constant", "train.iterations=3")

    def go(folder, settings, **changes):
        return gaussian_run.go(tmp_path / folder, settings, terms=[RewardTerm("set", make(tmp_path / "tones.safetensors"))], **changes)

    straight = go("straight", whole)
    go("cut", half)
    resumed = go("cut", whole, resume=True)
    assert torch.equal(straight.policy.shift, resumed.policy.shift)
    assert torch.equal(straight.terms[0].reward.memory.features, resumed.terms[0].reward.memory.features)
    kept = [row for row in read_metrics(tmp_path / "cut") if row["iteration"] >= 3]
    for expected, found in zip(read_metrics(tmp_path / "straight")[4:], kept, strict=True):
        assert {key: value for key, value in expected.items() if key.startswith(("reward/", "credit/"))} == {
            key: value for key, value in found.items() if key.startswith(("reward/", "credit/"))}
        assert found["reward/set/std"] > 0


def test_bad_settings(reference):
    with pytest.raises(ValueError, match="credit 'shapley' is not one of membership, leave_one_out, influence"):
        FrechetDistance(colour, reference, credit="shapley")
    with pytest.raises(ValueError, match="credit 'influence' is not one of membership, leave_one_out, which vendi offers"):
        VendiScore(colour, credit="influence")
    with pytest.raises(ValueError, match="sweeps 0"):
        VendiScore(colour, sweeps=0)
    with pytest.raises(ValueError, match="memory -1"):
        VendiScore(colour, memory=-1)
    with pytest.raises(ValueError, match="shrinkage -1"):
        FrechetDistance(colour, reference, shrinkage=-1)
    with pytest.raises(ValueError, match="q = 0"):
        VendiScore(colour, q=0)
    with pytest.raises(ValueError, match="features have 2 dimensions, the exemplars 3"):
        FrechetDistance(colour, reference).credit(torch.rand(4, 2), torch.tensor([0, 0, 1, 1]))
    with pytest.raises(ValueError, match="do not fit"):
        VendiScore(colour).credit(torch.rand(4, 2), torch.tensor([0, 0, 1]))

"""KID, KAD and CMMD as rewards of sets, on pixel means as features; seeds stated."""

import pytest
import torch
from colour_features import colour, images, prompts, save_reference

from visalign.maths.diversity import unit_rows
from visalign.maths.mmd import GaussianKernel, KernelReference, PolynomialKernel, mmd2
from visalign.media import save_media
from visalign.plugins import load_reward
from visalign.protocols import Measures, Remembers, Reward, SetReward
from visalign.rewards.exemplars import read_exemplars
from visalign.rewards.kernel_distance import CMMD, KAD, KID
from visalign.types import Media

KINDS = [KID, KAD, CMMD]


@pytest.fixture
def reference(tmp_path):
    return save_reference(tmp_path)


def plainly(kind, features, path):
    """The metric from the definition, of features as the encoder gives them."""
    exemplars = read_exemplars(path)
    rows = exemplars.features.double()
    if kind is CMMD:
        return 1000 * mmd2(unit_rows(features), KernelReference(unit_rows(rows), GaussianKernel(10.0)))
    return mmd2(features, KernelReference(rows, PolynomialKernel())) if kind is KID else 100 * mmd2(
        features, KernelReference(rows, GaussianKernel(exemplars.bandwidth)))


@pytest.mark.parametrize("kind", KINDS)
def test_value_is_minus_the_metric_on_its_published_scale(kind, reference):
    reward = kind(colour, reference)
    assert isinstance(reward, SetReward)
    assert isinstance(reward, Remembers)
    assert isinstance(reward, Measures)
    assert not isinstance(reward, Reward)
    media = images(30, seed=1)
    features = reward.features(media, prompts(30))
    found, = reward.measure(features)
    assert found.value == pytest.approx(plainly(kind, colour(media), reference), rel=1e-9)
    assert (found.name, found.direction, found.count, found.std) == (kind.__name__, -1, 30, None)
    assert reward.value(features) == pytest.approx(-found.value, rel=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_distributions_measure_zero_on_average(kind, reference):
    """40 sets of 30 against exemplars of the same distribution: less than 4 standard errors from 0, where the reference's own
    deviation counts as a part of each."""
    reward = kind(colour, reference)
    sets = [reward.features(images(30, seed=100 + seed), prompts(30)) for seed in range(40)]
    values = torch.tensor([reward.value(features) for features in sets])
    darker = torch.tensor([reward.value(reward.features([Media("image", one.data // 2) for one in images(30, seed=100 + seed)],
                                                        prompts(30))) for seed in range(5)])
    assert float(values.min()) < 0 < float(values.max())
    assert abs(float(values.mean())) < float(values.std())
    if kind is not CMMD:  # a colour and its half have one direction
        assert float(darker.max()) < float(values.min())


def test_kid_reports_its_spread_over_subsets(tmp_path):
    path = save_reference(tmp_path, n=110)
    reward, other = (KID(colour, path, subset_size=50, num_subsets=40, seed=seed) for seed in (0, 1))
    features = colour(images(120, seed=2))
    found, = reward.measure(features)
    assert found.std > 0
    assert found.value == pytest.approx(-reward.value(features), abs=4 * found.std / 40**0.5)
    assert reward.measure(features) == (found,) != other.measure(features)
    assert KID(colour, path).measure(features)[0].std is None  # 1000 are more than there are


def test_the_bandwidth_is_the_references_and_not_the_samples(reference):
    """A policy that spreads its samples must not move its own ruler."""
    reward = KAD(colour, reference)
    assert reward.reference.kernel == GaussianKernel(read_exemplars(reference).bandwidth)
    features = colour(images(30, seed=3))
    reward.value(100 * features)
    assert reward.reference.kernel == GaussianKernel(read_exemplars(reference).bandwidth)


def test_membership_takes_the_half_nearer_to_the_exemplars(reference):
    for kind in KINDS:
        reward = kind(colour, reference)
        features = reward.features(images(40, seed=4), prompts(40))
        credit = reward.credit(features, torch.arange(20).repeat_interleave(2))
        assert credit.view(20, 2).sum(dim=1).tolist() == [1.0] * 20
        positive, negative = reward.value(features[credit == 1]), reward.value(features[credit == 0])
        assert positive > max(reward.value(features[::2]), reward.value(features[1::2])) >= negative


@pytest.mark.parametrize("memory", [0, 15])
@pytest.mark.parametrize("kind", KINDS)
def test_leaving_out_is_exact_and_influence_near_it(kind, memory, reference):
    exact, first_order = (kind(colour, reference, credit=credit, memory=memory) for credit in ("leave_one_out", "influence"))
    features = [exact.features(images(40, seed=seed), prompts(40)) for seed in (5, 6)]
    group_id = torch.arange(10).repeat_interleave(4)
    for reward in (exact, first_order):
        reward.credit(features[0], group_id)
    earlier = features[0][-memory:] if memory else features[0][:0]
    whole = exact.value(torch.cat([features[1], earlier]))
    expected = [whole - exact.value(torch.cat([features[1][:i], features[1][i + 1:], earlier])) for i in range(40)]
    credit = exact.credit(features[1], group_id)
    assert credit.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-7 * kind.scale)
    other = first_order.credit(features[1], group_id)
    assert float(torch.corrcoef(torch.stack([credit, other]))[0, 1]) > 0.99
    assert float((credit - other).abs().max()) < 0.25 * float(credit.abs().max())


@pytest.mark.parametrize("kind", [KID, KAD])
def test_a_mode_that_the_exemplars_do_not_have_earns_least(kind, reference):
    """Five alike: the unbiased estimate compares different members, so that a single outlier has nothing to be like."""
    features = torch.cat([colour(images(30, seed=7)), torch.full((5, 3), 1.5, dtype=torch.float64)])
    for credit in ("leave_one_out", "influence"):
        found = kind(colour, reference, credit=credit).credit(features, torch.zeros(35, dtype=torch.int64))
        assert found[30:].max() < min(0.0, found[:30].min())


def test_features_without_a_direction_or_a_number_are_left_out(reference):
    reward = CMMD(colour, reference, credit="leave_one_out")
    media = [*images(6, seed=8), Media("image", torch.zeros(3, 4, 4, dtype=torch.uint8))]
    features = reward.features(media, prompts(7))
    assert features[6].isnan().all()
    credit = reward.credit(features, torch.zeros(7, dtype=torch.int64))
    assert credit.isfinite().tolist() == [True] * 6 + [False]
    alone = CMMD(colour, reference, credit="leave_one_out").credit(features[:6], torch.zeros(6, dtype=torch.int64))
    assert torch.equal(credit[:6], alone)


def test_configurations_name_them(reference):
    for name, kind in (("kid", KID), ("kad", KAD), ("cmmd", CMMD)):
        settings = {"credit": "influence", "memory": 9, "keep": "reservoir"}
        reward = load_reward(name, encoder="colour_features:colour", reference=str(reference), **settings)
        assert type(reward) is kind
        assert reward.spec.name == name
        assert reward.spec.arity == "set"


def test_bad_input(reference, tmp_path):
    with pytest.raises(ValueError, match="features have 2 dimensions, the exemplars 3"):
        KAD(colour, reference).credit(torch.rand(4, 2), torch.tensor([0, 0, 1, 1]))
    with pytest.raises(ValueError, match="subset_size 1 "):
        KID(colour, reference, subset_size=1)
    with pytest.raises(ValueError, match="at least two rows"):
        KAD(colour, reference).measure(torch.rand(1, 3))
    with pytest.raises(ValueError, match="1 of 4 rows of features are not finite"):
        KAD(colour, reference).value(torch.tensor([[0.1, 0.2, 0.3]] * 3 + [[float("nan")] * 3]))
    cmmd = CMMD(colour, reference)
    for ask in (cmmd.value, cmmd.measure, lambda x: cmmd.credit(x, torch.tensor([0, 0, 1, 1]))):
        with pytest.raises(ValueError, match="CMMD is defined on features of length 1"):
            ask(torch.full((4, 3), 0.3))
    with pytest.raises(ValueError, match="a set of 2 is too small"):
        KAD(colour, reference, credit="leave_one_out").credit(torch.rand(2, 3), torch.tensor([0, 0]))
    (tmp_path / "alike").mkdir()
    for number in range(3):
        save_media(images(1, seed=9)[0], tmp_path / "alike" / f"{number}")
    with pytest.raises(ValueError, match="a median distance is 0 where most features are equal"):
        KAD(colour, tmp_path / "alike")

"""AWM on the Gaussian oracle policy: its on-policy gradient is flow matching, its ratio compares like with like. Float64 unless said."""

from dataclasses import replace

import pytest
import torch

from tests import gaussian_run
from visalign.algorithms.awm import AWM
from visalign.algorithms.noising import Times
from visalign.algorithms.old_policy import Decay
from visalign.maths.oracle import GaussianWorld
from visalign.maths.schedules import dance_sigmas, flow_schedule
from visalign.samplers.dynamics import ODE
from visalign.samplers.oracle_policy import GaussianPolicy
from visalign.samplers.rollout import rollout
from visalign.samplers.steps import NoSteps
from visalign.types import Batch, Experience, Prompt

MEAN = torch.tensor([[0.3, -0.2, 1.0], [0.0, 0.1, 0.2]], dtype=torch.float64)
PROMPTS = [Prompt("one"), Prompt("two", metadata={"offset": 0.3})]
PLAIN = AWM(weighting="uniform", ema_weight=0.0, advantage_clip=1.0, draws=3)


def make_policy(dtype=torch.float64):
    return GaussianPolicy(GaussianWorld(mean=MEAN, var=0.25), flow_schedule(dance_sigmas(6, 3.0)), dtype=dtype)


def experience(policy, algorithm, advantage=None, valid=None):
    algorithm.begin(policy, 0)
    trajectory = rollout(policy, PROMPTS, 4, ODE(), NoSteps(), seed=0)
    n = trajectory.num_samples
    advantage = torch.randn(n, 1, generator=torch.Generator().manual_seed(5)) if advantage is None else torch.full((n, 1), advantage)
    valid = torch.ones(n, dtype=torch.bool) if valid is None else valid
    return algorithm.prepare(policy, Experience(trajectory, advantage, valid, iteration=0, reward=advantage[:, 0]), 8)


def whole(made, rows=None):
    rows = torch.arange(made.trajectory.num_samples) if rows is None else rows
    return Batch(made, rows, denominator=float(made.valid.sum()))


def gradient(algorithm, policy, batch, microbatch=100, seed=0):
    policy.zero_grad()
    loss = 0.0
    for part in algorithm.microbatches(policy, batch, microbatch, seed):
        terms = algorithm.loss(policy, part)
        terms.loss.backward()
        loss += float(terms.loss.detach())
    return loss, policy.shift.grad.clone()


def moved(policy, by=0.05):
    with torch.no_grad():
        policy.shift += by * torch.randn(policy.shift.shape, generator=torch.Generator().manual_seed(1), dtype=policy.shift.dtype)
    return policy


@pytest.mark.parametrize("ratio", ["exp_first", "sum_first"])
def test_with_advantage_one_the_first_gradient_is_flow_matching(ratio):
    """r = 1, so grad = A grad lp; with A = 1 and "uniform" that of mean_d (v - (x1 - x0))^2, averaged over samples and draws."""
    policy, algorithm = make_policy(), replace(PLAIN, ratio=ratio)
    batch = whole(experience(policy, algorithm, advantage=1.0))
    _, grad = gradient(algorithm, policy, batch)
    policy.zero_grad()
    for part in algorithm.microbatches(policy, batch, 100, 0):
        noised = part.noised(policy)
        velocity = policy.predict_at(noised.x, noised.timesteps, part.conditioning(policy)).velocity
        (velocity - (noised.noise - noised.x0)).square().flatten(1).mean(1).sum().div(8 * 3).backward()
    torch.testing.assert_close(grad, policy.shift.grad, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("weighting", ["uniform", "t", "t2", "huber", "ghuber"])
def test_without_advantage_nothing_moves(weighting):
    policy, algorithm = make_policy(), AWM(weighting=weighting)  # distances to weights that are the policy have no slope
    _, grad = gradient(algorithm, policy, whole(experience(policy, algorithm, advantage=0.0)))
    assert torch.equal(grad, torch.zeros_like(grad))


def test_a_share_of_the_samples_is_compared_with_the_weights_that_sampled():
    """The first of several optimizer steps: same weights, same time, same noise, so the ratio is 1 bit for bit; not after a move."""
    policy, algorithm = make_policy(torch.float32), AWM(kl_weight=0.1)
    made = experience(policy, algorithm)
    share = torch.tensor([0, 3, 5, 6])
    for part in algorithm.microbatches(policy, whole(made, share), 8, 0):
        assert algorithm.loss(policy, part).maxima == {"policy/ratio_deviation": 0.0, "policy/kl_reference": 0.0}
    on_policy = gradient(algorithm, policy, replace(whole(made, share), experience=made))[1]
    moved(policy)
    for part in algorithm.microbatches(policy, whole(made, share), 8, 0):
        terms = algorithm.loss(policy, part)
        assert terms.maxima["policy/ratio_deviation"] > 1e-3
        assert terms.metrics["awm/kl_ema"][0] > 0
    assert not torch.allclose(gradient(algorithm, policy, whole(made, share))[1], on_policy)


@pytest.mark.parametrize("what", ["timesteps", "seed"])
def test_other_times_or_noise_for_the_old_policy_would_be_seen(what):
    """Two micro-batches of the same samples with the same weights: the ratio of their surrogates is far from the 1 that a run checks."""
    policy, algorithm = make_policy(torch.float32), replace(PLAIN, weighting="ghuber", ratio="sum_first", draws=1)
    part = next(iter(algorithm.microbatches(policy, whole(experience(policy, algorithm)), 100, 0)))
    other = replace(part, timesteps=part.timesteps.roll(1, dims=0)) if what == "timesteps" else replace(part, seed=1)

    def log_prob(of):
        noised = of.noised(policy)
        with torch.no_grad():
            return algorithm._log_prob(policy.predict_at(noised.x, noised.timesteps, of.conditioning(policy)), noised, 1)[1]

    assert torch.equal(log_prob(part), log_prob(part))
    assert float((log_prob(other) - log_prob(part)).exp().sub(1).abs().max()) > 0.01


def test_one_exponential_per_draw_or_per_sample():
    """A ratio of the mean is the geometric mean of the ratios, so never above their arithmetic mean."""
    policy = make_policy()
    ratios = {}
    for ratio in ("exp_first", "sum_first"):
        algorithm = replace(PLAIN, ratio=ratio, clip=100.0)
        made = experience(policy, algorithm, advantage=1.0)
        moved(policy, 0.2)
        parts = list(algorithm.microbatches(policy, whole(made, torch.arange(4)), 100, 0))
        assert len(parts) == (3 if ratio == "exp_first" else 1)
        sums = [algorithm.loss(policy, part).metrics["awm/ratio"] for part in parts]
        ratios[ratio] = sum(value for value, _ in sums) / sum(count for _, count in sums)
        with torch.no_grad():
            policy.shift.zero_()
    assert ratios["sum_first"] < ratios["exp_first"]


@pytest.mark.parametrize("ratio", ["exp_first", "sum_first"])
@pytest.mark.parametrize("weights", [(0.0, 0.0), (0.3, 0.0), (0.0, 0.3), (0.2, 0.3)], ids=str)
def test_accumulation_and_processes_change_nothing(ratio, weights):
    """With either distance, both, or none: neither needs the other."""
    algorithm = AWM(ratio=ratio, kl_weight=weights[0], ema_weight=weights[1], draws=2, times=Times("uniform"))
    policy = make_policy()
    made = experience(policy, algorithm, valid=torch.tensor([True] * 5 + [False] + [True] * 2))
    moved(policy)
    shares = torch.tensor([6, 0, 3, 4]), torch.tensor([1, 2, 5, 7])
    both = [gradient(algorithm, policy, whole(made, share)) for share in shares]
    cut = [gradient(algorithm, policy, whole(made, share), microbatch=3) for share in shares]
    for one, other in zip(both, cut, strict=True):
        assert other[0] == pytest.approx(one[0], rel=1e-9)
        torch.testing.assert_close(other[1], one[1], atol=1e-9, rtol=1e-9)
    swapped = gradient(algorithm, policy, whole(made, shares[0].flip(0)))
    torch.testing.assert_close(swapped[1], both[0][1], atol=1e-9, rtol=1e-9)
    terms = [algorithm.loss(policy, part) for part in algorithm.microbatches(policy, whole(made, shares[1]), 100, 0)]
    assert terms[0].metrics["awm/loss"][1] == 3 * (1 if ratio == "exp_first" else 2)  # one of the four is invalid


def test_the_distances_have_their_weights():
    policy = make_policy()
    made = experience(policy, AWM(), advantage=0.0)
    moved(policy)
    reference, ema = (gradient(AWM(kl_weight=a, ema_weight=b), policy, whole(made))[0] for a, b in ((0.5, 0.0), (0.0, 1.0)))
    assert 0 < ema == pytest.approx(2 * reference)  # both are the weights of the start
    both = gradient(AWM(kl_weight=0.5, ema_weight=1.0), policy, whole(made))[0]
    assert both == pytest.approx(reference + ema)


@pytest.fixture
def settings():
    return gaussian_run.config("sampler.steps={name: none}", "sampler.dynamics={name: ode}", "ema=null", "evaluation.every=0",
                               "train.iterations=12", "train.learning_rate=0.03", "train.group_size=8", "train.schedule=constant")


@pytest.mark.parametrize("algorithm", [AWM(), AWM(kl_weight=1e-3, ema_weight=0.0, weighting="t2", ratio="sum_first", clip=0.1)],
                         ids=["anchored", "clipped"])
def test_a_run_raises_its_reward(tmp_path, settings, algorithm):
    policy = gaussian_run.go(tmp_path / "run", settings, algorithm=algorithm).policy
    assert float(policy.shift.detach().mean()) > 0.08


def test_resuming_is_exact_with_an_anchor_that_lags(tmp_path, settings):
    algorithm = AWM(ema_decay=Decay(start=0.5))
    straight = gaussian_run.go(tmp_path / "straight", settings, algorithm=algorithm).policy
    half = settings.model_copy(update={"train": settings.train.model_copy(update={"iterations": 5})})
    gaussian_run.go(tmp_path / "cut", half, algorithm=algorithm)
    resumed = gaussian_run.go(tmp_path / "cut", settings, resume=True, algorithm=algorithm).policy
    assert torch.equal(straight.shift, resumed.shift)
    assert torch.equal(straight.snapshots()["ema"]["shift"], resumed.snapshots()["ema"]["shift"])


def test_bad_input_is_refused():
    for wrong, match in (({"weighting": "t3"}, "unknown weighting"), ({"ratio": "sum"}, "exp_first or sum_first"),
                         ({"clip": 0.0}, "must be > 0"), ({"draws": 0}, "draws >= 1"), ({"ema_weight": -1.0}, "weights must be"),
                         ({"power": 2.0}, "power of ghuber")):
        with pytest.raises(ValueError, match=match):
            AWM(**wrong)
    policy, algorithm = make_policy(), replace(PLAIN, ratio="sum_first")
    batch = whole(experience(policy, algorithm))
    with pytest.raises(ValueError, match="3 draws of a sample"):
        list(algorithm.microbatches(policy, batch, 2, 0))

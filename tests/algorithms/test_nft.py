"""DiffusionNFT on the Gaussian oracle policy, where its optimum is known in closed form."""

from dataclasses import replace

import pytest
import torch

from tests import gaussian_run
from visalign.algorithms.nft import NFT
from visalign.algorithms.noising import Times
from visalign.algorithms.old_policy import PUBLISHED, Decay, follow
from visalign.maths.oracle import GaussianWorld
from visalign.maths.schedules import dance_sigmas, flow_schedule
from visalign.samplers.dynamics import ODE
from visalign.samplers.oracle_policy import GaussianPolicy
from visalign.samplers.rollout import rollout
from visalign.samplers.steps import NoSteps
from visalign.types import Batch, Experience, Prompt

MEAN, VAR = torch.tensor([[0.3, -0.2, 1.0], [0.0, 0.1, 0.2]], dtype=torch.float64), 0.25
PROMPTS = [Prompt("one"), Prompt("two", metadata={"offset": 0.3})]


def make_policy(dtype=torch.float64):
    return GaussianPolicy(GaussianWorld(mean=MEAN, var=VAR), flow_schedule(dance_sigmas(6, 3.0)), dtype=dtype)


def experience(policy, group=4, valid=None, iteration=0):
    trajectory = rollout(policy, PROMPTS, group, ODE(), NoSteps(), seed=0, role="old")
    advantage = torch.randn(trajectory.num_samples, 1, generator=torch.Generator().manual_seed(5))
    valid = torch.ones(trajectory.num_samples, dtype=torch.bool) if valid is None else valid
    return Experience(trajectory, advantage, valid, iteration=iteration, reward=advantage[:, 0])


def whole(made, rows=None):
    rows = torch.arange(made.trajectory.num_samples) if rows is None else rows
    return Batch(made, rows, denominator=float(made.valid.sum()))


def gradient(algorithm, policy, batch, microbatch=100, seed=0):
    """Accumulated loss, gradient and the last terms."""
    policy.zero_grad()
    loss = 0.0
    for part in algorithm.microbatches(policy, batch, microbatch, seed):
        terms = algorithm.loss(policy, part)
        terms.loss.backward()
        loss += float(terms.loss.detach())
    return loss, policy.shift.grad.clone()


def started(algorithm, dtype=torch.float64):
    policy = make_policy(dtype)
    algorithm.begin(policy, 0)
    return policy


def moved(policy, by=0.05):
    with torch.no_grad():
        policy.shift += by * torch.randn(policy.shift.shape, generator=torch.Generator().manual_seed(1), dtype=policy.shift.dtype)
    return policy


def test_the_minimum_is_the_closed_form_of_the_paper():
    """x0* = x0_old + (1/beta) E[(2r - 1)(x0 - x0_old) | x].

    With ``2 r - 1 = c . (x0 - mean)`` the conditional expectation is ``c Var(x0 | x) = c var sigma^2 / V``, the move of x0_pred that a
    shift of ``c var / beta`` makes at every level: the policy can represent the optimum, which is the KL-tilted Gaussian.
    """
    slope, num, beta = torch.tensor([[0.3, -0.2, 0.1], [0.0, 0.2, -0.1]], dtype=torch.float64), 20_000, 0.5
    algorithm = NFT(beta=beta, adaptive=False, times=Times("uniform", low=0.05, high=0.95), advantage_clip=5.0)
    policy = started(algorithm)
    made = experience(policy, group=2)
    x0 = MEAN + VAR**0.5 * torch.randn(num, *MEAN.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    advantage = 5.0 * (slope * (x0 - MEAN)).sum(dim=(1, 2)).unsqueeze(1)
    assert float(advantage.abs().max()) < 5.0  # nothing is clipped
    trajectory = replace(made.trajectory, x_final=x0, group_id=torch.zeros(num, dtype=torch.int64), sample_index=torch.arange(num))
    batch = whole(Experience(trajectory, advantage, torch.ones(num, dtype=torch.bool), 0, advantage[:, 0]))
    _, at_old = gradient(algorithm, policy, batch, microbatch=num)
    with torch.no_grad():
        policy.shift += 1.0
    _, away = gradient(algorithm, policy, batch, microbatch=num)
    minimum = -at_old / (away - at_old)  # the loss is quadratic and its elements are independent
    torch.testing.assert_close(minimum, slope * VAR / beta, atol=0.01, rtol=0)


def test_at_the_old_policy_nothing_deviates_and_beta_does_not_matter():
    gradients = []
    for beta in (0.1, 1.0):
        algorithm = NFT(beta=beta, kl_weight=0.1, draws=2)
        policy = started(algorithm, torch.float32)
        batch = whole(experience(policy))
        for part in algorithm.microbatches(policy, batch, 8, 0):
            terms = algorithm.loss(policy, part)
            assert terms.maxima == {"policy/output_gap": 0.0, "policy/kl_reference": 0.0}
            assert terms.metrics["nft/moved"] == (0.0, 8.0)
        gradients.append(gradient(algorithm, policy, batch)[1])
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-5)


def test_samples_without_advantage_move_nothing():
    algorithm = NFT(draws=3)
    policy = started(algorithm)
    made = experience(policy)
    _, grad = gradient(algorithm, policy, whole(replace(made, advantage=torch.zeros_like(made.advantage))))
    assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("times", [Times("grid"), Times("uniform"), Times("logit_normal")], ids=lambda t: t.name)
def test_accumulation_and_processes_change_nothing(times):
    algorithm = NFT(times=times, draws=2, kl_weight=0.2, beta=0.3)
    policy = started(algorithm)
    moved(policy)
    made = experience(policy, valid=torch.tensor([True] * 5 + [False] + [True] * 2))
    loss, grad = gradient(algorithm, policy, whole(made))
    assert gradient(algorithm, policy, whole(made), microbatch=3)[0] == pytest.approx(loss, rel=1e-6)
    torch.testing.assert_close(gradient(algorithm, policy, whole(made), microbatch=3)[1], grad, atol=1e-7, rtol=1e-6)
    parts = [gradient(algorithm, policy, whole(made, rows)) for rows in (torch.tensor([6, 0, 3]), torch.tensor([1, 2, 4, 5, 7]))]
    assert sum(part[0] for part in parts) == pytest.approx(loss, rel=1e-6)
    torch.testing.assert_close(parts[0][1] + parts[1][1], grad, atol=1e-7, rtol=1e-6)


def test_only_clean_samples_and_prompts_of_the_trajectory_are_read():
    """Its conditioning belongs to the call that sampled, whose guidance may be another."""
    algorithm = NFT(draws=2)
    policy = moved(started(algorithm))
    made = experience(policy)
    bare = replace(made.trajectory, conditioning=None, x=torch.empty(0), x_next=torch.empty(0), log_prob=torch.empty(0))
    expected, got = (gradient(algorithm, policy, whole(one)) for one in (made, replace(made, trajectory=bare)))
    assert torch.equal(expected[1], got[1])


def test_an_invalid_sample_counts_nowhere_even_if_it_is_not_finite():
    algorithm = NFT(kl_weight=0.2)
    policy = moved(started(algorithm))
    valid = torch.tensor([True] * 7 + [False])
    made = experience(policy, valid=valid)
    broken = made.trajectory.x_final.clone()
    broken[7] = torch.nan
    made = replace(made, trajectory=replace(made.trajectory, x_final=broken))
    made.advantage[7] = 9.0
    _, grad = gradient(algorithm, policy, whole(made))
    _, without = gradient(algorithm, policy, whole(made, torch.arange(7)))
    torch.testing.assert_close(grad, without, atol=1e-12, rtol=1e-12)
    terms = algorithm.loss(policy, next(iter(algorithm.microbatches(policy, whole(made), 8, 0))))
    assert all(count == 7 for _, count in terms.metrics.values())


def test_the_old_policy_copies_exactly_or_follows():
    policy = make_policy(torch.float32)
    follow(policy, "old", Decay(start=0.9), 0)
    start = policy.snapshots()["old"]["shift"].clone()
    moved(policy)
    follow(policy, "old", Decay(start=0.9), 1)
    torch.testing.assert_close(policy.snapshots()["old"]["shift"], 0.9 * start + 0.1 * policy.shift.detach())
    follow(policy, "old", Decay(), 2)
    assert torch.equal(policy.snapshots()["old"]["shift"], policy.shift.detach())


def test_published_decays():
    assert [PUBLISHED[0].at(i) for i in (0, 500)] == [0.0, 0.0]
    assert [PUBLISHED[1].at(i) for i in (0, 100, 900)] == pytest.approx([0.0, 0.1, 0.5])
    assert [PUBLISHED[2].at(i) for i in (0, 74, 75, 175, 900)] == pytest.approx([0.0, 0.0, 0.0, 0.75, 0.999])
    assert Decay(start=0.9).at(7) == 0.9


def test_no_trajectory_is_kept():
    made = experience(started(NFT())).trajectory
    assert made.x.numel() == made.x_next.numel() == made.log_prob.numel() == 0
    assert NFT().needs_prediction is False


@pytest.fixture
def settings():
    return gaussian_run.config("sampler.steps={name: none}", "sampler.dynamics={name: ode}", "ema=null", "evaluation.every=0",
                               "train.iterations=12", "train.learning_rate=0.03", "train.group_size=8", "train.schedule=constant")


def test_a_run_raises_its_reward(tmp_path, settings):
    policy = gaussian_run.go(tmp_path / "run", settings, algorithm=NFT(draws=2, kl_weight=1e-3)).policy
    assert float(policy.shift.detach().mean()) > 0.1


def test_resuming_is_exact_with_an_old_policy_that_lags(tmp_path, settings):
    algorithm = NFT(draws=2, old_decay=Decay(start=0.5))
    straight = gaussian_run.go(tmp_path / "straight", settings, algorithm=algorithm).policy
    half = settings.model_copy(update={"train": settings.train.model_copy(update={"iterations": 5})})
    gaussian_run.go(tmp_path / "cut", half, algorithm=algorithm)
    resumed = gaussian_run.go(tmp_path / "cut", settings, resume=True, algorithm=algorithm).policy
    assert torch.equal(straight.shift, resumed.shift)
    assert torch.equal(straight.snapshots()["old"]["shift"], resumed.snapshots()["old"]["shift"])


def test_bad_input_is_refused():
    for wrong in ({"beta": 0.0}, {"advantage_clip": 0.0}, {"kl_weight": -1.0}, {"draws": 0}):
        with pytest.raises(ValueError, match="must be"):
            NFT(**wrong)
    with pytest.raises(ValueError, match="start and cap"):
        Decay(start=1.5)
    with pytest.raises(ValueError, match="there are none"):
        follow(make_policy(), "old", Decay(start=0.5), 3)
    policy = started(NFT())
    with pytest.raises(ValueError, match="draws per"):
        list(NFT(draws=7).microbatches(policy, whole(experience(policy)), 8, 0))

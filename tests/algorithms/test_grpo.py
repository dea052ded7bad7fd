"""GRPO's loss, gradient and optimum, on the Gaussian oracle policy where all of them are known in closed form. Float64 unless said."""

from dataclasses import replace

import pytest
import torch

from visalign.algorithms.grpo import GRPO
from visalign.maths.advantages import AdvantageRule, group_advantages
from visalign.maths.gaussian import transition_mean
from visalign.maths.oracle import GaussianWorld, shift_response
from visalign.maths.schedules import dance_sigmas, flow_schedule
from visalign.samplers.dynamics import CPS, DDIM, FlowSDE, Mixed
from visalign.samplers.oracle_policy import GaussianPolicy
from visalign.samplers.rollout import rollout
from visalign.samplers.steps import AllSteps, SingleStep, Window
from visalign.types import Batch, Experience, Prompt

WORLD = GaussianWorld(mean=torch.tensor([[0.3, -0.2, 1.0], [0.0, 0.1, 0.2]], dtype=torch.float64), var=0.25)
PROMPTS = [Prompt("one"), Prompt("two", metadata={"offset": 0.3})]
NUM_STEPS, GROUP = 6, 4


def make_policy(dtype=torch.float64, per_step=False):
    return GaussianPolicy(WORLD, flow_schedule(dance_sigmas(NUM_STEPS, 3.0)), dtype=dtype, per_step=per_step)


def experience(policy, dynamics=FlowSDE(), steps=AllSteps(), advantage=None, valid=None, **settings):  # noqa: B008 - immutable
    trajectory = rollout(policy, PROMPTS, GROUP, dynamics, steps, seed=0, **settings)
    n, s = trajectory.log_prob.shape
    if advantage is None:
        advantage = torch.randn(n, s, generator=torch.Generator().manual_seed(5))
    valid = torch.ones(n, dtype=torch.bool) if valid is None else valid
    return Experience(trajectory, advantage, valid, iteration=0, reward=advantage[:, 0])


def whole(made):
    rows = torch.arange(made.trajectory.num_samples)
    return Batch(made, rows, denominator=float(made.valid.sum()))


def gradient(algorithm, policy, batch, microbatch=100):
    """Accumulated loss and gradient over the batch's micro-batches."""
    policy.zero_grad()
    loss = 0.0
    for part in algorithm.microbatches(policy, batch, microbatch, 0):
        terms = algorithm.loss(policy, part)
        terms.loss.backward()
        loss += float(terms.loss.detach())
    return loss, policy.shift.grad.clone()


def moved(policy, by=0.05):
    with torch.no_grad():
        policy.shift += by * torch.randn(policy.shift.shape, generator=torch.Generator().manual_seed(1), dtype=policy.shift.dtype)
    return policy


SURROGATES = [GRPO(clip=0.5), GRPO(clip=0.5, surrogate="guard"), GRPO(clip=10.0, surrogate="dppo")]


@pytest.mark.parametrize("algorithm", [replace(a, kl_weight=0.1) for a in SURROGATES], ids=lambda a: a.surrogate)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_before_the_first_update_nothing_deviates_bit_for_bit(algorithm, dtype):
    policy = make_policy(torch.float32)
    batch = whole(experience(policy, storage_dtype=dtype))
    for part in algorithm.microbatches(policy, batch, 8, 0):
        terms = algorithm.loss(policy, part)
        assert terms.maxima == {"policy/ratio_deviation": 0.0, "policy/output_gap": 0.0, "policy/kl_reference": 0.0}
        assert terms.metrics["grpo/ratio"] == (8.0, 8.0)
        assert terms.metrics["grpo/clip_fraction"] == (0.0, 8.0)


def test_the_on_policy_gradient_is_the_score_function_in_closed_form():
    """grad = -1/(N S) sum A (x_next - mean) / (std^2 D) dmean/dshift, with mean affine in shift."""
    policy = make_policy()
    made = experience(policy)
    trajectory, levels = made.trajectory, policy.schedule.levels
    expected = torch.zeros_like(policy.shift)
    for entry, step in enumerate(trajectory.step_index.tolist()):
        t, level = trajectory.transitions[entry], levels[step]
        total = level.alpha**2 * 0.25 + level.sigma**2
        slope = (t.A * level.sigma**2 - t.B * level.alpha * level.sigma) / total
        prediction = policy.predict(trajectory.x[:, entry], step, trajectory.conditioning.select(trajectory.group_id.tolist()))
        score = (trajectory.x_next[:, entry].double() - transition_mean(prediction, t).detach()) / t.std**2
        expected -= (made.advantage[:, entry].double().view(-1, 1, 1) * score * slope).sum(0) / 6 / (8 * 5)
    _, found = gradient(GRPO(clip=0.5), policy, whole(made))
    assert torch.allclose(found, expected, rtol=1e-6, atol=1e-9)  # log_prob_old is stored in float32


@pytest.mark.parametrize("algorithm", SURROGATES, ids=lambda a: a.surrogate)
def test_zero_advantage_is_zero_gradient(algorithm):
    policy = make_policy()
    made = experience(policy, advantage=torch.zeros(8, 5))
    moved(policy)
    assert torch.equal(gradient(algorithm, policy, whole(made))[1], torch.zeros_like(policy.shift))


@pytest.mark.parametrize("algorithm", [replace(a, kl_weight=0.3) for a in SURROGATES], ids=lambda a: a.surrogate)
@pytest.mark.parametrize("microbatch", [1, 3, 4])
def test_accumulated_micro_batches_equal_one_large_batch(algorithm, microbatch):
    policy = make_policy()
    made = experience(policy, valid=torch.tensor([True] * 6 + [False, True]))
    moved(policy)
    loss, expected = gradient(algorithm, policy, whole(made))
    loss_split, found = gradient(algorithm, policy, whole(made), microbatch)
    assert loss_split == pytest.approx(loss, rel=1e-12)
    assert torch.allclose(found, expected, rtol=1e-10, atol=1e-14)


def test_an_uneven_split_over_processes_sums_to_the_whole_gradient():
    """A mean of means would weight the two shares equally; sums over the global denominator do not."""
    policy = make_policy()
    made = experience(policy)
    moved(policy)
    algorithm = GRPO(clip=0.5, kl_weight=0.3)
    _, expected = gradient(algorithm, policy, whole(made))
    shares = [Batch(made, rows, denominator=8.0) for rows in (torch.arange(3), torch.arange(3, 8))]
    assert torch.allclose(sum(gradient(algorithm, policy, share)[1] for share in shares), expected, rtol=1e-10, atol=1e-14)


def test_invalid_samples_count_nowhere():
    """Even where their advantage is NaN: the result is that of the batch without them."""
    policy = make_policy()
    valid = torch.tensor([True, False, True, True, True, True, False, True])
    made = experience(policy, valid=valid)
    moved(policy)
    algorithm = GRPO(clip=0.5, kl_weight=0.3)
    rows = valid.nonzero().squeeze(1)
    loss, expected = gradient(algorithm, policy, Batch(made, rows, denominator=6.0))
    poisoned = replace(made, advantage=torch.where(valid[:, None], made.advantage, torch.nan))
    for other in (made, poisoned):
        loss_masked, found = gradient(algorithm, policy, whole(other))
        assert loss_masked == pytest.approx(loss, rel=1e-12)
        assert torch.allclose(found, expected, rtol=1e-10, atol=1e-14)
    part = next(iter(algorithm.microbatches(policy, whole(poisoned), 8, 0)))
    assert all(count == 6 and value == value for value, count in algorithm.loss(policy, part).metrics.values())


def test_the_kl_to_the_reference_has_its_closed_form_gradient():
    """With a per-step shift delta the step's KL is cost_i |delta_i|^2 / 2, so its gradient is beta cost_i delta_i / (S D)."""
    policy = make_policy(per_step=True)
    made = experience(policy, advantage=torch.zeros(8, 5))
    moved(policy)
    _, found = gradient(GRPO(clip=0.5, kl_weight=0.7), policy, whole(made))
    cost = shift_response(WORLD, FlowSDE(), policy.schedule.levels).cost.view(NUM_STEPS, 2, 3)
    assert torch.allclose(found, 0.7 * cost * policy.shift.detach() / (5 * 6), rtol=1e-6, atol=1e-10)
    assert found.abs().max() > 1e-4


@pytest.mark.parametrize(("index", "weight"), [(0, 1.0), (2, 0.5), (4, 0.0)])
def test_the_kl_weight_follows_its_schedule(index, weight):
    assert GRPO(kl_weight=1.0, kl_schedule="linear", iterations=5).kl_weight_at(index) == weight
    assert GRPO(kl_weight=1.0).kl_weight_at(index) == 1.0
    assert not GRPO().needs_reference


@pytest.mark.parametrize("dynamics", [FlowSDE(), CPS(), DDIM()])
@pytest.mark.parametrize("step", [0, 3])
def test_guard_rescales_the_on_policy_gradient_by_std(dynamics, step):
    """E log-ratio normalisation: exponent (dlogp + b) std, and b is flat at the sampling weights."""
    policy = make_policy()
    made = experience(policy, dynamics, SingleStep(step))
    std = made.trajectory.transitions[0].std
    _, plain = gradient(GRPO(clip=0.5), policy, whole(made))
    _, guarded = gradient(GRPO(clip=0.5, surrogate="guard"), policy, whole(made))
    assert torch.allclose(guarded, std * plain, rtol=1e-6, atol=1e-10)


def test_dppo_masks_by_the_exact_kl():
    policy = make_policy()
    made = experience(policy, advantage=torch.ones(8, 5))
    moved(policy, by=0.5)
    free, strict = GRPO(clip=1e9, surrogate="dppo"), GRPO(clip=1e-12, surrogate="dppo")
    assert not torch.equal(gradient(free, policy, whole(made))[1], gradient(strict, policy, whole(made))[1])

    def masked(algorithm):
        parts = algorithm.microbatches(policy, whole(made), 8, 0)
        return sum(algorithm.loss(policy, part).metrics["grpo/clip_fraction"][0] for part in parts)

    assert masked(strict) > 0
    assert masked(free) == 0


def test_metrics_tell_how_far_the_policy_has_moved():
    policy = make_policy(per_step=True)
    made = experience(policy)
    moved(policy)
    algorithm = GRPO(clip=0.5, kl_weight=0.1)
    cost = shift_response(WORLD, FlowSDE(), policy.schedule.levels).cost.view(NUM_STEPS, 2, 3)
    for part in algorithm.microbatches(policy, whole(made), 8, 0):
        terms = algorithm.loss(policy, part)
        exact = float((cost[part.entry] * policy.shift[part.entry].detach().square()).sum()) / 2 / 6
        total, count = terms.metrics["grpo/kl_reference"]
        assert total / count == pytest.approx(exact, rel=1e-6)
        total, count = terms.metrics["grpo/kl_old"]  # the sampling policy was the reference
        assert total / count == pytest.approx(exact, rel=1e-3)  # its velocity was stored in float32
        assert terms.maxima["policy/ratio_deviation"] > 1e-3
        assert terms.maxima["policy/output_gap"] > 1e-3


def test_recomputed_log_probs_equal_recorded_ones():
    policy = make_policy(torch.float32)
    made = experience(policy)
    assert GRPO().prepare(policy, made, 4) is made
    again = GRPO(old_log_prob="recomputed").prepare(policy, made, 3).trajectory
    assert torch.equal(again.log_prob, made.trajectory.log_prob)
    assert torch.equal(again.prediction, made.trajectory.prediction)
    assert not again.log_prob.requires_grad
    moved(policy)  # what is recomputed is what the policy is now
    later = GRPO(old_log_prob="recomputed").prepare(policy, made, 3).trajectory
    assert not torch.equal(later.log_prob, made.trajectory.log_prob)


def test_without_stored_predictions_the_clip_surrogate_is_unchanged():
    policy = make_policy()
    made = experience(policy)
    bare = replace(made, trajectory=replace(made.trajectory, prediction=None))
    moved(policy)
    assert torch.equal(gradient(GRPO(clip=0.5), policy, whole(made))[1], gradient(GRPO(clip=0.5), policy, whole(bare))[1])


@pytest.mark.parametrize(("dynamics", "steps", "surrogate", "memoryless"), [
    (FlowSDE(noise=2**0.5), AllSteps(), "clip", True), (DDIM(), Window(1, 3), "clip", False), (DDIM(), Window(1, 3), "dppo", False)])
def test_the_optimum_is_the_kl_tilted_gaussian(dynamics, steps, surrogate, memoryless):
    """Reward a . x0 and KL weight beta: the trained shift is where policy gradient and KL cancel, known in closed form.

    For a memoryless path with all steps stochastic that is the tilted optimum var a / beta. 60 updates of 2 x 256 samples, learning
    rate decayed to zero, seed 0; tolerance 8 % of the largest component.
    """
    num_steps, beta = 12 if memoryless else 8, 1.0
    slope = torch.tensor([[0.4, -0.2, 0.0], [0.1, 0.3, -0.4]], dtype=torch.float64)
    policy = GaussianPolicy(WORLD, flow_schedule(dance_sigmas(num_steps, 1.0)), dtype=torch.float64)
    # The surrogate and the KL are both per dimension and averaged over stored steps, so beta keeps its meaning.
    algorithm = GRPO(clip=1.0, surrogate=surrogate, kl_weight=beta)
    optimizer = torch.optim.Adam([policy.shift], lr=0.02)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, total_iters=60)
    valid = torch.ones(512, dtype=torch.bool)
    for iteration in range(60):
        found = rollout(policy, PROMPTS, 256, dynamics, steps, seed=0, iteration=iteration, first_index=512 * iteration)
        reward = (found.x_final.double() * slope).sum(dim=(1, 2))
        advantage = group_advantages(reward, valid, found.group_id, AdvantageRule(scale="none", clip=None)).advantage
        made = Experience(found, advantage[:, None].expand(-1, len(found.transitions)), valid, iteration, reward)
        gradient(algorithm, policy, whole(made), microbatch=512)
        optimizer.step()
        scheduler.step()
    mixed = Mixed(dynamics, steps.select(num_steps, 0, 0))
    exact = shift_response(WORLD, mixed, policy.schedule.levels).shared_optimum(slope, beta)
    error = (policy.shift.detach() - exact).abs().max() / exact.abs().max()
    assert error < 0.08
    if memoryless:
        tilted = WORLD.tilted(slope, beta).mean - WORLD.mean
        assert (exact - tilted).abs().max() < 0.05 * tilted.abs().max()  # 12 steps; the difference vanishes with more
        assert (policy.shift.detach() - tilted).abs().max() < 0.1 * tilted.abs().max()

"""What is stored is what was used, and a sample depends on nothing but its global index. On the Gaussian oracle policy."""

from dataclasses import dataclass

import pytest
import torch

from visalign.maths.gaussian import log_prob, transition_mean
from visalign.maths.oracle import GaussianWorld, propagate
from visalign.maths.philox import philox_normal
from visalign.maths.schedules import dance_sigmas, flow_schedule
from visalign.maths.seeds import derive_seed
from visalign.samplers.dynamics import CPS, DDIM, ODE, FlowSDE, Mixed
from visalign.samplers.oracle_policy import GaussianPolicy
from visalign.samplers.rollout import STEP, TrajectorySampler, generate, rollout
from visalign.samplers.steps import AllSteps, NoSteps, SingleStep, Tail, Window
from visalign.types import Prompt, Transition

PROMPTS = [Prompt(text, metadata={"offset": offset}) for text, offset in (("a cat", 0.0), ("A Cat", 0.5), ("a cat", -0.5))]
WORLD = GaussianWorld(mean=torch.tensor([[0.3, -0.2, 1.0], [0.0, 0.1, 0.2]]), var=0.25)


def make_policy(num_steps=6):
    return GaussianPolicy(WORLD, flow_schedule(dance_sigmas(num_steps, 3.0)))


def sample(policy=None, prompts=PROMPTS, dynamics=FlowSDE(), steps=AllSteps(), group_size=4, **settings):  # noqa: B008 - immutable
    return rollout(policy or make_policy(), prompts, group_size, dynamics, steps, **{"seed": 0, **settings})


def assert_same(one, two, rows=slice(None)):
    for name in ("x", "x_next", "x_final", "log_prob", "prediction", "sample_index"):
        assert torch.equal(getattr(one, name)[rows], getattr(two, name)), name


def test_shapes_and_groups_of_equal_and_differently_cased_prompts():
    found = sample(steps=Window(1, 4), storage_dtype=torch.bfloat16)
    assert found.x.shape == found.x_next.shape == found.prediction.shape == (12, 3, 2, 3)
    assert found.x.dtype == found.x_next.dtype == torch.bfloat16
    assert found.x_final.dtype == found.log_prob.dtype == torch.float32
    assert found.group_id.dtype == torch.int64
    assert found.group_id.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert found.step_index.tolist() == [1, 2, 3]
    assert found.num_dims == 6
    assert len({tuple(row.flatten().tolist()) for row in found.x_final}) == 12  # the two equal prompts got different samples


@pytest.mark.parametrize("microbatch", [1, 3, 5, 12, 100])
@pytest.mark.parametrize("same_initial_noise", [False, True])
@pytest.mark.parametrize("noise", ["generator", "philox"])
def test_the_microbatch_changes_no_bit(microbatch, same_initial_noise, noise):
    settings = {"same_initial_noise": same_initial_noise, "noise": noise}
    assert_same(sample(**settings), sample(microbatch=microbatch, **settings))


def test_the_source_of_noise_is_another_draw_of_the_same_steps():
    """Recomputed by hand from the sample's index, the step and the seed."""
    found, other = sample(noise="philox"), sample()
    assert torch.equal(found.x[:, 0], other.x[:, 0])
    assert not torch.equal(found.x_next[:, 0], other.x_next[:, 0])
    policy = make_policy()
    prediction = policy.predict(found.x[:, 2], 2, found.conditioning.select(found.group_id.tolist()))
    seeds = torch.tensor([derive_seed(0, index, STEP + 2) for index in found.sample_index.tolist()])
    drawn = transition_mean(prediction, found.transitions[2]) + found.transitions[2].std * philox_normal(seeds, policy.latent_shape)
    assert torch.equal(found.x_next[:, 2], drawn)


@pytest.mark.parametrize("same_initial_noise", [False, True])
def test_processes_with_their_share_of_groups_make_the_same_samples(same_initial_noise):
    """Process k of 3 has prompt k and the global indices 4 k .. 4 k + 3."""
    whole = sample(first_index=24, same_initial_noise=same_initial_noise)
    for k, prompt in enumerate(PROMPTS):
        part = sample(prompts=[prompt], first_index=24 + 4 * k, same_initial_noise=same_initial_noise)
        assert_same(whole, part, rows=slice(4 * k, 4 * k + 4))


def test_other_iterations_and_seeds_make_other_samples():
    first = sample()
    assert not torch.equal(first.x, sample(first_index=12).x)
    assert not torch.equal(first.x, sample(seed=1).x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dynamics", [FlowSDE(), CPS(), DDIM()])
def test_log_prob_recomputed_from_what_is_stored_is_equal_bit_for_bit(dtype, dynamics):
    policy = make_policy()
    found = sample(policy, dynamics=dynamics, storage_dtype=dtype)
    conditioning = found.conditioning.select(found.group_id.tolist())
    for entry, step in enumerate(found.step_index.tolist()):
        prediction = policy.predict(found.x[:, entry].float(), step, conditioning)
        mean = transition_mean(prediction, found.transitions[entry])
        assert torch.equal(log_prob(found.x_next[:, entry].float(), mean, found.transitions[entry].std), found.log_prob[:, entry])
        assert torch.equal(prediction.velocity, found.prediction[:, entry])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_next_step_sees_the_rounded_state(dtype):
    found = sample(storage_dtype=dtype)
    assert torch.equal(found.x_next[:, :-1], found.x[:, 1:])


def test_the_last_state_is_not_noised():
    policy = make_policy()
    found = sample(policy)
    levels, last = policy.schedule.levels, policy.schedule.num_steps - 1
    prediction = policy.predict(found.x_next[:, -1], last, found.conditioning.select(found.group_id.tolist()))
    assert torch.equal(found.x_final, transition_mean(prediction, ODE().transition(levels, last)))


def test_shared_initial_noise_is_shared_within_groups_only():
    first_states = sample(same_initial_noise=True).x[:, 0].unflatten(0, (3, 4))
    assert torch.equal(first_states, first_states[:, :1].expand_as(first_states))
    assert not torch.equal(first_states[0, 0], first_states[2, 0])
    independent = sample().x[:, 0].flatten(1)
    assert len(torch.unique(independent, dim=0)) == 12


def test_members_that_share_noise_agree_before_the_window_and_differ_after():
    found = sample(same_initial_noise=True, steps=SingleStep(3))
    before, after = found.x[:, 0].unflatten(0, (3, 4)), found.x_next[:, 0].unflatten(0, (3, 4))
    assert torch.equal(before, before[:, :1].expand_as(before))
    assert (after[:, 1:] != after[:, :1]).flatten(2).any(dim=2).all()


@pytest.mark.parametrize(("dynamics", "steps"), [(FlowSDE(), AllSteps()), (DDIM(), AllSteps()), (CPS(0.5), Window(1, 3))])
@pytest.mark.parametrize("noise", ["generator", "philox"])
def test_moments_are_those_of_exact_propagation(dynamics, steps, noise):
    """20 000 samples of 6 elements each; 5 standard errors."""
    policy = make_policy()
    found = sample(policy, prompts=[Prompt("x")], group_size=20_000, dynamics=dynamics, steps=steps, noise=noise)
    mixed = Mixed(dynamics, steps.select(6, 0, 0))
    exact = propagate(WORLD, mixed, policy.schedule.levels)
    assert (found.x_final.double().mean(0) - exact.mean).abs().max() < 5 * (exact.var.max() / 20_000) ** 0.5
    assert (found.x_final.double().var(0) / exact.var - 1).abs().max() < 5 * (2 / 20_000) ** 0.5


class Watched(GaussianPolicy):
    """Counts encodings and notes the mode and the gradient state of every prediction."""

    def __init__(self):
        super().__init__(WORLD, flow_schedule(dance_sigmas(6, 3.0)))
        self.encoded, self.modes = [], set()

    def encode(self, prompts):
        self.encoded += [prompt.text for prompt in prompts]
        return super().encode(prompts)

    def predict(self, x, step, conditioning, role="policy"):
        self.modes.add((self.training, torch.is_grad_enabled()))
        return super().predict(x, step, conditioning, role)


def test_prompts_are_encoded_once_and_nothing_is_recorded_for_gradients():
    policy = Watched()
    policy.train(True)
    found = sample(policy, microbatch=2)
    assert policy.encoded == [prompt.text for prompt in PROMPTS]
    assert policy.modes == {(False, False)}
    assert not found.log_prob.requires_grad


def test_predictions_are_kept_only_if_asked():
    assert sample(keep_prediction=False).prediction is None


def test_a_deterministic_step_cannot_be_selected():
    with pytest.raises(ValueError, match=r"step 0 is selected for training but ODE\(\) is deterministic there.*sampler.steps"):
        sample(dynamics=ODE())


@dataclass(frozen=True)
class NoisyToTheEnd:
    def transition(self, levels, index):
        return Transition(A=1.0, B=0.0, std=0.1)


@dataclass(frozen=True)
class LastStep:
    stochastic = True

    def select(self, num_steps, iteration, seed):
        return (num_steps - 1,)


def test_noise_in_the_last_step_is_refused():
    with pytest.raises(ValueError, match="in the last step, which would stay in every sample"):
        sample(dynamics=NoisyToTheEnd(), steps=LastStep())


@pytest.mark.parametrize("last", [1, 3, 6])
def test_a_tail_is_stored_without_noise_and_continues_to_the_sample(last):
    policy = make_policy()
    found = sample(policy, steps=Tail(last))
    assert found.step_index.tolist() == [6 - last]
    assert found.transitions == (ODE().transition(policy.schedule.levels, 6 - last),)
    assert torch.equal(found.log_prob, torch.zeros(12, 1))
    assert torch.equal(found.x_final, sample(policy, dynamics=ODE(), steps=NoSteps()).x_final)
    state, conditioning = found.x[:, 0], found.conditioning.select(found.group_id.tolist())
    for step in range(6 - last, 6):
        state = transition_mean(policy.predict(state, step, conditioning), ODE().transition(policy.schedule.levels, step))
        if step == 6 - last:
            assert torch.equal(found.x_next[:, 0], state)
    assert torch.equal(found.x_final, state)


def test_nothing_to_sample_is_an_error():
    with pytest.raises(ValueError, match="at least one prompt"):
        sample(prompts=[])


def test_generate_is_the_ode_from_the_seeds_own_noise():
    policy = make_policy()
    found = generate(policy, PROMPTS, [7, 7, 8], microbatch=2)
    state = policy.initial_latents([7, 7, 8])
    conditioning = policy.encode(PROMPTS)
    for step in range(6):
        state = transition_mean(policy.predict(state, step, conditioning), ODE().transition(policy.schedule.levels, step))
    assert torch.equal(found, state)
    with pytest.raises(ValueError, match="one seed per prompt"):
        generate(policy, PROMPTS, [1])


def test_generate_follows_a_role():
    policy = make_policy()
    before = generate(policy, PROMPTS, [1, 2, 3])
    with torch.no_grad():
        policy.shift += 1.0
    assert torch.equal(generate(policy, PROMPTS, [1, 2, 3], role="reference"), before)
    assert not torch.equal(generate(policy, PROMPTS, [1, 2, 3]), before)


def test_sampler_object_is_the_function_with_settings():
    sampler = TrajectorySampler(group_size=4, dynamics=FlowSDE(), steps=AllSteps(), seed=0, microbatch=5)
    assert_same(sample(), sampler.rollout(make_policy(), PROMPTS, rows=range(len(PROMPTS)), iteration=0, first_index=0))

"""Back-propagated rewards: closed forms on linear and Gaussian policies, the whole path on a tiny real pipeline."""

import weakref
from dataclasses import dataclass, replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from scripts.tiny_families import by_name
from tests import gaussian_run
from visalign.algorithms.reward_gradient import RewardGradient
from visalign.maths.gaussian import transition_mean
from visalign.maths.oracle import GaussianWorld, shift_response
from visalign.maths.schedules import dance_sigmas, flow_schedule
from visalign.protocols import RewardSpec
from visalign.samplers.dynamics import ODE, FlowSDE
from visalign.samplers.oracle_policy import GaussianConditioning, GaussianPolicy
from visalign.samplers.policy import PipelinePolicy
from visalign.samplers.rollout import rollout
from visalign.samplers.steps import AllSteps, RandomTail, Tail
from visalign.types import Batch, Experience, Prediction, Prompt

NUM_STEPS, GROUP = 6, 4
WORLD = GaussianWorld(mean=torch.tensor([[0.3, -0.2, 1.0], [0.0, 0.1, 0.2]], dtype=torch.float64), var=0.25)
PROMPTS = [Prompt("one"), Prompt("two", metadata={"offset": 0.3})]
SLOPE = torch.tensor([[0.5, -1.0, 2.0], [0.25, 1.5, -0.75]], dtype=torch.float64)


class Linear:
    """``slope . media``."""

    spec = RewardSpec(name="linear", modality=frozenset({"audio", "image"}), differentiable=True)

    def __init__(self, slope=SLOPE):
        self.slope = slope

    def score_tensor(self, media, prompts):
        return (self.slope * media).flatten(1).sum(1)


class Wavy(Linear):
    def score_tensor(self, media, prompts):
        return torch.sin(3 * self.slope * media).flatten(1).sum(1)


class LinearPolicy:
    """``x_{i+1} = x_i + theta h_i`` on a flow schedule."""

    def __init__(self, num_steps):
        self.schedule, self.latent_shape, self.device = flow_schedule(dance_sigmas(num_steps, 3.0)), (1, 2), torch.device("cpu")
        self.theta = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
        self.h = torch.randn(num_steps, 1, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def encode(self, prompts):
        return GaussianConditioning(torch.zeros(len(prompts)))

    def initial_latents(self, seeds):
        return torch.ones(len(seeds), 1, 2)

    def predict(self, x, step, conditioning, role="policy"):
        here, there = self.schedule.levels[step], self.schedule.levels[step + 1]
        velocity = self.theta * self.h[step] / (there.sigma - here.sigma)
        return Prediction(x0=x - here.sigma * velocity, x1=x + here.alpha * velocity)

    def decode_tensor(self, latents, prompts=None):
        return latents

    def train(self, mode=True):
        pass


def make_policy(per_step=False, dtype=torch.float64):
    return GaussianPolicy(WORLD, flow_schedule(dance_sigmas(NUM_STEPS, 3.0)), dtype=dtype, per_step=per_step)


def experience(policy, steps=Tail(1), valid=None, prompts=PROMPTS, group=GROUP, dynamics=ODE()):  # noqa: B008 - immutable
    trajectory = rollout(policy, prompts, group, dynamics, steps, seed=0)
    n = trajectory.num_samples
    valid = torch.ones(n, dtype=torch.bool) if valid is None else valid
    return Experience(trajectory, torch.zeros(n, len(trajectory.transitions)), valid, iteration=0, reward=torch.zeros(n))


def algorithm(method="draft", reward=None, **settings):
    return RewardGradient(terms=[("linear", 1.0, reward or Linear())], method=method, **settings)


def whole(made):
    return Batch(made, torch.arange(made.trajectory.num_samples), denominator=float(made.valid.sum()))


def gradient(how, policy, batch, weights, microbatch=100):
    """Accumulated loss and gradient of ``weights`` over the batch's micro-batches."""
    weights.grad, loss = None, 0.0
    for part in how.microbatches(policy, batch, microbatch, 0):
        terms = how.loss(policy, part)
        terms.loss.backward()
        loss += float(terms.loss.detach())
    return loss, torch.zeros_like(weights) if weights.grad is None else weights.grad.clone()


def moved(policy, by=0.05):
    with torch.no_grad():
        policy.shift += by * torch.randn(policy.shift.shape, generator=torch.Generator().manual_seed(1), dtype=policy.shift.dtype)
    return policy


# --- closed forms -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("last", [1, 3, 8])
@pytest.mark.parametrize("recompute", [True, False])
def test_the_gradient_of_a_linear_sampler_is_the_sum_of_its_last_steps(last, recompute):
    policy, slope = LinearPolicy(8), torch.tensor([[2.0, -1.0]], dtype=torch.float64)
    how = algorithm(reward=Linear(slope), recompute=recompute)
    _, found = gradient(how, policy, whole(experience(policy, Tail(last))), policy.theta)
    assert float(found) == pytest.approx(-float((slope * policy.h[8 - last:]).sum()), rel=1e-12)


@pytest.mark.parametrize("last", [1, 2, NUM_STEPS])
def test_steps_before_the_tail_have_no_gradient_and_the_others_their_linear_response(last):
    policy = make_policy(per_step=True)
    _, found = gradient(algorithm(), policy, whole(experience(policy, Tail(last))), policy.shift)
    gain = shift_response(WORLD, ODE(), policy.schedule.levels).gain
    gain[:NUM_STEPS - last] = 0
    assert torch.allclose(found, -SLOPE * gain, rtol=1e-10, atol=1e-14)


def test_all_steps_are_full_automatic_differentiation():
    policy = moved(make_policy())
    made = experience(policy, Tail(NUM_STEPS))
    _, found = gradient(algorithm(reward=Wavy()), policy, whole(made), policy.shift)
    state, conditioning = made.trajectory.x[:, 0], made.trajectory.conditioning.select(made.trajectory.group_id.tolist())
    for step in range(NUM_STEPS):
        state = transition_mean(policy.predict(state, step, conditioning), ODE().transition(policy.schedule.levels, step))
    (expected,) = torch.autograd.grad(-Wavy().score_tensor(state, None).mean(), policy.shift)
    assert torch.allclose(found, expected, rtol=1e-12)


def test_alignprop_is_the_gradient_with_earlier_outputs_detached():
    """The published form keeps the latents' path through all steps and detaches the network before step m; ours starts at m."""
    policy = moved(make_policy())
    steps = RandomTail(1, 5)
    made = replace(experience(policy, steps), iteration=0)
    (m,) = made.trajectory.step_index.tolist()
    _, found = gradient(algorithm(reward=Wavy()), policy, whole(made), policy.shift)
    conditioning = made.trajectory.conditioning.select(made.trajectory.group_id.tolist())
    state = experience(policy, Tail(NUM_STEPS)).trajectory.x[:, 0].clone().requires_grad_()
    for step in range(NUM_STEPS):
        level = policy.schedule.levels[step]
        velocity = policy.predict(state if step >= m else state.detach(), step, conditioning).velocity
        velocity = velocity if step >= m else velocity.detach()
        prediction = Prediction(x0=state - level.sigma * velocity, x1=state + level.alpha * velocity)
        state = transition_mean(prediction, ODE().transition(policy.schedule.levels, step))
    (expected,) = torch.autograd.grad(-Wavy().score_tensor(state, None).mean(), policy.shift)
    assert torch.allclose(found, expected, rtol=1e-5)  # the stored state is float32


@pytest.mark.parametrize("method", ["draft", "draft_lv", "refl"])
def test_nothing_flows_back_into_the_stored_samples(method):
    policy = moved(make_policy())
    made = experience(policy, Tail(3))
    leaves = made.trajectory.x.clone().requires_grad_(), made.trajectory.x_final.clone().requires_grad_()
    made = replace(made, trajectory=replace(made.trajectory, x=leaves[0], x_final=leaves[1]))
    _, found = gradient(algorithm(method), policy, whole(made), policy.shift)
    assert found.abs().max() > 0
    assert [leaf.grad for leaf in leaves] == [None, None]


@pytest.mark.parametrize("num_noisings", [1, 2, 5])
def test_lv_has_the_mean_gradient_of_one_step_on_a_linear_reward(num_noisings):
    policy = make_policy()
    made = experience(policy, Tail(1))
    _, expected = gradient(algorithm(), policy, whole(made), policy.shift)
    _, found = gradient(algorithm("draft_lv", num_noisings=num_noisings), policy, whole(made), policy.shift, microbatch=3)
    assert torch.allclose(found, expected, rtol=1e-10)


def test_lv_noises_the_sample_to_the_last_level_anew_each_time():
    """Mean x0 and variance sigma^2 of the states it starts from; 400 noisings of 8 samples of 6 elements, 5 standard errors."""
    policy = make_policy()
    made = experience(policy, Tail(1))
    how, level = algorithm("draft_lv", num_noisings=400), policy.schedule.levels[-2]
    states = torch.stack([how.start(policy, part)[0] for part in how.microbatches(policy, whole(made), 8, 0)]).double()
    noise = (states - level.alpha * made.trajectory.x_final) / level.sigma
    assert abs(float(noise.mean())) < 5 / noise.numel() ** 0.5
    assert abs(float(noise.var()) - 1) < 5 * (2 / noise.numel()) ** 0.5
    small = torch.cat([how.start(policy, part)[0] for part in how.microbatches(policy, whole(made), 1, 0)])
    assert torch.equal(small.view(8, 400, 2, 3).transpose(0, 1).double(), states)


def test_refl_is_one_step_to_the_predicted_data():
    policy = moved(make_policy())
    made = experience(policy, Tail(4))
    loss, found = gradient(algorithm("refl", reward=Wavy()), policy, whole(made), policy.shift)
    conditioning = made.trajectory.conditioning.select(made.trajectory.group_id.tolist())
    expected = -Wavy().score_tensor(policy.predict(made.trajectory.x[:, 0], NUM_STEPS - 4, conditioning).x0, None).mean()
    assert loss == pytest.approx(float(expected.detach()), rel=1e-12)
    assert torch.allclose(found, torch.autograd.grad(expected, policy.shift)[0], rtol=1e-12)


def test_weights_combine_rewards_and_the_margin_leaves_good_samples_alone():
    policy = make_policy()
    made = experience(policy, Tail(2))
    both = RewardGradient(terms=[("a", 2.0, Linear()), ("b", -0.5, Wavy())])
    single = [gradient(algorithm(reward=reward), policy, whole(made), policy.shift)[1] for reward in (Linear(), Wavy())]
    assert torch.allclose(gradient(both, policy, whole(made), policy.shift)[1], 2 * single[0] - 0.5 * single[1], rtol=1e-10)

    scores = Linear().score_tensor(made.trajectory.x_final.double(), None)
    margin = float(scores.median()) + 1e-3
    part = next(iter(algorithm(margin=margin).microbatches(policy, whole(made), 100, 0)))
    terms = algorithm(margin=margin).loss(policy, part)
    assert float(terms.loss.detach()) == pytest.approx(float((margin - scores).relu().mean()), rel=1e-5)
    assert terms.metrics["reward_gradient/below_margin"] == (float((scores < margin).sum()), 8.0)
    below = scores < margin
    expected = gradient(algorithm(), policy, Batch(made, below.nonzero().squeeze(1), denominator=8.0), policy.shift)[1]
    assert torch.allclose(gradient(algorithm(margin=margin), policy, whole(made), policy.shift)[1], expected, rtol=1e-10)


def test_the_regulariser_has_its_closed_form_optimum():
    """One step: reward gain g = sigma^2 / V, velocity gap (alpha + sigma) sigma / V per shift; optimum slope g D / (2 kl gap^2)."""
    policy, level = make_policy(), make_policy().schedule.levels[-2]
    total = level.alpha**2 * 0.25 + level.sigma**2
    gain, gap = level.sigma**2 / total, (level.alpha + level.sigma) * level.sigma / total
    how = algorithm(kl_weight=0.3)
    with torch.no_grad():
        policy.shift += SLOPE * gain * 6 / (2 * 0.3 * gap**2)
    made = experience(policy, Tail(1))
    assert gradient(how, policy, whole(made), policy.shift)[1].abs().max() < 1e-12
    part = next(iter(how.microbatches(policy, whole(made), 100, 0)))
    expected = float((gap * policy.shift.detach()).square().mean())
    assert how.loss(policy, part).metrics["reward_gradient/velocity_gap"][0] / 8 == pytest.approx(expected, rel=1e-10)


def test_the_regulariser_of_several_steps_holds_the_states_fixed():
    """Velocities of the Gaussian policy differ by a constant per step, whatever x is: the gradient is that of the mean of constants."""
    policy = moved(make_policy(per_step=True))
    made = experience(policy, Tail(3))
    nothing = algorithm(reward=Linear(0 * SLOPE), kl_weight=0.7)
    _, found = gradient(nothing, policy, whole(made), policy.shift)
    expected = torch.zeros_like(policy.shift)
    for step in range(NUM_STEPS - 3, NUM_STEPS):
        level = policy.schedule.levels[step]
        gap = (level.alpha + level.sigma) * level.sigma / (level.alpha**2 * 0.25 + level.sigma**2)
        expected[step] = 0.7 * 2 * gap**2 * policy.shift[step].detach() / (3 * 6)
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-14)


# --- sums and masks ---------------------------------------------------------------------------------------------------------------

HOWS = [algorithm(reward=Wavy()), algorithm("draft_lv", reward=Wavy(), num_noisings=3), algorithm("refl", reward=Wavy(), kl_weight=0.4),
        algorithm(reward=Wavy(), kl_weight=0.4, margin=5.0)]


@pytest.mark.parametrize("how", HOWS, ids=lambda how: how.method)
@pytest.mark.parametrize("microbatch", [1, 3])
def test_accumulated_micro_batches_and_processes_equal_one_large_batch(how, microbatch):
    policy = moved(make_policy())
    made = experience(policy, Tail(3), valid=torch.tensor([True] * 6 + [False, True]))
    loss, expected = gradient(how, policy, whole(made), policy.shift)
    split, found = gradient(how, policy, whole(made), policy.shift, microbatch)
    assert split == pytest.approx(loss, rel=1e-12)
    assert torch.allclose(found, expected, rtol=1e-10, atol=1e-14)
    shares = [Batch(made, rows, denominator=7.0) for rows in (torch.arange(3), torch.arange(3, 8))]
    assert torch.allclose(sum(gradient(how, policy, share, policy.shift)[1] for share in shares), expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("how", HOWS, ids=lambda how: how.method)
def test_invalid_samples_count_nowhere_even_if_their_states_are_not_numbers(how):
    policy = moved(make_policy())
    valid = torch.tensor([True, False, True, True, True, True, False, True])
    made = experience(policy, Tail(3), valid=valid)
    loss, expected = gradient(how, policy, Batch(made, valid.nonzero().squeeze(1), denominator=6.0), policy.shift)
    poisoned = [torch.where(valid.view(-1, *[1] * (x.dim() - 1)), x, torch.nan) for x in (made.trajectory.x, made.trajectory.x_final)]
    made = replace(made, trajectory=replace(made.trajectory, x=poisoned[0], x_final=poisoned[1]))
    masked, found = gradient(how, policy, whole(made), policy.shift)
    assert masked == loss
    assert torch.equal(found, expected)
    nobody = Batch(replace(made, valid=torch.zeros_like(valid)), torch.arange(8), denominator=6.0)
    assert list(how.microbatches(policy, nobody, 4, 0)) == []


# --- a real pipeline --------------------------------------------------------------------------------------------------------------


class LiveBytes(TorchDispatchMode):
    """The largest number of bytes of tensors that were alive at once, of those made inside."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.seen = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor.untyped_storage())
        return out

    def add(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key not in self.seen:
            self.now += size
            self.peak = max(self.peak, self.now)
            self.seen[key] = weakref.finalize(storage, self.remove, key, size)

    def remove(self, key, size):
        del self.seen[key]
        self.now -= size


@dataclass(frozen=True)
class Brightness:
    """Mean of the first channel minus that of the last, so that a pipeline of random weights has something to learn."""

    spec = RewardSpec(name="brightness", differentiable=True)

    def score_tensor(self, media, prompts):
        return 10 * (media[:, 0] - media[:, -1]).flatten(1).mean(1)


def tiny(name, num_steps):
    family = by_name(name)
    return PipelinePolicy.from_pipeline(family.build(), **{**family.call, "num_inference_steps": num_steps})


@pytest.fixture(scope="module")
def sd3():
    policy = tiny("Stable Diffusion 3", 4)
    torch.manual_seed(0)
    policy.roles.add_lora(rank=2)
    with torch.no_grad():
        policy.pipe.vae.decoder.conv_out.weight *= 0.5  # no pixel at an edge: there the gradient is deliberately not the derivative
        for parameter in policy.named_trainable().values():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return policy


def real(policy, steps, count=1):
    return experience(policy, steps, prompts=[Prompt("a red circle")], group=count)


def real_loss(policy, batch, **settings):
    how = RewardGradient(terms=[("brightness", 1.0, Brightness())], **settings)
    return sum(how.loss(policy, part).loss for part in how.microbatches(policy, batch, 8, 0))


@pytest.mark.parametrize(("method", "last"), [("draft", 2), ("draft_lv", 1), ("refl", 3)])
def test_the_gradient_through_sampler_and_decoder_is_the_finite_difference(sd3, method, last):
    batch, weights = whole(real(sd3, Tail(last), 2)), list(sd3.named_trainable().values())
    grads = torch.autograd.grad(real_loss(sd3, batch, method=method), weights, allow_unused=True)
    grads = [torch.zeros_like(w) if g is None else g for w, g in zip(weights, grads, strict=True)]
    norm = torch.stack([grad.square().sum() for grad in grads]).sum().sqrt()
    assert norm > 0
    values = []
    for sign in (1, -2, 1):
        with torch.no_grad():
            for weight, grad in zip(weights, grads, strict=True):
                weight += sign * 2e-2 * grad / norm
        values.append(float(real_loss(sd3, batch, method=method).detach()))
    assert (values[0] - values[1]) / 4e-2 == pytest.approx(float(norm), rel=2e-2)


@pytest.mark.parametrize("autocast", [False, True])
def test_recomputed_steps_have_the_same_gradient(sd3, autocast):
    batch, weights = whole(real(sd3, Tail(3))), list(sd3.named_trainable().values())
    kept, again = [], []
    for recompute, grads in ((False, kept), (True, again)):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast, cache_enabled=False):
            loss = real_loss(sd3, batch, recompute=recompute, kl_weight=0.1)
        grads += torch.autograd.grad(loss, weights, allow_unused=True)
    assert any(grad is not None and grad.abs().max() > 0 for grad in kept)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(kept, again, strict=True))


def test_memory_does_not_depend_on_the_number_of_steps_and_barely_on_the_trained_ones():
    """Live bytes of loss and backward, measured; decoding notes a few latents per step of the pipeline's loop, 1 % at these sizes."""

    def peak(num_steps, last, recompute):
        policy = tiny("Stable Diffusion 3", num_steps)
        policy.roles.train_full()
        batch = whole(real(policy, Tail(last)))
        real_loss(policy, batch, recompute=recompute).backward()  # the decoder probes its output type once
        for parameter in policy.named_trainable().values():
            parameter.grad.zero_()
        with LiveBytes() as live:
            real_loss(policy, batch, recompute=recompute).backward()
        return live.peak

    kept = [peak(4, 2, False), peak(8, 2, False), peak(8, 6, False)]
    again = [peak(4, 2, True), peak(8, 2, True), peak(8, 6, True)]
    assert kept[0] == pytest.approx(kept[1], rel=2e-2)
    assert again[0] == pytest.approx(again[1], rel=2e-2)
    assert kept[2] > 1.8 * kept[1]
    assert again[2] - again[1] < 0.1 * (kept[2] - kept[1])


def test_refl_asks_the_network_at_the_timestep_of_its_step():
    policy = tiny("Stable Diffusion, v-prediction", 5)
    policy.roles.train_full()
    batch = whole(real(policy, Tail(3)))
    how, asked = RewardGradient(terms=[("brightness", 1.0, Brightness())], method="refl"), []
    (part,) = how.microbatches(policy, batch, 8, 0)
    state, ((step, transition),) = how.start(policy, part)
    hook = policy.pipe.unet.time_proj.register_forward_pre_hook(lambda module, args: asked.append(args[0].unique().tolist()))
    how.advance(policy, state, step, transition, batch.experience.trajectory.conditioning)
    hook.remove()
    assert asked == [[policy.schedule.timesteps[2]]]
    loss, x, level = how.loss(policy, part).loss, batch.experience.trajectory.x[:, 0], policy.schedule.levels[2]
    with torch.no_grad():
        v = policy.model_output(x, 2, batch.experience.trajectory.conditioning)
        expected = Brightness().score_tensor(policy.decode_tensor(level.alpha * x - level.sigma * v), None)
    assert float(loss.detach()) == pytest.approx(-float(expected), rel=1e-4)


def test_saturated_pixels_keep_the_gradient_that_brings_them_back():
    """A decoder of 100 times the contrast: nearly every pixel is at an edge, where a plain clamp leaves almost nothing."""
    sd3 = tiny("Stable Diffusion 3", 4)
    with torch.no_grad():
        sd3.pipe.vae.decoder.conv_out.weight *= 100
    how = RewardGradient(terms=[("brightness", 1.0, Brightness())])
    latents = sd3.initial_latents([0]).requires_grad_()
    media = sd3.decode_tensor(latents)
    assert ((media == 0) | (media == 1)).float().mean() > 0.8
    (plain,) = torch.autograd.grad(-Brightness().score_tensor(media, None).sum(), latents)
    ours = how.scores(sd3, latents, [Prompt("x")])["brightness"]
    assert torch.equal(ours, Brightness().score_tensor(media, None))
    (back,) = torch.autograd.grad(-ours.sum(), latents)
    assert back.norm() > 1.5 * plain.norm()


# --- runs and refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["draft", "draft_lv", "refl"])
def test_a_run_raises_its_reward(tmp_path, method):
    settings = gaussian_run.config("sampler.steps={name: tail}", "train.iterations=8")
    how = RewardGradient([("value", 1.0, Linear(torch.full((2, 3), 1 / 6)))], method)
    made = gaussian_run.go(tmp_path / "run", settings, algorithm=how)
    assert float(made.policy.shift.detach().mean()) > 0.05


class Judge:
    spec = RewardSpec(name="judge")

    def score(self, media, prompts, group_id):
        raise AssertionError


class Cut(Linear):
    def score_tensor(self, media, prompts):
        return super().score_tensor(media.detach(), prompts)


class Summed(Linear):
    def score_tensor(self, media, prompts):
        return super().score_tensor(media, prompts).sum()


@pytest.mark.parametrize(("make", "message"), [
    (lambda: RewardGradient([("judge", 1.0, Judge()), ("linear", 1.0, Linear())]), "without one: judge; with one: linear.*watch the"),
    (lambda: RewardGradient([]), "without one: no rewards given; with one: none"),
    (lambda: algorithm("alignprop"), "AlignProp: draft with steps random_tail"),
    (lambda: algorithm("draft_lv", num_noisings=0), "num_noisings must be at least 1"),
    (lambda: algorithm(kl_weight=-1.0), "kl_weight not negative"),
])
def test_settings_are_checked_at_construction(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(("how", "steps", "dynamics", "message"), [
    (algorithm(), AllSteps(), FlowSDE(), "one stored step without noise.*name: tail"),
    (algorithm("refl"), AllSteps(), FlowSDE(), "one stored step without noise"),
    (algorithm(reward=Cut()), Tail(), ODE(), r"'linear' answered 8 samples with a tensor \(8,\) that has no gradient .*media have one"),
    (algorithm(reward=Summed()), Tail(), ODE(), r"with a tensor \(\) that has gradient.*expected shape \(8,\)"),
])
def test_what_cannot_be_differentiated_is_refused(how, steps, dynamics, message):
    policy = make_policy()
    with pytest.raises(ValueError, match=message):
        gradient(how, policy, whole(experience(policy, steps, dynamics=dynamics)), policy.shift)


def test_another_schedule_than_the_samplers_is_refused():
    made = experience(make_policy(), Tail(2))
    other = GaussianPolicy(WORLD, flow_schedule(dance_sigmas(8, 3.0)), dtype=torch.float64)
    with pytest.raises(ValueError, match="the schedule it was sampled with"):
        gradient(algorithm(), other, whole(made), other.shift)

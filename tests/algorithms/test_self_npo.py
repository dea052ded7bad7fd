"""Self-NPO against closed forms: a Gaussian teacher's truncated run is affine in its state, and what it teaches is a contraction."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from scripts.tiny_families import by_name
from tests import gaussian_run
from visalign import loop
from visalign.algorithms.noising import Times
from visalign.algorithms.self_npo import SelfNpo
from visalign.maths.oracle import GaussianWorld
from visalign.maths.renoise import pseudo_huber, renoise, training_fraction
from visalign.maths.schedules import flow_schedule, scaled_linear_alphas_cumprod
from visalign.samplers.oracle_policy import GaussianPolicy
from visalign.samplers.policy import PipelinePolicy
from visalign.samplers.times import SchedulerTimes
from visalign.types import Batch, Experience, Prediction, Prompt, Trajectory

MEAN, VAR, OFFSET = 0.4, 0.25, 0.7
# 0.9 -> 0.6 -> 0.3 of a flow: two coarse steps, whose contraction is large enough to be seen.
START, STOP, NUM_STEPS = 0.9, 0.3, 2
COARSE = SelfNpo(times=Times(low=START, high=START + 1e-9), num_steps=NUM_STEPS, step=0.3)
SHAPE = (1, 64)
PROMPT = Prompt("a", metadata={"offset": OFFSET})


class Oracle(GaussianPolicy):
    """The empty prompt has no offset; the "policy" role's x0 prediction has slope ``gain`` times the true one, 1 at first."""

    def __init__(self):
        world = GaussianWorld(torch.full(SHAPE, MEAN, dtype=torch.float64), VAR)
        super().__init__(world, flow_schedule([1.0, 0.5, 0.0]), dtype=torch.float64)
        self.gain = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.asked = []

    def encode(self, prompts):
        return super().encode([prompt if prompt.text else Prompt("") for prompt in prompts])

    def predict_at(self, x, timesteps, conditioning, role="policy"):
        self.asked.append((role, timesteps.clone(), conditioning.offset.clone()))
        exact = super().predict_at(x, timesteps, conditioning, role)
        mean = self.mean + conditioning.offset.reshape(-1, 1, 1) + (self.shift if role == "policy" else 0.0)
        return exact if role != "policy" else Prediction(x0=mean + self.gain * (exact.x0 - mean), x1=exact.x1)


def batch(num, prompts=(PROMPT,), valid=None):
    """Samples of the data distribution, shared evenly among the prompts."""
    generator = torch.Generator().manual_seed(0)
    group_id = torch.arange(num) * len(prompts) // num
    offset = torch.tensor([prompt.metadata.get("offset", 0.0) for prompt in prompts])[group_id].reshape(-1, 1, 1)
    x_final = MEAN + offset + VAR**0.5 * torch.randn(num, *SHAPE, generator=generator)
    nothing = torch.empty(num, 0, *SHAPE)
    trajectory = Trajectory(x=nothing, x_next=nothing, x_final=x_final, step_index=torch.empty(0, dtype=torch.int64), transitions=(),
                            log_prob=torch.empty(num, 0), prediction=None, group_id=group_id, prompt_index=group_id,
                            sample_index=torch.arange(num), prompts=tuple(prompts), conditioning=None)
    valid = torch.ones(num, dtype=torch.bool) if valid is None else valid
    made = Experience(trajectory, torch.zeros(num, 1), valid, iteration=0, reward=torch.where(valid, 0.0, torch.nan))
    return Batch(made, torch.arange(num), denominator=float(valid.sum()))


def only(algorithm, policy, whole):
    (part,) = algorithm.microbatches(policy, whole, 10**6, seed=7)
    return part


def contraction(alpha, sigma, alpha_next, sigma_next):
    """Of one Euler step of the exact denoiser: x' - alpha' m = g (x - alpha m)."""
    return (alpha_next * alpha * VAR + sigma_next * sigma) / (alpha**2 * VAR + sigma**2)


SIGMAS = torch.linspace(START, STOP, NUM_STEPS + 1, dtype=torch.float64)
SHRUNK = float(contraction(1 - SIGMAS[:-1], SIGMAS[:-1], 1 - SIGMAS[1:], SIGMAS[1:]).prod())  # of the teacher's steps together
ALPHA, SIGMA = 1 - STOP, STOP


def test_renoising_keeps_the_forward_process():
    """alpha .9 -> .5: variance .691358 is added, and with what x_t has of its noise they make sigma_s^2 = .75."""
    alpha, sigma = torch.tensor([0.9], dtype=torch.float64), torch.tensor([(1 - 0.81) ** 0.5], dtype=torch.float64)
    more, sigma_more = torch.tensor([0.5], dtype=torch.float64), torch.tensor([0.75**0.5], dtype=torch.float64)
    one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    added = float(renoise(zero, one, alpha, sigma, more, sigma_more)) ** 2
    kept = float(renoise(sigma * one, zero, alpha, sigma, more, sigma_more)) ** 2
    assert added == pytest.approx(0.691358, abs=1e-6)
    assert added + kept == pytest.approx(0.75, abs=1e-12)
    assert float(renoise(alpha * one, zero, alpha, sigma, more, sigma_more)) == pytest.approx(0.5)
    assert torch.equal(renoise(one, one, alpha, sigma, alpha, sigma), one)
    with pytest.raises(ValueError, match="upwards only"):
        renoise(one, one, more, sigma_more, alpha, sigma)
    with pytest.raises(ValueError, match="pure noise"):
        renoise(one, one, zero[0], one[0], alpha, sigma)


def test_pseudo_huber():
    difference = torch.tensor([0.01, -0.01, 0.0, 1e-6, 100.0], dtype=torch.float64)
    found = pseudo_huber(difference, 1e-3)
    assert found[:2].tolist() == pytest.approx([0.00904988] * 2, abs=1e-8)
    assert found[2] == 0
    assert float(found[3]) == pytest.approx(1e-12 / 2e-3, rel=1e-5)
    assert float(found[4]) == pytest.approx(100 - 1e-3, abs=1e-7)


@pytest.mark.parametrize("whole", [False, True])
def test_the_fraction_is_the_inverse_of_the_timestep(whole):
    bars = torch.tensor(scaled_linear_alphas_cumprod(), dtype=torch.float64)
    times = SchedulerTimes("epsilon", 1.0, "VP" if whole else "flow", 0.0, 999.0 if whole else 1000.0, whole,
                           ratio=(lambda t: (1 / bars[t.long()] - 1).sqrt()) if whole else lambda t: t / 1000)
    every = torch.arange(1000, dtype=torch.float64)
    assert torch.equal(times.timestep(training_fraction(times, every)).round(), every)


@pytest.mark.parametrize(("guidance", "believed"), [(0.0, MEAN + OFFSET), (-1.0, MEAN), (-5.0, MEAN - 4 * OFFSET)])
def test_the_teachers_target_is_the_closed_form(guidance, believed):
    """Guidance moves the mean the teacher believes in to ``m_cond + w (m_cond - m_uncond)``; the rest is the product of contractions."""
    policy, algorithm = Oracle(), replace(COARSE, teacher_guidance=guidance)
    part = only(algorithm, policy, batch(8))
    made = algorithm.truncate(policy, part)
    x_stop = ALPHA * believed + SHRUNK * (part.noised(policy).x.double() - (1 - START) * believed)
    expected = believed + ALPHA * VAR / (ALPHA**2 * VAR + SIGMA**2) * (x_stop - ALPHA * believed)
    torch.testing.assert_close(made.x0_hat, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(made.stopped, torch.full((8,), 1000 * STOP, dtype=torch.float64))
    assert bool((made.timesteps > made.stopped).all())
    assert {role for role, _, _ in policy.asked} == {"reference"}
    calls = 2 if guidance == -5 else 1
    assert len(policy.asked) == (NUM_STEPS + 1) * calls
    if guidance == -1:
        assert all(float(offset.abs().max()) == 0 for _, _, offset in policy.asked)  # purely unconditional
    assert torch.equal(made.conditioning.offset, torch.full((8,), OFFSET, dtype=torch.float64))  # the student is asked under the prompt


def test_the_state_is_noised_from_where_the_teacher_stopped():
    """x_s - (alpha_s / alpha_t) x_t is fresh noise of the forward process' variance."""
    policy = Oracle()
    part = only(COARSE, policy, batch(1500))
    made, mean = COARSE.truncate(policy, part), MEAN + OFFSET
    x_stop = ALPHA * mean + SHRUNK * (part.noised(policy).x.double() - (1 - START) * mean)
    later = made.timesteps.reshape(-1, 1, 1) / 1000
    ratio = (1 - later) / ALPHA
    noise = (made.x - ratio * x_stop) / (later.square() - (ratio * SIGMA).square()).sqrt()
    assert float(noise.mean()) == pytest.approx(0, abs=0.02)
    assert float(noise.square().mean()) == pytest.approx(1, abs=0.02)
    assert float((noise * (x_stop - x_stop.mean())).mean()) == pytest.approx(0, abs=0.02)
    assert float(made.timesteps.mean()) == pytest.approx(500 * (1 + STOP), abs=20)  # uniform between t and pure noise


def best_slope(later):
    """Of the prediction that minimises the loss at s: ``x0 = m + slope (x_s - alpha_s m)``; and the true denoiser's."""
    exact = ALPHA**2 * VAR + SIGMA**2
    reached = SHRUNK**2 * ((1 - START) ** 2 * VAR + START**2)
    ratio, total = (1 - later) / ALPHA, (1 - later) ** 2 * VAR + later**2
    true = (1 - later) * VAR / total
    return true * (reached / exact) * total / (total + ratio**2 * (reached - exact)), true


def test_what_it_teaches_is_the_documented_contraction():
    """Residuals of the closed-form prediction are uncorrelated with the state at every s, those of the true denoiser are not."""
    policy, mean = Oracle(), MEAN + OFFSET
    made = COARSE.truncate(policy, only(COARSE, policy, batch(1500)))
    later = made.timesteps.reshape(-1, 1, 1) / 1000
    best, true = best_slope(later)
    assert bool((best < true).all())
    assert float((best / true).min()) == pytest.approx(0.684, abs=0.002)  # W_t / V_t, in pure noise
    state, target = made.x - (1 - later) * mean, made.x0_hat - mean
    pull = [((target - slope * state) * state).mean(dim=(1, 2)) for slope in (best, true)]
    error = [float(part.std()) / len(part) ** 0.5 for part in pull]
    assert abs(float(pull[0].mean())) < 4 * error[0]
    assert float(pull[1].mean()) < -20 * error[1]


def test_the_gradient_vanishes_at_the_contraction_and_pulls_the_true_denoiser_towards_it():
    """Huber's minimiser is that of the squares for symmetric residuals; the mean (shift) is left alone."""
    algorithm, gradients, whole = replace(COARSE, huber=0.05), {}, batch(1500)

    class Contracted(Oracle):
        def predict_at(self, x, timesteps, conditioning, role="policy"):
            found = super().predict_at(x, timesteps, conditioning, role)
            if role != "policy":
                return found
            best, true = best_slope(timesteps.reshape(-1, 1, 1) / 1000)
            mean = self.mean + conditioning.offset.reshape(-1, 1, 1) + self.shift
            return Prediction(x0=mean + best / true * (found.x0 - mean), x1=found.x1)

    for policy in (Oracle(), Contracted()):
        algorithm.loss(policy, only(algorithm, policy, whole)).loss.backward()
        gradients[type(policy)] = (float(policy.gain.grad), float(policy.shift.grad.sum()))
    assert gradients[Oracle][0] > 0.005
    assert abs(gradients[Contracted][0]) < 0.1 * gradients[Oracle][0]
    assert abs(gradients[Oracle][1]) < 0.01


@pytest.mark.parametrize("draws", [1, 3])
def test_micro_batches_and_draws_add_up(draws):
    policy, whole = Oracle(), batch(6, prompts=(Prompt("a", metadata={"offset": 1.0}), Prompt("b")))
    algorithm = SelfNpo(draws=draws, prompt_dropout=0.4, teacher_guidance=-1.5)
    found = []
    for size in (6, 4, 1):
        policy.zero_grad()
        losses = [algorithm.loss(policy, part) for part in algorithm.microbatches(policy, whole, size, seed=3)]
        for terms in losses:
            terms.loss.backward()
        found.append((sum(float(terms.loss.detach()) for terms in losses), float(policy.gain.grad), policy.shift.grad.clone(),
                      sum(terms.metrics["self_npo/loss"][1] for terms in losses)))
    assert found[0][3] == 6 * draws
    for other in found[1:]:
        assert other[:2] == pytest.approx(found[0][:2], rel=1e-6)
        torch.testing.assert_close(other[2], found[0][2], rtol=1e-6, atol=1e-9)


def test_invalid_samples_change_nothing():
    policy, algorithm, valid = Oracle(), SelfNpo(), torch.tensor([True, True, False, True])
    whole = batch(4, valid=valid)
    broken = whole.experience.trajectory.x_final.clone()
    broken[2] = torch.nan
    made = replace(whole, experience=replace(whole.experience, trajectory=replace(whole.experience.trajectory, x_final=broken)))
    losses = []
    for current in (whole, made):
        policy.zero_grad()
        terms = algorithm.loss(policy, only(algorithm, policy, current))
        terms.loss.backward()
        losses.append((float(terms.loss.detach()), float(policy.gain.grad)))
        assert terms.metrics["self_npo/loss"][1] == 3
    assert losses[0] == losses[1]


def test_dropped_prompts_are_empty_for_teacher_and_student():
    policy, algorithm = Oracle(), SelfNpo(prompt_dropout=1.0)
    algorithm.loss(policy, only(algorithm, policy, batch(3)))
    assert all(float(offset.abs().max()) == 0 for _, _, offset in policy.asked)


def test_the_average_teaches_and_follows():
    policy, algorithm = Oracle(), SelfNpo(teacher="ema", ema_decay=0.75)
    assert (algorithm.rollout_role, algorithm.needs_reference) == ("ema", False)
    algorithm.begin(policy, 0)
    with torch.no_grad():
        policy.shift.fill_(1.0)
    algorithm.begin(policy, 1)
    torch.testing.assert_close(policy.snapshots()["ema"]["shift"], torch.full(SHAPE, 0.25, dtype=torch.float64))
    algorithm.truncate(policy, only(algorithm, policy, batch(2)))
    assert {role for role, _, _ in policy.asked} == {"ema"}
    assert (SelfNpo().rollout_role, SelfNpo().needs_reference) == ("reference", True)


def test_a_killed_run_resumes_with_the_same_numbers(tmp_path, monkeypatch):
    algorithm, settings = SelfNpo(teacher="ema", ema_decay=0.5, prompt_dropout=0.3), gaussian_run.config("ema=null")
    gaussian_run.go(tmp_path / "whole", settings, algorithm=algorithm)
    collect = loop.Loop.collect

    def stop_at_four(self):
        if self.state.iteration == 4:
            raise KeyboardInterrupt
        return collect(self)

    with monkeypatch.context() as patched:
        patched.setattr(loop.Loop, "collect", stop_at_four)
        with pytest.raises(KeyboardInterrupt):
            gaussian_run.go(tmp_path / "cut", settings, algorithm=algorithm)
    gaussian_run.go(tmp_path / "cut", settings, algorithm=algorithm, resume=True)
    rows = [[{key: value for key, value in json.loads(line).items() if "time/" not in key}
             for line in (tmp_path / folder / "metrics.jsonl").read_text().splitlines()] for folder in ("whole", "cut")]
    assert rows[0] == rows[1]
    assert rows[0][-1]["self_npo/loss"] > 0


@pytest.mark.parametrize(("options", "message"), [
    ({"teacher": "old"}, "reference or ema"), ({"num_steps": 0}, "num_steps >= 1"), ({"num_steps": 25}, "a part of the range undone"),
    ({"draws": 0}, "draws must be >= 1"), ({"huber": 0.0}, "huber > 0"), ({"ema_decay": 1.0}, "ema_decay"),
    ({"prompt_dropout": 1.5}, "prompt_dropout")])
def test_impossible_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SelfNpo(**options)


@pytest.mark.parametrize("name", ["Stable Diffusion 1.5", "Stable Diffusion 3"])
def test_captured_pipelines_learn_it(name):
    """Tables of timesteps and flow alike: before the first update the student is its teacher; gradients reach the adapter."""
    family = by_name(name)
    policy = PipelinePolicy.from_pipeline(family.build(), **{**family.call, "num_inference_steps": 4, "guidance_scale": 1.0})
    policy.roles.add_lora(rank=2)
    algorithm, whole = SelfNpo(teacher_guidance=-1.0), batch(3, prompts=(Prompt("a"), Prompt("b"), Prompt("c")))
    x_final = torch.randn(3, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    whole = replace(whole, experience=replace(whole.experience, trajectory=replace(whole.experience.trajectory, x_final=x_final)))
    part = only(algorithm, policy, whole)
    made = algorithm.truncate(policy, part)
    assert bool((made.timesteps >= made.stopped).all())
    with torch.no_grad():
        reference = policy.predict_at(made.x, made.timesteps, made.conditioning, "reference").x0
    terms = algorithm.loss(policy, part)
    expected = pseudo_huber(reference - made.x0_hat, 1e-3).mean()
    assert float(terms.loss.detach()) == pytest.approx(float(expected), rel=1e-4)
    terms.loss.backward()
    assert any(parameter.grad is not None and float(parameter.grad.abs().max()) > 0 for parameter in policy.named_trainable().values())

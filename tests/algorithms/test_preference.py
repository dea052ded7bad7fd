"""Preference optimisation on the Gaussian oracle: draws, groups, invariants, gradients, and where training ends."""

from dataclasses import replace

import pytest
import torch

from tests import gaussian_run
from visalign.algorithms.errors import errors
from visalign.algorithms.noising import Times, add_noise, gaussian_noise
from visalign.algorithms.pairing import Pairing
from visalign.algorithms.preference import PreferenceOptimisation
from visalign.credit import RewardTerm
from visalign.distributed import Processes
from visalign.kernels.ask import outputs_at
from visalign.kernels.paired_error.reference import mean_squared
from visalign.loop import Loop
from visalign.maths.oracle import GaussianWorld
from visalign.maths.preference import LOSSES, bind_loss
from visalign.maths.schedules import dance_sigmas, flow_schedule
from visalign.progress import Silent
from visalign.rewards.function import FunctionReward
from visalign.samplers.dynamics import ODE
from visalign.samplers.oracle_policy import GaussianPolicy
from visalign.samplers.rollout import rollout
from visalign.samplers.steps import NoSteps
from visalign.types import Batch, Experience, Prompt, Scores

WORLD = GaussianWorld(mean=torch.full((1, 2), 0.3, dtype=torch.float64), var=0.25)
PROMPTS = [Prompt("one"), Prompt("two", metadata={"offset": 0.4})]
PARAMS = {"smpo": {"low": 0.0, "high": 1.0}, "rwr": {"temperature": 1.0}}


def make_policy(steps=6):
    return GaussianPolicy(WORLD, flow_schedule(dance_sigmas(steps, 3.0)), dtype=torch.float64)


def experience(policy, group_size=4, num_prompts=2, reward=None, valid=None, first_index=0):
    prompts = [PROMPTS[p % 2] for p in range(num_prompts)]
    made = rollout(policy, prompts, group_size, ODE(), NoSteps(), seed=0, first_index=first_index)
    n = made.num_samples
    reward = made.x_final.sum(dim=(1, 2)) if reward is None else torch.as_tensor(reward, dtype=torch.float32)
    valid = torch.ones(n, dtype=torch.bool) if valid is None else torch.as_tensor(valid)
    return Experience(made, torch.zeros(n, 1), valid, 0, torch.where(valid, reward, torch.nan))


def algorithm(name="dpo", kappa=2.0, **changes):
    if name == "best_of_group":
        changes = {"pairing": Pairing(keep=1)} | changes
    return PreferenceOptimisation(bind_loss(name, **PARAMS.get(name, {})), kappa, **changes)


def whole(made):
    return Batch(made, torch.arange(made.trajectory.num_samples), float(made.valid.sum()))


def gradient(method, policy, batch, microbatch=100, seed=7):
    policy.zero_grad()
    for part in method.microbatches(policy, batch, microbatch, seed):
        method.loss(policy, part).loss.backward()
    return torch.zeros_like(policy.shift) if policy.shift.grad is None else policy.shift.grad.clone()


def moved(policy, by=0.1):
    policy.snapshot("old")
    with torch.no_grad():
        policy.shift += by
    return policy


USABLE = sorted(name for name in LOSSES if not LOSSES[name].needs.from_reference and name != "dmpo")


@pytest.mark.parametrize("name", USABLE)
def test_before_the_first_update_the_margin_is_exactly_zero(name):
    policy, made = make_policy(), None
    policy.snapshot("old")
    made = experience(policy)
    for part in algorithm(name).microbatches(policy, whole(made), 4, 0):
        terms = algorithm(name).loss(policy, part)
        assert terms.maxima.get("policy/error_gap", 0.0) == 0.0
        if "preference/margin" in terms.metrics:
            assert terms.metrics["preference/margin"][0] == 0.0
            assert terms.metrics["preference/accuracy"][0] == 0.5 * terms.metrics["preference/accuracy"][1]


@pytest.mark.parametrize("name", USABLE)
def test_microbatches_and_processes_change_no_gradient(name):
    policy = moved(make_policy())
    made = experience(policy, num_prompts=4)
    method = algorithm(name, draws=3, times=Times("logit_normal"))
    together = gradient(method, policy, whole(made))
    assert together.abs().max() > 0 or name in ("hinge",)
    torch.testing.assert_close(gradient(method, policy, whole(made), microbatch=4), together)
    if method.preference_loss.needs.statistics:
        return  # their sums meet through Batch.reduce, below
    halves = []
    for rows in (torch.arange(8), torch.arange(8, 16)):
        count = {}
        def reduce(values, count=count):
            return [2 * value for value in values]  # both processes hold equally many groups here
        halves.append(gradient(method, policy, Batch(made, rows, 16.0, reduce)))
    torch.testing.assert_close(halves[0] + halves[1], together)


def test_a_process_without_a_group_in_a_step_takes_part_in_its_sums_and_makes_nothing():
    policy, calls = make_policy(), []
    made = experience(policy)
    for name in ("dpo", "kto", "plackett_luce", "rwr"):
        calls.clear()
        batch = Batch(made, torch.arange(0), 8.0, lambda values: calls.append(values) or [5.0] * len(values))
        assert not list(algorithm(name).microbatches(policy, batch, 4, 7))
        assert len(calls) == 1 + len(algorithm(name).preference_loss.needs.statistics)


def test_whole_groups_go_to_the_same_step_on_any_number_of_processes(tmp_path):
    settings = gaussian_run.config("sampler.steps={name: none}", "sampler.dynamics={name: ode}", "train.groups=6", "train.updates=4",
                                   "train.group_size=4", "train.microbatch=2")
    parts = gaussian_run.parts(settings, algorithm=algorithm(), prompts=PROMPTS * 3)
    loop = Loop(parts, settings, tmp_path / "run", Processes.start("cpu"), Silent())
    made = experience(make_policy(), num_prompts=6, first_index=24)
    whole = loop.assignment(made.trajectory)
    shares = [loop.assignment(experience(make_policy(), num_prompts=3, first_index=first).trajectory) for first in (24, 36)]
    assert torch.equal(whole, torch.cat(shares))
    assert bool((whole.reshape(6, 4) == whole.reshape(6, 4)[:, :1]).all())


def test_statistics_are_those_of_all_processes():
    policy = moved(make_policy())
    made = experience(policy, num_prompts=4)
    method = algorithm("kto")
    together = gradient(method, policy, whole(made))
    parts = [torch.arange(8), torch.arange(8, 16)]
    asked = []
    for rows in parts:  # what every process would hand in
        calls = []
        def reduce(values, calls=calls):
            calls.append(list(values))
            return list(values)
        list(method.microbatches(policy, Batch(made, rows, 16.0, reduce), 4, 7))
        asked.append(calls)
    sums = [[a + b for a, b in zip(*both, strict=True)] for both in zip(*asked, strict=True)]
    total = torch.zeros_like(together)
    for rows in parts:
        replies = iter(sums)
        total += gradient(method, policy, Batch(made, rows, 16.0, lambda values, replies=replies: next(replies)))
    torch.testing.assert_close(total, together)


REGRESSIONS = ("ipo", "nca", "sppo", "sppo_soft", "inpo", "gpo")  # they stop at a margin near 1 / kappa


@pytest.mark.parametrize("name", USABLE)
def test_every_method_moves_towards_the_reward(name):
    policy = make_policy()
    pairing = Pairing(keep={"sft": 2, "best_of_group": 1}.get(name))
    method = algorithm(name, kappa=1.0 if name in REGRESSIONS else 20.0, draws=2, pairing=pairing)
    optimizer = torch.optim.SGD([policy.shift], lr=0.05)
    for iteration in range(12):
        method.begin(policy, iteration)
        made = experience(policy, group_size=8, num_prompts=8, first_index=64 * iteration)
        gradient(method, policy, whole(made), seed=iteration)
        torch.nn.utils.clip_grad_norm_([policy.shift], 1.0)
        optimizer.step()
    towards = policy.shift if name != "npo" else -policy.shift  # a negative model learns what to avoid
    assert towards.min() > 0.02


@pytest.mark.parametrize("name", ["dpo", "kto", "dro"])
def test_flipped_preferences_move_the_other_way(name):
    policy = make_policy()
    made = experience(policy, group_size=8, num_prompts=8)
    forward = gradient(algorithm(name), policy, whole(made))
    backward = gradient(algorithm(name, pairing=Pairing(flip=True)), policy, whole(made))
    torch.testing.assert_close(forward, -backward)


def test_weights_fixed_point_is_the_reweighted_mean():
    """RWR's minimiser on a fixed set of samples: the x0-prediction with the mean of the weighted samples."""
    policy = make_policy()
    made = experience(policy, group_size=512, num_prompts=1)
    x0 = made.trajectory.x_final.double()
    method = algorithm("rwr", draws=4, space="x0", times=Times("uniform", low=0.999, high=1.0))
    optimizer = torch.optim.LBFGS([policy.shift], max_iter=30)

    def closure():
        optimizer.zero_grad()
        total = 0.0
        for part in method.microbatches(policy, whole(made), 512, 3):
            terms = method.loss(policy, part)
            terms.loss.backward()
            total += float(terms.loss.detach())
        return total

    optimizer.step(closure)
    weights = torch.softmax(made.reward.double(), dim=0)
    wanted = (weights.reshape(-1, 1, 1) * x0).sum(dim=0) - WORLD.mean
    torch.testing.assert_close(policy.shift.detach(), wanted, atol=5e-3, rtol=0)


def test_pairs_share_time_and_noise_and_members_of_other_groups_do_not():
    policy = make_policy()
    made = experience(policy, num_prompts=2)
    method = algorithm("dpo")
    part = next(iter(method.microbatches(policy, whole(made), 100, 3)))
    x0 = made.trajectory.x_final[part.groups.rows.flatten()]
    noised = method._noised(policy, part, x0, None)
    assert torch.equal(noised.noise[0], noised.noise[1])
    assert torch.equal(noised.timesteps[0], noised.timesteps[1])
    assert not torch.equal(noised.noise[0], noised.noise[2])
    torch.testing.assert_close(noised.x[0] - noised.x[1], noised.alpha[0] * (x0[0] - x0[1]))
    apart = replace(method, share_noise=False)._noised(policy, part, x0, None)
    assert not torch.equal(apart.noise[0], apart.noise[1])
    assert torch.equal(apart.timesteps, noised.timesteps)


def test_ties_and_invalid_samples_form_no_pairs():
    policy = make_policy()
    ties = experience(policy, reward=[1.0] * 8)
    assert not list(algorithm().microbatches(policy, whole(ties), 8, 0))
    broken = experience(policy, reward=range(8), valid=[True, False, False, False] + [True] * 4)
    part = next(iter(algorithm().microbatches(policy, whole(broken), 8, 0)))
    assert part.groups.rows.tolist() == [[7, 4]]


def test_labels_follow_the_threshold_or_the_groups_mean():
    policy = make_policy()
    made = experience(policy, reward=[0.0, 0.0, 1.0, 0.2, 5.0, 6.0, 7.0, 8.0])
    part = next(iter(algorithm("dro").microbatches(policy, whole(made), 8, 0)))
    assert part.groups.label[:, 0].tolist() == [-1, -1, 1, -1, -1, -1, 1, 1]
    part = next(iter(algorithm("dro", pairing=Pairing(threshold=0.5)).microbatches(policy, whole(made), 8, 0)))
    assert part.groups.label[:, 0].tolist() == [-1, -1, 1, -1, 1, 1, 1, 1]


def test_keep_takes_the_best_of_every_group():
    policy = make_policy()
    made = experience(policy, reward=[3.0, 1.0, 2.0, 0.0, 4.0, 5.0, 6.0, 7.0])
    part = next(iter(algorithm("sft", pairing=Pairing(keep=1)).microbatches(policy, whole(made), 8, 0)))
    assert sorted(part.groups.rows.flatten().tolist()) == [0, 7]


def test_errors_of_images_video_and_audio_are_one_number_per_sample():
    for shape in ((2, 4, 8, 8), (2, 4, 3, 8, 8), (2, 4, 8)):
        output, target = torch.randn(shape), torch.randn(shape)
        found = mean_squared(output, target)
        assert found.shape == (2,)
        torch.testing.assert_close(found, (output - target).square().flatten(1).mean(1))
        mask = torch.rand(shape) < 0.5
        garbage = torch.where(mask, output, 1e6)
        torch.testing.assert_close(mean_squared(garbage, target, mask), mean_squared(output, target, mask))
    with pytest.raises(ValueError, match="no valid element"):
        mean_squared(output, target, torch.zeros(shape, dtype=torch.bool))


def test_spaces_differ_by_exact_factors():
    policy = moved(make_policy())
    x0 = torch.randn(3, 1, 2, dtype=torch.float64)
    timesteps = torch.tensor([300.0, 300.0, 800.0], dtype=torch.float64)
    noised = add_noise(policy, x0, gaussian_noise([1, 2, 3], x0).double(), timesteps)
    conditioning = policy.encode([PROMPTS[0]] * 3)
    outputs = outputs_at(policy, noised.x, timesteps, conditioning)
    e = {space: errors(policy, noised, outputs, space=space).policy for space in ("native", "velocity", "epsilon", "x0")}
    t = timesteps.float() / 1000
    torch.testing.assert_close(e["native"], e["velocity"])
    torch.testing.assert_close(e["epsilon"], (1 - t) ** 2 * e["velocity"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(e["x0"], t**2 * e["velocity"], rtol=1e-4, atol=1e-6)


def test_a_refreshed_reference_is_the_policy_of_that_round():
    policy = moved(make_policy())
    method = algorithm(refresh=2)
    for iteration, same in ((0, False), (1, False), (2, True)):
        method.begin(policy, iteration)
        assert torch.equal(policy.snapshots()["reference"]["shift"], policy.shift) is same


def test_safeguard_keeps_the_chosen_samples_descent():
    policy = moved(make_policy(), 0.4)
    made = experience(policy)
    plain, guarded = (gradient(algorithm("dpo", safeguard=mu), policy, whole(made)) for mu in (None, 1.0))
    assert not torch.equal(plain, guarded)
    values = [sum(float(method.loss(policy, part).loss.detach()) for part in method.microbatches(policy, whole(made), 8, 7))
              for method in (algorithm(), algorithm(safeguard=1.0))]
    assert values[0] == pytest.approx(values[1])


@pytest.mark.parametrize(("times", "low", "high"), [(Times("uniform", low=0.2, high=0.4), 200, 400), (Times("grid"), 0, 1000),
                                                    (Times("logit_normal", mean=1.0, shift=3.0), 0, 1000)])
def test_times_stay_in_range_and_are_reproducible(times, low, high):
    policy = make_policy()
    drawn = times.draw(policy, range(200), 4)
    assert drawn.shape == (200, 4)
    assert bool(((drawn >= low) & (drawn <= high)).all())
    assert torch.equal(drawn, times.draw(policy, range(200), 4))
    if times.name == "grid":
        assert all(len(set(row)) == 4 for row in drawn.tolist())


def test_stratified_draws_cover_the_range():
    drawn = Times("uniform").draw(make_policy(), range(50), 5).sort(dim=1).values / 1000
    edges = torch.arange(5) / 5
    assert bool((drawn >= edges).all())
    assert bool((drawn < edges + 0.2).all())


@pytest.mark.parametrize(("make", "message"), [
    (lambda: Times("cosine"), "uniform, logit_normal or grid"), (lambda: Times(low=0.5, high=0.5), "low < high"),
    (lambda: Times(shift=0), "shift must be positive"), (lambda: algorithm("xpo"), "which samples the reference made"),
    (lambda: algorithm("kto", safeguard=0.9), "leave safeguard out"),
    (lambda: algorithm("best_of_group", pairing=Pairing()), "keep: 1"),
    (lambda: Times("grid").draw(make_policy(3), [0], 9), "the schedule has 3 steps")])
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


class Drifting(FunctionReward):
    """A reward that remembers, so that a resume without its memory gives other numbers."""

    def __init__(self):
        super().__init__(gaussian_run.mean_value, name="value", modality=["audio"])
        self.calls = torch.zeros(1)

    def score(self, media, prompts, group_id):
        self.calls += 1
        found = super().score(media, prompts, group_id)
        return replace(found, value=found.value * torch.cos(self.calls), raw=found.raw * torch.cos(self.calls))

    def state_dict(self):
        return {"calls": self.calls.clone()}

    def load_state_dict(self, state):
        self.calls = state["calls"].clone()


def test_resuming_is_exact_with_a_refreshed_reference_and_a_reward_that_remembers(tmp_path):
    settings = gaussian_run.config("sampler.steps={name: none}", "sampler.dynamics={name: ode}", "ema=null", "evaluation.every=5",
                                   "train.iterations=8", "train.group_size=4", "train.schedule=constant")
    half = settings.model_copy(update={"train": settings.train.model_copy(update={"iterations": 5})})
    method = algorithm("inpo", refresh=2, draws=2)

    def go(folder, config, **changes):
        return gaussian_run.go(tmp_path / folder, config, algorithm=method, terms=[RewardTerm("value", Drifting())], **changes).policy

    straight = go("straight", settings)
    go("cut", half)
    resumed = go("cut", settings, resume=True)
    assert torch.equal(straight.shift, resumed.shift)
    assert torch.equal(straight.snapshots()["reference"]["shift"], resumed.snapshots()["reference"]["shift"])


def test_a_data_sets_weights_multiply_its_judgements():
    policy = moved(make_policy())
    made = experience(policy)
    prompts = tuple(replace(prompt, metadata={**prompt.metadata, "weight": weight})
                    for prompt, weight in zip(made.trajectory.prompts, (2.0, 0.0), strict=True))
    recorded = {"preference": Scores.from_values(made.reward.tolist())}
    heavy = replace(made, trajectory=replace(made.trajectory, prompts=prompts, scores=recorded))
    first = replace(made, valid=torch.arange(8) < 4, reward=torch.where(torch.arange(8) < 4, made.reward, torch.nan))
    torch.testing.assert_close(gradient(algorithm(), policy, whole(heavy)), gradient(algorithm(), policy, whole(first)))


def test_the_reference_term_is_the_squared_distance_of_the_answers():
    """Two policies that differ by a shift d answer velocities that differ by c(t) d: the term is their mean square, and it pulls back."""
    policy = moved(make_policy(), 0.3)
    made, times = experience(policy), Times("uniform", low=0.5, high=0.500001)
    values = []
    for weight in (0.0, 2.0):
        method = algorithm("sft", reference_weight=weight, times=times)
        values.append(sum(float(method.loss(policy, part).loss.detach()) for part in method.microbatches(policy, whole(made), 8, 7)))
    conditioning, t = policy.encode([PROMPTS[0]]), torch.tensor([500.0], dtype=torch.float64)
    gap = [policy.predict_at(torch.zeros(1, 1, 2), t, conditioning, role).velocity for role in ("policy", "reference")]
    assert values[1] - values[0] == pytest.approx(2.0 * float((gap[0] - gap[1]).square().mean()), rel=1e-3)


def test_dropped_prompts_are_empty_and_as_frequent_as_asked():
    policy = make_policy()
    made = experience(policy, num_prompts=32)
    texts = {}
    for share in (0.0, 0.3, 1.0):
        method = algorithm(prompt_dropout=share, draws=4)
        texts[share] = [prompt.text for part in method.microbatches(policy, whole(made), 64, 7)
                        for prompt in method._prompts(part, part.groups.rows.flatten())]
    assert "" not in texts[0.0]
    assert set(texts[1.0]) == {""}
    assert sum(text == "" for text in texts[0.3]) / len(texts[0.3]) == pytest.approx(0.3, abs=0.12)
    assert all(first == second for first, second in zip(texts[0.3][::2], texts[0.3][1::2], strict=True))  # a pair shares its fate


def test_advantages_take_the_rewards_place_where_asked():
    policy = make_policy()
    made = experience(policy, reward=range(8))
    made = replace(made, advantage=-torch.arange(8.0).unsqueeze(1))
    chosen = [next(iter(algorithm(pairing=Pairing(by_advantage=flag)).microbatches(policy, whole(made), 8, 0))).groups.rows[:, 0].tolist()
              for flag in (False, True)]
    assert chosen == [[3, 7], [0, 4]]


def test_an_inversion_gives_the_noise_of_the_state_and_of_the_target():
    policy, asked_for = make_policy(), []

    def invert(policy, x0, timesteps, conditioning):
        asked_for.append((x0.shape, timesteps))
        return torch.full_like(x0, 0.25)

    method = algorithm(invert=invert)
    part = next(iter(method.microbatches(policy, whole(experience(policy)), 8, 7)))
    x0 = part.experience.trajectory.x_final[part.groups.rows.flatten()]
    noised = method._noised(policy, part, x0, None)
    assert asked_for[0][0] == x0.shape
    assert torch.equal(asked_for[0][1], part.timesteps.repeat_interleave(2))
    assert bool((noised.noise == 0.25).all())
    torch.testing.assert_close(noised.x, noised.alpha.reshape(-1, 1, 1) * x0 + noised.sigma.reshape(-1, 1, 1) * 0.25)

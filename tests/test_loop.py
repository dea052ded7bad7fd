"""The whole loop on the Gaussian oracle policy: its invariants, its refusals, and the same run on one process or two."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import gaussian_run
from tests.gaussian_run import PROMPTS, config, go
from visalign import checkpoint, invariants
from visalign.algorithms.grpo import GRPO
from visalign.credit import RewardFailureError, RewardTerm
from visalign.distributed import Processes
from visalign.invariants import InvariantError
from visalign.maths.oracle import GaussianWorld
from visalign.maths.schedules import dance_sigmas, flow_schedule
from visalign.optimization import Optimization, TrainingStoppedError
from visalign.protocols import LossTerms
from visalign.rewards.function import FunctionReward
from visalign.samplers.oracle_policy import GaussianPolicy
from visalign.tracking import read_metrics
from visalign.types import Scores


def test_a_run_leaves_its_folder_and_raises_the_reward(tmp_path):
    saved = []
    go(tmp_path / "run", config("train.iterations=20", "train.learning_rate=0.02", "algorithm.kl_weight=0", "train.groups=4",
                                "train.microbatch=8"), save_adapter=saved.append)
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert {"config.yaml", "metrics.jsonl", "timings.jsonl", "samples", "checkpoints", "evaluations", "evaluation.json",
            "report.html"} <= names
    assert saved == [tmp_path / "run" / "adapter"]
    rows = read_metrics(tmp_path / "run")
    assert [row["iteration"] for row in rows] == list(range(-1, 20))
    gain = json.loads((tmp_path / "run" / "evaluation.json").read_text())["value"]["gain"]
    assert gain["low"] > 0.02
    first = rows[1]
    assert first["policy/ratio_deviation_first"] == first["policy/output_gap_first"] == 0.0
    assert 0 < rows[3]["policy/ratio_deviation"] < 0.1  # the second update of an iteration is off-policy
    assert not any("time" in name for row in rows for name in row)


def test_averaged_weights_are_evaluated_and_exported_and_then_put_back(tmp_path):
    exported = {}
    settings = config("checkpoint.every=0")
    made = gaussian_run.parts(settings)
    parameter = made.policy.shift
    made = dataclasses.replace(made, save_adapter=lambda folder: exported.update(shift=parameter.detach().clone()))
    gaussian_run.loop.run(made, settings, tmp_path / "run", Processes())
    stored = checkpoint.load(checkpoint.latest(tmp_path / "run" / "checkpoints"))
    assert torch.equal(exported["shift"], stored.tensors["ema"]["shift"])
    assert torch.equal(parameter.detach(), stored.tensors["weights"]["shift"])
    assert not torch.equal(exported["shift"], parameter.detach())
    assert stored.state["ema_steps"] == 6 * 2  # optimizer steps, not the 24 micro-batches


# --- invariants -------------------------------------------------------------------------------------------------------------------


class DropoutPolicy(GaussianPolicy):
    """A layer that behaves differently in training mode, and says so in its outputs."""

    strength = 0.02

    def predict(self, x, step, conditioning, role="policy"):
        return super().predict(x * (1 + self.strength) if self.training else x, step, conditioning, role)


def world(cls=GaussianPolicy):
    return cls(GaussianWorld(mean=torch.full((2, 3), 0.1), var=0.04), flow_schedule(dance_sigmas(5, 3.0)))


def run_with(policy, tmp_path, *overrides, **changes):
    return go(tmp_path / "run", config(*overrides), policy=policy, train_policy=policy, eval_policy=policy, **changes)


def test_a_policy_that_trains_differently_from_how_it_samples_is_stopped(tmp_path):
    with pytest.raises(InvariantError, match=r"outputs differ by .* between sampling and training.*dropout"):
        run_with(world(DropoutPolicy), tmp_path)


def test_old_log_probs_of_other_numbers_are_stopped(tmp_path):
    class Stale(GRPO):
        def prepare(self, policy, experience, microbatch):
            trajectory = dataclasses.replace(experience.trajectory, log_prob=experience.trajectory.log_prob + 0.01, prediction=None)
            return dataclasses.replace(experience, trajectory=trajectory)

    with pytest.raises(InvariantError, match=r"ratio differs from 1 by 1\.67e-03.*old_log_prob=recomputed"):
        go(tmp_path / "run", config(), algorithm=Stale(clip=0.1))


def test_a_reference_that_is_not_the_start_is_stopped(tmp_path):
    policy = world()
    with torch.no_grad():
        policy.shift += 0.1  # the snapshot taken at construction is elsewhere
    with pytest.raises(InvariantError, match="KL between policy and reference"):
        run_with(policy, tmp_path)


class FollowingReference(GaussianPolicy):
    """The adapter switch does nothing: asked for the reference, it answers as the policy."""

    def predict(self, x, step, conditioning, role="policy"):
        return super().predict(x, step, conditioning, "policy")


def test_a_reference_that_follows_the_policy_is_stopped(tmp_path):
    with pytest.raises(InvariantError, match=r"iteration 1: the weights have moved, yet the KL .* is exactly 0"):
        run_with(world(FollowingReference), tmp_path)


def test_kl_without_a_reference_is_refused_before_anything_is_sampled(tmp_path):
    policy = world()
    policy._snapshots.clear()
    with pytest.raises(ValueError, match="compares with a reference"):
        run_with(policy, tmp_path)


def test_a_constant_reward_moves_nothing(tmp_path):
    made = go(tmp_path / "run", config("train.weight_decay=0", "algorithm.kl_weight=0"), reward=lambda media, prompts: [0.1] * len(media))
    assert torch.equal(made.policy.shift.detach(), torch.zeros(2, 3))
    assert read_metrics(tmp_path / "run")[1]["credit/zero_spread_fraction"] == 1.0


def test_an_advantage_without_spread_is_an_error():
    scores = {"r": Scores.from_values([0.1, 0.1, 0.2, 0.3])}
    group = torch.tensor([0, 0, 1, 1])
    invariants.check_advantages(torch.tensor([0.0, 0.0, -1.0, 1.0]), scores, group)
    with pytest.raises(InvariantError, match="2 samples of groups without any spread"):
        invariants.check_advantages(torch.tensor([-1e-9, 1e-9, -1.0, 1.0]), scores, group)
    with pytest.raises(InvariantError, match="not finite"):
        invariants.check_advantages(torch.tensor([0.0, 0.0, float("nan"), 1.0]), scores, group)


def test_tolerances_follow_dtype_and_size():
    """bfloat16 noise on a 65 536-element latent is about 1e-5 per log-ratio in published measurements; a maximum over many is allowed."""
    assert 1e-5 < invariants.ratio_tolerance("bfloat16", 65_536) < 1e-3
    assert invariants.ratio_tolerance("float32", 65_536) < 1e-5
    assert invariants.coarser("float32", "bfloat16") == "bfloat16"


# --- latents ----------------------------------------------------------------------------------------------------------------------


def reads_latents(name="value"):
    return FunctionReward(gaussian_run.mean_value, name=name, modality=["latent"])


def test_a_run_on_a_reward_of_latents_decodes_nothing_and_equals_the_same_reward_of_media(tmp_path):
    """The oracle's audio is its latents, so a mean of either is one number."""

    class Counting(GaussianPolicy):
        decoded = 0

        def decode(self, latents, prompts=None):
            Counting.decoded += len(latents)
            return super().decode(latents, prompts)

    run_with(world(Counting), tmp_path, terms=[RewardTerm("value", reads_latents())])
    assert Counting.decoded == 4 * 4  # evaluations show their pictures: before, after two, four and six iterations
    go(tmp_path / "media", config())
    # What training samples look like is not known of what was never decoded.
    decoded, never = ([{key: value for key, value in row.items() if not key.startswith("media/")} for row in read_metrics(tmp_path / run)]
                      for run in ("media", "run"))
    assert decoded == never


def test_rewards_of_latents_and_of_media_add_up(tmp_path):
    value = FunctionReward(gaussian_run.mean_value, name="media", modality=["audio"])
    terms = [RewardTerm("latent", reads_latents(), weight=0.5), RewardTerm("media", value, weight=0.5)]
    go(tmp_path / "both", config(), terms=terms)
    go(tmp_path / "one", config())
    both, one = (read_metrics(tmp_path / name) for name in ("both", "one"))
    for row, other in zip(both[1:], one[1:], strict=True):
        assert row["reward/latent/mean"] == row["reward/media/mean"] == other["reward/value/mean"]
        assert row["credit/reward_mean"] == pytest.approx(other["credit/reward_mean"], abs=1e-9)
    assert both[0]["eval/latent"] == both[0]["eval/media"] == one[0]["eval/value"]
    timings = read_metrics(tmp_path / "both", "timings.jsonl")
    assert all(row["reward/latent/seconds"] > 0 and row["reward/media/seconds"] > 0 for row in timings[1:])


def test_latents_that_nobody_describes_are_refused_before_anything_is_sampled(tmp_path):
    with pytest.raises(ValueError, match="does not say what its latents mean"):
        go(tmp_path / "run", config(), terms=[RewardTerm("value", reads_latents())], latents=None)
    assert not (tmp_path / "run").exists()


# --- refusals ---------------------------------------------------------------------------------------------------------------------


class Poisoned(GRPO):
    """Non-finite in some optimizer steps (2 updates of 4 micro-batches x 2 steps each)."""

    calls, bad, how = 0, frozenset(), "loss"

    def loss(self, policy, microbatch):
        update = Poisoned.calls // 4
        Poisoned.calls += 1
        terms = super().loss(policy, microbatch)
        if update not in Poisoned.bad:
            return terms
        value = terms.loss * float("nan") if Poisoned.how == "loss" else terms.loss + 0 * (policy.shift * 0).sqrt().sum()
        return LossTerms(loss=value, metrics=terms.metrics, maxima=terms.maxima)


@pytest.fixture
def poison():
    def set_up(*bad, how="loss"):
        Poisoned.calls, Poisoned.bad, Poisoned.how = 0, frozenset(bad), how
        return Poisoned(clip=0.1)

    return set_up


@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_a_non_finite_step_is_refused_and_counted(tmp_path, poison, how):
    made = go(tmp_path / "run", config("train.max_skipped=1", "checkpoint.keep=100"), algorithm=poison(0, 2, 5, how=how))
    rows = read_metrics(tmp_path / "run")
    assert [row["train/skipped"] for row in rows[1:]] == [1, 2, 3, 3, 3, 3]
    assert bool(torch.isfinite(made.policy.shift).all())
    state = checkpoint.load(checkpoint.latest(tmp_path / "run" / "checkpoints")).state
    assert state["optimization"]["num_steps"] == 12 - 3
    assert state["ema_steps"] == 12 - 3


def test_a_refused_step_leaves_weights_and_optimizer_untouched(tmp_path, poison):
    made = go(tmp_path / "run", config("train.iterations=1", "train.max_skipped=5"), algorithm=poison(0, 1))
    assert torch.equal(made.policy.shift.detach(), torch.zeros(2, 3))
    stored = checkpoint.load(checkpoint.latest(tmp_path / "run" / "checkpoints"))
    assert stored.tensors["optimizer"] == {}


def test_too_many_refusals_stop_the_run(tmp_path, poison):
    with pytest.raises(TrainingStoppedError, match=r"3 optimizer steps in a row.*last checkpoint"):
        go(tmp_path / "run", config("train.max_skipped=2"), algorithm=poison(4, 5, 6, 7, 8))
    assert checkpoint.latest(tmp_path / "run" / "checkpoints").name == "000003"  # two refusals in iteration 2 were tolerated


def test_rewards_that_fail_mask_their_samples_and_then_stop_the_run(tmp_path):
    def flaky(media, prompts):
        flaky.calls += 1
        return [None if flaky.calls > 1 and k == 3 else float(sample.data.mean()) for k, sample in enumerate(media)]

    flaky.calls = 0
    go(tmp_path / "one", config(), reward=flaky)
    assert read_metrics(tmp_path / "one")[1]["credit/valid_rate"] == pytest.approx(7 / 8)
    with pytest.raises(RewardFailureError, match="gave no score for any"):
        go(tmp_path / "two", config(), reward=lambda media, prompts: [None] * len(media))


def test_missing_metadata_is_found_before_anything_is_sampled(tmp_path):
    settings = config()
    made = gaussian_run.parts(settings)
    needy = dataclasses.replace(made.terms[0].reward.spec, requires=frozenset({"answer"}))
    made.terms[0].reward.spec = needy
    with pytest.raises(ValueError, match="metadata lacks 'answer'"):
        gaussian_run.loop.run(made, settings, tmp_path / "run", Processes())
    assert not (tmp_path / "run").exists()


# --- precision --------------------------------------------------------------------------------------------------------------------


class LinearPolicy(GaussianPolicy):
    """A matrix in the path, so that autocast has something to round; starts as the identity."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.mix = torch.nn.Linear(3, 3, bias=False)
        torch.nn.init.eye_(self.mix.weight)

    def predict(self, x, step, conditioning, role="policy"):
        if role != "policy":
            return super().predict(x, step, conditioning, role)
        return super().predict(self.mix(x).float(), step, conditioning, role)

    def named_trainable(self):
        return {"shift": self.shift, "mix": self.mix.weight}


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_autocast_is_the_same_in_sampling_and_training_and_gradients_arrive(tmp_path, precision):
    made = run_with(world(LinearPolicy), tmp_path, f"train.precision={precision}", "algorithm.kl_weight=0", "train.max_skipped=8")
    first = read_metrics(tmp_path / "run")[1]
    assert first["policy/output_gap_first"] == first["policy/ratio_deviation_first"] == 0.0
    assert not torch.equal(made.policy.mix.weight.detach(), torch.eye(3))


def test_recomputed_log_probs_use_the_precision_of_training(tmp_path):
    run_with(world(LinearPolicy), tmp_path, "train.precision=bfloat16", "algorithm.kl_weight=0", "algorithm.old_log_prob=recomputed")
    first = read_metrics(tmp_path / "run")[1]
    assert first["policy/output_gap_first"] == first["policy/ratio_deviation_first"] == 0.0


def test_a_prediction_without_gradients_does_not_cost_the_next_one_its_gradient():
    """torch's autocast cache keeps a weight cast under no_grad; a training pass that reuses it gets no gradient, silently."""
    layer = torch.nn.Linear(3, 3)
    optimization = Optimization(dict(layer.named_parameters()), config("train.precision=bfloat16").train, torch.device("cpu"))
    with optimization.autocast():
        with torch.no_grad():
            layer(torch.ones(1, 3))
        loss = layer(torch.ones(1, 3)).sum()
    loss.backward()
    assert layer.weight.grad is not None


# --- processes --------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_make_the_run_of_one(tmp_path):
    """torchrun with gloo against this process: same samples, same metrics, same weights up to the order of sums (1e-6)."""
    overrides = ["train.groups=4", "train.iterations=3", "evaluation.num_prompts=5"]
    script = Path(gaussian_run.__file__)
    environment = {**os.environ, "PYTHONPATH": str(script.parents[1])}
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script), str(tmp_path / "two"),
                    "--plain", *overrides], env=environment, check=True, timeout=900)
    go(tmp_path / "one", config(*overrides))
    one, two = (checkpoint.load(checkpoint.latest(tmp_path / name / "checkpoints")) for name in ("one", "two"))
    assert len(two.state["rng"]) == 2
    for part in ("weights", "ema"):
        assert torch.allclose(one.tensors[part]["shift"], two.tensors[part]["shift"], rtol=1e-6, atol=1e-8)
    for row, other in zip(read_metrics(tmp_path / "one"), read_metrics(tmp_path / "two"), strict=True):
        assert row == pytest.approx(other, rel=1e-4, abs=1e-6)
    # The first iteration's samples had the same weights: equal numbers, not just close ones.
    first, other = (read_metrics(tmp_path / name)[1]["reward/value/mean"] for name in ("one", "two"))
    assert first == other


def test_prompts_come_in_epochs():
    """5 prompts, 2 groups: iterations 0-1 hold four different prompts, the epoch goes on in iteration 2."""
    sampler = gaussian_run.loop.GroupSampler(len(PROMPTS), 2, seed=0)
    seen = [sampler.next() for _ in range(5)]
    assert sorted(i for pair in seen for i in pair) == sorted(list(range(5)) * 2)
    assert all(len(set(pair)) == 2 for pair in seen)

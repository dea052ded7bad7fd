"""Intervals against the normal approximation, pairing against its purpose, and evaluation as a pure function of weights and seed."""

import math

import pytest
import torch

from tests.gaussian_run import PROMPTS, config, mean_value, parts
from visalign.distributed import Processes
from visalign.evaluation import Evaluation, bootstrap_gain, bootstrap_mean, evaluate, write_comparison
from visalign.media import read_index
from visalign.rewards.function import FunctionReward
from visalign.rewards.pairwise import BradleyTerry, WinRate


def test_the_interval_is_that_of_the_normal_approximation():
    """n = 2000: half width 1.96 s / sqrt(n), within 8 % for 2000 resamples."""
    values = torch.randn(2000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = bootstrap_mean(values)
    half = 1.96 * float(values.std()) / math.sqrt(2000)
    assert found.mean == pytest.approx(float(values.mean()))
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.08)
    assert found.low < found.mean < found.high
    assert found == bootstrap_mean(values)


def test_invalid_samples_are_left_out():
    values = torch.tensor([1.0, float("nan"), 3.0])
    assert bootstrap_mean(values).count == 2
    assert bootstrap_mean(values).mean == 2.0
    with pytest.raises(ValueError, match="at least one valid"):
        bootstrap_mean(torch.tensor([float("nan")]))


def test_pairing_removes_the_variance_between_prompts():
    generator = torch.Generator().manual_seed(0)
    before = 10 * torch.randn(200, generator=generator)
    after = before + 0.5 + 0.1 * torch.randn(200, generator=generator)
    gain = bootstrap_gain(before, after)
    assert 0.45 < gain.low < gain.high < 0.55
    assert bootstrap_mean(after).low < bootstrap_mean(before).high  # unpaired, nothing could be said
    with pytest.raises(ValueError, match="same samples"):
        bootstrap_gain(before, after[:-1])


def made(batch=2, folder=None, rewards=None):
    whole = parts(config())
    return evaluate(whole.policy, whole.sampler, rewards or {"value": whole.terms[0].reward}, PROMPTS, seed=5, batch=batch,
                    processes=Processes(), folder=folder)


def test_evaluation_is_the_same_whatever_the_batch(tmp_path):
    one, two = made(batch=2, folder=tmp_path), made(batch=5)
    assert torch.equal(one.values["value"], two.values["value"])
    index = read_index(tmp_path)
    assert [sample.prompt for sample in index] == PROMPTS
    assert [sample.seed for sample in index] == list(one.seeds)
    assert len(set(one.seeds)) == len(PROMPTS)


def test_rewards_that_need_a_group_are_not_asked():
    value = FunctionReward(mean_value, name="value", modality=["audio"])
    found = made(rewards={"value": value, "wins": WinRate(BradleyTerry(value))})
    assert [name for name in found.values if not name.startswith("media/")] == ["value"]


def test_files_round_trip_and_compare(tmp_path):
    values = {"a": torch.tensor([0.1, float("nan"), 0.3], dtype=torch.float64), "gone": torch.full((3,), float("nan"))}
    before = Evaluation(values, (1, 2, 3))
    before.write(tmp_path / "before.json")
    again = Evaluation.read(tmp_path / "before.json")
    assert torch.equal(again.values["a"].nan_to_num(9.0), before.values["a"].nan_to_num(9.0))
    assert again.seeds == before.seeds
    assert set(before.metrics()) == {"eval/a", "eval/a_low", "eval/a_high"}
    after = Evaluation({"a": before.values["a"] + 1, "gone": before.values["gone"]}, (1, 2, 3))
    write_comparison(tmp_path / "evaluation.json", before, after)
    text = (tmp_path / "evaluation.json").read_text()
    assert '"gain"' in text
    assert "gone" not in text

"""Evaluation as a pure function of weights and seed, and its files."""


import torch

from tests.gaussian_run import PROMPTS, config, mean_value, parts
from visalign.distributed import Processes
from visalign.evaluation import Evaluation, evaluate, write_comparison
from visalign.media import read_index
from visalign.rewards.function import FunctionReward
from visalign.rewards.pairwise import BradleyTerry, WinRate


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

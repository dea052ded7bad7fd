"""`visalign reward-train` and its configuration as a user meets them: recipes of both kinds, overrides, messages, the table."""

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from tests.reward_training.worlds import colour_pairs
from visalign.cli import app
from visalign.config import load_config, recipe_names
from visalign.plugins import load_reward
from visalign.reward_training.config import load_reward_config
from visalign.reward_training.parts import build_parts
from visalign.settings import ConfigError, dump_yaml

QUICK = ("encoder=tests.reward_training.worlds:colour", "data.gold=gold", "features.blocks=null", "optimization.epochs=3")


def visalign(*words: str | Path) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})


def test_the_command_prints_what_the_reward_is_worth_and_how_to_use_it(tmp_path):
    data = colour_pairs(tmp_path / "data")
    out, cache = tmp_path / "reward", f"features.cache={tmp_path / 'cache'}"
    result = visalign("reward-train", "reward_embedded_clip", "--out", out, f"data.path={data}", cache, *QUICK)
    assert result.exit_code == 0, result.output + result.stderr
    assert re.search(r"ranking accuracy +│ 0\.\d{3} \[0\.\d{3}, [01]\.\d{3}\]", result.output)
    assert "against gold" in result.output
    assert f"{{name: trained, params: {{path: {out}}}}}" in result.output
    assert load_reward("trained", path=str(out)).spec.name == "trained"
    again = visalign("reward-train", "reward_embedded_clip", "--out", out, f"data.path={data}", *QUICK)
    assert again.exit_code == 1
    assert "is not empty" in again.stderr


@pytest.mark.parametrize(("words", "status", "needle"), [
    (("reward_embedded_clip", "data.path=./nowhere"), 1, "no such file or folder"),
    (("reward_embedded_clip", "objective=bradley"), 2, "there is no 'bradley'; did you mean 'bradley_terry'"),
    (("reward_embedded_clip", "optimization.epoch=3"), 2, "did you mean 'epochs'"),
    (("reward_embedded_clip", "heldout=0.3"), 2, "it belongs to data.heldout"),
    (("reward_embedded_clip", "data.heldout=0.95"), 2, "leave no prompt to train on"),
    (("reward_embedded_clip", "data.calibration=0", "optimization.keep=best"), 2, "set data.calibration above 0"),
    (("reward_embedded_clip", "encoder={model: x}"), 2, "write {reward: clip"),
    (("reward_embedded_clip", "device=gpu"), 1, "use cpu, cuda"),
    (("embedded_grpo",), 2, "visalign train embedded_grpo"), (("reward_embedded",), 2, "did you mean 'reward_embedded_clip'")])
def test_mistakes_end_in_one_message(words, status, needle, tmp_path):
    result = visalign("reward-train", *words, "--out", tmp_path / "reward")
    assert result.exit_code == status
    assert needle in " ".join(result.stderr.split())
    assert not (tmp_path / "reward").exists()


def test_a_reward_to_train_is_no_run():
    with pytest.raises(ConfigError, match="visalign reward-train reward_embedded_clip"):
        load_config("reward_embedded_clip")


def test_recipes_of_both_kinds_are_listed_by_their_names():
    rewards = recipe_names("reward")
    assert rewards
    assert all(name.startswith("reward_") for name in rewards)
    assert sorted([*rewards, *recipe_names("run")]) == recipe_names()


@pytest.mark.parametrize("name", recipe_names("reward"))
def test_reward_recipes_are_valid_sourced_and_round_trip(name, tmp_path):
    config = load_reward_config(name)
    assert config.recipe.description
    assert config.recipe.source
    build_parts(config)
    (tmp_path / "config.yaml").write_text(dump_yaml(config), encoding="utf-8")
    assert load_reward_config(tmp_path / "config.yaml") == config


def test_a_recipe_may_extend_another(tmp_path):
    (tmp_path / "mine.yaml").write_text("extends: reward_embedded_clip\nensemble: {members: 2}\nnoise: posterior\n", encoding="utf-8")
    config = load_reward_config(tmp_path / "mine.yaml", ["noise={name: voting, models: 4}"])
    assert config.ensemble.members == 2
    assert (config.noise.name, config.noise.params) == ("voting", {"models": 4})
    assert config.head == load_reward_config("reward_embedded_clip").head

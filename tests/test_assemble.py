"""Dataclasses from configuration values, and recipes that extend one another."""

from dataclasses import dataclass, field
from typing import Literal

import pytest

from visalign.algorithms.noising import Times
from visalign.algorithms.preference import PreferenceOptimisation
from visalign.assemble import assemble
from visalign.build_algorithm import ALGORITHMS, build_algorithm
from visalign.config import load_config, recipe_names
from visalign.settings import ConfigError, merge


@dataclass(frozen=True)
class Inner:
    name: Literal["a", "b"] = "a"
    size: int = 1

    def __post_init__(self):
        if self.size < 1:
            raise ValueError(f"size must be at least 1, got {self.size}")


@dataclass(frozen=True)
class Outer:
    strength: float
    inner: Inner = field(default_factory=Inner)
    mode: Literal["x", "y"] = "x"
    maybe: Inner | None = None
    handed: object = None


def test_values_are_checked_against_the_fields():
    made = assemble(Outer, {"strength": 2, "inner": {"name": "b", "size": 3}, "maybe": "a"}, "algorithm", {"handed": 5})
    assert made == Outer(2.0, Inner("b", 3), maybe=Inner("a"), handed=5)
    assert assemble(Outer, {"strength": 1, "maybe": None}, "algorithm").maybe is None


def test_all_mistakes_are_reported_at_once_with_their_paths():
    with pytest.raises(ConfigError) as caught:
        assemble(Outer, {"strenght": 1, "mode": "z", "inner": {"sise": 3}}, "algorithm")
    assert caught.value.errors == ["algorithm.strenght: unknown key; did you mean 'strength'?",
                                   "algorithm.mode: should be 'x' or 'y', got 'z'",
                                   "algorithm.inner.sise: unknown key; did you mean 'size'?",
                                   "algorithm.strength: required, but not given"]


@pytest.mark.parametrize(("params", "message"), [
    ({"strength": 1, "inner": {"size": 0}}, "algorithm.inner: size must be at least 1, got 0"),
    ({"strength": 1, "inner": 7}, "algorithm.inner: expected a mapping with name, size, got 7"),
    ({"strength": "much"}, "algorithm.strength: should be a valid number, unable to parse string as a number, got 'much'")])
def test_a_parts_own_complaints_keep_their_path(params, message):
    with pytest.raises(ConfigError) as caught:
        assemble(Outer, params, "algorithm")
    assert caught.value.errors == [message]


def test_what_is_handed_over_is_not_the_users_to_set():
    with pytest.raises(ConfigError, match=r"algorithm.handed: unknown key"):
        assemble(Outer, {"strength": 1, "handed": 2}, "algorithm", {"handed": 5})


def test_merging_replaces_parts_of_another_name_and_removes_null():
    base = {"a": {"name": "grpo", "clip": 1}, "b": {"x": 1, "y": 2}, "c": [1, 2], "d": 3}
    assert merge(base, {"a": {"name": "nft", "beta": 2}, "b": {"y": 3}, "c": [4], "d": None}) == {
        "a": {"name": "nft", "beta": 2}, "b": {"x": 1, "y": 3}, "c": [4]}
    assert merge(base, {"a": {"clip": 5}})["a"] == {"name": "grpo", "clip": 5}
    assert base["b"] == {"x": 1, "y": 2}


def test_a_file_extends_a_recipe_or_a_file_beside_it(tmp_path):
    (tmp_path / "base.yaml").write_text("extends: quickstart\ntrain: {iterations: 7}\n", encoding="utf-8")
    (tmp_path / "mine.yaml").write_text("extends: base.yaml\ntrain: {learning_rate: 1.0e-5}\n", encoding="utf-8")
    config = load_config(tmp_path / "mine.yaml", ["train.groups=24"])
    assert (config.train.iterations, config.train.learning_rate, config.train.groups) == (7, 1e-5, 24)
    assert config.train.group_size == load_config("quickstart").train.group_size


def test_circles_are_refused(tmp_path):
    (tmp_path / "a.yaml").write_text("extends: b.yaml\n", encoding="utf-8")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="circle"):
        load_config(tmp_path / "a.yaml")


@pytest.mark.parametrize("name", recipe_names("run"))
def test_every_recipe_builds_its_algorithm(name):
    config = load_config(name)
    if config.algorithm.name == "reward_gradient":
        assert "reward_gradient" in ALGORITHMS  # it is built with its rewards, in the tests of the recipes that run
        return
    build_algorithm(config, [])


@pytest.mark.parametrize(("override", "message"), [
    ("algorithm={name: nftt}", "did you mean 'nft'"), ("algorithm.kapa=3", "algorithm.kapa: unknown key; did you mean 'kappa'"),
    ("algorithm.loss=plackett", "did you mean 'plackett_luce'"),
    ("algorithm.loss={name: kto, weight: 2}", "algorithm.loss: the loss 'kto' has no"),
    ("algorithm.times={name: cosine}", "algorithm.times.name: should be 'uniform', 'logit_normal' or 'grid'"),
    ("algorithm.pairing.rule=best", "algorithm.pairing.rule")])
def test_mistakes_in_an_algorithms_section_teach(override, message):
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        build_algorithm(load_config("embedded_online_dpo", [override]), [])


def test_nested_parts_reach_the_algorithm():
    made = build_algorithm(load_config("embedded_online_dpo", ["algorithm.times={name: uniform, low: 0.2}"]), [])
    assert isinstance(made, PreferenceOptimisation)
    assert made.times == Times("uniform", low=0.2)


def test_the_plan_of_an_offline_run_samples_nothing():
    from visalign.commands.plan import compute

    rows = dict(compute(load_config("embedded_flow_dpo"), world=1))
    assert "nothing is sampled" in rows["samples"]
    assert "forwards to sample" not in rows
    assert "forwards to sample" in dict(compute(load_config("embedded_nft"), world=1))

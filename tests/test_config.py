"""The schema refuses, suggests and never rewrites; overrides really apply; recipes load and say where their numbers come from."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from visalign.config import ConfigError, dump_config, load_config, make_config, read_source, recipe_names, resolve_path
from visalign.geometry import Geometry
from visalign.settings import apply_overrides, parse_yaml

MINIMAL: dict[str, Any] = {"model": {"path": "somewhere"}, "data": {"prompts": "p.txt"}, "rewards": [{"name": "clip"}]}


def errors_of(data: dict[str, Any]) -> dict[str, str]:
    with pytest.raises(ConfigError) as caught:
        make_config(data)
    return dict(line.split(": ", 1) for line in caught.value.errors)


def test_all_mistakes_are_reported_at_once_with_path_and_suggestion() -> None:
    found = errors_of({**MINIMAL, "trian": {}, "learning_rate": 1, "ema": {"decay": 2}, "tracking": ["jsonl", "tensorbord"],
                       "train": {"group_sise": 3, "groups": "many"}, "data": {"prompts": {"datset": "x"}},
                       "rewards": [{"name": "clip", "wieght": 1}, {"name": "jpeg", "weight": 0}]})
    assert found["trian"] == "unknown key; did you mean 'train'?"
    assert found["train.group_sise"] == "unknown key; did you mean 'group_size'?"
    assert found["rewards.0.wieght"] == "unknown key; did you mean 'weight'?"
    assert found["data.prompts.datset"] == "unknown key; did you mean 'dataset'?"
    assert found["learning_rate"] == "unknown key here; it belongs to train.learning_rate"
    assert "got 'many'" in found["train.groups"]
    assert "got 2" in found["ema.decay"]
    assert "tensorboard" in found["tracking.1"]
    assert "list it under guards" in found["rewards.1.weight"]
    assert found["data.prompts.dataset"].startswith("required")
    assert len(found) == 10


@pytest.mark.parametrize(("change", "path", "needle"), [
    ({"rewards": []}, "top level", "rewards: at least one is needed"),
    ({"rewards": [{"name": "clip", "required": False}]}, "rewards", "no reward is required"),
    ({"train": {"groups": 3, "group_size": 5, "updates": 4}}, "train", "updates 4 does not divide"),
    ({"train": {"groups": 4, "group_size": 4, "microbatch": 3}}, "train", "use one of [1, 2, 4, 8, 16]"),
    ({"train": {"group_size": 1}}, "train.group_size", "greater than or equal to 2"),
    ({"train": {"learning_rate": float("nan")}}, "train.learning_rate", "finite"),
    ({"train": {"betas": [0.9, 1.0]}}, "train.betas", "[0, 1)"),
    ({"tracking": ["wandb"]}, "tracking", "add jsonl"),
    ({"model": {"path": "x", "call": {"prompt": "a"}}}, "model.call", "come from data.prompts"),
    ({"trainable": {"target_modules": []}}, "trainable.target_modules", "nothing would train"),
    ({"recipe": {"verification": "published weights"}}, "recipe", "needs verified_by"),
])
def test_values_that_cannot_be_honoured_are_refused(change: dict[str, Any], path: str, needle: str) -> None:
    found = errors_of({**MINIMAL, **change})
    assert needle in found[path]


def test_numbers_as_people_write_them() -> None:
    config = make_config(parse_yaml("model: {path: x, call: {guidance_scale: 1e1}}\ndata: {prompts: p.txt}\nrewards: [{name: clip}]\n"
                                    "train: {learning_rate: 3e-5}\nsampler: {dynamics: {name: flow_sde, noise: 7e-1}}"))
    assert config.train.learning_rate == 3e-5
    assert config.model.call["guidance_scale"] == 10.0
    assert config.sampler.dynamics.params == {"noise": 0.7}


def test_a_key_given_twice_is_an_error_with_its_line() -> None:
    with pytest.raises(ValueError, match=r"line 3, column 1: the key 'a' is given twice"):
        parse_yaml("a: 1\nb: 2\na: 3")


def test_configurations_are_frozen_and_parameters_are_copies() -> None:
    config = make_config({**MINIMAL, "sampler": {"steps": "all", "dynamics": {"name": "cps", "eta": 0.8}}})
    with pytest.raises(ValidationError):
        config.train.groups = 3  # type: ignore[misc]
    config.sampler.dynamics.params["eta"] = 0.1
    assert config.sampler.dynamics.params == {"eta": 0.8}
    assert config.sampler.steps.name == "all"


@pytest.mark.parametrize(("override", "path", "expected"), [
    ("train.learning_rate=3e-5", ("train", "learning_rate"), 3e-5),
    ("rewards.0.weight=2", ("rewards", 0, "weight"), 2),
    ("rewards.-1.weight=2", ("rewards", 0, "weight"), 2),
    ("rewards.+={name: jpeg, weight: -0.5}", ("rewards", 1), {"name": "jpeg", "weight": -0.5}),
    ("rewards.+.name=jpeg", ("rewards", 1, "name"), "jpeg"),
    ("ema.decay=0.99", ("ema", "decay"), 0.99),
    ("ema=null", ("ema",), None),
    ("model.call.prompt_2='a: b'", ("model", "call", "prompt_2"), "a: b"),
    ("data.prompts=other.txt", ("data", "prompts"), "other.txt"),
    ("tracking.+=wandb", ("tracking", 0), "wandb"),
])
def test_overrides_apply(override: str, path: tuple[str | int, ...], expected: Any) -> None:
    value: Any = apply_overrides(MINIMAL, [override])
    for part in path:
        value = value[part]
    assert value == expected
    assert MINIMAL["rewards"] == [{"name": "clip"}]


def test_overrides_reach_the_validated_configuration_and_the_last_one_wins() -> None:
    config = load_config("quickstart", ["train.groups=4", "train.updates=1", "train.group_size=8", "train.microbatch=16",
                                        "train.microbatch=32", "sampler.dynamics={name: cps, eta: 0.5}"])
    assert (config.train.groups, config.train.group_size, config.train.microbatch) == (4, 8, 32)
    assert config.sampler.dynamics.params == {"eta": 0.5}


def test_every_bad_override_teaches() -> None:
    bad = ["rewards.3.weight=1", "rewards.weight=1", "plain", "--train.groups=1", "model.path.x=2", "a..b=1", "model={a: b: c}"]
    with pytest.raises(ConfigError) as caught:
        apply_overrides(MINIMAL, bad)
    assert len(caught.value.errors) == len(bad)
    for needle, line in zip(["has 1 entries", "rewards.0", "key=value", "no dashes", "single value", "empty part", "quotes"],
                            caught.value.errors, strict=True):
        assert needle in line


def test_an_unknown_key_in_an_override_is_refused_like_one_in_a_file() -> None:
    with pytest.raises(ConfigError, match=r"train\.learning_rat: unknown key; did you mean 'learning_rate'\?"):
        load_config("quickstart", ["train.learning_rat=1e-4"])


def test_unknown_recipes_get_a_suggestion() -> None:
    with pytest.raises(ConfigError, match="did you mean 'sd35_flow_grpo'"):
        load_config("sd35_flow_grp")


@pytest.mark.parametrize("name", recipe_names("run"))
def test_recipes_are_valid_sourced_and_round_trip(name: str, tmp_path: Path) -> None:
    config = load_config(name)
    assert config.recipe.description
    assert config.recipe.source
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(path) == config
    assert load_config(f"configs/{name}.yaml") == config


@pytest.mark.parametrize("name", recipe_names("run"))
def test_recipes_name_parts_that_exist(name: str) -> None:
    from visalign.build_algorithm import ALGORITHMS
    from visalign.plugins import reward_names
    from visalign.samplers.dynamics import build_dynamics
    from visalign.samplers.steps import build_selection

    config = load_config(name)
    build_dynamics(config.sampler.dynamics.name, **config.sampler.dynamics.params)
    selection = build_selection(config.sampler.steps.name, **config.sampler.steps.params)
    num_steps = int(config.model.call["num_inference_steps"])
    stored = [selection.select(num_steps, iteration, seed=0) for iteration in range(200)]
    assert all(stored) if config.sampler.steps.name != "none" else not any(stored)
    assert config.algorithm.name == "grpo" or config.algorithm.name in ALGORITHMS
    assert {part.name for part in (*config.rewards, *config.guards)} <= reward_names().keys()
    for world in (1, 8) if "playground" not in config.model.path else (1,):
        train = config.train
        Geometry(train.groups, train.group_size, train.updates, train.microbatch, world)


def test_the_promised_recipes_are_all_there() -> None:
    assert {"quickstart", "embedded_grpo", "sd35_flow_grpo", "sd35_flow_grpo_fast", "flux_dance_grpo", "flux_mix_grpo", "flux_pref_grpo",
            "sdxl_ddpo", "wan_flow_grpo"} <= set(recipe_names())


def test_recipe_comments_survive_printing() -> None:
    assert "arXiv:2505.05470" in read_source("sd35_flow_grpo")[0]


def test_strings_that_look_like_numbers_survive_a_dump() -> None:
    config = make_config({**MINIMAL, "model": {"path": "1e5", "call": {"note": "on", "scale": 1e-7}}})
    again = make_config(parse_yaml(dump_config(config)))
    assert again == config
    assert again.model.path == "1e5"


def test_playground_paths_resolve_and_others_pass() -> None:
    assert resolve_path("org/model") == "org/model"
    assert resolve_path(3) == 3
    with pytest.raises(ValueError, match="pipeline, clip and exemplars"):
        resolve_path("playground:pipelin")


def test_embedded_models_are_found_inside_nested_parameters() -> None:
    from visalign import playground

    nested = {"judge": {"pointwise": {"reward": "clip", "model": "playground:clip"}, "others": ["playground:pipeline", 3]}}
    found = resolve_path(nested)
    assert found["judge"]["pointwise"] == {"reward": "clip", "model": str(playground.clip_path())}
    assert found["judge"]["others"] == [str(playground.pipeline_path()), 3]

"""Recipes for published checkpoints say what their sources say, and train tiny pipelines of their class; seeds are the recipes' own."""

import json
import math

import pytest

from scripts.verify_recipes import RECIPES, RESULTS, verify
from visalign.config import load_config
from visalign.maths.preference_scale import PRESETS

STRENGTHS = {"sd15_diffusion_dpo": "diffusion_dpo", "sdxl_diffusion_dpo": "diffusion_dpo", "sd15_kto": "diffusion_kto",
             "sd15_smpo": "smpo_sd15", "sdxl_smpo": "smpo_sdxl", "sd15_npo": "npo_sd15", "sd35_online_dpo": "flow_grpo_dpo"}
# One image UNet of each kind, an image transformer of each kind, video and sound; Flux has no recipe of these methods and takes SD 3's.
CLASSES = [("sd15_diffusion_dpo", None), ("sdxl_mapo", None), ("sd35_nft", None), ("sd35_online_dpo", "Flux"),
           ("wan_flow_dpo", None), ("stable_audio_dragon", None)]
# The other methods; tails that start after the third step start anywhere.
OTHERS = {"sd15_kto": (), "sd15_npo": (), "sd15_self_npo": (), "sdxl_smpo": (), "sd35_rwr": (), "sd35_awm": (), "sd15_draft": (),
          "sd15_alignprop": ("sampler.steps={name: random_tail}",), "sd15_refl": ("sampler.steps={name: random_tail}",)}
FEWER = ["model.call.num_inference_steps=3", "evaluation.num_prompts=1", "evaluation.batch=1", "train.iterations=1", "guards=[]"]


@pytest.mark.parametrize(("recipe", "preset"), STRENGTHS.items())
def test_strengths_are_the_published_betas_in_the_one_unit(recipe, preset):
    assert load_config(recipe).algorithm.params["kappa"] == PRESETS[preset].kappa


@pytest.mark.parametrize("recipe", RECIPES)
def test_updates_on_clean_samples_train_the_conditional_prediction(recipe):
    config = load_config(recipe)
    if config.algorithm.name in ("grpo", "reward_gradient"):
        assert not config.model.train_call
    else:
        assert {**config.model.call, **config.model.train_call}["guidance_scale"] == 1.0


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_says_it_ran_only_if_a_row_shows_it(recipe):
    ran = {row["recipe"] for row in map(json.loads, RESULTS.read_text(encoding="utf-8").splitlines())}
    assert load_config(recipe).recipe.verification == ("tiny random weights" if recipe in ran else "not yet run")


@pytest.mark.parametrize("recipe", [name for name in RECIPES if load_config(name).trainable.mode == "full" and "flux" not in name])
def test_weights_that_train_whole_are_kept_in_float32(recipe):
    assert load_config(recipe).model.dtype == "float32"


@pytest.mark.parametrize(("recipe", "family"), CLASSES)
def test_a_recipe_trains_its_class_of_pipelines(recipe, family):
    rows, _ = verify(recipe, family, FEWER)
    first = rows[1]
    assert 0 < first["train/grad_norm"] < math.inf
    assert first["train/skipped"] == 0
    for gap in ("policy/error_gap_first", "policy/output_gap_first"):  # the reference and the old policy are the starting weights
        assert first.get(gap, 0.0) == 0.0
    if load_config(recipe).algorithm.params.get("loss") == "dpo":
        assert first["preference/loss"] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.slow
def test_every_other_method_trains_too():
    for recipe, overrides in OTHERS.items():
        rows, _ = verify(recipe, overrides=[*FEWER, *overrides])
        assert rows[1]["train/skipped"] == 0, recipe
        assert rows[1].get("policy/error_gap_first", 0.0) == 0.0, recipe

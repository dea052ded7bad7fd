"""A configuration and a diffusers folder become a run: a tiny random Stable Diffusion 3, LoRA and full, on the CPU."""

import json

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from scripts.tiny_families import by_name
from visalign import checkpoint
from visalign.build import build_prompts, build_rewards
from visalign.config import make_config
from visalign.loop import train
from visalign.media import read_index
from visalign.settings import apply_overrides
from visalign.tracking import read_metrics

TEXTS = ["a red circle", "A red circle", "two blue squares above a green triangle", "a red circle"]


@pytest.fixture(scope="module")
def sd3(tmp_path_factory):
    """The pipeline's folder, its call, and a prompt file."""
    folder = tmp_path_factory.mktemp("sd3")
    family = by_name("Stable Diffusion 3")
    family.build().save_pretrained(folder / "model")
    (folder / "prompts.txt").write_text("\n".join(TEXTS))
    return folder, {key: value for key, value in family.call.items() if key != "negative_prompt"}


def config(sd3, *overrides):
    folder, call = sd3
    data = {"model": {"path": str(folder / "model"), "device": "cpu", "call": {**call, "num_inference_steps": 4}},
            "data": {"prompts": str(folder / "prompts.txt")},
            "rewards": [{"name": "jpeg_compressibility"}],
            "guards": [{"name": "jpeg_incompressibility"}],
            "algorithm": {"clip": 1e-2, "kl_weight": 0.01},
            "train": {"iterations": 3, "groups": 2, "group_size": 4, "updates": 2, "microbatch": 2, "learning_rate": 1e-2},
            "trainable": {"rank": 4}, "evaluation": {"num_prompts": 4, "every": 0, "batch": 2}, "checkpoint": {"every": 1}}
    return make_config(apply_overrides(data, overrides))


def final_weights(run_dir):
    return checkpoint.load(checkpoint.latest(run_dir / "checkpoints")).tensors["weights"]


@pytest.fixture(scope="module")
def finished(sd3, tmp_path_factory):
    return train(config(sd3), tmp_path_factory.mktemp("run") / "run")


def test_the_first_update_sees_the_numbers_of_the_rollout(finished):
    """Same batch shape and dtype on one thread: the ratio is 1, the outputs are equal, the reference is the start; in every iteration."""
    rows = read_metrics(finished)[1:]
    for row in rows:
        assert row["policy/ratio_deviation_first"] < 1e-6
        assert row["policy/output_gap_first"] < 1e-5
    assert rows[0]["policy/kl_reference_first"] == 0.0
    assert rows[-1]["grpo/kl_reference"] > 0
    assert {"eval/jpeg_compressibility", "eval/jpeg_incompressibility"} <= rows[-1].keys()


def test_the_adapter_loads_in_plain_diffusers_and_gives_the_same_image(sd3, finished):
    folder, call = sd3
    pipe = StableDiffusion3Pipeline.from_pretrained(folder / "model")
    pipe.set_progress_bar_config(disable=True)
    arguments = {**call, "num_inference_steps": 4, "output_type": "np"}

    def image(sample):
        with torch.no_grad():
            made = pipe(prompt=sample.prompt.text, generator=torch.Generator().manual_seed(sample.seed), **arguments).images[0]
        return (torch.from_numpy(made) * 255).round()

    from visalign.media import load_media

    before, after = (read_index(finished / "samples" / label)[2] for label in ("before", "after"))
    stored = [load_media(sample.file).data.permute(1, 2, 0).float() for sample in (before, after)]
    assert (image(before) - stored[0]).abs().max() <= 1
    pipe.load_lora_weights(finished / "adapter")
    assert (image(after) - stored[1]).abs().max() <= 1
    assert (stored[0] - stored[1]).abs().max() > 1


class Interrupt:
    """Raises when an iteration has begun; nothing after the last checkpoint may count."""

    def __init__(self, iteration):
        self.left = iteration

    def on_start(self, first, total): ...

    def on_phase(self, name, done, total):
        if name == "update" and done == 0:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt

    def on_iteration(self, iteration, metrics): ...

    def on_end(self): ...


def test_an_interrupted_run_of_a_pipeline_resumes_bit_for_bit(sd3, finished, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(config(sd3), tmp_path / "run", callback=Interrupt(2))
    train(config(sd3), tmp_path / "run", resume=True)
    one, two = final_weights(finished), final_weights(tmp_path / "run")
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert (finished / "metrics.jsonl").read_bytes() == (tmp_path / "run" / "metrics.jsonl").read_bytes()


def test_gradient_checkpointing_and_microbatch_change_nothing_but_rounding(sd3, finished, tmp_path):
    """Adam turns gradient rounding into relative noise of its own where gradients vanish, hence SGD-like tolerance on the whole vector."""
    train(config(sd3, "train.gradient_checkpointing=true", "train.microbatch=4"), tmp_path / "run")
    one, two = (torch.cat([w.flatten() for w in final_weights(run).values()]) for run in (finished, tmp_path / "run"))
    assert (one - two).norm() < 1e-2 * one.norm()
    rows, others = read_metrics(finished)[1:], read_metrics(tmp_path / "run")[1:]
    assert rows[0]["train/grad_norm"] == pytest.approx(others[0]["train/grad_norm"], rel=1e-2)


@pytest.mark.parametrize("overrides", [
    ("trainable.mode=full", "train.learning_rate=1e-4"), ("train.precision=bfloat16",), ("sampler.storage_dtype=bfloat16",),
    ("sampler.noise=philox", "kernels=torch"),
    ("algorithm.surrogate=guard", "sampler.dynamics={name: cps, eta: 0.5}"), ("ema.decay=0.9", "sampler.same_initial_noise=true"),
    ("algorithm.old_log_prob=recomputed", "model.eval_call={num_inference_steps: 6}", "sampler.steps={name: single}")])
def test_variants_run_and_keep_the_invariants(sd3, tmp_path, overrides):
    train(config(sd3, "train.iterations=2", *overrides), tmp_path / "run")
    rows = read_metrics(tmp_path / "run")[1:]
    assert all(row["train/grad_norm"] > 0 and row["train/skipped"] == 0 for row in rows)
    assert rows[-1]["grpo/kl_reference"] > 0
    assert "gain" in json.loads((tmp_path / "run" / "evaluation.json").read_text())["jpeg_compressibility"]


def test_more_evaluation_prompts_than_there_are_is_an_error(sd3):
    with pytest.raises(ValueError, match=r"num_prompts is 9, but there are 4 evaluation prompts; use evaluation.num_prompts=4"):
        build_prompts(config(sd3, "evaluation.num_prompts=9"))


def test_rewards_of_one_name_get_names_of_their_own(sd3):
    terms, guards, stopping = build_rewards(config(sd3, "rewards.+={name: jpeg_compressibility, weight: 2}",
                                                   "guards.+={name: jpeg_compressibility, stops: false}"))
    assert [(term.name, term.weight) for term in terms] == [("jpeg_compressibility", 1.0), ("jpeg_compressibility_2", 2.0)]
    assert list(guards) == ["jpeg_incompressibility", "jpeg_compressibility_3"]
    assert stopping == {"jpeg_incompressibility"}


def test_kernels_that_are_not_possible_are_refused_before_anything_is_loaded(sd3, tmp_path):
    with pytest.raises(ValueError, match="kernels: cuda is not possible on cpu, tensors are on cpu; use kernels=auto or kernels=torch"):
        train(config(sd3, f"model.path={tmp_path}/nowhere", "kernels=cuda"), tmp_path / "run")


def test_a_missing_model_says_so(sd3, tmp_path):
    with pytest.raises(ValueError, match="nowhere"):
        train(config(sd3, f"model.path={tmp_path}/nowhere"), tmp_path / "run")

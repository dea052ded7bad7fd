"""A data set as a sampler: the trajectory is the stored latents, bit for bit, and the judgements."""

import pytest
import torch

from tests.preferences.judged import Encoder, encoded, pairs, picture, write
from visalign.preferences import cached_latents, load_preferences
from visalign.preferences.stored import write_latents
from visalign.samplers.replay import ReplaySampler
from visalign.samplers.rollout import generate
from visalign.types import Prompt


def replay(path, policy=None, **options):
    policy = policy or Encoder()
    dataset = cached_latents(policy, load_preferences(path, **options), path.parent / "cache", identity="test").dataset
    return policy, ReplaySampler(dataset, microbatch=2)


def rollout(policy, sampler, rows, **options):
    prompts = [sampler.dataset.prompts[row] for row in rows]
    return sampler.rollout(policy, prompts, **{"rows": rows, "iteration": 0, "first_index": 0, **options})


def test_the_trajectory_is_the_latents_and_the_judgements(tmp_path):
    policy, sampler = replay(pairs(tmp_path, 4))
    found = rollout(policy, sampler, [2, 0], first_index=12)
    expected = torch.stack([encoded(picture(tmp_path / "x.png", seed=k)) for k in (4, 5, 0, 1)])
    assert torch.equal(found.x_final, expected)
    assert found.x_final.dtype == torch.float32
    assert found.scores["preference"].value.tolist() == [1, 0, 1, 0]
    assert found.scores["preference"].valid.all()
    assert found.group_id.tolist() == found.prompt_index.tolist() == [0, 0, 1, 1]
    assert found.sample_index.tolist() == [12, 13, 14, 15]
    assert [prompt.text for prompt in found.prompts] == ["prompt 2", "prompt 0"]
    assert len(found.conditioning) == 2
    assert found.num_samples == 4


def test_no_step_is_stored(tmp_path):
    policy, sampler = replay(pairs(tmp_path, 1))
    found = rollout(policy, sampler, [0])
    assert found.x.shape == found.x_next.shape == (2, 0, 3, 8, 8)
    assert found.log_prob.shape == (2, 0)
    assert (found.transitions, found.prediction, found.step_index.numel()) == ((), None, 0)


def test_lists_keep_their_scores_and_users_travel_with_the_prompts(tmp_path):
    for k in range(3):
        picture(tmp_path / f"{k}.png", seed=k)
    path = write(tmp_path / "lists.jsonl", [{"prompt": "a", "media": ["0.png", "1.png", "2.png"], "ranking": [2, 3, 1], "user": "u7"}])
    policy, sampler = replay(path)
    assert sampler.group_size == 3
    found = rollout(policy, sampler, [0])
    assert found.scores["preference"].value.tolist() == [-2, -3, -1]
    assert found.prompts[0].metadata["user"] == "u7"


def test_generation_is_the_ordinary_one(tmp_path):
    policy, sampler = replay(pairs(tmp_path, 1))
    prompts, seeds = [Prompt("a"), Prompt("b"), Prompt("c")], [1, 2, 3]
    assert torch.equal(sampler.generate(policy, prompts, seeds), generate(policy, prompts, seeds))


def test_prompts_and_rows_must_be_the_data_sets(tmp_path):
    policy, sampler = replay(pairs(tmp_path, 2))
    with pytest.raises(ValueError, match=r"row 1 of .* is about 'prompt 1', the run's prompt there is 'another'"):
        sampler.rollout(policy, [Prompt("another")], rows=[1], iteration=0, first_index=0)
    with pytest.raises(ValueError, match="row 2 of a data set of 2"):
        sampler.rollout(policy, [Prompt("prompt 1")], rows=[2], iteration=0, first_index=0)
    with pytest.raises(ValueError, match="got 0 rows for 1 prompts"):
        sampler.rollout(policy, [Prompt("prompt 1")], rows=[], iteration=0, first_index=0)


def test_media_must_be_encoded_first_and_latents_must_fit(tmp_path):
    dataset = load_preferences(pairs(tmp_path, 1))
    with pytest.raises(ValueError, match=r"0\.png is a medium, not a latent; encode the data set first"):
        rollout(Encoder(), ReplaySampler(dataset), [0])
    write_latents(tmp_path / "other.safetensors", torch.zeros(2, 5), "test")
    path = write(tmp_path / "other.jsonl", [{"prompt": "a", "latents": "other.safetensors", "rows": [0, 1], "label": [1, 0]}])
    with pytest.raises(ValueError, match=r"are \(5,\), this pipeline's are \(3, 8, 8\)"):
        rollout(Encoder(), ReplaySampler(load_preferences(path)), [0])

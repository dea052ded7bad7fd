"""Which pipelines share latents, and media of every kind through real encoders."""

import numpy as np
import pytest
import torch

from scripts.tiny_families import by_name
from tests.preferences.judged import write
from visalign.media import save_media
from visalign.preferences import PreferenceError, cached_latents, load_latents, load_preferences
from visalign.samplers.identity import pipeline_identity
from visalign.samplers.policy import PipelinePolicy
from visalign.types import Media


def captured(name, **call):
    family = by_name(name)
    return PipelinePolicy(family.build(), {**family.call, **call})


@pytest.fixture(scope="module")
def image_policy():
    return captured("Stable Diffusion 3")


def test_steps_and_guidance_do_not_matter_and_the_size_does(image_policy):
    identity = pipeline_identity(image_policy)
    height = image_policy.call.fixed["height"]
    assert pipeline_identity(image_policy.with_call(num_inference_steps=3, guidance_scale=1.0)) == identity
    assert pipeline_identity(image_policy.with_call(height=2 * height, width=2 * height)) != identity


def test_one_changed_weight_of_the_encoder_is_another_pipeline(image_policy):
    identity = pipeline_identity(image_policy)
    weight = next(iter(image_policy.pipe.vae.encoder.parameters()))
    before = weight.data.clone()
    with torch.no_grad():
        weight.view(-1)[0] += 1e-3
    assert pipeline_identity(image_policy) != identity
    weight.data.copy_(before)
    assert pipeline_identity(image_policy) == identity


def test_another_scaling_is_another_pipeline():
    one, other = by_name("Stable Diffusion 3"), by_name("Stable Diffusion 3").build()
    other.vae.register_to_config(scaling_factor=0.5)
    assert pipeline_identity(PipelinePolicy(other, one.call)) != pipeline_identity(captured("Stable Diffusion 3"))


def test_pipelines_in_pixel_space_are_told_by_their_class_and_shape():
    assert pipeline_identity(captured("DDPM")) == pipeline_identity(captured("DDPM")) != pipeline_identity(captured("DDIM"))


def media(policy, num, seed=0):
    """Random media as this pipeline makes them."""
    like = policy.decode(torch.zeros(1, *policy.latent_shape))[0]
    rng = np.random.default_rng(seed)
    if like.kind == "audio":
        return [Media("audio", torch.from_numpy(rng.uniform(-0.5, 0.5, tuple(like.data.shape)).astype(np.float32)), like.rate)
                for _ in range(num)]
    return [Media(like.kind, torch.from_numpy(rng.integers(0, 256, tuple(like.data.shape), dtype=np.uint8)), like.rate) for _ in range(num)]


def test_pictures_become_the_policys_own_latents(image_policy, tmp_path):
    pictures = media(image_policy, 2)
    files = [save_media(one, tmp_path / str(k)).name for k, one in enumerate(pictures)]
    path = write(tmp_path / "data.jsonl", [{"prompt": "a", "media": files, "label": [1, 0]}])
    cached = cached_latents(image_policy, load_preferences(path), tmp_path / "cache", identity=pipeline_identity(image_policy))
    assert torch.equal(load_latents(cached.dataset.records[0].candidates), image_policy.encode_media(pictures).float())


def test_videos(tmp_path):
    pytest.importorskip("av")
    policy = captured("Wan 2.1")
    clips = media(policy, 2)
    longer = Media("video", torch.cat([clips[0].data, clips[1].data]), clips[0].rate)
    short = Media("video", clips[0].data[:1], clips[0].rate)
    files = [save_media(one, tmp_path / f"{k}").name for k, one in enumerate([*clips, longer, short])]
    rows = [{"prompt": "a", "media": files[:2], "label": [1, 0]}, {"prompt": "b", "media": files[1:3], "label": [1, 0]},
            {"prompt": "c", "media": [files[0], files[3]], "label": [1, 0]}]
    dataset = load_preferences(write(tmp_path / "data.jsonl", rows))
    identity = pipeline_identity(policy)
    with pytest.raises(PreferenceError, match=r"row 1: .*frames of .*, the pipeline makes") as caught:
        cached_latents(policy, dataset, tmp_path / "cache", identity=identity)
    assert [problem.row for problem in caught.value.problems] == [1, 2]
    with pytest.raises(PreferenceError, match=r"row 2: .*has 1 frames") as caught:
        cached_latents(policy, dataset, tmp_path / "cache", identity=identity, resize=True)
    assert [problem.row for problem in caught.value.problems] == [2]  # a longer clip gives its first frames
    kept = cached_latents(policy, dataset, tmp_path / "cache", identity=identity, resize=True, broken="skip").dataset
    assert load_latents(kept.records[1].candidates).shape == (2, *policy.latent_shape)
    assert kept.dropped == {"size": 1}


def sounding_policy():
    """Stable Audio asked for all of the 64 x 4 samples its latents stand for; its encoder has as many channels as its decoder."""
    family = by_name("Stable Audio")
    pipe = family.build()
    config = {**pipe.vae.config, "encoder_hidden_size": 8}
    pipe.register_modules(vae=type(pipe.vae).from_config(config).eval())
    return PipelinePolicy(pipe, {**family.call, "audio_end_in_s": 0.064})


def test_sounds(tmp_path):
    soundfile = pytest.importorskip("soundfile")
    policy = sounding_policy()
    sounds = media(policy, 3)
    files = [save_media(one, tmp_path / f"{k}").name for k, one in enumerate(sounds)]
    soundfile.write(tmp_path / "0.flac", sounds[0].data.T.numpy(), int(sounds[0].rate), subtype="PCM_16")
    soundfile.write(tmp_path / "float.wav", sounds[1].data.T.numpy(), int(sounds[0].rate), subtype="FLOAT")
    (tmp_path / "broken.flac").write_bytes(b"fLaC")
    rows = [{"prompt": "a", "media": pair, "label": [1, 0]} for pair in
            ([files[0], "0.flac"], [files[1], "float.wav"], [files[2], "broken.flac"])]
    dataset = load_preferences(write(tmp_path / "data.jsonl", rows))
    identity = pipeline_identity(policy)
    with pytest.raises(PreferenceError, match=r"row 2: .*broken\.flac: not a readable audio file") as caught:
        cached_latents(policy, dataset, tmp_path / "cache", identity=identity)
    assert len(caught.value.problems) == 1
    kept = cached_latents(policy, dataset, tmp_path / "cache", identity=identity, broken="skip").dataset
    for record in kept.records:
        one, other = load_latents(record.candidates)
        assert one.shape == policy.latent_shape
        assert torch.allclose(one, other, atol=1e-2)

"""Scorers for other environments: what of them does not need their upstream, and what they say without it."""

import importlib
import inspect
from pathlib import Path

import numpy as np
import pytest
import torch
from packaging.requirements import Requirement

from visalign.maths.frechet import Gaussian, Moments
from visalign.media import load_media
from visalign.rewards.detector import DetectedObjects, Seen, correct, parse_request
from visalign.rewards.detectors import Detection
from visalign.rewards.scorers.fad import clip_distance, read_background
from visalign.rewards.scorers.imagereward import load_strictly
from visalign.rewards.scorers.pictures import frames, lossless_mp4, pil
from visalign.rewards.scorers.upstream import ENVIRONMENTS, check_vocabulary
from visalign.rewards.scorers.videoalign import check_special_tokens
from visalign.rewards.scorers.videoscore import read_instruction
from visalign.types import Media, Prompt

ROOT = Path(__file__).parents[2]
SCORERS = {"hpsv3": "HPSv3", "imagereward": "OriginalImageReward", "videoalign": "VideoReward", "videoscore": "VideoScore",
           "geneval": "GenEval", "vqascore": "VQAScore", "audiobox": "AudioboxAesthetics", "fad": "ClipFAD"}
FILES = {name: "fadtk" if name == "fad" else name for name in SCORERS}
PARAMS = {"videoalign": ("project", "checkpoints"), "geneval": ("config", "checkpoint"), "videoscore": ("instruction",)}


@pytest.mark.parametrize("name", SCORERS)
def test_without_its_upstream_a_scorer_names_its_environment(name, tmp_path):
    """Its module imports anywhere; its class says which file to install from."""
    (tmp_path / "instruction").write_text("{text_prompt}")
    found = getattr(importlib.import_module(f"visalign.rewards.scorers.{name}"), SCORERS[name])
    given = {one: str(tmp_path / "instruction" if one == "instruction" else tmp_path) for one in PARAMS.get(name, ())}
    with pytest.raises(ValueError, match=rf"wants an environment of its own: pip install -r .*environments/{FILES[name]}\.txt"):
        found(**given)
    assert [one.name for one in inspect.signature(found.score).parameters.values()][-3:] == ["media", "prompts", "group_id"]


@pytest.mark.parametrize("name", sorted(set(FILES.values())))
def test_every_environment_says_how_far_it_was_verified_and_can_be_read(name):
    lines = (ENVIRONMENTS / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith(("# Verified", "# Not verified"))
    wanted = [line for line in lines if line and not line.startswith("#")]
    assert wanted[0] == "-r server.txt"
    assert any("==" in line for line in wanted)
    for line in wanted[1:]:
        Requirement(line)


def test_the_document_lists_every_scorer_with_its_command():
    text = (ROOT / "docs" / "scorers.md").read_text(encoding="utf-8")
    for name, attribute in SCORERS.items():
        assert f"visalign.rewards.scorers.{name}:{attribute}" in text
        assert f"environments/{FILES[name]}.txt" in text


def test_a_project_that_is_no_package_is_looked_for_where_it_was_said(tmp_path):
    from visalign.rewards.scorers.upstream import upstream

    with pytest.raises(ValueError, match=r"is no folder; clone the project that videoalign\.txt names"):
        upstream("inference", "videoalign", tmp_path / "nowhere")
    (tmp_path / "a_project_of_someone.py").write_text("ANSWER = 42\n")
    assert upstream("a_project_of_someone", "videoalign", tmp_path).ANSWER == 42


def test_an_empty_tokenizer_is_refused():
    check_vocabulary(range(49408), 49408, "x")
    with pytest.raises(ValueError, match="its tokenizer has 2 entries, expected 49408 or more"):
        check_vocabulary(range(2), 49408, "x")


# --- pictures ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 3, 16, 24), (3, 3, 17, 33)])
def test_videos_become_files_without_a_loss(tmp_path, shape):
    video = Media("video", torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0)), rate=12.5)
    lossless_mp4(video, tmp_path / "x.mp4")
    again = load_media(tmp_path / "x.mp4")
    assert torch.equal(again.data, video.data)
    assert again.rate == 12.5


def test_frames_are_evenly_spaced():
    video = Media("video", torch.arange(10, dtype=torch.uint8).reshape(10, 1, 1, 1).expand(10, 3, 2, 2).contiguous(), rate=8.0)

    def shown(most):
        return [np.asarray(frame)[0, 0, 0].item() for frame in frames(video, most)]

    assert shown(16) == list(range(10))
    assert shown(4) == [0, 3, 6, 9]
    assert shown(3) == [0, 4, 9]
    assert shown(1) == [0]
    image = Media("image", torch.full((3, 2, 4), 7, dtype=torch.uint8))
    assert [frame.size for frame in frames(image, 8)] == [(4, 2)]
    assert np.array_equal(np.asarray(pil(image.data)), np.full((2, 4, 3), 7))


# --- what each of them adds -------------------------------------------------------------------------------------------------------


def test_checkpoints_of_another_model_are_refused(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    good = {name: torch.full_like(value, 3.0) for name, value in model.state_dict().items()}
    torch.save({**good, "embeddings.position_ids": torch.arange(4)}, tmp_path / "good.pt")
    load_strictly(model, tmp_path / "good.pt")
    assert bool((model[0].weight == 3).all())
    for bad in ({"0.weight": good["0.weight"]}, {**good, "extra": torch.zeros(1)}):
        torch.save(bad, tmp_path / "bad.pt")
        with pytest.raises(ValueError, match=r"is no checkpoint of this model: 1 tensors differ, for example (0\.bias|extra)"):
            load_strictly(model, tmp_path / "bad.pt")


def at(label, x, y, score=0.9, size=10.0):
    return Detection(label, score, (x, y, x + size, y + size))


@pytest.mark.parametrize(("include", "exclude", "found", "expected"), [
    ([{"class": "dog"}], [], [at("dog", 0, 0)], True), ([{"class": "dog"}], [], [], False),
    ([{"class": "dog", "count": 2}], [], [at("dog", 0, 0), at("dog", 50, 0), at("dog", 90, 0)], True),  # at least
    ([{"class": "dog", "count": 2}], [{"class": "dog", "count": 3}], [at("dog", 0, 0), at("dog", 50, 0), at("dog", 90, 0)], False),
    ([{"class": "dog", "color": "red"}], [], [at("dog", 0, 0)], True),
    # The colour of the most confident ones counts, not whether one of that colour is somewhere.
    ([{"class": "dog", "color": "red"}], [], [at("dog", 50, 0, 0.9), at("dog", 0, 0, 0.5)], False),
    ([{"class": "dog"}, {"class": "cat", "position": ["right of", 0]}], [], [at("dog", 0, 0), at("cat", 50, 0)], True),
    ([{"class": "dog"}, {"class": "cat", "position": ["left of", 0]}], [], [at("dog", 0, 0), at("cat", 50, 0)], False),
    # Every object of the entry in that relation to every anchor.
    ([{"class": "dog", "count": 2}, {"class": "cat", "position": ["right of", 0]}], [],
     [at("dog", 0, 0), at("dog", 90, 0), at("cat", 50, 0)], False),
    # An anchor that is itself wrong is none.
    ([{"class": "dog", "color": "red"}, {"class": "cat", "position": ["left of", 0]}], [], [at("dog", 50, 0), at("cat", 0, 0)], False),
])
def test_genevals_verdict(include, exclude, found, expected):
    """Dogs at x = 0 are red, all others blue."""
    request = parse_request({"include": include, "exclude": exclude})
    by_class = {}
    for detection in sorted(found, key=lambda one: -one.score):
        by_class.setdefault(detection.label, []).append(detection)
    colors = {detection: "red" if detection.box[0] == 0 else "blue" for detection in found}
    assert correct(request, Seen(by_class, colors)) is expected


def test_objects_may_be_seen_by_any_detector():
    class Fixed:
        labels, model_id = ("dog", "cat"), "fixed"

        def __call__(self, image, threshold):
            return [one for one in (at("dog", 0, 0, 0.95), at("cat", 50, 0, 0.5)) if one.score >= threshold]

    from visalign import playground

    reward = DetectedObjects(Fixed(), clip=str(playground.clip_path()), clip_pretrained=None)
    image = [Media("image", torch.zeros(3, 64, 64, dtype=torch.uint8))]
    request = {"include": [{"class": "dog"}, {"class": "cat", "position": ["right of", 0]}]}
    assert reward.score(image, [Prompt("x", metadata=request)], [0]).raw.tolist() == [1.0]
    assert reward.score(image, [Prompt("x", metadata={**request, "tag": "counting"})], [0]).raw[0] == pytest.approx(1 / 3)
    assert reward.spec.model_ids[0] == "fixed"


def test_a_clips_distance_is_zero_for_the_background_itself_and_the_shift_squared_for_a_shifted_one():
    frames_ = torch.randn(200, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    background = Moments.of(frames_).gaussian()
    shift = torch.tensor([1.0, 0.0, -2.0, 0.5], dtype=torch.float64)
    assert clip_distance(frames_, background) == pytest.approx(0.0, abs=1e-9)
    assert clip_distance(frames_ + shift, background) == pytest.approx(float(shift.square().sum()), rel=1e-9)
    assert clip_distance(frames_[:1], background) is None


def test_backgrounds_are_read_as_fadtk_writes_them(tmp_path):
    np.savez(tmp_path / "b.npz", **{"vggish.mu": np.zeros(3, np.float16), "vggish.cov": np.eye(3, dtype=np.float32)})
    found = read_background(tmp_path / "b.npz", "vggish")
    assert isinstance(found, Gaussian)
    assert found.mean.dtype == torch.float64
    with pytest.raises(ValueError, match="no statistics of 'encodec-emb'; it has vggish"):
        read_background(tmp_path / "b.npz", "encodec-emb")
    with pytest.raises(ValueError, match="no such file"):
        read_background(tmp_path / "c.npz", "vggish")


def test_prompts_with_the_models_own_tokens_are_refused():
    check_special_tokens([Prompt("a dog")], "videoalign")
    with pytest.raises(ValueError, match=r"prompt 1 .*contains <\|TA_reward\|>"):
        check_special_tokens([Prompt("a dog"), Prompt("a <|TA_reward|> dog")], "videoalign")


def test_an_instruction_says_where_the_prompt_goes(tmp_path):
    (tmp_path / "x.txt").write_text("Judge {text_prompt} now")
    assert read_instruction(str(tmp_path / "x.txt")) == "Judge {text_prompt} now"
    (tmp_path / "x.txt").write_text("Judge now")
    with pytest.raises(ValueError, match="does not say where the prompt goes"):
        read_instruction(str(tmp_path / "x.txt"))
    with pytest.raises(ValueError, match=r"cannot be read \(No such file"):
        read_instruction(str(tmp_path / "y.txt"))

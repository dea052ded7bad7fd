"""A judge in this process: a tiny LLaVA with random weights against its own forward pass, and behind ``transformers serve``."""

import math
import os
import shutil
from io import BytesIO

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.rewards.tiny_judge import make
from tests.rewards.transformers_server import serving
from visalign.rewards.judges.images import png
from visalign.rewards.judges.local import LocalModel
from visalign.rewards.judges.pairwise import PairwiseJudge
from visalign.rewards.judges.pointwise import PointwiseJudge
from visalign.rewards.judges.question import Question
from visalign.rewards.judges.rubric import RubricJudge
from visalign.rewards.judges.server import ChatServer
from visalign.rewards.pairwise import WinRate
from visalign.types import Media, Prompt

PICTURES = tuple(png(torch.full((3, 20, 30), level, dtype=torch.uint8)) for level in (0, 200))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(make(tmp_path_factory.mktemp("judge")))


@pytest.fixture(scope="module")
def judge(folder):
    return LocalModel(folder, device="cpu")


def first_token_of(judge, text, pictures):
    """Log-probabilities of the first token by the model's own forward pass over the prompt written out by hand."""
    shown = [Image.open(BytesIO(picture)) for picture in pictures]
    inputs = judge._processor(images=shown, text="user: " + "<image> " * len(shown) + text + "<end>assistant: ", return_tensors="pt")
    with torch.no_grad():
        return torch.log_softmax(judge._network(**inputs).logits[0, -1], dim=-1)


def test_first_token_is_the_models_own(judge):
    reply, = judge.ask([Question("Image 1 is better", PICTURES, max_tokens=1, top_logprobs=20)])
    expected = first_token_of(judge, "Image 1 is better", PICTURES)
    listed = reply.answer.first_token
    vocabulary = judge._processor.tokenizer.get_vocab()
    assert len(listed) == 16
    assert {word: pytest.approx(expected[vocabulary[word]].item(), abs=1e-5) for word in listed} == listed
    assert sum(math.exp(value) for value in listed.values()) == pytest.approx(1, abs=1e-5)
    assert reply.answer.text == max(listed, key=listed.get)


def test_a_longer_answer_has_the_same_first_token(judge):
    one, = judge.ask([Question("Image 1 is better", PICTURES, max_tokens=1, top_logprobs=20)])
    longer, = judge.ask([Question("Image 1 is better", PICTURES, max_tokens=4, top_logprobs=20)])
    assert longer.answer.first_token == pytest.approx(one.answer.first_token, abs=1e-5)
    assert longer.answer.text.startswith(one.answer.text)


def test_answers_depend_on_the_pictures_and_their_order(judge):
    ask = [judge.ask([Question("1 is better", pictures, 1, 20)])[0].answer.first_token["1"] for pictures in
           (PICTURES, PICTURES[::-1], PICTURES[:1])]
    assert len(set(ask)) == 3


def test_half_precision_is_the_same_judge(folder, judge):
    question = Question("Image 1 is better", PICTURES, 1, 20)
    half, = LocalModel(folder, device="cpu", dtype="bfloat16").ask([question])
    full, = judge.ask([question])
    assert half.answer.first_token == pytest.approx(full.answer.first_token, abs=0.05)


def test_a_repair_is_a_conversation(judge):
    reply, = judge.ask([Question("Image 1 is better", PICTURES, 3, exchanges=(("Yes", "1 or 2 .",),))])
    assert reply.answer.truncated
    assert reply.answer.first_token is None


def test_rewards_over_a_model_in_this_process(judge, folder):
    images = [Media("image", torch.full((3, 20, 30), level, dtype=torch.uint8)) for level in (0, 100, 200)]
    scores = WinRate(PairwiseJudge(judge, "verdict_token", both_orders=True)).score(images, [Prompt("better")] * 3, [0] * 3)
    assert scores.valid.all()
    assert scores.raw.sum().item() == pytest.approx(1.5)
    better = [{"text": "is better", "id": "better"}]
    rubric = RubricJudge({"folder": folder, "device": "cpu"}, better).score(images, [Prompt("a")] * 3, [0] * 3)
    assert rubric.valid.all()
    assert rubric.raw.std() > 0
    words = PointwiseJudge(judge).score(images[:1], [Prompt("a")], [0])
    assert words.reasons == ("truncated",)


def test_a_judge_that_says_one_thing_says_it_in_this_process_too(tmp_path):
    decided = LocalModel(str(make(tmp_path, verdict="Image 1 is better.")), device="cpu")
    images = [Media("image", torch.full((3, 20, 30), level, dtype=torch.uint8)) for level in (0, 200)]
    answer = PairwiseJudge(decided).compare(images, images[::-1], [Prompt("a")] * 2)
    assert answer.prob_first.tolist() == [1.0, 1.0]


def test_a_processor_without_a_chat_template(folder, tmp_path):
    for name in os.listdir(folder):
        if name != "chat_template.jinja":
            os.link(os.path.join(folder, name), tmp_path / name)
    with pytest.raises(ValueError, match="no chat template"):
        LocalModel(str(tmp_path))


def test_weights_that_are_missing_are_not_made_up(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "cut")
    weights = load_file(tmp_path / "cut" / "model.safetensors")
    save_file({name: tensor for name, tensor in weights.items() if "down_proj" not in name}, tmp_path / "cut" / "model.safetensors",
              {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 tensors of a LlavaFor.*down_proj"):
        LocalModel(str(tmp_path / "cut"))


@pytest.fixture(scope="module")
def served(folder, tmp_path_factory):
    with serving(folder, tmp_path_factory.mktemp("serve") / "log") as url:
        yield url


@pytest.mark.slow
def test_transformers_serve_answers_as_the_model_in_this_process_does(served, folder, judge, tmp_path):
    questions = [Question(text, pictures, 6) for text in ("Image 1 is better", "is 2 better ?") for pictures in (PICTURES, PICTURES[:1])]
    server = ChatServer(served, folder, cache_dir=tmp_path)
    assert [reply.answer for reply in server.ask(questions)] == [reply.answer for reply in judge.ask(questions)]
    assert [reply.attempts for reply in server.ask(questions)] == [0] * 4

    images = [Media("image", torch.full((3, 20, 30), level, dtype=torch.uint8)) for level in (0, 100)]
    words = WinRate(PairwiseJudge(server)).score(images, [Prompt("a")] * 2, [0, 0])
    assert words.reasons == ("truncated", "truncated")
    # This server accepts the request for log-probabilities and ignores it.
    with pytest.raises(ValueError, match="gave none"):
        PairwiseJudge(ChatServer(served, folder), "verdict_token").compare(images[:1], images[1:], [Prompt("a")])

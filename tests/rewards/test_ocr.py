"""Text accuracy: the formula by hand, targets from prompts, and rapidocr itself on rendered text where it is installed."""

import itertools
import sys

import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from visalign.rewards.framewise import FrameWise
from visalign.rewards.ocr import WrittenText, edit_distance, fold, target_text, text_accuracy
from visalign.types import Media, Prompt


@pytest.mark.parametrize(("first", "second", "distance"), [
    ("", "", 0), ("", "abc", 3), ("abc", "abc", 0), ("kitten", "sitting", 3), ("flaw", "lawn", 2), ("sale", "sail", 2), ("ab", "ba", 2)])
def test_edit_distance(first, second, distance):
    assert edit_distance(first, second) == edit_distance(second, first) == distance


def test_edit_distance_is_a_metric():
    words = ["".join(letters) for n in range(4) for letters in itertools.product("ab", repeat=n)]
    table = {(a, b): edit_distance(a, b) for a in words for b in words}
    assert all((distance == 0) is (a == b) for (a, b), distance in table.items())
    assert all(table[a, c] <= table[a, b] + table[b, c] for a in words for b in words for c in words)


@pytest.mark.parametrize(("recognised", "score"), [
    ("sale", 1.0), ("", 0.0), ("sole", 0.75), ("sal", 0.75), ("sold", 0.5), ("xxxx", 0.0), ("completely different", 0.0),
    ("bigsale", 1.0), ("sale" * 3, 1.0), ("sale" * 6, 0.5), ("sale" + "x" * 396, 0.03)])
def test_text_accuracy(recognised, score):
    assert text_accuracy("sale", recognised, 3.0) == pytest.approx(score)


def test_without_a_cap_a_page_of_text_is_worth_one():
    assert text_accuracy("sale", "sale" + "x" * 396, float("inf")) == 1


@pytest.mark.parametrize(("prompt", "target"), [
    (Prompt('a sign that says "Open Now"'), "Open Now"),
    (Prompt("a sign that says “Open” in red"), "Open"),
    (Prompt('a card with "Happy" and below it "Birthday"'), "Happy Birthday"),
    (Prompt('a "sign"', metadata={"target_text": "SALE"}), "SALE"),
    (Prompt("a sign", metadata={"target_text": ["BIG", "SALE"]}), "BIG SALE")])
def test_the_target_is_the_metadata_or_what_is_quoted(prompt, target):
    assert target_text(prompt) == target


@pytest.mark.parametrize("prompt", [Prompt("a sign that says open"), Prompt('a sign that says " "'), Prompt("it's a 'sign'"),
                                    Prompt('a "sign"', metadata={"target_text": " "}), Prompt("a", metadata={"target_text": [1]})])
def test_a_prompt_without_a_target_is_refused(prompt):
    with pytest.raises(ValueError, match=r'names no text to write; add .*"target_text"'):
        target_text(prompt)


def test_case_spaces_and_widths_do_not_count():
    assert fold(" Big\tSALE\n！") == fold("bigsale!") == "bigsale!"
    assert fold("STRASSE") == fold("straße")


def test_bad_settings_and_the_missing_package(monkeypatch):
    with pytest.raises(ValueError, match="must be at least 1"):
        WrittenText(max_length_ratio=0.5)
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    with pytest.raises(ValueError, match=r"pip install 'visalign\[ocr\]'"):
        WrittenText()


def written(*lines):
    image = Image.new("RGB", (224, 160), "white")
    for row, line in enumerate(lines):
        ImageDraw.Draw(image).text((20, 20 + 50 * row), line, fill="navy", font=ImageFont.load_default(32))
    return Media("image", torch.tensor(list(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3).permute(2, 0, 1))


def test_rapidocr_reads_rendered_text_offline():
    pytest.importorskip("rapidocr")
    pytest.importorskip("onnxruntime")
    reward = WrittenText()
    prompts = [Prompt('a sign that says "Hello World"')] * 4
    scores = reward.score([written("Hello World"), written("Hello", "World"), written("Hello Word"), written()], prompts, [0] * 4)
    torch.testing.assert_close(scores.raw, torch.tensor([1.0, 1.0, 0.9, 0.0]))
    assert scores.valid.all()
    assert scores.details["contained"].tolist() == [1, 1, 0, 0]
    torch.testing.assert_close(scores.details["length_ratio"], torch.tensor([1.0, 1.0, 0.9, 0.0]))
    with pytest.raises(ValueError, match="reward 'ocr', prompt 1: 'a sign' names no text"):
        reward.check_prompts([prompts[0], Prompt("a sign")])
    video = Media("video", torch.stack([written("Hello World").data, written("Hello Word").data, written().data]), rate=8.0)
    worst, mean = (FrameWise(reward, num_frames=3, reduce=how).score([video], prompts[:1], [0]) for how in ("min", "mean"))
    assert worst.raw.tolist() == [0.0]
    torch.testing.assert_close(mean.raw, torch.tensor([1.9 / 3]))

"""Counts, colours, positions: the terms by hand, requests that cannot be judged, and real detectors with weights set to a known answer."""

import math

import pytest
import torch
from transformers import (
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessor,
    SwinConfig,
    YolosForObjectDetection,
    YolosImageProcessor,
)

from tests.rewards.tiny_detector import make
from visalign import playground
from visalign.protocols import Reward
from visalign.rewards.detector import COLORS, DetectedObjects, by_class, crop_box, judge, parse_request, relations
from visalign.rewards.detectors import Detection, Detector, _box
from visalign.scoring import admit
from visalign.types import Media, Prompt

CLIP = str(playground.clip_path())


def at(x, y, label="dog", score=0.9, size=10.0):
    return Detection(label, score, (x - size / 2, y - size / 2, x + size / 2, y + size / 2))


def terms(include, detections, exclude=(), colors=None, counts="exact"):
    return judge(parse_request({"include": include, "exclude": list(exclude)}), by_class(detections), colors or {}, counts)


@pytest.mark.parametrize(("found", "exact", "at_least"), [
    (0, 0.0, 0.0), (1, 0.5, 0.5), (2, 1.0, 1.0), (3, 0.5, 1.0), (4, 0.0, 1.0), (16, 0.0, 1.0)])
def test_counts_never_leave_the_unit_interval(found, exact, at_least):
    detections = [at(20 * i, 0) for i in range(found)]
    for counts, expected in (("exact", exact), ("at_least", at_least)):
        assert terms([{"class": "dog", "count": 2}], detections, counts=counts)["count"] == [expected]


def test_at_most_sixteen_objects_of_a_class_the_most_confident_first():
    found = by_class([at(i, 0, score=i / 20) for i in range(20)] + [at(0, 0, "cat", 0.4)])
    assert [one.score for one in found["dog"]] == [i / 20 for i in range(19, 3, -1)]
    assert len(found["cat"]) == 1


def test_colours_count_the_objects_that_have_them():
    dogs = [at(0, 0), at(20, 0), at(40, 0)]
    colors = dict(zip(dogs, ["red", "blue", "red"], strict=True))
    for color, expected in (("red", 1.0), ("blue", 0.5), ("green", 0.0)):
        assert terms([{"class": "dog", "count": 2, "color": color}], dogs, colors=colors)["color"] == [expected]


@pytest.mark.parametrize(("x", "y", "expected"), [
    (-30, 0, {"left of"}), (30, 0, {"right of"}), (0, -30, {"above"}), (0, 30, {"below"}), (30, 30, {"right of", "below"}),
    (-30, 30, {"left of", "below"}), (30, 10, {"right of"}), (1, 1, set()), (0, 0, set()),
    # Boxes of 10 take 2 pixels off the offset, and more than half of its length must remain.
    (3.9, 0, set()), (4.1, 0, {"right of"})])
def test_relations_of_boxes(x, y, expected):
    assert relations(at(50 + x, 50 + y), at(50, 50)) == expected
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    assert relations(at(50, 50), at(50 + x, 50 + y)) == {opposite[name] for name in expected}


def test_a_failed_position_is_zero_and_pairs_are_averaged():
    include = [{"class": "cat"}, {"class": "dog", "position": ["left of", 0]}]
    assert terms(include, [at(0, 0), at(50, 0, "cat")])["position"] == [1.0]
    assert terms(include, [at(90, 0), at(50, 0, "cat")])["position"] == [0.0]
    assert terms(include, [at(0, 0)])["position"] == [0.0]  # nothing to be left of
    include[1]["count"] = 2
    assert terms(include, [at(0, 0), at(90, 0), at(50, 0, "cat")])["position"] == [0.5]


def test_only_as_many_objects_as_are_wanted_are_placed_the_most_confident_first():
    sure, unsure, cat = at(0, 0, score=0.9), at(90, 0, score=0.5), at(50, 0, "cat")
    include = [{"class": "cat"}, {"class": "dog", "position": ["left of", 0]}]
    assert terms(include, [unsure, sure, cat])["position"] == [1.0]


def test_only_objects_of_the_colour_are_placed():
    red, blue, cat = at(0, 0), at(90, 0), at(50, 0, "cat")
    include = [{"class": "cat"}, {"class": "dog", "color": "blue", "position": ["right of", 0]}]
    assert terms(include, [red, blue, cat], colors={red: "red", blue: "blue"})["position"] == [1.0]


def test_what_must_not_be_there():
    three = [at(20 * i, 0) for i in range(3)]
    assert terms([], three, exclude=[{"class": "dog", "count": 3}])["exclude"] == [0.0]
    assert terms([], three, exclude=[{"class": "dog", "count": 4}, {"class": "cat"}])["exclude"] == [1.0, 1.0]


@pytest.mark.parametrize(("request_", "problem"), [
    ({}, "nothing is asked for"),
    ({"include": [{"count": 1}]}, "expected {\"class\": \"dog\""),
    ({"include": [{"class": "dog", "count": 0}]}, "wants 0 of 'dog'; expected a whole number from 1 on"),
    ({"include": [{"class": "dog", "color": "reddish"}]}, "wants the colour 'reddish'; known: red, orange"),
    ({"include": [{"class": "dog", "position": ["beside", 0]}]}, "expected \\[\"left of\", 0\\]"),
    ({"include": [{"class": "dog", "position": ["above", 0]}]}, "refers to entry 0; expected another of the 1 included entries"),
    ({"include": [{"class": "dog", "position": ["above", 2]}, {"class": "cat"}]}, "refers to entry 2")])
def test_requests_that_are_not_of_the_form(request_, problem):
    with pytest.raises(ValueError, match=problem):
        parse_request(request_)


def test_crops_touch_at_least_one_pixel_and_stay_inside():
    image = torch.arange(3 * 6 * 8, dtype=torch.uint8).view(3, 6, 8)
    assert torch.equal(crop_box(image, (1.2, 2.0, 3.1, 4.5)), image[:, 2:5, 1:4])
    assert crop_box(image, (-5.0, -5.0, 100.0, 100.0)).shape == image.shape
    assert crop_box(image, (8.0, 6.0, 8.0, 6.0)).shape == (3, 1, 1)
    mask = torch.zeros(6, 8, dtype=torch.bool)
    mask[2:4, 5] = True
    assert _box(mask) == (5.0, 2.0, 6.0, 4.0)


@pytest.fixture(scope="module")
def yolos(tmp_path_factory):
    return make(tmp_path_factory.mktemp("yolos"))


def test_boxes_come_back_in_the_images_own_pixels(yolos):
    detector = Detector(str(yolos), device="cpu")
    assert detector.labels == ("cat", "dog")
    found = detector(torch.zeros(3, 100, 200, dtype=torch.uint8), 0.3)
    assert [one.label for one in found] == ["dog", "dog"]
    confidence = math.exp(5) / (math.exp(5) + 2)
    for one in found:
        assert one.score == pytest.approx(confidence, abs=1e-4)
        assert one.box == pytest.approx((50, 40, 150, 60), abs=0.01)
    assert detector(torch.zeros(3, 100, 200, dtype=torch.uint8), 0.99) == []


def test_counting_wants_more_confidence(yolos, tmp_path):
    """A detector that is 84 % sure: enough for an object, not for one of several."""
    model = YolosForObjectDetection.from_pretrained(yolos)
    with torch.no_grad():
        model.class_labels_classifier.layers[-1].bias[1] = math.log(2 * 0.84 / 0.16)
    model.save_pretrained(tmp_path)
    YolosImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    reward = DetectedObjects(str(tmp_path), clip=CLIP, device="cpu")
    include = [{"class": "dog", "count": 2}]
    prompts = [Prompt("a", metadata={"include": include}), Prompt("b", metadata={"include": include, "tag": "counting"})]
    assert reward.score([picture((255, 0, 0))] * 2, prompts, [0, 1]).raw.tolist() == [1.0, 0.0]


def test_pixels_reach_the_network_once_rescaled_and_in_their_own_order(yolos):
    detector, seen = Detector(str(yolos), device="cpu"), []
    detector.model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs["pixel_values"]), with_kwargs=True)
    levels = torch.tensor([255, 100, 0], dtype=torch.uint8)
    detector(levels[:, None, None].expand(3, 20, 20).contiguous(), 0.3)
    mean, std = torch.tensor(detector.processor.image_mean), torch.tensor(detector.processor.image_std)
    torch.testing.assert_close(seen[0][0].mean(dim=(1, 2)), (levels / 255 - mean) / std, rtol=1e-3, atol=1e-3)


def picture(color):
    image = torch.zeros(3, 48, 64, dtype=torch.uint8)
    image[:, 8:40, 8:56] = torch.tensor(color, dtype=torch.uint8)[:, None, None]
    return Media("image", image)


def test_an_image_is_scored_against_its_request(yolos):
    include = [{"class": "dog", "count": 2}, {"class": "cat", "count": 1}]
    prompts = [Prompt("a", metadata={"include": include}), Prompt("b", metadata={"include": include[:1]}),
               Prompt("c", metadata={"include": include[:1], "exclude": [{"class": "cat"}], "tag": "counting"})]
    soft, strict = (DetectedObjects(str(yolos), clip=CLIP, device="cpu", reward=kind) for kind in ("soft", "strict"))
    assert isinstance(soft, Reward)
    media = [picture((255, 0, 0))] * 3
    scores = soft.score(media, prompts, [0, 1, 2])
    assert scores.raw.tolist() == [0.5, 1.0, 1.0]
    assert scores.details["strict"].tolist() == strict.score(media, prompts, [0, 1, 2]).raw.tolist() == [0.0, 1.0, 1.0]
    assert scores.details["correct"].tolist() == [0.0, 1.0, 1.0]
    assert scores.details["position"].isnan().all()
    assert scores.details["exclude"].isnan().tolist() == [True, True, False]
    certain = DetectedObjects(str(yolos), clip=CLIP, device="cpu", threshold=0.99)
    assert certain.score(media, prompts, [0, 1, 2]).raw.tolist() == [0.0, 0.0, 0.5]  # nothing is found, so no cat either


def test_genevals_verdict_allows_more_objects_and_stands_beside_the_strict_one_whatever_counts_says(yolos):
    """The detector finds two dogs; one is asked for, with and without "not two"."""
    one = [{"class": "dog", "count": 1}]
    prompts = [Prompt("a", metadata={"include": one}), Prompt("b", metadata={"include": one, "exclude": [{"class": "dog", "count": 2}]})]
    for counts, strict in (("exact", [0.0, 0.0]), ("at_least", [1.0, 0.0])):
        scores = DetectedObjects(str(yolos), clip=CLIP, device="cpu", counts=counts).score([picture((255, 0, 0))] * 2, prompts, [0, 1])
        assert scores.details["correct"].tolist() == [1.0, 0.0]
        assert scores.details["strict"].tolist() == strict


def test_the_colour_is_the_nearest_description_of_the_object_without_its_background(yolos, monkeypatch):
    reward, shown = DetectedObjects(str(yolos), clip=CLIP, device="cpu"), []
    embed = reward.encoder.images
    monkeypatch.setattr(reward.encoder, "images", lambda pictures: shown.extend(pictures) or embed(pictures))
    image = torch.randint(0, 256, (3, 40, 40), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    y, x = torch.meshgrid(torch.arange(40), torch.arange(40), indexing="ij")
    mask = ((x - 16) ** 2 + (y - 16) ** 2) < 100
    texts = {color: [f"a photo of a {color} dog", f"a photo of a {color}-colored dog", f"a photo of a {color} object"] for color in COLORS}
    names = torch.stack([reward.encoder.texts(of).mean(dim=0) for of in texts.values()])
    for kept, whole in ((mask, image * mask + 153 * ~mask), (None, image)):
        cut = whole[:, 6:26, 6:26].to(torch.uint8)
        seen = reward._color(image, Detection("dog", 0.9, (6.0, 6.0, 26.0, 26.0), kept))
        assert torch.equal(shown[-1], cut)
        assert seen == COLORS[int(torch.nn.functional.cosine_similarity(names, embed([cut])).argmax())]


def test_requests_are_checked_against_the_detectors_classes(yolos):
    with pytest.raises(ValueError, match=r"prompt 0 \('a'\): the detector does not know 'dogs'; it knows dog, \.\.\."):
        admit({"r": DetectedObjects(str(yolos), clip=CLIP, device="cpu")}, [Prompt("a", metadata={"include": [{"class": "dogs"}]})])


def test_instance_masks_give_boxes_and_masks(tmp_path):
    torch.manual_seed(0)
    model = Mask2FormerForUniversalSegmentation(Mask2FormerConfig(
        backbone_config=SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=2,
                                   out_features=["stage1", "stage2", "stage3", "stage4"]),
        hidden_dim=32, feature_size=32, mask_feature_size=32, encoder_layers=1, decoder_layers=2, num_attention_heads=2, num_queries=3,
        dim_feedforward=16, encoder_feedforward_dim=16, id2label={0: "cat", 1: "dog"}, label2id={"cat": 0, "dog": 1}))
    with torch.no_grad():
        model.class_predictor.weight.zero_()
        model.class_predictor.bias.copy_(torch.tensor([0.0, 6.0, 0.0]))
    model.save_pretrained(tmp_path)
    Mask2FormerImageProcessor(size={"height": 64, "width": 64}).save_pretrained(tmp_path)
    detector = Detector(str(tmp_path), device="cpu")
    image = torch.randint(0, 256, (3, 40, 60), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    found = detector(image, 0.3)
    assert detector.segments
    assert found
    assert {one.label for one in found} == {"dog"}
    for one in found:
        assert one.mask.shape == (40, 60)
        assert one.box == _box(one.mask)
        assert 0.3 <= one.score <= 1


def test_what_is_no_detector_or_not_complete(yolos, tmp_path):
    model = YolosForObjectDetection.from_pretrained(yolos)
    state = {key: value for key, value in model.state_dict().items() if key != "class_labels_classifier.layers.2.weight"}
    model.save_pretrained(tmp_path / "cut", state_dict=state)
    with pytest.raises(ValueError, match=r"lacks 1 tensors of a Yolos.* \(the first is class_labels_classifier\.layers\.2\.weight"):
        Detector(str(tmp_path / "cut"))
    SwinConfig().save_pretrained(tmp_path / "swin")
    with pytest.raises(ValueError, match="is a swin; expected an object detector"):
        Detector(str(tmp_path / "swin"))
    with pytest.raises(ValueError, match="must be soft or strict"):
        DetectedObjects(str(yolos), clip=CLIP, reward="hard")

"""Published layouts, from tables and from JSON."""

import json

import pytest
import torch

from tests.preferences.judged import Encoder, picture
from visalign.preferences import (
    PreferenceDataset,
    PreferenceError,
    PreferenceRecord,
    cached_latents,
    load_latents,
    load_preferences,
    readers,
)
from visalign.preferences.candidates import MediaCell
from visalign.preferences.layouts import FORMATS, sniff
from visalign.types import Prompt


@pytest.fixture
def folder(tmp_path):
    for k in range(4):
        picture(tmp_path / f"{k}.png", seed=k)
    return tmp_path


def content(folder, k):
    return (folder / f"{k}.png").read_bytes()


def pick_a_pic(folder):
    """Six rows: first better, second better, a tie, no label, an empty prompt, an empty cell."""
    first, second = content(folder, 0), content(folder, 1)
    return {"caption": ["a", "b", "c", "d", " ", "f"], "jpg_0": [first] * 6, "jpg_1": [second] * 5 + [None],
            "label_0": [1.0, 0.0, 0.5, 0.0, 1.0, 1.0], "label_1": [0.0, 1.0, 0.5, 1.0, 0.0, 0.0],
            "has_label": [True, True, True, False, True, True], "user_id": [3, 4, 3, 3, 3, 3], "are_different": [True] * 6}


@pytest.fixture(params=["parquet file", "parquet folder", "arrow", "saved", "saved splits"])
def table(request, folder):
    datasets = pytest.importorskip("datasets")
    made, path = datasets.Dataset.from_dict(pick_a_pic(folder)), folder / "table"
    if request.param == "saved":
        made.save_to_disk(path)
    elif request.param == "saved splits":
        datasets.DatasetDict({"train": made, "test": made.select([0])}).save_to_disk(path)
    elif request.param == "arrow":
        made.save_to_disk(folder / "saved")
        path.mkdir()
        (folder / "saved" / "data-00000-of-00001.arrow").rename(path / "data.arrow")
    else:
        path.mkdir()
        made.to_parquet(path / "train-00000-of-00001.parquet")
        made.select([0]).to_parquet(path / "test-00000-of-00001.parquet")
        path = path / "train-00000-of-00001.parquet" if request.param == "parquet file" else path
    return path


def test_pick_a_pic_tables(folder, table):
    with pytest.raises(PreferenceError) as caught:
        load_preferences(table)
    assert [(p.row, p.fault) for p in caught.value.problems] == [(2, "tie"), (3, "judgement"), (4, "empty prompt")]
    found = load_preferences(table, ties="skip", broken="skip")
    assert [(r.row, r.prompt.text, r.scores, r.user) for r in found.records] == [
        (0, "a", (1, 0), "3"), (1, "b", (0, 1), "4"), (5, "f", (1, 0), "3")]
    assert found.dropped == {"tie": 1, "judgement": 1, "empty prompt": 1}
    assert found.records[1].candidates[1].read() == content(folder, 1)
    assert found.prompts[0].metadata == {"user": "3"}


def test_the_cells_are_encoded_and_an_empty_one_is_a_problem_of_its_row(folder, table):
    dataset, policy = load_preferences(table, ties="skip", broken="skip"), Encoder()
    with pytest.raises(PreferenceError, match="row 5: jpg_1: column jpg_1 is empty"):
        cached_latents(policy, dataset, folder / "cache", identity="test")
    cached = cached_latents(policy, dataset, folder / "cache", identity="test", broken="skip")
    assert [record.row for record in cached.dataset.records] == [0, 1]
    assert cached.dataset.dropped == {"tie": 1, "judgement": 1, "empty prompt": 1, "missing file": 1}
    assert policy.num_encoded == 2  # two pictures, each in two rows
    assert load_latents(cached.dataset.records[0].candidates).shape == (2, 3, 8, 8)


def test_image_features_are_read_as_their_bytes(folder):
    datasets = pytest.importorskip("datasets")
    files = [str(folder / "0.png"), str(folder / "1.png")]
    made = datasets.Dataset.from_dict({"prompt": ["a"], "image_1": files[:1], "image_2": files[1:], "overall_image": [2]})
    made = made.cast_column("image_1", datasets.Image()).cast_column("image_2", datasets.Image())
    made.save_to_disk(folder / "features")
    (record,) = load_preferences(folder / "features").records
    assert record.scores == (0, 1)
    assert [one.read() for one in record.candidates] == [content(folder, 0), content(folder, 1)]


def test_the_split_and_the_limit(folder):
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_dict(pick_a_pic(folder))
    datasets.DatasetDict({"train": made, "test": made.select([1])}).save_to_disk(folder / "splits")
    assert [record.prompt.text for record in load_preferences(folder / "splits", split="test").records] == ["b"]
    assert len(load_preferences(folder / "splits", limit=2)) == 2
    with pytest.raises(ValueError, match="no split 'validation'; it has train, test"):
        load_preferences(folder / "splits", split="validation")


def from_json(folder, *rows, **options):
    (folder / "data.json").write_text(json.dumps(list(rows)), encoding="utf-8")
    return load_preferences(folder / "data.json", **options)


@pytest.mark.parametrize(("row", "scores"), [
    ({"prompt": "a", "image_path": ["0.png", "1.png"], "human_preference": [0, 1], "user_hash": "u"}, (0, 1)),
    ({"prompt": "a", "file_path": ["0.png", "1.png", "2.png"], "human_preference": 2}, (0, 0, 1)),
    ({"prompt": "a", "image_path": ["0.png", "1.png", "2.png"], "rank": [2, 1, 3]}, (-2, -1, -3)),
    ({"prompt": "a", "path1": "0.png", "path2": "1.png", "confidence": 0.9, "choice_dist": [9, 1]}, (1, 0)),
    ({"prompt": "a", "image_1": "0.png", "image_2": "1.png", "overall_preference": 2}, (0, 1)),
    ({"prompt_text": "a", "image_1_path": "0.png", "image_2_path": "1.png", "better_id": "1"}, (1, 0)),
    ({"prompt": "a", "chosen": "0.png", "rejected": "1.png"}, (1, 0)),
])
def test_layouts_in_json(folder, row, scores):
    (record,) = from_json(folder, row).records
    assert record.scores == scores
    assert [one.path.name for one in record.candidates] == [f"{k}.png" for k in range(len(scores))]
    assert record.user == row.get("user_hash")


def test_media_relative_to_another_folder_and_missing_ones(folder):
    row = {"prompt": "a", "path1": "0.png", "path2": "1.png"}
    (folder / "elsewhere").mkdir()
    (folder / "elsewhere" / "data.json").write_text(json.dumps([row]), encoding="utf-8")
    assert len(load_preferences(folder / "elsewhere" / "data.json", folder=folder)) == 1
    with pytest.raises(PreferenceError, match=r"row 0: no such file: .*0\.png, .*1\.png"):
        load_preferences(folder / "elsewhere" / "data.json")


@pytest.mark.parametrize(("row", "message"), [
    ({"prompt": "a", "image_path": ["0.png", "1.png"], "human_preference": [1]}, "one number per candidate, 2"),
    ({"prompt": "a", "image_path": ["0.png", "1.png"], "human_preference": 2}, "chooses candidate 2 of 2, counted from 0"),
    ({"prompt": "a", "image_path": ["0.png", "1.png"], "human_preference": None}, "neither 'human_preference' nor 'rank'"),
    ({"prompt": "a", "image_1": "0.png", "image_2": "1.png", "overall_image": 3}, "1 or 2 for the better one, 0 for a tie, got 3"),
    ({"prompt": "a", "image_1": "0.png", "image_2": "1.png"}, "the row has none of better_id"),
])
def test_wrong_judgements(folder, row, message):
    with pytest.raises(PreferenceError, match="judgement") as caught:
        from_json(folder, row)
    assert message in str(caught.value)


def test_labels_that_contradict_each_other(folder):
    datasets = pytest.importorskip("datasets")
    columns = {name: values[:2] for name, values in pick_a_pic(folder).items()} | {"label_1": [1.0, 1.0]}
    datasets.Dataset.from_dict(columns).save_to_disk(folder / "table")
    with pytest.raises(PreferenceError, match="label_0 1 and label_1 1") as caught:
        load_preferences(folder / "table")
    assert len(caught.value.problems) == 1


def test_an_unknown_layout_says_what_is_known(folder):
    with pytest.raises(ValueError, match=r"no known layout has the columns text, left, right.*pickapic: caption"):
        from_json(folder, {"text": "a", "left": "0.png", "right": "1.png"})
    with pytest.raises(ValueError, match="expected a list of objects"):
        from_json(folder, 3)
    with pytest.raises(ValueError, match="not one usable row"):
        from_json(folder)
    (folder / "data.csv").write_text("a,b")
    with pytest.raises(ValueError, match="not a known kind of file"):
        load_preferences(folder / "data.csv")


def test_every_layout_recognises_itself():
    for name, layouts in FORMATS.items():
        for layout in layouts:
            columns = [*layout.signature, layout.columns[-1], "another"]
            assert sniff(columns) is sniff(columns, name) is layout
            assert all(sniff(columns, other) is None for other in FORMATS if other != name)


def test_a_named_format_is_not_guessed(folder):
    row = {"prompt": "a", "path1": "0.png", "path2": "1.png"}
    assert len(from_json(folder, row, format="hpd")) == 1
    with pytest.raises(ValueError, match=r"no known layout has the columns prompt, path1, path2\. Known are pickapic: caption, jpg_0"):
        from_json(folder, row, format="pickapic")


def test_an_unchanged_table_is_not_read_again(folder, table, monkeypatch):
    def encode():
        dataset = load_preferences(table, ties="skip", broken="skip")
        return cached_latents(Encoder(), dataset, folder / "cache", identity="test", broken="skip").dataset

    first, read = encode(), []
    original = readers._cell
    monkeypatch.setattr(readers, "_cell", lambda cells, row, column: read.append((row, column)) or original(cells, row, column))
    assert encode().records == first.records
    assert read == [(5, "jpg_1")]  # the empty cell, which is looked at again


def test_cells_that_cannot_be_told_apart_without_reading_are_read(tmp_path):
    for k in range(2):
        picture(tmp_path / f"{k}.png", seed=k)
    cells = tuple(MediaCell((tmp_path / f"{k}.png").read_bytes, f"cell {k}", ".png") for k in range(2))
    dataset = PreferenceDataset("cells", (PreferenceRecord(Prompt("a"), cells, (1.0, 0.0), 0),))
    for _ in range(2):
        cached = cached_latents(Encoder(), dataset, tmp_path / "cache", identity="test")
        assert not torch.equal(*load_latents(cached.dataset.records[0].candidates))

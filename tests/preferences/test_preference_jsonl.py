"""Our own format: every way to say who is better, and every way to get it wrong."""

import json

import pytest
import torch
from safetensors.torch import save_file

from tests.preferences.judged import pairs, picture, write
from visalign.preferences import PreferenceError, load_preferences, write_jsonl
from visalign.preferences.candidates import MediaFile, StoredLatent
from visalign.preferences.ratings import aspect_values, rated_aspects


@pytest.fixture
def folder(tmp_path):
    for name in "abc":
        picture(tmp_path / f"{name}.png", seed=ord(name))
    save_file({"latents": torch.arange(12.0).reshape(4, 3)}, tmp_path / "kept.safetensors")
    return tmp_path


def load(folder, *rows, **options):
    return load_preferences(write(folder / "data.jsonl", rows), **options)


def problems(folder, *rows, **options):
    with pytest.raises(PreferenceError) as caught:
        load(folder, *rows, **options)
    return caught.value


ROW = {"prompt": "a dog", "media": ["a.png", "b.png"]}


@pytest.mark.parametrize(("said", "scores"), [
    ({"scores": [0.2, 0.7]}, (0.2, 0.7)),
    ({"scores": [-3, -5]}, (-3, -5)),
    ({"ranking": [2, 1]}, (-2, -1)),
    ({"label": [1, 0]}, (1, 0)),
])
def test_scores_rankings_and_labels_are_all_larger_is_better(folder, said, scores):
    (record,) = load(folder, {**ROW, **said}).records
    assert record.scores == scores
    assert record.candidates == (MediaFile(folder / "a.png"), MediaFile(folder / "b.png"))


def test_chosen_and_rejected(folder):
    (record,) = load(folder, {"prompt": "a dog", "chosen": "b.png", "rejected": "a.png"}).records
    assert [one.path.name for one in record.candidates] == ["b.png", "a.png"]
    assert record.scores == (1, 0)


def test_user_weight_negative_prompt_and_further_keys_reach_the_prompt(folder):
    (record,) = load(folder, {**ROW, "label": [1, 0], "user": 7, "weight": 0.5, "negative_prompt": "blurry", "margin": 0.3}).records
    assert (record.user, record.weight, record.prompt.negative) == ("7", 0.5, "blurry")
    assert record.prompt.metadata == {"user": "7", "weight": 0.5, "margin": 0.3}


def test_lists_of_more_than_two(folder):
    found = load(folder, {"prompt": "a dog", "media": ["a.png", "b.png", "c.png"], "ranking": [2, 3, 1]})
    assert found.num_candidates == 3
    assert found.records[0].scores == (-2, -3, -1)
    assert not found.records[0].is_tie
    shared = load(folder, {"prompt": "a dog", "media": ["a.png", "b.png", "c.png"], "ranking": [1.5, 1.5, 3]})
    assert not shared.records[0].is_tie  # two of three are tied: still a judgement


def test_latents_of_one_file_and_of_several(folder):
    one = {"prompt": "a dog", "latents": "kept.safetensors", "rows": [3, 0], "scores": [1, 0]}
    several = {"prompt": "a dog", "latents": ["kept.safetensors", "kept.safetensors"], "scores": [1, 0]}
    found = load(folder, one, several)
    kept = folder / "kept.safetensors"
    assert found.records[0].candidates == (StoredLatent(kept, 3), StoredLatent(kept, 0))
    assert found.records[1].candidates == (StoredLatent(kept, 0), StoredLatent(kept, 0))


@pytest.mark.parametrize(("row", "fault", "message"), [
    ({**ROW, "prompt": " ", "label": [1, 0]}, "empty prompt", "the prompt is missing or empty"),
    ({"media": ["a.png", "b.png"], "label": [1, 0]}, "empty prompt", "the prompt is missing or empty"),
    ({**ROW, "media": ["a.png", "gone.png"], "label": [1, 0]}, "missing file", "gone.png"),
    ({**ROW, "media": ["a.png", "data.jsonl"], "label": [1, 0]}, "unreadable", "unknown suffix: data.jsonl"),
    ({**ROW, "label": [1, 0, 0]}, "judgement", "'label' needs one number per candidate, 2 of them"),
    ({**ROW, "scores": [1, None]}, "judgement", "'scores' needs finite numbers"),
    ({**ROW, "scores": [1, float("nan")]}, "judgement", "'scores' needs finite numbers"),
    ({**ROW, "ranking": [0, 1]}, "judgement", "places from 1 (the best) to 2"),
    ({**ROW}, "judgement", "needs exactly one of scores, ranking, label, found none"),
    ({**ROW, "label": [1, 0], "ranking": [1, 2]}, "judgement", "found ranking and label"),
    ({**ROW, "rankng": [1, 2]}, "format", "did you mean"),
    ({**ROW, "chosen": "a.png", "rejected": "b.png"}, "format", "needs 'media', or 'chosen' and 'rejected'"),
    ({"prompt": "a dog", "chosen": "a.png"}, "format", "expected the paths of the candidates"),
    ({"prompt": "a dog", "label": [1, 0]}, "format", "needs 'media', or 'chosen' and 'rejected', or 'latents'"),
    ({**ROW, "label": [1, 0], "weight": 0}, "format", "'weight' must be a number above 0"),
    ({"prompt": "a dog", "latents": "kept.pt", "rows": [0, 1], "label": [1, 0]}, "format", "safetensors"),
    ({"prompt": "a dog", "latents": "kept.safetensors", "label": [1, 0]}, "format", "'rows' must list"),
    ({"prompt": "a dog", "latents": "gone.safetensors", "rows": [0, 1], "label": [1, 0]}, "missing file", "gone.safetensors"),
    ({"prompt": "a dog", "latents": "kept.safetensors", "rows": [0, 1], "media": ["a.png"], "label": [1, 0]}, "candidates", "2 rows"),
    (["a dog"], "format", "expected an object, got list"),
])
def test_a_bad_row_is_reported_with_its_number(folder, row, fault, message):
    good = {**ROW, "label": [1, 0]}
    error = problems(folder, good, row, good)
    assert [(problem.row, problem.fault) for problem in error.problems] == [(1, fault)]
    assert message in str(error)
    assert "row 1: (line 2)" in str(error)
    assert "broken='skip'" in str(error)
    kept = load(folder, good, row, good, broken="skip")
    assert [record.row for record in kept.records] == [0, 2]
    assert kept.dropped == {fault: 1}


def test_lines_that_are_not_json_or_not_utf8_are_reported_too(folder):
    path = folder / "data.jsonl"
    path.write_bytes(b'{"prompt": \n\n{"prompt": "\xff"}\n')
    with pytest.raises(PreferenceError, match="not JSON") as caught:
        load_preferences(path)
    assert [str(problem)[:15] for problem in caught.value.problems] == ["row 0: (line 1)", "row 1: (line 3)"]


def test_all_problems_are_reported_at_once_and_counted(folder):
    bad = [{**ROW, "prompt": "", "label": [1, 0]}] * 18 + [{**ROW, "media": ["gone.png", "a.png"], "label": [1, 0]}] * 12
    error = problems(folder, *bad, {**ROW, "label": [0.5, 0.5]}, {**ROW, "label": [1, 0]})
    assert len(error.problems) == 31
    assert "31 rows" in str(error)
    assert "18 empty prompt, 12 missing file, 1 tie" in str(error)
    assert "row 19" in str(error)
    assert "row 20:" not in str(error)
    assert "... and 11 more" in str(error)


def test_ties_are_an_error_until_the_user_decides(folder):
    rows = [{**ROW, "label": [1, 0]}, {**ROW, "label": [0.5, 0.5]}]
    error = problems(folder, *rows)
    assert "row 1: a tie: 2 candidates with the score 0.5" in str(error)
    assert "ties='skip' leaves ties out, ties='keep' keeps them" in str(error)
    skipped, kept = load(folder, *rows, ties="skip"), load(folder, *rows, ties="keep")
    assert (len(skipped), skipped.dropped) == (1, {"tie": 1})
    assert (len(kept), kept.dropped) == (2, {})
    assert "1 of them ties" in kept.summary()
    assert "left out: 1 tie" in skipped.summary()


def test_broken_rows_do_not_hide_ties_and_ties_do_not_hide_broken_rows(folder):
    rows = [{**ROW, "label": [1, 0]}, {**ROW, "label": [0, 0]}, {**ROW, "label": [1]}]
    assert [p.fault for p in problems(folder, *rows, ties="skip").problems] == ["judgement"]
    assert [p.fault for p in problems(folder, *rows, broken="skip").problems] == ["tie"]
    assert load(folder, *rows, ties="skip", broken="skip").dropped == {"judgement": 1, "tie": 1}


def test_one_data_set_has_one_number_of_candidates(folder):
    three = {"prompt": "a dog", "media": ["a.png", "b.png", "c.png"], "ranking": [1, 2, 3]}
    error = problems(folder, {**ROW, "label": [1, 0]}, three, {**ROW, "label": [1, 0]})
    assert "row 1: 3 candidates where the other rows have 2" in str(error)


@pytest.mark.parametrize(("options", "message"), [
    ({"ties": "drop"}, "ties 'drop': use error, skip, keep"),
    ({"broken": "keep"}, "broken 'keep': use error, skip"),
    ({"limit": 0}, "limit must be at least 1"),
    ({"format": "parquet"}, "format 'parquet': use jsonl, pickapic"),
])
def test_wrong_options(folder, options, message):
    with pytest.raises(ValueError, match=message):
        load(folder, {**ROW, "label": [1, 0]}, **options)


def test_nothing_usable_is_an_error_even_if_everything_may_be_skipped(folder):
    with pytest.raises(ValueError, match=r"not one usable row \(1 judgement left out\)"):
        load(folder, {**ROW, "label": [1]}, broken="skip")
    with pytest.raises(ValueError, match="no such file"):
        load_preferences(folder / "gone.jsonl")


def test_the_limit_counts_rows(tmp_path):
    assert [record.row for record in load_preferences(pairs(tmp_path, 4), limit=2).records] == [0, 1]


def test_writing_and_reading_gives_the_same_data_set(folder):
    first = load(folder, {**ROW, "label": [1, 0], "user": "u", "weight": 0.5, "negative_prompt": "blurry", "images": ["c.png"], "tag": "x"},
                 {"prompt": "Ein Hündchen", "latents": "kept.safetensors", "rows": [3, 1], "scores": [0.25, -1.5]})
    write_jsonl(first, folder / "again.jsonl")
    again = load_preferences(folder / "again.jsonl")
    assert again.records == first.records
    assert "media" in json.loads((folder / "again.jsonl").read_text(encoding="utf-8").splitlines()[0])


def test_rows_with_latents_and_media_are_read_as_what_is_asked_for(folder):
    row = {"prompt": "x", "latents": "kept.safetensors", "rows": [3, 0], "media": ["a.png", "b.png"], "scores": [1, 0]}
    kept = folder / "kept.safetensors"
    assert load(folder, row).records[0].candidates == (StoredLatent(kept, 3), StoredLatent(kept, 0))
    assert load(folder, row, content="media").records[0].candidates == (MediaFile(folder / "a.png"), MediaFile(folder / "b.png"))
    alone = {key: value for key, value in row.items() if key != "media"}
    assert isinstance(load(folder, alone, content="media").records[0].candidates[0], StoredLatent)


def test_ratings_are_a_key_of_their_own_and_survive_a_round_trip(folder):
    ratings = {"colour": [0.5, None], "shape": [1, 0]}
    dataset = load(folder, {"prompt": "x", "media": ["a.png", "b.png"], "label": [1, 0], "ratings": ratings})
    assert rated_aspects(dataset.records[0]) == ratings
    assert aspect_values(dataset.records[0], "shape") == (1.0, 0.0)
    write_jsonl(dataset, folder / "again.jsonl")
    assert rated_aspects(load_preferences(folder / "again.jsonl").records[0]) == ratings

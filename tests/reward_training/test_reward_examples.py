"""Judgements as tensors: comparisons inside lists, ratings, and splits that keep a prompt on one side."""

import json
import math

import pytest
import torch

from tests.reward_training.worlds import colour_pairs, examples, plain
from visalign.preferences import PreferenceError, load_preferences
from visalign.preferences.ratings import aspect_values
from visalign.reward_training.config import RewardTrainingConfig
from visalign.reward_training.examples import build_corpus, prompt_key
from visalign.reward_training.splitting import hash_order, split, split_prompts


def write(folder, rows):
    for name in {name for row in rows for name in row.get("media", [])}:
        plain(folder / name.removesuffix(".png"), [0.5, 0.5, 0.5])
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return load_preferences(folder / "data.jsonl", ties="keep", content="media")


def config(path, **data):
    return RewardTrainingConfig(kind="reward", data={"path": str(path), **data}, encoder="some:thing")


class TestExamples:
    def test_lists_hold_every_comparison_once_with_a_share_of_the_weight(self):
        lists = examples(torch.tensor([[3.0, 1.0, 1.0]]), torch.tensor([[7, 8, 9]]), gold=torch.tensor([[0.0, 1.0, math.nan]]),
                         ratings=torch.arange(3.0).reshape(1, 3, 1))
        pairs = lists.pairs()
        assert pairs.media.tolist() == [[7, 8], [7, 9], [8, 9]]
        assert pairs.label.tolist() == [1, 1, 0]
        assert pairs.gold_label.tolist() == [-1, 0, 0]  # without a second opinion it says nothing
        assert pairs.ratings[..., 0].tolist() == [[0, 1], [0, 2], [1, 2]]
        torch.testing.assert_close(pairs.weight, torch.full((3,), 1 / 3))
        assert pairs.pairs() is pairs

    def test_equal_files_texts_and_prompts_are_one_row_each(self, tmp_path):
        data = write(tmp_path, [{"prompt": "A red  circle", "media": ["a.png", "b.png"], "scores": [1, 0], "weight": 2.0},
                                {"prompt": "a red circle", "media": ["b.png", "c.png"], "scores": [0, 0]},
                                {"prompt": "a dog", "media": ["c.png", "a.png"], "scores": [0, 1]}])
        corpus = build_corpus(data)
        assert [one.path.name for one in corpus.media] == ["a.png", "b.png", "c.png"]
        assert corpus.examples.media.tolist() == [[0, 1], [1, 2], [2, 0]]
        assert corpus.texts == ("A red  circle", "a red circle", "a dog")
        assert corpus.examples.text.tolist() == [0, 1, 2]
        assert corpus.examples.cluster.tolist() == [0, 0, 1]
        assert corpus.keys == ("a red circle", "a dog")
        assert corpus.examples.label.tolist() == [1, 0, -1]
        assert corpus.examples.weight.tolist() == [2, 1, 1]

    def test_ratings_and_recorded_rewards_are_found_by_aspect(self, tmp_path):
        pair = {"rewards": {"captions": [1.0, 0.5], "red": [9.0, 9.0]}}
        data = write(tmp_path, [{"prompt": "x", "media": ["a.png", "b.png"], "scores": [1, 0], "ratings": {"red": [0.25, None]},
                                 "metadata": {"pair": pair}},
                                {"prompt": "y", "media": ["a.png", "b.png"], "scores": [1, 0]}])
        corpus = build_corpus(data, ["red"], gold="captions")
        torch.testing.assert_close(corpus.examples.ratings[..., 0], torch.tensor([[0.25, math.nan], [math.nan, math.nan]]), equal_nan=True)
        torch.testing.assert_close(corpus.examples.gold, torch.tensor([[1.0, 0.5], [math.nan] * 2], dtype=torch.float64), equal_nan=True)

    @pytest.mark.parametrize("given", [[1.0], [1.0, "x"], "no", [1.0, float("inf")]])
    def test_ratings_that_are_none_are_reported_with_their_row_or_left_out(self, tmp_path, given):
        rows = [{"prompt": "x", "media": ["a.png", "b.png"], "scores": [1, 0], "ratings": {"red": [0, 1]}},
                {"prompt": "x", "media": ["a.png", "b.png"], "scores": [1, 0], "ratings": {"red": given}}]
        data = write(tmp_path, rows)
        with pytest.raises(PreferenceError, match="row 1: ratings of 'red'"):
            build_corpus(data, ["red"])
        assert build_corpus(data, ["red"], broken="skip").examples.ratings.squeeze(-1).tolist() == [[0, 1]]

    def test_data_without_what_is_needed_is_refused(self, tmp_path):
        data = write(tmp_path, [{"prompt": "x", "media": ["a.png", "b.png"], "scores": [1, 0], "ratings": {"red": [0, 1]}}])
        with pytest.raises(ValueError, match=r"no row has a rating 'blue'; there are red"):
            build_corpus(data, ["blue"])
        with pytest.raises(ValueError, match="no row has a rating 'verifier'"):
            build_corpus(data, gold="verifier")
        single = write(tmp_path, [{"prompt": "x", "media": ["a.png"], "scores": [1]}])
        with pytest.raises(ValueError, match="one candidate per row"):
            build_corpus(single)

    def test_rows_with_both_are_read_as_media_and_rows_with_latents_alone_refused(self, tmp_path):
        from visalign.preferences.stored import write_latents

        write_latents(tmp_path / "l.safetensors", torch.zeros(2, 3), None)
        both = {"prompt": "x", "media": ["a.png", "b.png"], "latents": "l.safetensors", "rows": [0, 1], "scores": [1, 0]}
        alone = {"prompt": "x", "latents": "l.safetensors", "rows": [0, 1], "scores": [1, 0]}
        data = write(tmp_path, [both, alone])
        assert len(load_preferences(tmp_path / "data.jsonl").records[0].candidates) == 2
        with pytest.raises(PreferenceError, match=r"row 1: .*is a latent; a reward is trained on media"):
            build_corpus(data)
        assert [one.path.name for one in build_corpus(data, broken="skip").media] == ["a.png", "b.png"]

    def test_aspect_values_of_an_unknown_aspect_are_nothing(self, tmp_path):
        record = write(tmp_path, [{"prompt": "x", "media": ["a.png", "b.png"], "scores": [1, 0]}]).records[0]
        assert all(math.isnan(value) for value in aspect_values(record, "red"))


class TestSplit:
    def test_no_prompt_is_on_two_sides_whatever_its_case_and_spacing(self, tmp_path):
        path = colour_pairs(tmp_path, num=80, num_prompts=20)
        lines = path.read_text(encoding="utf-8").splitlines()
        changed = [line.replace('"prompt": "', '"prompt": " ').replace(" number ", "  Number ") if k % 3 == 0 else line
                   for k, line in enumerate(lines)]
        path.write_text("\n".join(changed) + "\n", encoding="utf-8")
        corpus = build_corpus(load_preferences(path, content="media"))
        assert len(corpus.keys) == 20
        found = split(config(path, heldout=0.25, calibration=0.25), corpus, lists=False)
        sides = [set(part.cluster.tolist()) for part in (found.train, found.calibration, found.heldout)]
        assert [len(side) for side in sides] == [10, 5, 5]
        assert len(set.union(*sides)) == 20
        assert found.counts() == {name: {"judgements": 4 * n, "prompts": n} for name, n in
                                  (("train", 10), ("calibration", 5), ("heldout", 5))}

    def test_depends_on_the_texts_and_the_seed_and_not_on_their_order(self):
        keys = [f"prompt {k}" for k in range(50)]
        part = dict(zip(keys, split_prompts(keys, 0.2, 0.1, 0).tolist(), strict=True))
        other = keys[::-1]
        assert dict(zip(other, split_prompts(other, 0.2, 0.1, 0).tolist(), strict=True)) == part
        assert split_prompts(keys, 0.2, 0.1, 1).tolist() != list(part.values())
        assert [list(part.values()).count(k) for k in range(3)] == [35, 5, 10]

    def test_more_prompts_keep_the_order_of_the_old_ones(self):
        few = hash_order([f"{k}" for k in range(10)], 3)
        many = hash_order([f"{k}" for k in range(30)], 3)
        assert [row for row in many if row < 10] == few

    @pytest.mark.parametrize(("num", "calibration", "message"), [(1, 0.1, "1 distinct prompt cannot"), (2, 0.1, "data.calibration=0"),
                                                                 (1, 0.0, "more prompts are needed")])
    def test_too_few_prompts_are_refused(self, num, calibration, message):
        with pytest.raises(ValueError, match=message):
            split_prompts([f"{k}" for k in range(num)], 0.2, calibration, 0)
        assert split_prompts(["a", "b", "c"], 0.2, 0.1, 0).sort().values.tolist() == [0, 1, 2]

    def test_ties_alone_teach_nothing(self, tmp_path):
        rows = [{"prompt": f"{k}", "media": ["a.png", "b.png"], "scores": [1, 1]} for k in range(10)]
        corpus = build_corpus(write(tmp_path, rows))
        for ties in ("keep", "skip"):
            with pytest.raises(ValueError, match="none of the training judgements has a winner; nothing can be learnt from ties alone"):
                split(config(tmp_path, ties=ties), corpus, lists=False)

    def test_tied_comparisons_inside_lists_count_only_where_ties_are_kept(self, tmp_path):
        rows = [{"prompt": f"{k}", "media": ["a.png", "b.png", "c.png"], "scores": [1, 0, 0]} for k in range(10)]
        corpus = build_corpus(write(tmp_path, rows))
        assert len(split(config(tmp_path), corpus, lists=False).train) == 7 * 2
        assert len(split(config(tmp_path, ties="keep"), corpus, lists=False).train) == 7 * 3
        assert split(config(tmp_path), corpus, lists=True).train.media.shape == (7, 3)


def test_prompt_keys_ignore_case_and_spacing_alone():
    assert prompt_key("  A Red\tcircle ") == prompt_key("a red circle") != prompt_key("a red circles")

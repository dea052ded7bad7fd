"""Preferences out of scored groups: which, why not, and the folder they come from."""

import json
import math

import pytest

from visalign.credit import RewardTerm
from visalign.preferences.groups import GroupFolder, choose, scored_group
from visalign.rewards.function import FunctionReward
from visalign.types import Prompt, Scores


def term(name="r", weight=1.0, required=True):
    return RewardTerm(name, FunctionReward(lambda media, prompts: [0.0] * len(media), name=name), weight=weight, required=required)


def group(index, **values):
    """A group with these values by reward; ``None`` is invalid."""
    size = len(next(iter(values.values())))
    scores = {name: Scores.from_values(given, reason="parse") for name, given in values.items()}
    files = [f"media/{index}-{k}.png" for k in range(size)]
    return scored_group(index, Prompt(f"prompt {index}"), range(size), files, scores, [True] * size)


def chosen(found):
    rows = [json.loads(line) for line in found.lines]
    return [(row["metadata"]["pair"]["group"], tuple(row["rows"]), tuple(row["scores"])) for row in rows]


GROUP = group(0, r=[1.0, 4.0, 2.0, 2.0])


def test_best_against_worst():
    found = choose([GROUP], [term()])
    assert chosen(found) == [(0, (1, 0), (4.0, 1.0))]
    assert found.margins == (3.0,)


def test_all_pairs_leave_out_ties_and_take_the_largest_gaps_first():
    found = choose([GROUP], [term()], rule="all")
    assert [rows for _, rows, _ in chosen(found)] == [(1, 0), (1, 2), (1, 3), (2, 0), (3, 0)]
    assert found.margins == (3, 2, 2, 1, 1)
    assert [rows for _, rows, _ in chosen(choose([GROUP], [term()], rule="all", per_prompt=2))] == [(1, 0), (1, 2)]
    assert len(choose([GROUP], [term()], rule="all", margin=1.5).lines) == 3


def test_a_list_is_the_whole_group():
    found = choose([GROUP, group(1, r=[1.0, None, 2.0]), group(2, r=[1.0, 1.0])], [term()], rule="list")
    assert chosen(found) == [(0, (0, 1, 2, 3), (1.0, 4.0, 2.0, 2.0))]
    assert found.margins == (3.0,)
    assert found.without == {"invalid samples": 1, "ties": 1}


def test_a_negative_weight_turns_the_preference_around():
    assert chosen(choose([GROUP], [term(weight=-2.0)])) == [(0, (0, 1), (-2.0, -8.0))]


def test_groups_that_give_nothing_say_why():
    groups = [group(0, r=[1.0, 1.0]), group(1, r=[1.0, None]), group(2, r=[None, None]), group(3, r=[1.0, 1.5]), group(4, r=[1.0, 3.0])]
    found = choose(groups, [term()], margin=1.0)
    assert [index for index, _, _ in chosen(found)] == [4]
    assert found.without == {"ties": 1, "too few valid samples": 2, "below the margin": 1}
    assert found.invalid == {("r", "parse"): 3}


def test_an_invalid_sample_is_in_no_pair_and_has_no_number():
    found = choose([group(0, r=[None, 1.0, 2.0, float("nan"), 3.0])], [term()], rule="all")
    assert [rows for _, rows, _ in chosen(found)] == [(4, 1), (2, 1), (4, 2)]
    assert found.invalid == {("r", "parse"): 1, ("r", "nonfinite"): 1}


def test_samples_with_latents_that_are_not_finite_are_invalid_under_every_reward():
    made = scored_group(0, Prompt("a"), [1, 2], ["a.png", "b.png"], {"r": Scores.from_values([1.0, 2.0])}, [True, False])
    assert made.values == {"r": (1.0, None)}
    assert made.reasons == {"r": (None, "nonfinite latents")}


def test_several_rewards_are_summed_and_can_be_asked_to_agree():
    both = [term("a"), term("b", weight=10.0)]
    two = group(0, a=[3.0, 1.0, 2.0], b=[0.1, 0.2, 0.3])
    assert chosen(choose([two], both))[0][1:] == ((2, 1), (5.0, 3.0))  # sums 4, 3, 5
    unanimous = choose([two], both, rule="all", agreement="unanimous")
    assert [rows for _, rows, _ in chosen(unanimous)] == [(2, 1)]
    assert choose([group(0, a=[1.0, 2.0], b=[0.3, 0.1])], both, agreement="unanimous").without == {
        "rewards disagree or nothing was drawn": 1}


@pytest.mark.parametrize("rule", ["random", "rso"])
def test_rules_that_draw_depend_on_the_seed_and_the_group_alone(rule):
    groups = [group(k, r=[0.1 * j for j in range(8)]) for k in range(6)]
    settings = {"rule": rule, "temperature": 0.5}
    first = choose(groups, [term()], seed=1, **settings)
    assert choose(groups[:3], [term()], seed=1, **settings).lines == tuple(
        line for line in first.lines if json.loads(line)["metadata"]["pair"]["group"] < 3)
    assert choose(groups, [term()], seed=2, **settings).lines != first.lines
    assert len({rows for _, rows, _ in chosen(first)}) > 1


def test_wrong_options():
    with pytest.raises(ValueError, match="rule 'worst': use best_worst, random, all, rso, list"):
        choose([GROUP], [term()], rule="worst")
    with pytest.raises(ValueError, match="per_prompt must be at least 1"):
        choose([GROUP], [term()], per_prompt=0)
    with pytest.raises(ValueError, match="margin must be at least 0"):
        choose([], [term()], margin=-1.0)
    with pytest.raises(ValueError, match="agreement 'some': use combined, majority, unanimous"):
        choose([], [term()], agreement="some")


def test_the_folder_gives_back_what_was_appended(tmp_path):
    prompts = [Prompt("prompt 0"), Prompt("prompt 1")]
    folder = GroupFolder(tmp_path, {"seed": 0})
    groups = [group(0, r=[1.0, None]), group(1, r=[1 / 3, math.pi])]
    for one in groups:
        folder.append(one)
    assert GroupFolder(tmp_path, {"seed": 0}).read(prompts) == [
        scored_group(k, prompts[k], (0, 1), one.media, {"r": Scores.from_values(one.values["r"], reason="parse")}, [True, True])
        for k, one in enumerate(groups)]


def test_a_line_that_was_not_finished_is_cut_off(tmp_path):
    folder = GroupFolder(tmp_path, {"seed": 0})
    folder.append(group(0, r=[1.0, 2.0]))
    file = tmp_path / "groups.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole + whole[:40])
    assert len(folder.read([Prompt("prompt 0")])) == 1
    assert file.read_bytes() == whole


def test_other_settings_or_prompts_are_refused_and_more_prompts_are_not(tmp_path):
    folder = GroupFolder(tmp_path, {"seed": 0, "model": "a"})
    folder.append(group(0, r=[1.0, 2.0]))
    assert len(folder.read([Prompt("prompt 0"), Prompt("prompt 1")])) == 1
    with pytest.raises(ValueError, match="prompt 0 was 'prompt 0' there and is 'another' now"):
        folder.read([Prompt("another")])
    with pytest.raises(ValueError, match=r"other settings \(seed: 0 there, 1 now\)"):
        GroupFolder(tmp_path, {"seed": 1, "model": "a"})
    (tmp_path / "pairs.json").unlink()
    with pytest.raises(ValueError, match=r"holds samples but no pairs\.json"):
        GroupFolder(tmp_path, {"seed": 0, "model": "a"})
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "groups.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"holds samples but no pairs\.json"):
        GroupFolder(tmp_path / "new", {})


def test_a_damaged_line_is_named(tmp_path):
    folder = GroupFolder(tmp_path, {})
    folder.append(group(0, r=[1.0, 2.0]))
    (tmp_path / "groups.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"line 1: not a group"):
        folder.read([])

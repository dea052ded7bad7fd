"""Users as rewards: each sample by its user's, mixtures add up, failures stay masked."""

import pytest
import torch

from visalign import scoring
from visalign.plugins import load_reward
from visalign.rewards.by_user import ByUser
from visalign.rewards.function import FunctionReward
from visalign.types import Media, Prompt


def brightness(media, prompts):
    return [sample.data.float().mean().item() / 255 for sample in media]


def fails_in_the_dark(media, prompts):
    return [None if sample.data.max() == 0 else 1.0 for sample in media]


def shots(*levels):
    return [Media("image", torch.full((3, 4, 4), level, dtype=torch.uint8)) for level in levels]


def prompts(*users):
    return [Prompt("a field", metadata={} if user is None else {"user": user}) for user in users]


DAY, NIGHT = FunctionReward(brightness), FunctionReward(brightness, direction=-1)


def test_users_may_disagree_about_one_and_the_same_sample():
    reward = ByUser({"day": DAY, "night": NIGHT})
    media = shots(0, 255, 0, 255)
    found = scoring.score({"taste": reward}, media, prompts("day", "day", "night", "night"), [0, 0, 1, 1])["taste"]
    assert found.value.tolist() == [0.0, 1.0, 0.0, -1.0]
    assert torch.equal(found.raw, found.value)


def test_a_mixture_mixes_the_rewards_and_nobody_has_one_of_its_own():
    reward = ByUser({"day": DAY, "night": NIGHT}, nobody=FunctionReward(fails_in_the_dark))
    asked = prompts({"day": 0.25, "night": 0.75}, {"day": 1.0, "night": 0.0}, None, None)
    found = reward.score(shots(255, 255, 255, 0), asked, [0, 1, 2, 3])
    assert found.value[:3].tolist() == [-0.5, 1.0, 1.0]
    assert found.valid.tolist() == [True, True, True, False]
    assert found.reasons == (None, None, None, "no score")


def test_only_the_rewards_of_users_asked_for_are_computed():
    def broken(media, prompts):
        raise AssertionError("nobody asked")

    assert ByUser({"day": DAY, "other": FunctionReward(broken)}).score(shots(255), prompts("day"), [0]).value.tolist() == [1.0]


def test_group_rewards_see_their_own_groups_together():
    judge = load_reward("win_rate", judge={"reward": "bradley_terry", "pointwise": DAY, "scale": 1.0})
    reward = ByUser({"day": judge, "night": NIGHT})
    assert reward.spec.arity == "groupwise"
    found = reward.score(shots(0, 255, 10, 0), prompts("day", "day", "night", "night"), [0, 0, 1, 1])
    assert found.value[1] > 0.5 > found.value[0]


def test_a_prompt_file_is_checked_before_anything_is_generated():
    reward = ByUser({"day": DAY, "reader": FunctionReward(brightness, requires=["target_text"])})
    with pytest.raises(ValueError, match="metadata lacks 'user'"):
        scoring.admit({"taste": reward}, prompts("day", None))
    with pytest.raises(ValueError, match="no reward for dusk; there are rewards for day, reader"):
        scoring.admit({"taste": reward}, prompts("day", "dusk"))
    with pytest.raises(ValueError, match=r"prompt 1.*the reward of reader needs target_text"):
        scoring.admit({"taste": reward}, prompts("day", "reader"))


def test_wrong_users_are_refused():
    with pytest.raises(ValueError, match="at least one user"):
        ByUser({})
    with pytest.raises(ValueError, match="no common kind of media"):
        ByUser({"day": DAY, "ear": FunctionReward(brightness, modality=["audio"])})
    with pytest.raises(ValueError, match="gives no score per sample; wrap a judge of pairs with win_rate"):
        ByUser({"day": load_reward("bradley_terry", pointwise=DAY, scale=1.0)})

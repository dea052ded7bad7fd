"""Plain functions as rewards."""

import numpy as np
import pytest
import torch

from visalign.protocols import Reward
from visalign.rewards.function import FunctionReward
from visalign.types import Media, Prompt

MEDIA = [Media("image", torch.full((3, 2, 2), value, dtype=torch.uint8)) for value in (10, 20, 30)]
PROMPTS = [Prompt("a"), Prompt("b"), Prompt("c")]


def run(function, **options):
    return FunctionReward(function, **options).score(MEDIA, PROMPTS, [0, 0, 0])


def brightness(media, prompts):
    return [sample.data.float().mean().item() for sample in media]


def test_name_direction_and_values():
    reward = FunctionReward(brightness, direction=-1)
    assert isinstance(reward, Reward)
    assert reward.spec.name == "brightness"
    scores = reward.score(MEDIA, PROMPTS, [0, 0, 0])
    assert scores.raw.tolist() == [10, 20, 30]
    assert scores.value.tolist() == [-10, -20, -30]


@pytest.mark.parametrize("values", [[1, 2.0, True], (1, 2, 1), torch.tensor([1, 2, 1]), np.array([1.0, 2.0, 1.0]),
                                    [torch.tensor(1.0), np.float32(2), np.int64(1)]])
def test_accepted_number_types(values):
    assert run(lambda media, prompts: values).raw.tolist() == [1, 2, 1]


def test_none_and_nonfinite_become_invalid_and_never_a_number():
    scores = run(lambda media, prompts: [None, float("nan"), 1.5])
    assert scores.valid.tolist() == [False, False, True]
    assert scores.reasons == ("no score", "nonfinite", None)
    assert scores.raw[:2].isnan().all()
    assert scores.value[:2].isnan().all()


@pytest.mark.parametrize(("values", "error", "message"), [
    ([1.0], ValueError, r"reward 'judge' returned 1 values for 3 samples"),
    (0.5, ValueError, r"reward 'judge' returned float; expected a list"),
    ("abc", ValueError, r"reward 'judge' returned str; expected a list"),
    ([1.0, "2", 3.0], ValueError, r"reward 'judge' returned str for sample 1"),
    (torch.zeros(3, 2), ValueError, r"reward 'judge' returned list for sample 0"),
])
def test_anything_else_is_an_error_that_names_reward_and_row(values, error, message):
    with pytest.raises(error, match=message):
        run(lambda media, prompts: values, name="judge")


def test_bad_options():
    with pytest.raises(ValueError, match="direction 0 is neither"):
        FunctionReward(brightness, direction=0)
    with pytest.raises(ValueError, match=r'write \["image"\]'):
        FunctionReward(brightness, modality="image")

"""What a memory keeps: the newest rows, or a uniform sample that no batching and no resume changes."""

import itertools

import pytest
import torch

from visalign.rewards.memory import Memory


def rows(start, stop):
    return torch.arange(start, stop, dtype=torch.float64)[:, None]


def filled(keep="reservoir", seed=0, capacity=10, parts=(0, 40)):
    memory = Memory(capacity, keep, seed)
    for start, stop in itertools.pairwise(parts):
        memory.add(rows(start, stop))
    return memory


def test_the_newest_are_kept_in_order():
    memory = filled("newest", parts=(0, 4, 13, 15))
    assert memory.features.flatten().tolist() == list(range(5, 15))


def test_nothing_is_kept_without_capacity():
    memory = Memory(0)
    memory.add(rows(0, 5))
    assert memory.features is None
    assert memory.state_dict() == {}


def test_a_reservoir_is_the_same_for_any_batching():
    whole = filled()
    assert torch.equal(whole.features, filled(parts=(0, 3, 4, 29, 40)).features)
    assert not torch.equal(whole.features, filled(seed=1).features)
    assert whole.features.flatten().tolist() == sorted(set(whole.features.flatten().tolist()))


def test_every_row_is_kept_equally_often():
    """10 of 40 rows, 800 seeds: each is kept in a quarter of them, within 5 standard deviations; also the first and the last."""
    counts = torch.zeros(40)
    for seed in range(800):
        counts[filled(seed=seed).features.flatten().long()] += 1
    assert float((counts / 800 - 0.25).abs().max()) < 5 * (0.25 * 0.75 / 800) ** 0.5


@pytest.mark.parametrize("keep", ["newest", "reservoir"])
def test_a_checkpoint_continues_as_if_nothing_happened(keep):
    straight, first = filled(keep, parts=(0, 25, 40)), filled(keep, parts=(0, 25))
    resumed = Memory(10, keep)
    resumed.load_state_dict({name: tensor.clone() for name, tensor in first.state_dict().items()})
    resumed.add(rows(25, 40))
    assert torch.equal(resumed.features, straight.features)
    assert resumed.state_dict().keys() == straight.state_dict().keys()
    assert all(torch.equal(tensor, straight.state_dict()[name]) for name, tensor in resumed.state_dict().items())


def test_a_reservoir_forgets_what_an_unfilled_checkpoint_does_not_have():
    memory = filled()
    memory.load_state_dict({})
    assert memory.features is None
    memory.add(rows(0, 40))
    assert torch.equal(memory.features, filled().features)


def test_bad_input():
    with pytest.raises(ValueError, match="memory -1"):
        Memory(-1)
    with pytest.raises(ValueError, match="keep 'oldest'"):
        Memory(3, "oldest")
    with pytest.raises(ValueError, match="resume with keep: newest"):
        Memory(10, "reservoir").load_state_dict(filled("newest").state_dict())

"""Batch geometry: nothing is rewritten, every error names numbers that work, and updates share every group evenly."""

import pytest
import torch

from visalign.geometry import Geometry, assign_updates


def test_derived_numbers():
    shape = Geometry(groups=8, group_size=6, updates=3, microbatch=4, world=2)
    assert (shape.samples, shape.local_groups, shape.local_samples, shape.update_samples) == (48, 4, 24, 8)
    assert shape.describe()["micro-batches per update and stored step"] == 2


@pytest.mark.parametrize(("numbers", "message"), [
    ((6, 4, 1, 1, 4), r"groups 6 does not divide over 4 processes.*use 4 or 8 groups or \[1, 2, 3, 6\] processes"),
    ((2, 3, 4, 1, 1), r"updates 4 does not divide the 6 samples of a process \(2 groups x group_size 3 / .*use one of \[1, 2, 3, 6\]"),
    ((2, 6, 2, 4, 1), r"microbatch 4 does not divide the 6 samples a process has per update.*use one of \[1, 2, 3, 6\]"),
    ((2, 0, 1, 1, 1), r"group_size must be at least 1, got 0")])
def test_errors_teach(numbers, message):
    with pytest.raises(ValueError, match=message):
        Geometry(*numbers)


def permutations(groups, size):
    return torch.stack([torch.randperm(size, generator=torch.Generator().manual_seed(g)) for g in range(groups)])


@pytest.mark.parametrize(("groups", "size", "updates"), [(4, 6, 2), (4, 6, 3), (4, 3, 4), (2, 2, 4), (8, 9, 2)])
def test_updates_are_equal_shares_of_every_group(groups, size, updates):
    assigned = assign_updates(permutations(groups, size), updates)
    assert torch.bincount(assigned, minlength=updates).unique().numel() == 1
    per_group = torch.stack([torch.bincount(row, minlength=updates) for row in assigned.view(groups, size)])
    assert int(per_group.max() - per_group.min()) <= 1


@pytest.mark.parametrize("world", [2, 4])
def test_the_assignment_does_not_depend_on_the_number_of_processes(world):
    whole = permutations(4, 6)
    parts = [assign_updates(part, 3) for part in whole.chunk(world)]
    assert torch.equal(torch.cat(parts), assign_updates(whole, 3))
    for part in parts:
        assert torch.bincount(part, minlength=3).unique().numel() == 1

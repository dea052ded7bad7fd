"""Gathers found from probe digits, and rows of a batch."""

import pytest
import torch

from visalign.samplers.slots import (
    BASE,
    Gather,
    Rows,
    Unbatchable,
    decode_gather,
    digits,
    fill_in,
    find_rows,
    join_rows,
    leaves,
    split_rows,
)


@pytest.mark.parametrize("numel", [1, 31, 32, 33, 64, BASE**2, BASE**2 + 1, 5000])
def test_digits_name_every_position_exactly_once(numel):
    places = digits(numel)
    position = sum((digit - 1).long() * BASE**i for i, digit in enumerate(places))
    assert torch.equal(position, torch.arange(numel))
    assert all(float(d.min()) >= 1 and float(d.max()) <= BASE for d in places)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_rearrangement_with_condition_channels_is_recovered_through_rounding(dtype):
    generator = torch.Generator().manual_seed(0)
    numel, scale = 700, 0.37
    order = torch.randperm(numel, generator=generator)

    def pipeline(x):  # permute, scale, round to the model's dtype, append two condition channels
        moved = (scale * x[order]).to(dtype)
        return torch.cat([moved.reshape(7, 100), torch.full((2, 100), 5.0, dtype=dtype)])

    zero, one = pipeline(torch.zeros(numel)).double(), pipeline(torch.ones(numel)).double()
    dependent = one != zero
    measured = (one - zero)[dependent].median()
    gather = decode_gather([(pipeline(d).double() - zero) / measured for d in digits(numel)], dependent, numel)
    assert gather is not None
    assert not gather.covers
    assert not gather.identity
    assert torch.equal(gather.index[:7].flatten(), order)
    x = torch.randn(3, numel, generator=generator)
    background = torch.full((3, 9, 100), 5.0)
    out = gather(x, background)
    assert torch.equal(out[:, :7].flatten(1), x[:, order])
    assert torch.equal(out[:, 7:], background[:, 7:])


def test_mixed_elements_are_not_a_gather():
    numel = 128
    coded = [(d + d.roll(1)) / 2 for d in digits(numel)]
    found = decode_gather(coded, torch.ones(numel, dtype=torch.bool), numel)
    assert found is None or not torch.equal(found.index.sort().values, torch.arange(numel))


def test_gather_is_differentiable_and_its_gradient_is_the_transpose():
    gather = Gather(torch.tensor([[2, 0], [-1, 2]]), identity=False)
    x = torch.randn(1, 3, requires_grad=True)
    out = gather(x, torch.zeros(1, 2, 2))
    out.sum().backward()
    assert torch.equal(x.grad, torch.tensor([[1.0, 0.0, 2.0]]))


@pytest.mark.parametrize("order", ["chunk", "sample"])
@pytest.mark.parametrize("as_list", [False, True])
def test_join_and_split_rows_are_inverse_in_both_orders(order, as_list):
    rows = Rows(2, as_list)
    per_sample = [[torch.tensor([10.0 * b + c]) for c in range(2)] for b in range(3)]
    joined = split_rows(join_rows(per_sample, rows, order), Rows(6, as_list))
    values = [float(row) for row in joined]
    assert values == ([0, 10, 20, 1, 11, 21] if order == "chunk" else [0, 1, 10, 11, 20, 21])


def test_find_rows_sees_tensors_lists_and_nested_dicts_that_double():
    one = {"x": torch.zeros(2, 3), "ids": torch.zeros(5, 3), "more": {"caps": [torch.zeros(4)], "n": 7}, "flag": None}
    two = {"x": torch.zeros(4, 3), "ids": torch.zeros(5, 3), "more": {"caps": [torch.zeros(4), torch.zeros(9)], "n": 7}, "flag": None}
    assert find_rows(one, two) == {("x",): Rows(2, False), ("more", "caps"): Rows(1, True)}


@pytest.mark.parametrize("two", [torch.zeros(3, 3), torch.zeros(2, 6), torch.zeros(4, 4)])
def test_growth_that_is_not_by_rows_is_refused(two):
    with pytest.raises(Unbatchable, match=r"x: float32\[2, 3\] at batch 1"):
        find_rows({"x": torch.zeros(2, 3)}, {"x": two})
    with pytest.raises(Unbatchable, match="n: 1 at batch 1, 2 at batch 2"):
        find_rows({"n": 1}, {"n": 2})


def test_fill_in_replaces_leaves_and_keeps_structure():
    template = {"a": [1, (2, 3)], "b": {"c": 4}}
    assert dict(leaves(template)) == {("a", 0): 1, ("a", 1, 0): 2, ("a", 1, 1): 3, ("b", "c"): 4}
    assert fill_in(template, {("a", 1): "x", ("b", "c"): 5}) == {"a": [1, "x"], "b": {"c": 5}}

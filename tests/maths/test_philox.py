"""Philox against the published answers, and normals that are normal."""

import math

import pytest
import torch

from visalign.maths.philox import philox, philox_normal


def words(*values):
    return [torch.tensor(value, dtype=torch.int64) for value in values]


@pytest.mark.parametrize(("counter", "key", "answer"), [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0), (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1))])
def test_known_answers(counter, key, answer):
    """The vectors of Random123, its authors' implementation."""
    assert tuple(int(word) for word in philox(words(*counter), words(*key))) == answer


def test_an_element_depends_on_its_seed_and_position_alone():
    seeds = torch.tensor([7, 2**62 + 11, 7, 0])
    whole = philox_normal(seeds, (3, 5, 7))
    assert torch.equal(whole[0], whole[2])
    assert not torch.equal(whole[0], whole[1])
    assert torch.equal(whole[1:2], philox_normal(seeds[1:2], (3, 5, 7)))
    assert torch.equal(whole.flatten(1)[:, :50], philox_normal(seeds, (50,)))
    assert not torch.equal(whole[3], philox_normal(torch.tensor([2**32]), (3, 5, 7))[0])  # the high word of a seed counts


def test_moments_and_tails_of_four_million_normals():
    """Five standard errors; the share beyond three standard deviations is 0.0027."""
    z = philox_normal(torch.arange(4), (1_000_000,)).double()
    count = z.numel()
    assert z.mean().abs() < 5 / count**0.5
    assert (z.square().mean() - 1).abs() < 5 * (2 / count) ** 0.5
    assert (z.pow(3).mean()).abs() < 5 * (15 / count) ** 0.5
    assert (z.pow(4).mean() - 3).abs() < 5 * (96 / count) ** 0.5
    share = math.erfc(3 / 2**0.5)
    assert ((z.abs() > 3).double().mean() - share).abs() < 5 * (share / count) ** 0.5
    assert 4.5 < z.abs().max() < 6.8  # the smallest uniform is 2^-33


def test_neighbours_and_seeds_are_uncorrelated():
    z = philox_normal(torch.tensor([5, 6, 5 + 2**32]), (400_000,)).double()
    correlations = [(z[0, lag:] * z[0, : len(z[0]) - lag]).mean() for lag in (1, 2, 3, 4)]
    correlations += [(z[0] * z[k]).mean() for k in (1, 2)]
    assert max(abs(float(value)) for value in correlations) < 5 / 400_000**0.5

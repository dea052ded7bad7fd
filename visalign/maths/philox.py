"""Counter-based random numbers: Philox4x32-10, and normals made of them by the Box-Muller transform.

A number is a function of its key and its counter alone, so any processor can compute any element of a sample's noise without the others:

    key      = the sample's seed, 64 bits
    counter  = (block, 0, 0), block = element // 4 in 64 bits             four words per block, two pairs of normals
    z0, z1   = sqrt(-2 ln u) (cos, sin)(2 pi w / 2^32)                    of the words v, w of a pair
    u        = (v + 1/2) / 2^32, v and u rounded to float32               in (0, 1]

The words and u are exact everywhere. ``visalign/kernels/elements.h`` computes the same normals in float32 arithmetic of its own, equal bit
for bit on every device; they differ from those here, float64 rounded to float32, by at most 4 units in the last place.
Source: Salmon, Moraes, Dror & Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


def philox(counter: Sequence[Tensor], key: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds of Philox4x32: four words, int64 in [0, 2^32), of a counter of four and a key of two such words (broadcastable)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def philox_normal(seeds: Tensor, shape: Sequence[int]) -> Tensor:
    """N(0, I) of shape (len(seeds), *shape), float32, on the device of ``seeds``: row k depends on ``seeds[k]`` alone.

    Args:
        seeds: int64 (B,), such as `visalign.maths.seeds.derive_seed` gives.
    """
    num_dims = math.prod(shape)
    block = torch.arange((num_dims + 3) // 4, device=seeds.device)
    zero = torch.zeros((), dtype=torch.int64, device=seeds.device)
    key = (seeds.unsqueeze(1) & _MASK, (seeds.unsqueeze(1) >> 32) & _MASK)
    words = philox((block & _MASK, block >> 32, zero, zero), key)
    pairs = [_box_muller(words[0], words[1]), _box_muller(words[2], words[3])]
    normals = torch.stack([z for pair in pairs for z in pair], dim=-1).flatten(1)[:, :num_dims]
    return normals.reshape(len(seeds), *shape)


def _box_muller(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    uniform = ((first.float().double() + 0.5) / 2**32).float()
    radius = (-2 * uniform.double().log()).sqrt()
    angle = second.double() * (2 * math.pi / 2**32)
    return (radius * angle.cos()).float(), (radius * angle.sin()).float()


def _multiply(word: Tensor, constant: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a 64-bit product, in signed 64-bit integers: halves of ``word`` keep partial products below 2^48."""
    low_part, high_part = (word & 0xFFFF) * constant, (word >> 16) * constant
    high = (high_part + (low_part >> 16)) >> 16
    low = ((high_part << 16) + low_part) & _MASK
    return high, low

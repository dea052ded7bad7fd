"""What one member does to the distance of its set from a reference, to first order: one decomposition instead of one per member.

    IF_i = d/d eps D((1 - eps) G + eps delta_{g_i}) at eps = 0        > 0 where the member makes the distance larger, 0 on average
    D(G without i) - D(G)  =  -IF_i / (m - 1)  +  smaller terms       so that a credit is -IF_i

The smaller terms matter where IF_i itself is small: m = 400 samples in 8 dimensions give a correlation with the exact change above 0.9999
if the set is clearly another than its reference, and 0.996 if it is nearly the same.

Frechet distance, with A = I - T and T the optimal transport map from N(mu_g, S_g) to N(mu_r, S_r):

    IF_i = 2 (g_i - mu_g).(mu_g - mu_r) + (g_i - mu_g)^T A (g_i - mu_g) - tr(A S_g)
    T = S_r^{1/2} (S_r^{1/2} S_g S_r^{1/2})^{-1/2} S_r^{1/2} = F_r V Sigma^{-1} V^T F_r^T,    F_g^T F_r = U Sigma V^T,    S = F F^T

MMD^2: IF_i = 2 [ mean_{j != i} k(g_i, g_j) - mean_j k(g_i, r_j) ] minus its average over the set: repulsion from siblings, attraction to
the reference. Removing i takes it out of both slots of k(g, g'), hence the factor 2 on the repulsion; with a factor 1 the members'
credits sum to the distance, yet say little about removing one. Here the removal is exact at the same cost:

    D(G without i) - D(G) = -2/(m - 1) [ (s_i - (m - 1) U) / (m - 2)  -  (a_i - mean a) ],    s_i = sum_{j != i} k(g_i, g_j),  U = mean k

Sources: infinitesimal jackknife, Jaeckel 1972; the gradient of the Bures metric, Bhatia, Jain & Lim 2019.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from visalign.maths.frechet import Gaussian, Moments
from visalign.maths.mmd import KernelReference, KernelSet, KernelSums, kernel_sums, pair_sums


def frechet_influence(features: Tensor, moments: Moments, reference: Gaussian, shrinkage: float = 0.0) -> Tensor:
    """``IF_i`` of members of a set, float64 (n,).

    Args:
        features: the members asked about, (n, d); all or some of those in ``moments``.
        moments: of the whole set.
        reference: without shrinkage.
        shrinkage: added to the diagonal of both covariances.
    Raises:
        ValueError: the set spans as many dimensions as it has members, less one: each holds one of its own, and what removing it does is
            not small. Covariances that are singular for another reason (features that never vary) are no obstacle.
    """
    plain = moments.gaussian()
    if plain.factor.shape[1] >= moments.count - 1:
        raise ValueError(f"{moments.count} members span {plain.factor.shape[1]} dimensions: every one of them holds a dimension of its "
                         "own, and removing it is no small change; use leave_one_out, or more members than dimensions")
    ours, theirs = plain.shrunk(shrinkage), reference.shrunk(shrinkage)
    _, strength, directions = torch.linalg.svd(ours.factor.T @ theirs.factor, full_matrices=False)
    kept = strength > len(ours.mean) * torch.finfo(torch.float64).eps * max(strength.tolist(), default=0.0)
    towards = theirs.factor @ directions[kept].T / strength[kept].sqrt()  # T = towards towards^T
    offset = features.double() - moments.mean
    curvature = offset.square().sum(dim=1) - (offset @ towards).square().sum(dim=1)
    average = plain.covariance.trace() - ((plain.covariance @ towards) * towards).sum()
    return 2 * offset @ (moments.mean - reference.mean) + curvature - average


@dataclass(frozen=True)
class MemberSums:
    """Kernel sums of single members beside those of their set.

    Attributes:
        repulsion: ``sum_{j != i} k(g_i, g_j)`` over the set, (n,).
        attraction: ``mean_j k(g_i, r_j)`` over the reference, (n,).
        whole: of the set.
    """

    repulsion: Tensor
    attraction: Tensor
    whole: KernelSums


def member_sums(features: Tensor, reference: KernelReference, memory: KernelSet | None = None) -> MemberSums:
    """Of every row of (n, d), in the set of these rows and the memory's."""
    repulsion, attraction = pair_sums(features, reference.kernel), reference.attraction(features)
    pairs, total, count = float(repulsion.sum()), float(attraction.sum()), len(features)
    if memory is not None:
        across = kernel_sums(features, memory.features, reference.kernel)
        repulsion = repulsion + across
        pairs += 2 * float(across.sum()) + memory.sums.pairs
        total += memory.sums.attraction
        count += memory.sums.count
    return MemberSums(repulsion, attraction, KernelSums(count, pairs, total))


def mmd2_influence(sums: MemberSums) -> Tensor:
    """``IF_i`` of ``MMD^2_u``, (n,).

    Raises:
        ValueError: fewer than two members.
    """
    return 2 * _excess(sums, sums.whole.count - 1)


def mmd2_without_each(sums: MemberSums) -> Tensor:
    """``MMD^2_u(G without i) - MMD^2_u(G)``, exact, (n,).

    Raises:
        ValueError: fewer than three members.
    """
    return -2 * _excess(sums, sums.whole.count - 2) / (sums.whole.count - 1)


def _excess(sums: MemberSums, others: int) -> Tensor:
    """What a member adds to the set's similarity with itself and with the reference, less the average member."""
    whole = sums.whole
    if others < 1:
        raise ValueError(f"a set of {whole.count} is too small to ask what one member does to it")
    return (sums.repulsion - (whole.count - 1) * whole.pair_mean) / others - (sums.attraction - whole.attraction / whole.count)

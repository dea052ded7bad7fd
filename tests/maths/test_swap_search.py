"""D+ and D- from paired samples, against hand-made sets and all 2^n assignments; float64, seeds stated."""

import itertools

import pytest
import torch

from visalign.maths.diversity import cosine_vendi, unit_rows
from visalign.maths.frechet import Gaussian, Moments, frechet_distance
from visalign.maths.influence import member_sums, mmd2_without_each
from visalign.maths.mmd import GaussianKernel, KernelReference, KernelSet, PolynomialKernel, mmd2
from visalign.maths.set_objectives import FrechetObjective, KernelObjective, VendiObjective
from visalign.maths.swap_search import leave_one_out, swap_search


def column(*values):
    return torch.tensor(values, dtype=torch.float64)[:, None]


def features(n, d, seed=0):
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def kernel_reference(kernel):
    return KernelReference(features(30, 3, seed=7), kernel)


def take(first, second, result):
    return torch.where(result.first_is_positive[:, None], first, second)


STANDARD = Gaussian(torch.zeros(1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64))
D1, D2 = column(2, -0.2, 0.1, 0.3), column(1.2, -1, 0, -0.6)


def distance(x, reference=STANDARD, shrinkage=0.0):
    return frechet_distance(Moments.of(x).gaussian(shrinkage), reference.shrunk(shrinkage))


def best_of_all(first, second, reward):
    return max(reward(torch.stack([(first, second)[choice][i] for i, choice in enumerate(choices)]))
               for choices in itertools.product((0, 1), repeat=len(first)))


def test_the_example_needs_a_second_sweep():
    objective = FrechetObjective(STANDARD)
    assert distance(D1) == pytest.approx(0.302638, abs=1e-6)
    assert distance(D2) == pytest.approx(0.011667, abs=1e-6)
    one = swap_search(D1, D2, objective, start="first", sweeps=1)
    assert one.swaps == (0, 1, 2, 3)
    two = swap_search(D1, D2, objective, start="first")
    assert two.swaps == (0, 1, 2, 3, 2)
    assert take(D1, D2, two).flatten().tolist() == [1.2, -1, 0.1, -0.6]
    assert two.value == pytest.approx(-0.0069258, abs=1e-7)
    assert two.value == pytest.approx(best_of_all(D1, D2, lambda x: -distance(x)), abs=1e-12)
    assert two.start == pytest.approx(-0.302638, abs=1e-6)


def test_by_default_the_better_half_is_the_start():
    result = swap_search(D1, D2, FrechetObjective(STANDARD))
    assert result.start == pytest.approx(-0.011667, abs=1e-6)
    assert result.swaps == (2,)
    assert result.first_is_positive.tolist() == [False, False, True, False]
    assert result.value == pytest.approx(-0.0069258, abs=1e-7)


def test_choosing_sample_by_sample_is_worse():
    closest = torch.where(D1.abs() <= D2.abs(), D1, D2)
    assert closest.flatten().tolist() == [1.2, -0.2, 0, 0.3]
    assert distance(closest) == pytest.approx(0.251193, abs=1e-6)


@pytest.mark.parametrize("seed", range(6))
def test_a_converged_search_is_a_local_and_often_the_global_optimum(seed):
    first, second = features(7, 2, seed), features(7, 2, seed + 50)
    reference = Moments.of(features(200, 2, seed + 100)).gaussian()
    result = swap_search(first, second, FrechetObjective(reference), sweeps=20)
    chosen = take(first, second, result)
    assert result.sweeps < 20
    assert result.value == pytest.approx(-distance(chosen, reference), abs=1e-9)
    assert result.start <= result.value <= best_of_all(first, second, lambda x: -distance(x, reference)) + 1e-9
    for i in range(7):
        other = chosen.clone()
        other[i] = first[i] + second[i] - chosen[i]
        assert -distance(other, reference) <= result.value + 1e-9


def test_the_greedy_search_finds_most_of_what_brute_force_finds():
    gained = possible = 0.0
    for seed in range(20):
        first, second = features(4, 1, seed), features(4, 1, seed + 500)
        result = swap_search(first, second, FrechetObjective(STANDARD), sweeps=10)
        best = best_of_all(first, second, lambda x: -distance(x))
        assert result.value <= best + 1e-12
        gained, possible = gained + result.value - result.start, possible + best - result.start
    assert 0.8 * possible < gained < possible  # greedy: single swaps get stuck


@pytest.mark.parametrize("make", [lambda: FrechetObjective(Moments.of(features(30, 3, seed=7)).gaussian(), shrinkage=0.01),
                                  lambda: FrechetObjective(Moments.of(features(30, 3, seed=7)).gaussian(), Moments.of(features(9, 3, 8))),
                                  lambda: KernelObjective(kernel_reference(PolynomialKernel())),
                                  lambda: KernelObjective(kernel_reference(GaussianKernel(0.7)), features(9, 3, seed=8), scale=100.0),
                                  lambda: VendiObjective(), lambda: VendiObjective(features(9, 3, seed=8), q=2.0)])
def test_states_that_follow_swaps_equal_states_from_scratch(make):
    objective, members, pool = make(), unit_rows(features(6, 3, seed=9)), unit_rows(features(40, 3, seed=10))
    state = objective.state(members)
    for step, enter in enumerate(pool):
        leave = members[step % 6].clone()
        state = objective.swap(state, leave, enter)
        members[step % 6] = enter
        assert objective.value(state) == pytest.approx(objective.value(objective.state(members)), abs=1e-9)
    smaller = objective.remove(state, members[2])
    assert objective.value(smaller) == pytest.approx(objective.value(objective.state(torch.cat([members[:2], members[3:]]))), abs=1e-9)


def test_fewer_samples_than_dimensions():
    first, second = features(4, 10, seed=11), features(4, 10, seed=12)
    reference = Moments.of(features(50, 10, seed=13)).gaussian()
    result = swap_search(first, second, FrechetObjective(reference), sweeps=5)
    assert result.value == pytest.approx(-distance(take(first, second, result), reference), abs=1e-9)


def test_objectives_are_the_plain_metrics():
    x, reference = features(8, 3, seed=14), Moments.of(features(30, 3, seed=15)).gaussian()
    memory = features(20, 3, seed=16)
    with_memory = FrechetObjective(reference, Moments.of(memory), shrinkage=0.1)
    assert with_memory.value(with_memory.state(x)) == pytest.approx(-distance(torch.cat([x, memory]), reference, 0.1), abs=1e-9)
    reference = kernel_reference(GaussianKernel(2.0))
    for earlier, pooled in ((None, x), (memory, torch.cat([x, memory]))):
        kernel = KernelObjective(reference, earlier, scale=100.0)
        assert kernel.value(kernel.state(x)) == pytest.approx(-100 * mmd2(pooled, reference), rel=1e-9)
    vendi = VendiObjective(memory)
    assert vendi.value(vendi.state(unit_rows(x))) == pytest.approx(cosine_vendi(torch.cat([x, memory])), rel=1e-10)


def test_vendi_search_collects_different_members():
    a, b, c = torch.eye(3, dtype=torch.float64)
    # Prompt 0 offers two equal samples; the others offer "like prompt 0" or something new.
    first, second = torch.stack([a, a, a]), torch.stack([a, b, c])
    result = swap_search(first, second, VendiObjective(), start="first")
    assert result.first_is_positive.tolist() == [True, False, False]
    assert result.value == pytest.approx(3, rel=1e-9)


def test_leave_one_out_is_the_loss_without_a_member():
    x = unit_rows(features(6, 3, seed=17))
    credit = leave_one_out(x, VendiObjective())
    expected = [cosine_vendi(x) - cosine_vendi(torch.cat([x[:i], x[i + 1:]])) for i in range(6)]
    torch.testing.assert_close(credit, torch.tensor(expected, dtype=torch.float64), atol=1e-9, rtol=0)
    outlier = torch.cat([features(30, 2, seed=18), torch.full((1, 2), 9.0, dtype=torch.float64)])
    reference = Gaussian(torch.zeros(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64))
    credit = leave_one_out(outlier, FrechetObjective(reference))
    assert int(credit.argmin()) == 30
    assert credit[30] < 0


@pytest.mark.parametrize("kernel", [PolynomialKernel(), GaussianKernel(1.0)])
def test_a_kernel_search_ends_in_a_local_optimum(kernel):
    first, second, reference = features(7, 3, seed=30), features(7, 3, seed=31), kernel_reference(kernel)
    result = swap_search(first, second, KernelObjective(reference), sweeps=20)
    chosen = take(first, second, result)
    assert result.value == pytest.approx(-mmd2(chosen, reference), rel=1e-9)
    assert result.start <= result.value <= best_of_all(first, second, lambda x: -mmd2(x, reference)) + 1e-12
    for i in range(7):
        other = chosen.clone()
        other[i] = first[i] + second[i] - chosen[i]
        assert -mmd2(other, reference) <= result.value + 1e-9


@pytest.mark.parametrize("memory", [None, features(9, 3, seed=33)])
def test_leaving_kernel_members_out_one_by_one_equals_the_closed_form(memory):
    x, reference = features(12, 3, seed=32), kernel_reference(GaussianKernel(1.0))
    earlier = None if memory is None else KernelSet(memory, reference)
    one_by_one = leave_one_out(x, KernelObjective(reference, memory, scale=100.0))
    torch.testing.assert_close(one_by_one, 100 * mmd2_without_each(member_sums(x, reference, earlier)), atol=1e-11, rtol=1e-9)


def test_the_order_of_a_diversity_counts_in_leaving_out():
    """Two modes of 5 and 1: removing one of the five costs q = 1 and q = 2 differently; the score of every order is checked by hand."""
    x = unit_rows(torch.tensor([[1.0, 0.0]] * 5 + [[0.0, 1.0]]))
    for q in (0.5, 2.0, 5.0):
        def score(p, q=q):
            return sum(share**q for share in p) ** (1 / (1 - q))
        credit = leave_one_out(x, VendiObjective(q=q))
        expected = [score((5 / 6, 1 / 6)) - score((4 / 5, 1 / 5))] * 5 + [score((5 / 6, 1 / 6)) - 1]
        torch.testing.assert_close(credit, torch.tensor(expected, dtype=torch.float64), atol=1e-9, rtol=0)


def test_the_same_input_gives_the_same_sets_and_the_order_is_respected():
    first, second = features(12, 2, seed=19), features(12, 2, seed=20)
    objective = FrechetObjective(Moments.of(features(50, 2, seed=21)).gaussian())
    runs = [swap_search(first.clone(), second.clone(), objective, start="first") for _ in range(2)]
    assert runs[0].swaps == runs[1].swaps
    assert runs[0].value == runs[1].value
    order = list(range(11, -1, -1))
    backwards = swap_search(first.flip(0), second.flip(0), objective, start="first", order=order)
    assert [11 - i for i in backwards.swaps] == list(runs[0].swaps)


def test_equal_halves_are_left_alone():
    x = features(5, 2, seed=22)
    result = swap_search(x, x.clone(), FrechetObjective(Moments.of(features(9, 2, seed=23)).gaussian()))
    assert result.swaps == ()
    assert result.sweeps == 1
    assert result.first_is_positive.all()


def test_bad_input():
    objective = FrechetObjective(STANDARD)
    with pytest.raises(ValueError, match="only sets of equal size compare"):
        swap_search(D1, D2[:3], objective)
    with pytest.raises(ValueError, match="sweeps 0"):
        swap_search(D1, D2, objective, sweeps=0)
    with pytest.raises(ValueError, match=r"permutation of 0 \.\. 3"):
        swap_search(D1, D2, objective, order=[0, 1, 1, 2])
    with pytest.raises(ValueError, match="needs at least 2 features, got 1"):
        swap_search(D1[:1], D2[:1], objective)
    with pytest.raises(ValueError, match="rows of length 1"):
        swap_search(D1, D2, VendiObjective())
    kernel = KernelObjective(KernelReference(column(0, 1, 2), GaussianKernel(1.0)))
    with pytest.raises(ValueError, match="MMD needs at least 2 features, got 1"):
        swap_search(D1[:1], D2[:1], kernel)
    with pytest.raises(ValueError, match="no member of the set"):
        kernel.remove(kernel.state(D1), torch.tensor([17.0], dtype=torch.float64))
    with pytest.raises(ValueError, match="only member"):
        leave_one_out(column(1.0), VendiObjective())
